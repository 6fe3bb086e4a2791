"""What a cheater may compute in place of the model, and what it tells of the distances (`pocd audit`).

Every shortcut gives states of the positions after the final norm, right or wrong. The scheme's own
`readout` of them is what the cheater has of a nonce, as it is, and made the likeliest honest readout by a
ridge regression that is trained on honest nonces of the block. The scheme's own `distance` does the rest. So a
scheme with another readout is attacked by the same code.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from pocd.audit_statistics import ridge
from pocd.compute.engine import is_out_of_memory
from pocd.compute.errors import NonFiniteError, OutOfMemoryError
from pocd.compute.transforms import JOIN

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from pocd.compute.engine import BlockRun
    from pocd.compute.model import Model

    Floats = NDArray[np.float64]

RANK_SHARE = 4  # the MLP's matrices keep one in so many of their ranks
BITS_OF_FULL = 16  # a multiplication of b bits is counted as b/16


@dataclass(frozen=True, slots=True)
class Shortcut:
    """One way to know something of a nonce for less.

    Attributes:
        name: What the report calls it.
        cost: Multiply-adds of the model's layers, as a share of a full forward pass's.
        rest: What a nonce that it has predicted costs when it is then computed in full.
        states: Who runs and nonces [B] in, states of positions `start` to `stop` out [B, stop − start, H].
        start: The first position that it has states of; the others are taken to be as on average.
        stop: The first that it has none of any more; None for the end.
        fitted: Whether the cheater is trained; else the shortcut's own readout is all there is.
        prepared: Gives who runs the shortcut, while its context lasts: with other weights, or for another block.
    """

    name: str
    cost: float
    rest: float
    prepared: Callable[[], AbstractContextManager[BlockRun]]
    states: Callable[[BlockRun, Sequence[int]], torch.Tensor]
    start: int = 0
    stop: int | None = None
    fitted: bool = True


@dataclass(frozen=True, slots=True)
class Honest:
    """What the honest computation gave.

    Attributes:
        readouts: Unit vectors [nonces, H].
        distances: [nonces].
        average: States after the final norm, averaged over the nonces that the cheater trains on [S, H].
        first: The first nonce's states [S, H].
    """

    readouts: Floats
    distances: Floats
    average: torch.Tensor
    first: torch.Tensor


# Running a part of the model.


def _states(run: BlockRun, embeddings: torch.Tensor, kept: Collection[int]) -> torch.Tensor:
    return run.model.by_layers.states(embeddings, JOIN[run.scheme.layer_step], run.vectors, kept=kept)


def _unit(readout: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(readout.double(), dim=-1)


def _batches(nonces: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (nonces[start : start + size] for start in range(0, len(nonces), size))


def compute_honestly(run: BlockRun, nonces: Sequence[int], trained_on: int, batch_size: int) -> Honest:
    """Compute nonces in full; the first `trained_on` of them are those whose states are averaged."""
    readouts, distances, first, left = [], [], None, trained_on
    total = torch.zeros(run.seq_len, run.model.hidden_size, dtype=torch.float64, device=run.model.device)
    for batch in _batches(nonces, batch_size):
        states = _states(run, run.inputs(batch), range(run.model.layers))
        first = states[0] if first is None else first
        total += states[:left].double().sum(dim=0)
        left = max(0, left - len(batch))
        readouts.append(_unit(run.readout(states, batch)))
        distances.append(run.distance(run.readout(states, batch), batch).double())
        if not distances[-1].isfinite().all():
            run.distances(batch, batch_size=batch_size)  # says where it begins
    assert first is not None, "there are nonces"
    average = (total / trained_on).to(first.dtype)
    return Honest(torch.cat(readouts).cpu().numpy(), torch.cat(distances).cpu().numpy(), average, first)


# The shortcuts.


def shortcuts(
    run: BlockRun, honest: Honest, previous: Callable[[], AbstractContextManager[BlockRun]]
) -> list[Shortcut]:
    """Return all shortcuts for a block; `previous` prepares the model for the block before it."""
    layers, length, cost = run.model.layers, run.seq_len, _Cost(run.model, run.seq_len)

    def plainly() -> AbstractContextManager[BlockRun]:
        return nullcontext(run)

    def constant(states: torch.Tensor) -> Callable[[BlockRun, Sequence[int]], torch.Tensor]:
        return lambda _, nonces: states.expand(len(nonces), -1, -1)

    def through(
        kept: Collection[int], start: int = 0, stop: int | None = None
    ) -> Callable[[BlockRun, Sequence[int]], torch.Tensor]:
        return lambda acting, nonces: _states(acting, run.inputs(nonces)[:, start:stop], kept)

    whole = through(range(layers))
    found = [
        Shortcut("mean output", 0, 1, plainly, constant(honest.average)),
        Shortcut("another nonce's", 0, 1, plainly, constant(honest.first), fitted=False),
        Shortcut("input embedding", 0, 1, plainly, through(())),
    ]
    for depth in range(1, layers):
        share = cost.of(layers=depth)
        found.append(Shortcut(f"stop at layer {depth}", share, 1 - share, plainly, through(range(depth))))
    if layers > 1:
        kept = range(0, layers, 2)
        found.append(Shortcut("every other layer", cost.of(layers=len(kept)), 1, plainly, through(kept)))
    for name, part in (("half", 2), ("quarter", 4), ("eighth", 8)):
        count = max(1, length // part)
        share = cost.of(positions=count)
        first, last = through(range(layers), 0, count), through(range(layers), length - count)
        # The states of a prefix serve the full pass too, as no position looks ahead.
        found.append(Shortcut(f"first {name}", share, 1 - share, plainly, first, stop=count))
        found.append(Shortcut(f"last {name}", share, 1, plainly, last, start=length - count))
    for bits in (8, 4):
        rounding = functools.partial(_replacing, run, functools.partial(_rounded, bits=bits), lambda _: True)
        found.append(Shortcut(f"{bits}-bit weights", bits / BITS_OF_FULL, 1, rounding, whole))
    reducing = functools.partial(_replacing, run, _of_low_rank, _is_mlp)
    found.append(Shortcut("low-rank MLP", cost.of_low_rank(), 1, reducing, whole))
    found.append(Shortcut("old transforms", 1, 1, previous, whole))
    return found


class _Cost:
    """Multiply-adds of the layers: a matrix's elements for each position, and two products of attention per pair.

    Every layer is counted at every position, and every expert. Drawing the inputs and what follows the
    layers are left out: they are small, and nobody saves them.
    """

    def __init__(self, model: Model, seq_len: int) -> None:
        config = model.causal.config.get_text_config()
        heads: int = config.num_attention_heads
        self._head_width: int = heads * (getattr(config, "head_dim", None) or model.hidden_size // heads)
        self._matrices = list(_matrices(model))
        self._layers, self._seq_len = model.layers, seq_len

    def of(self, *, layers: int | None = None, positions: int | None = None) -> float:
        """The share of so many layers at so many positions."""
        share = 1.0 if layers is None else layers / self._layers
        return share * self._whole(positions or self._seq_len) / self._whole(self._seq_len)

    def _whole(self, positions: int) -> int:
        pairs = positions * (positions + 1) // 2
        elements = sum(matrix.numel() for _, matrix in self._matrices)
        return positions * elements + 2 * self._layers * self._head_width * pairs

    def of_low_rank(self) -> float:
        """The share that is left with the MLP's matrices as products of two thin ones."""
        saved = 0
        for name, matrix in self._matrices:
            if _is_mlp(name):
                rows, columns = matrix.shape[-2:]
                saved += matrix.numel() - matrix.numel() // (rows * columns) * _rank(matrix) * (rows + columns)
        return 1 - self._seq_len * saved / self._whole(self._seq_len)


