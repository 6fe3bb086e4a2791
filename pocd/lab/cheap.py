"""Cheap ways of computing whose results a miner claims as honest ones (`pocd audit`), and how far off they are.

Beside the shortcuts of `shortcuts.py`: matrices, activations, keys and values of few bits. What hardware would do in
few bits is done here by rounding, so nothing is faster; the costs are those of hardware with twice the speed in 8 bits.
"""

from __future__ import annotations

import functools
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from pocd.compute.reference import reference_of
from pocd.lab.shortcuts import Known, Shortcut, batches, replacing, run_states, shortcuts
from pocd.protocol.vectors import rounding_variance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray
    from torch import nn

    from pocd.compute.engine import BlockRun
    from pocd.lab.shortcuts import Prepared

    Floats = NDArray[np.float64]
    Round = Callable[[torch.Tensor], torch.Tensor]

HONEST = "transformers' layers"  # the way that is no cheat, but rounds elsewhere
KEPT = 64  # nonces whose honest states the cheater keeps
GROUP = 64  # weights that share a scale, in 4 bits
LARGEST_FP8 = 448.0  # of float8_e4m3fn
# The 16 values of NF4 (Dettmers et al. 2023): quantiles of a normal distribution.
NF4 = (
    *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
)


@dataclass(frozen=True, slots=True)
class Claimed:
    """A way's results: the expected squared error of a number, by nonce.

    Attributes:
        name: Name of the way.
        cost: Cost of a nonce, as a share of a full forward pass.
        errors: Expected squared error of a number, [nonces]; infinity where the way gives NaN.
    """

    name: str
    cost: float
    errors: Floats


@dataclass(frozen=True, slots=True)
class Measured:
    """What all ways are off by, and what a validator is, over the nonces of a block.

    Attributes:
        own: Expected squared error of a number of the validator's own result, [nonces].
        blank: Expected squared difference of a number from that of a claim that holds nothing of its nonce.
        ways: All ways.
    """

    own: Floats
    blank: float
    ways: list[Claimed]


# Rounding to few bits; a row of a matrix, and a position of a state, has a scale of its own.


def to_int8(values: torch.Tensor) -> torch.Tensor:
    """Round each row to whole multiples of its largest element / 127."""
    step = values.abs().amax(dim=-1, keepdim=True).float().clamp_min(torch.finfo(torch.float32).tiny) / 127
    return ((values.float() / step).round() * step).to(values.dtype)


