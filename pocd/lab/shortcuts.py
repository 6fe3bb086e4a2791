"""Shortcuts that a cheater may compute in place of the model (`pocd audit`); `cheater.py` predicts distances by them.

Every shortcut gives states of positions after the final norm, right or wrong, at a cost below the full pass's.
"""

from __future__ import annotations

import functools
import itertools
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from pocd.compute.transforms import join_of
from pocd.lab.few_bits import to_bits
from pocd.lab.linear import LinearMap
from pocd.protocol.schemes import SEGMENTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from pocd.compute.engine import BlockRun
    from pocd.compute.layers import Between
    from pocd.compute.model import Model

    Prepared = Callable[[], AbstractContextManager[BlockRun]]
    States = Callable[[BlockRun, Sequence[int]], torch.Tensor]

RANK_SHARE = 4  # the MLP's matrices keep one in so many of their ranks
BITS_OF_FULL = 16  # a multiplication of b bits is counted as b/16
PARTS = (("half", 1, 2), ("quarter", 1, 4), ("eighth", 1, 8), ("3/4", 3, 4))  # of the sequence


@dataclass(frozen=True, slots=True)
class Shortcut:
    """A cheaper computation than the full one, which tells something of a nonce.

    Attributes:
        name: Name in the report.
        cost: Multiply-adds of the model's layers, as a share of a full forward pass's.
        rest: Cost of then computing a predicted nonce in full, as a share of a full forward pass's.
        prepared: Context that gives the run for the shortcut: with other weights, or for another block.
        states: Computes the states of the positions `where` [B, ≤ S, H] from a run and nonces [B].
        where: Positions whose states the shortcut gives; the average is taken for the others.
        guess: How distances are guessed: "trained" on honest nonces; "as it is", by the readout of its states; or
            by the "size" of what is known of a product, which tells not how far but how sure.
        is_claimed: Whether a miner might claim the shortcut's distances, without computing anything in full.
    """

    name: str
    cost: float
    rest: float
    prepared: Prepared
    states: States
    where: slice = field(default_factory=lambda: slice(None))
    guess: Literal["trained", "as it is", "size"] = "trained"
    is_claimed: bool = False


@dataclass(frozen=True, slots=True)
class Known:
    """States of a block that the cheater keeps from nonces computed honestly.

    Attributes:
        nonces: Nonces whose states are kept.
        states: States of all positions after the final norm [nonces, S, H].
        average: Average of the states after the final norm over more nonces [S, H].
    """

    nonces: Sequence[int]
    states: torch.Tensor
    average: torch.Tensor


# Running a part of the model.


