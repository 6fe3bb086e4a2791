"""The cheater of `pocd audit`: runs shortcuts, trains on honest nonces, and predicts distances.

A shortcut's states are read by the scheme's own `readout` and `distance`, so a scheme with another readout is
attacked by the same code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from pocd.compute.memory import is_out_of_memory
from pocd.lab.audit_statistics import ridge
from pocd.lab.linear import LinearMap
from pocd.lab.shortcuts import Known, batches, run_states, shortcuts
from pocd.protocol.errors import NonFiniteError, OutOfMemoryError
from pocd.protocol.schemes import SEGMENTS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from pocd.compute.engine import BlockRun
    from pocd.lab.shortcuts import Prepared, Shortcut

    Floats = NDArray[np.float64]

KEPT_POSITIONS = 2**16  # whose honest states the cheater keeps to train on, over all its nonces


@dataclass(frozen=True, slots=True)
class Honest:
    """Results of the honest computation.

    Attributes:
        readouts: Unit vectors [nonces, H].
        distances: Distances [nonces].
        known: States that the cheater has kept.
    """

    readouts: Floats
    distances: Floats
    known: Known


@dataclass(frozen=True, slots=True)
class Predicted:
    """Distances that one shortcut predicts for the nonces that the cheater was not trained on.

    Attributes:
        distances: The cheater's best predictions from the shortcut [n].
        own: Distances by the shortcut's states alone, as if they were the honest ones [n].
    """

    distances: Floats
    own: Floats


@dataclass(frozen=True, slots=True)
class Attacked:
    """One block: its true distances [n], and the predictions of each shortcut."""

    shortcuts: list[Shortcut]
    predicted: list[Predicted]
    true: Floats


def _unit(readout: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(readout.double(), dim=-1)


def compute_honestly(run: BlockRun, nonces: Sequence[int], trained_on: int, batch_size: int) -> Honest:
    """Compute nonces in full; average the states of the first `trained_on`, and keep those of at most half of these."""
    readouts, distances, kept = [], [], list[torch.Tensor]()
    keep = max(1, min(trained_on // 2, KEPT_POSITIONS // run.seq_len))
    total = torch.zeros(run.seq_len, run.model.hidden_size, dtype=torch.float64, device=run.model.device)
    done = 0
    for batch in batches(nonces, batch_size):
        states = run_states(run, run.inputs(batch))
        total += states[: max(0, trained_on - done)].double().sum(dim=0)
        kept.append(states[: max(0, keep - done)].cpu())
        done += len(batch)
        readout = run.readout(states, batch)
        readouts.append(_unit(readout))
        distances.append(run.distance(readout, batch).double())
        if not distances[-1].isfinite().all():
            run.distances(batch, batch_size=batch_size)  # says where it begins
    known = Known(nonces[:keep], torch.cat(kept), (total / trained_on).to(run.model.dtype))
    return Honest(torch.cat(readouts).cpu().numpy(), torch.cat(distances).cpu().numpy(), known)


def predict(
    run: BlockRun, shortcut: Shortcut, honest: Honest, nonces: Sequence[int], trained_on: int, batch_size: int
) -> Predicted:
    """Predict the distances of the nonces after the first `trained_on`, which the cheater is trained on.

    There are three guesses: by the shortcut's own states; by the readout that a ridge regression makes of theirs; and
    by the states that a linear map makes of them, position by position. The cheater weighs them by another ridge
    regression, to true distances of nonces that neither was trained on.

    Raises:
        NonFiniteError: The shortcut gave NaN or infinity.
    """
    features, own, mapped = _observe(run, shortcut, honest.known, nonces, batch_size)
    if not np.isfinite(features).all():
        raise NonFiniteError(
            f"the shortcut {shortcut.name!r} gave NaN or infinity, though the honest pass did not; try another dtype"
        )
    if shortcut.guess != "trained":
        return Predicted(own[trained_on:], own[trained_on:])

    def guesses(known: int) -> Floats:
        weights, bias = ridge(features[:known], honest.readouts[:known])
        return np.stack([own, mapped, _guess(run, features @ weights + bias, nonces, batch_size)], axis=1)

    # Where the states are the honest ones, two guesses are the same but for rounding: plain least squares would
    # blow that up.
    half = trained_on // 2
    weighing, bias = ridge(guesses(half)[half:trained_on], honest.distances[half:trained_on, None])
    return Predicted((guesses(trained_on)[trained_on:] @ weighing + bias)[:, 0], own[trained_on:])


def _observe(
    run: BlockRun, shortcut: Shortcut, known: Known, nonces: Sequence[int], batch_size: int
) -> tuple[Floats, Floats, Floats]:
    """Run a shortcut, train a linear map on the states that the cheater knows, and apply it.

    Returns:
        Features for a regression [nonces, H or 2H]: the readout and, where the end is missing, the last state known.
        Distances by the shortcut's own states [nonces].
        Distances by the linear map of those states [nonces], valid for nonces that the map was not trained on.
    """
    features, own, mapped = list[torch.Tensor](), list[torch.Tensor](), list[torch.Tensor]()
    to_honest = LinearMap()
    with shortcut.prepared() as acting:
        for batch in (*batches(known.nonces, batch_size), *batches(nonces[len(known.nonces) :], batch_size)):
            states = shortcut.states(acting, batch)
            whole = _fill(known.average, shortcut.where, states)
            if shortcut.guess == "size":
                features.append(states[:, -1].double())
                own.append(-_size(run, whole, shortcut.where.stop, batch))
                continue
            readout = _unit(run.readout(whole, batch))
            has_end = shortcut.where.stop is None
            features.append(readout if has_end else torch.cat([readout, _unit(states[:, -1])], dim=-1))
            own.append(run.distance(readout.float(), batch).double())
            done = sum(map(len, mapped))
            if done < len(known.nonces):
                target = known.states[done : done + len(batch), shortcut.where].to(states.device)
                to_honest.add(states, target)
                mapped.append(own[-1])
            else:
                likeliest = _fill(known.average, shortcut.where, to_honest(states).to(states.dtype))
                mapped.append(run.distance(run.readout(likeliest, batch), batch).double())
    arrays = [torch.cat(parts).cpu().numpy() for parts in (features, own, mapped or own)]
    return arrays[0], arrays[1], arrays[2]


def _fill(average: torch.Tensor, where: slice, states: torch.Tensor) -> torch.Tensor:
    """Return states of all positions [B, S, H]: `states` at the positions `where`, the average elsewhere."""
    whole = average.expand(len(states), -1, -1).clone()
    whole[:, where] = states
    return whole


def _guess(run: BlockRun, readouts: Floats, nonces: Sequence[int], batch_size: int) -> Floats:
    """Return distances by guessed readouts [n, H].

    A readout that is known badly is short, as regression draws it to the mean. Its cosine to the
    target is scaled by its length, so that bold guesses come first only where they are well founded.
    """
    guesses = torch.from_numpy(readouts).to(run.model.device)
    cosines = [
        guess.norm(dim=-1) * (1 - run.distance(guess.float(), batch).double().square() / 2)
        for guess, batch in zip(guesses.split(batch_size), batches(nonces, batch_size), strict=True)
    ]
    return np.asarray((2 - 2 * torch.cat(cosines).clamp(-1, 1)).sqrt().cpu().numpy())


def _size(run: BlockRun, states: torch.Tensor, stop: int, nonces: Sequence[int]) -> torch.Tensor:
    """Return the variance of the cosine to the target, given the first factors of the product, float64 [B].

    The factors that are missing have signs that nobody knows, so the mean is 0; but where the known ones are large
    at the target's large coordinates, both very near and very far outputs are likelier.
    """
    product = run.factors(states, nonces)[:, : stop * SEGMENTS // run.seq_len].prod(dim=1).double()
    return (run.targets(nonces) * product).square().sum(dim=-1) / product.square().sum(dim=-1)


@torch.inference_mode()
def attack(
    run: BlockRun,
    previous: Prepared,
    nonces: Sequence[int],
    *,
    trained_on: int,
    batch_size: int,
    advance: Callable[[float], None],
) -> Attacked:
    """Predict the distances of nonces by every shortcut.

    Args:
        run: The model, prepared for the block.
        previous: Prepares the model for the block before.
        nonces: Distinct nonces.
        trained_on: Number of nonces, the first ones, whose honest distances the cheater knows.
        batch_size: Nonces per forward pass.
        advance: Called with the number of nonces' worth of work just done.

    Raises:
        OutOfMemoryError: A batch of this size does not fit.
        NonFiniteError: The model, or a shortcut, gave NaN or infinity.
    """
    try:
        honest = compute_honestly(run, nonces, trained_on, batch_size)
        tried = shortcuts(run, honest.known, previous, batch_size)
        passes = len(tried) + 1
        advance(len(nonces) / passes)
        predicted = []
        for shortcut in tried:
            predicted.append(predict(run, shortcut, honest, nonces, trained_on, batch_size))
            advance(len(nonces) / passes)
        return Attacked(tried, predicted, honest.distances[trained_on:])
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    raise OutOfMemoryError(
        f"a batch of {batch_size} × {run.seq_len} positions does not fit into the memory of {run.model.device}; "
        "give a smaller --batch-size"
    )