def _matrices(model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    """Every matrix of every layer [(experts,) rows, columns], with its name."""
    for layer in model.by_layers.layers:
        yield from ((name, weight) for name, weight in layer.named_parameters() if weight.ndim > 1)


def _is_mlp(name: str) -> bool:
    return "mlp" in name


def _rounded(weight: torch.Tensor, *, bits: int) -> torch.Tensor:
    """Round each row to whole multiples of its largest element / (2^(bits−1) − 1)."""
    step = weight.abs().amax(dim=-1, keepdim=True).float() / (2 ** (bits - 1) - 1)
    rounded: torch.Tensor = (weight.float() / step.clamp_min(torch.finfo(torch.float32).tiny)).round() * step
    return rounded


def _rank(weight: torch.Tensor) -> int:
    rows, columns = weight.shape[-2:]
    return max(1, min(rows, columns) // RANK_SHARE)


def _of_low_rank(weight: torch.Tensor) -> torch.Tensor:
    """The nearest matrix of `_rank`."""
    u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
    rank = _rank(weight)
    nearest: torch.Tensor = (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
    return nearest


@contextmanager
def _replacing(
    run: BlockRun, change: Callable[[torch.Tensor], torch.Tensor], concerns: Callable[[str], bool]
) -> Iterator[BlockRun]:
    """Replace the layers' matrices while the context lasts; afterwards they are as before, bit for bit."""
    saved: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for name, weight in _matrices(run.model):
            if concerns(name):
                saved.append((weight, weight.to("cpu", copy=True)))
                weight.copy_(change(weight))
        yield run
    finally:
        for weight, values in saved:
            weight.copy_(values)


# What they tell.


def _features(
    run: BlockRun, acting: BlockRun, shortcut: Shortcut, average: torch.Tensor, nonces: Sequence[int]
) -> torch.Tensor:
    """What the cheater has of nonces [B, H or 2H]: the readout and, where the end is missing, the last state known."""
    known = shortcut.states(acting, nonces)
    states = average.expand(len(nonces), -1, -1).clone()
    states[:, shortcut.start : shortcut.stop] = known
    readout = _unit(run.readout(states, nonces))
    return readout if shortcut.stop is None else torch.cat([readout, _unit(known[:, -1])], dim=-1)


def predict(
    run: BlockRun, shortcut: Shortcut, honest: Honest, nonces: Sequence[int], trained_on: int, batch_size: int
) -> Floats:
    """Return predicted distances of the nonces after the first `trained_on`, which the cheater is trained on.

    There are two guesses: by the shortcut's own readout, which needs no training, and by the regression's.
    A line through both is fitted to true distances that the regression has not seen.

    Raises:
        NonFiniteError: The shortcut gave NaN or infinity.
    """
    with shortcut.prepared() as acting:
        parts = [_features(run, acting, shortcut, honest.average, batch) for batch in _batches(nonces, batch_size)]
    features = torch.cat(parts).cpu().numpy()
    if not np.isfinite(features).all():
        raise NonFiniteError(
            f"the shortcut {shortcut.name!r} gave NaN or infinity, though the honest pass did not; try another dtype"
        )
    plain = _guess(run, features[:, : run.model.hidden_size], nonces, batch_size)
    if not shortcut.fitted:
        return plain[trained_on:]

    def regressed(known: int) -> Floats:
        weights, bias = ridge(features[:known], honest.readouts[:known])
        return _guess(run, features @ weights + bias, nonces, batch_size)

    half = trained_on // 2
    seen = np.stack([plain, regressed(half), np.ones(len(nonces))], axis=1)[half:trained_on]
    line = np.linalg.lstsq(seen, honest.distances[half:trained_on])[0]
    guesses = np.stack([plain, regressed(trained_on), np.ones(len(nonces))], axis=1)
    return np.asarray(guesses[trained_on:] @ line)


def _guess(run: BlockRun, readouts: Floats, nonces: Sequence[int], batch_size: int) -> Floats:
    """Distances by guessed readouts [n, H].

    A readout that is known badly is short, as regression draws it to the mean. Its cosine to the
    target is scaled by its length, so that bold guesses come first only where they are well founded.
    """
    guesses = torch.from_numpy(readouts).to(run.model.device)
    cosines = [
        guess.norm(dim=-1) * (1 - run.distance(guess.float(), batch).double().square() / 2)
        for guess, batch in zip(guesses.split(batch_size), _batches(nonces, batch_size), strict=True)
    ]
    return np.asarray((2 - 2 * torch.cat(cosines).clamp(-1, 1)).sqrt().cpu().numpy())


@dataclass(frozen=True, slots=True)
class Attacked:
    """One block: its distances [n], and what each shortcut predicts of them [shortcuts, n]."""

    shortcuts: list[Shortcut]
    predicted: Floats
    true: Floats


@torch.inference_mode()
def attack(
    run: BlockRun,
    previous: Callable[[], AbstractContextManager[BlockRun]],
    nonces: Sequence[int],
    *,
    trained_on: int,
    batch_size: int,
    advance: Callable[[float], None],
) -> Attacked:
    """Predict the distances of nonces by every shortcut.

    Args:
        run: The model, prepared for the block.
        previous: Prepares it for the block before.
        nonces: Distinct.
        trained_on: How many of them, the first, the cheater knows the honest distances of.
        batch_size: Nonces per forward pass.
        advance: Told how many nonces' worth of work has just been done.

    Raises:
        OutOfMemoryError: A batch of this size does not fit.
        NonFiniteError: The model, or a shortcut, gave NaN or infinity.
    """
    try:
        honest = compute_honestly(run, nonces, trained_on, batch_size)
        tried = shortcuts(run, honest, previous)
        passes = len(tried) + 1
        advance(len(nonces) / passes)
        predicted = []
        for shortcut in tried:
            predicted.append(predict(run, shortcut, honest, nonces, trained_on, batch_size))
            advance(len(nonces) / passes)
        return Attacked(tried, np.array(predicted), honest.distances[trained_on:])
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    raise OutOfMemoryError(
        f"a batch of {batch_size} × {run.seq_len} positions does not fit into the memory of {run.model.device}; "
        "give a smaller --batch-size"
    )