def run_states(
    run: BlockRun,
    embeddings: torch.Tensor,
    between: Mapping[int, Between] | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run the layers on embeddings [B, S, H]; see `LayerDecoder.states`."""
    join = join_of(run.scheme.layer_step, run.model.layers)
    return run.model.by_layers.states(embeddings, join, run.vectors, between=between or {}, positions=positions)


def batches(nonces: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Divide nonces into batches of `size`."""
    return (nonces[start : start + size] for start in range(0, len(nonces), size))


def _pass(entered: torch.Tensor, _left: torch.Tensor) -> torch.Tensor:
    return entered


# All of them.


def shortcuts(run: BlockRun, known: Known, previous: Prepared, batch_size: int) -> list[Shortcut]:
    """Return all shortcuts for a block.

    Args:
        run: The model, prepared for the block.
        known: States of the block that the cheater has kept.
        previous: Prepares the model for the block before it.
        batch_size: Nonces per forward pass, where the cheater trains stand-ins for layers.
    """
    cost = _Cost(run.model, run.seq_len)
    return [
        *_without_layers(run, known),
        *_with_few_layers(run, cost),
        *_with_linear_layers(run, known, cost, batch_size),
        *_with_few_positions(run, cost),
        *_with_other_weights(run, known, cost, batch_size),
        Shortcut("old transforms", 1, 1, previous, _whole(run)),
    ]


def _plainly(run: BlockRun) -> Prepared:
    return lambda: nullcontext(run)


def _whole(run: BlockRun, between: Mapping[int, Between] | None = None) -> States:
    """Return the function that computes states of all positions with a given run, from the block's own inputs."""
    return lambda acting, nonces: run_states(acting, run.inputs(nonces), between)


def _without_layers(run: BlockRun, known: Known) -> Iterator[Shortcut]:
    def constant(states: torch.Tensor) -> States:
        return lambda _, nonces: states.expand(len(nonces), -1, -1)

    plainly, layers = _plainly(run), range(run.model.layers)
    yield Shortcut("mean output", 0, 1, plainly, constant(known.average))
    yield Shortcut("another nonce's", 0, 1, plainly, constant(known.states[0]), guess="as it is")
    yield Shortcut("input embedding", 0, 1, plainly, _whole(run, dict.fromkeys(layers, _pass)))


def _with_few_layers(run: BlockRun, cost: _Cost) -> Iterator[Shortcut]:
    plainly, layers = _plainly(run), range(run.model.layers)
    for depth in layers[1:]:
        share = cost.of(layers=depth)
        passed = dict.fromkeys(layers[depth:], _pass)
        yield Shortcut(f"stop at layer {depth}", share, 1 - share, plainly, _whole(run, passed))
    if len(layers) > 1:
        for index in layers:
            share = cost.of(layers=len(layers) - 1)
            yield Shortcut(f"without layer {index + 1}", share, 1, plainly, _whole(run, {index: _pass}))
        passed = dict.fromkeys(layers[1::2], _pass)
        yield Shortcut("every 2nd layer", cost.of(layers=len(layers[::2])), 1, plainly, _whole(run, passed))


def _with_linear_layers(run: BlockRun, known: Known, cost: _Cost, batch_size: int) -> Iterator[Shortcut]:
    """Return shortcuts with linear maps in place of the first half of the layers, or of every other one."""
    layers = run.model.layers
    if layers > 1:
        for name, spans in (
            ("first half linear", [(0, layers // 2 - 1)]),
            ("every 2nd linear", _every_other(layers)),
        ):
            left_out = sum(last - first + 1 for first, last in spans)
            share = cost.of(layers=layers - left_out) + len(spans) * cost.of_linear()
            stand_ins = linear_layers(run, known.nonces, spans, batch_size)
            yield Shortcut(name, share, 1, _plainly(run), _whole(run, stand_ins))


def _every_other(layers: int) -> list[tuple[int, int]]:
    return [(index, index) for index in range(1, layers, 2)]


def linear_layers(
    run: BlockRun, nonces: Sequence[int], spans: Sequence[tuple[int, int]], batch_size: int
) -> dict[int, Between]:
    """Train a linear map in place of each span of layers (first, last), on the honest streams of some nonces."""
    between: dict[int, Between] = {}
    stand_ins: dict[int, Between] = {}
    for first, last in spans:
        entering: list[torch.Tensor] = []
        linear = LinearMap()

        def begin(entered: torch.Tensor, left: torch.Tensor, held: list[torch.Tensor] = entering) -> torch.Tensor:
            held[:] = [entered]
            return left

        def end(
            entered: torch.Tensor, left: torch.Tensor, held: list[torch.Tensor] = entering, to: LinearMap = linear
        ) -> torch.Tensor:
            to.add(held[0] if held else entered, left)
            return left

        def stand_in(entered: torch.Tensor, left: torch.Tensor, by: LinearMap = linear) -> torch.Tensor:
            return by(entered).to(left.dtype)

        if first < last:
            between[first] = begin
        between[last] = end
        stand_ins |= dict.fromkeys(range(first, last), _pass) | {last: stand_in}
    for batch in batches(nonces, batch_size):
        run_states(run, run.inputs(batch), between)
    return stand_ins


def _with_few_positions(run: BlockRun, cost: _Cost) -> Iterator[Shortcut]:
    length, plainly = run.seq_len, _plainly(run)

    def at(where: slice) -> States:
        positions = torch.arange(length, device=run.model.device)[where]
        return lambda acting, nonces: run_states(acting, run.inputs(nonces)[:, where], positions=positions)

    def apart(acting: BlockRun, nonces: Sequence[int]) -> torch.Tensor:
        return torch.cat([at(quarter)(acting, nonces) for quarter in quarters], dim=1)

    for name, numerator, denominator in PARTS:
        count = max(1, length * numerator // denominator)
        share, first, last = cost.of(positions=count), slice(0, count), slice(length - count, None)
        # The states of a prefix serve the full pass too, as no position looks ahead.
        yield Shortcut(f"first {name}", share, 1 - share, plainly, at(first), first)
        yield Shortcut(f"last {name}", share, 1, plainly, at(last), last)
        if run.scheme.reads == "segments" and count * SEGMENTS >= length:
            yield Shortcut(f"first {name}, size", share, 1 - share, plainly, at(first), first, guess="size")
    other = slice(1, None, 2)
    yield Shortcut("every 2nd position", cost.of(positions=length // 2), 1, plainly, at(other), other)
    bounds = [length * part // 4 for part in range(5)]
    quarters = [slice(*pair) for pair in itertools.pairwise(bounds)]
    share = sum(cost.of(positions=quarter.stop - quarter.start) for quarter in quarters)
    yield Shortcut("quarters apart", share, 1, plainly, apart)


def _with_other_weights(run: BlockRun, known: Known, cost: _Cost, batch_size: int) -> Iterator[Shortcut]:
    whole, reduced = _whole(run), cost.of_low_rank()
    for bits in (8, 4):
        rounding = functools.partial(replacing, run, functools.partial(_rounded, bits=bits))
        yield Shortcut(f"{bits}-bit weights", bits / BITS_OF_FULL, 1, rounding, whole, is_claimed=True)
    yield Shortcut("low-rank MLP", reduced, 1, functools.partial(replacing, run, _reduced), whole)
    # Two at once: a rounded pass is worth most, so whatever makes it cheaper is tried with it.
    eighth = 8 / BITS_OF_FULL
    rounding = functools.partial(replacing, run, functools.partial(_rounded, bits=8))
    yield Shortcut("8-bit, low-rank MLP", eighth * reduced, 1, functools.partial(replacing, run, _both), whole)
    if run.model.layers > 1:
        spans = _every_other(run.model.layers)
        share = eighth * (cost.of(layers=run.model.layers - len(spans)) + len(spans) * cost.of_linear())
        linear = _whole(run, linear_layers(run, known.nonces, spans, batch_size))
        yield Shortcut("8-bit, 2nd linear", share, 1, rounding, linear)


# What they cost.


class _Cost:
    """Counts multiply-adds of the layers: a matrix's elements for each position, and attention's two products per pair.

    Every layer is counted at every position, and every expert. Drawing the inputs and what follows the
    layers are left out: they are small, and nobody saves them.
    """

    def __init__(self, model: Model, seq_len: int) -> None:
        config = model.causal.config.get_text_config()
        heads: int = config.num_attention_heads
        self._head_width: int = heads * (getattr(config, "head_dim", None) or model.hidden_size // heads)
        self._matrices = list(_matrices(model))
        self._layers, self._seq_len, self._hidden_size = model.layers, seq_len, model.hidden_size

    def of(self, *, layers: int | None = None, positions: int | None = None) -> float:
        """Return the share of so many layers at so many positions."""
        share = 1.0 if layers is None else layers / self._layers
        return share * self._whole(positions or self._seq_len) / self._whole(self._seq_len)

    def _whole(self, positions: int) -> int:
        pairs = positions * (positions + 1) // 2
        elements = sum(matrix.numel() for _, matrix in self._matrices)
        return positions * elements + 2 * self._layers * self._head_width * pairs

    def of_linear(self) -> float:
        """Return the share of one linear map at all positions, from a state and the mean of those up to it."""
        return self._seq_len * 2 * self._hidden_size**2 / self._whole(self._seq_len)

    def of_low_rank(self) -> float:
        """Return the share that is left with the MLP's matrices as products of two thin ones."""
        saved = 0
        for name, matrix in self._matrices:
            if _is_mlp(name):
                rows, columns = matrix.shape[-2:]
                saved += matrix.numel() - matrix.numel() // (rows * columns) * _rank(matrix) * (rows + columns)
        return 1 - self._seq_len * saved / self._whole(self._seq_len)


def _matrices(model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    """Give every matrix of every layer [(experts,) rows, columns], with its name."""
    for layer in model.by_layers.layers:
        yield from ((name, weight) for name, weight in layer.named_parameters() if weight.ndim > 1)


# Other weights.


def _is_mlp(name: str) -> bool:
    return "mlp" in name


def _rounded(_name: str, weight: torch.Tensor, *, bits: int) -> torch.Tensor:
    return to_bits(weight, bits)


def _rank(weight: torch.Tensor) -> int:
    rows, columns = weight.shape[-2:]
    return max(1, min(rows, columns) // RANK_SHARE)


def _reduced(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Return the nearest matrix of rank `_rank`, for the MLP's matrices; others unchanged."""
    if not _is_mlp(name):
        return weight
    u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
    rank = _rank(weight)
    nearest: torch.Tensor = (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
    return nearest


def _both(name: str, weight: torch.Tensor) -> torch.Tensor:
    return _rounded(name, _reduced(name, weight), bits=8)


@contextmanager
def replacing(run: BlockRun, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Iterator[BlockRun]:
    """Replace the layers' matrices while the context lasts; afterwards they are as before, bit for bit."""
    saved: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for name, weight in _matrices(run.model):
            saved.append((weight, weight.to("cpu", copy=True)))
            weight.copy_(change(name, weight))
        yield run
    finally:
        for weight, values in saved:
            weight.copy_(values)