def to_fp8(values: torch.Tensor) -> torch.Tensor:
    """Round each row to FP8 (four bits of exponent, three of mantissa), scaled to its range."""
    scale = values.abs().amax(dim=-1, keepdim=True).float().clamp_min(torch.finfo(torch.float32).tiny) / LARGEST_FP8
    return ((values.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(values.dtype)


def to_nf4(values: torch.Tensor) -> torch.Tensor:
    """Round each group of up to `GROUP` weights to the values of NF4, scaled to its largest."""
    size = GROUP if values.shape[-1] % GROUP == 0 else values.shape[-1]
    groups = values.float().unflatten(-1, (-1, size))
    scale = groups.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    levels = torch.tensor(NF4, device=values.device)
    nearest = torch.bucketize(groups / scale, (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * scale).flatten(-2).to(values.dtype)


def two_of_four(values: torch.Tensor) -> torch.Tensor:
    """Keep the two largest of each four weights."""
    if values.shape[-1] % 4:
        return values
    fours = values.unflatten(-1, (-1, 4))
    kept = torch.zeros_like(fours).scatter_(-1, fours.abs().topk(2, dim=-1).indices, 1)
    return (fours * kept).flatten(-2)


@contextmanager
def _products(run: BlockRun, of_weights: Round, of_inputs: Round, layers: slice) -> Iterator[BlockRun]:
    """Let the matrices of some layers multiply rounded inputs by rounded weights while the context lasts."""

    def act(matrix: nn.Linear, inputs: tuple[torch.Tensor, ...], _output: torch.Tensor) -> torch.Tensor:
        return functional.linear(of_inputs(inputs[0]), of_weights(matrix.weight), matrix.bias)

    with ExitStack() as hooks:
        for layer in list(run.model.by_layers.layers)[layers]:
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    hooks.enter_context(module.register_forward_hook(act))
        yield run


@contextmanager
def _keys_and_values(run: BlockRun, rounding: Round) -> Iterator[BlockRun]:
    """Round keys and values while the context lasts, before positions are turned in."""
    with ExitStack() as hooks:
        for name, module in run.model.causal.named_modules():
            if name.endswith((".k_proj", ".v_proj")):
                hooks.enter_context(module.register_forward_hook(lambda _module, _inputs, output: rounding(output)))
        yield run


@contextmanager
def _unrounded(run: BlockRun, change: Round) -> Iterator[BlockRun]:
    """Change the matrices, and compute with them in float32 arithmetic, while the context lasts."""
    with replacing(run, lambda _name, weight: change(weight)) as acting:
        yield reference_of(acting)


def of_few_bits(run: BlockRun) -> list[Shortcut]:
    """Return the ways that compute everything, in fewer bits."""
    everywhere, last = slice(None), slice(-1, None)
    quarter = slice(-max(1, run.model.layers // 4), None)
    share = max(1, run.model.layers // 4) / run.model.layers

    def of(prepared: Callable[..., object], *arguments: object) -> Prepared:
        return functools.partial(prepared, run, *arguments)  # type: ignore[arg-type] - contexts of a run, all of them

    rows: list[tuple[str, float, Prepared]] = [
        ("W8A8", 0.5, of(_products, to_int8, to_int8, everywhere)),
        ("W8A8, last quarter", 1 - share / 2, of(_products, to_int8, to_int8, quarter)),
        ("FP8 W8A8", 0.5, of(_products, to_fp8, to_fp8, everywhere)),
        ("FP8, last layer", 1 - 1 / (2 * run.model.layers), of(_products, to_fp8, to_fp8, last)),
        ("FP8 weights", 0.5, of(_products, to_fp8, lambda x: x, everywhere)),
        ("keys, values in FP8", 1.0, of(_keys_and_values, to_fp8)),
        ("NF4 weights", 0.25, of(_products, to_nf4, lambda x: x, everywhere)),
        ("2:4 weights", 0.5, of(_products, two_of_four, lambda x: x, everywhere)),
    ]
    in_float32 = of(_unrounded, to_int8)
    exactly = Shortcut("8-bit weights, float32", 0.5, 1, in_float32, lambda acting, nonces: acting.states(nonces))
    return [exactly, *(Shortcut(name, cost, 1, prepared, _states) for name, cost, prepared in rows)]


def with_few_positions_missing(run: BlockRun) -> list[Shortcut]:
    """Return the ways that leave out the first positions, few of them."""
    found = []
    for name, left_out in (("without position 1", 1), ("last 7/8", max(1, run.seq_len // 8))):
        where = slice(left_out, None)

        def states(acting: BlockRun, nonces: Sequence[int], where: slice = where) -> torch.Tensor:
            positions = torch.arange(run.seq_len, device=run.model.device)[where]
            return run_states(acting, acting.inputs(nonces)[:, where], positions=positions)

        found.append(Shortcut(name, 1 - left_out / run.seq_len, 1, lambda: nullcontext(run), states, where))
    return found


def _states(acting: BlockRun, nonces: Sequence[int]) -> torch.Tensor:
    return run_states(acting, acting.inputs(nonces))


# Measuring.


@torch.inference_mode()
def measure(
    run: BlockRun,
    previous: Prepared,
    nonces: Sequence[int],
    *,
    batch_size: int,
    advance: Callable[[float], None],
) -> Measured:
    """Compute the nonces of a block in every way, and compare with the reference.

    Args:
        run: The model, prepared for the block.
        previous: Prepares the model for the block before.
        nonces: Distinct nonces, two or more.
        batch_size: Nonces per forward pass.
        advance: Called with the number of nonces' worth of work just done.
    """
    exact, own, honest, results = [], [], [], []
    for batch in batches(nonces, batch_size):
        exact.append(reference_of(run).states(batch))
        _, reference, errors = run.differences(run.states(batch), exact[-1], batch)
        own.append(errors + _transport(run, reference))
        results.append(reference)
        honest.append(_states(run, batch))
    states = torch.cat(honest)
    kept = min(KEPT, len(nonces))
    known = Known(nonces[:kept], states[:kept], states.double().mean(dim=0).to(states.dtype))
    layers = Shortcut(HONEST, 1, 1, lambda: nullcontext(run), _states)
    others = [way for way in shortcuts(run, known, previous, batch_size) if way.guess != "size"]
    tried = [layers, *of_few_bits(run), *with_few_positions_missing(run), *others]
    passes = len(tried) + 1
    advance(len(nonces) / passes)
    ways = []
    for way in tried:
        ways.append(_measured(run, way, known, nonces, exact, batch_size))
        advance(len(nonces) / passes)
    found = torch.cat(results).double()
    blank = float(found.square().mean() if found.dim() == 2 else found.var())
    return Measured(torch.cat(own).cpu().numpy(), blank, ways)


def _transport(run: BlockRun, reference: torch.Tensor) -> torch.Tensor:
    """Return what float16 adds to the squared error of the numbers of a vector, by nonce; nothing for distances."""
    if run.scheme.output == "distance":
        return torch.zeros(len(reference), dtype=torch.float64, device=reference.device)
    return torch.from_numpy(rounding_variance(reference.cpu().numpy())).to(reference.device)


def _measured(
    run: BlockRun, way: Shortcut, known: Known, nonces: Sequence[int], exact: Sequence[torch.Tensor], batch_size: int
) -> Claimed:
    found = []
    with way.prepared() as acting:
        for batch, right in zip(batches(nonces, batch_size), exact, strict=True):
            states = way.states(acting, batch)
            if states.dim() == 3:
                part, states = states, known.average.expand(len(batch), -1, -1).to(states.dtype, copy=True)
                states[:, way.where] = part
            _, reference, errors = run.differences(states, right, batch)
            found.append(errors + _transport(run, reference))
    errors = torch.cat(found).cpu().numpy()
    return Claimed(way.name, way.cost, np.where(np.isfinite(errors), errors, np.inf))
