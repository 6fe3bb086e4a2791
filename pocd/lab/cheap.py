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
from pocd.lab.few_bits import to_bits, to_fp8, to_nf4, two_of_four
from pocd.lab.shortcuts import Known, Shortcut, batches, linear_layers, replacing, run_states, shortcuts
from pocd.protocol.vectors import rounding_variance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray
    from torch import nn

    from pocd.compute.engine import BlockRun
    from pocd.lab.shortcuts import Prepared

    Floats = NDArray[np.float64]
    Change = Callable[[torch.Tensor], torch.Tensor]
    Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

HONEST = "transformers' layers"  # the way that is no cheat, but rounds elsewhere
KEPT = 64  # nonces whose honest states the cheater keeps


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


# Ways.


@contextmanager
def multiplying(layers: Sequence[nn.Module], product: Product) -> Iterator[None]:
    """Let the matrices of some layers multiply in another way while the context lasts."""

    def act(matrix: nn.Linear, inputs: tuple[torch.Tensor, ...], _output: torch.Tensor) -> torch.Tensor:
        return product(inputs[0], matrix.weight, matrix.bias)

    with ExitStack() as hooks:
        for module in (each for layer in layers for each in layer.modules()):
            if isinstance(module, torch.nn.Linear):
                hooks.enter_context(module.register_forward_hook(act))
        yield


@contextmanager
def _products(run: BlockRun, of_weights: Change, of_inputs: Change, layers: slice) -> Iterator[BlockRun]:
    """Let the matrices of some layers multiply rounded inputs by rounded weights while the context lasts."""

    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return functional.linear(of_inputs(x), of_weights(weight), bias)

    with multiplying(list(run.model.by_layers.layers)[layers], product):
        yield run


@contextmanager
def _keys_and_values(run: BlockRun, rounding: Change) -> Iterator[BlockRun]:
    """Round keys and values while the context lasts, before positions are turned in."""
    with ExitStack() as hooks:
        for name, module in run.model.causal.named_modules():
            if name.endswith((".k_proj", ".v_proj")):
                hooks.enter_context(module.register_forward_hook(lambda _module, _inputs, output: rounding(output)))
        yield run


@contextmanager
def _unrounded(run: BlockRun, change: Change) -> Iterator[BlockRun]:
    """Change the matrices, and compute with them in float32 arithmetic, while the context lasts."""
    with replacing(run, lambda _name, weight: change(weight)) as acting:
        yield reference_of(acting)


def of_few_bits(run: BlockRun) -> list[Shortcut]:
    """Return the ways that compute everything, in fewer bits."""
    everywhere, last = slice(None), slice(-1, None)
    quarter = slice(-max(1, run.model.layers // 4), None)
    share = max(1, run.model.layers // 4) / run.model.layers

    def of(prepared: Callable[..., AbstractContextManager[BlockRun]], *arguments: object) -> Prepared:
        return functools.partial(prepared, run, *arguments)

    to_int8 = functools.partial(to_bits, bits=8)
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


def with_another_last_layer(run: BlockRun, known: Known, batch_size: int) -> Shortcut:
    """Return the way that has a linear map in place of the last layer, trained on states that the cheater knows."""
    last = run.model.layers - 1
    stand_ins = linear_layers(run, known.nonces, [(last, last)], batch_size)
    size = run.model.hidden_size
    matrices = sum(weight.numel() for weight in run.model.by_layers.layers[-1].parameters() if weight.ndim > 1)
    cost = 1 - (1 - 2 * size**2 / matrices) / run.model.layers

    def states(acting: BlockRun, nonces: Sequence[int]) -> torch.Tensor:
        return run_states(acting, acting.inputs(nonces), stand_ins)

    return Shortcut("last layer linear", cost, 1, lambda: nullcontext(run), states)


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
    last = with_another_last_layer(run, known, batch_size)
    tried = [layers, *of_few_bits(run), *with_few_positions_missing(run), last, *others]
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
    squares = torch.cat(found).cpu().numpy()
    return Claimed(way.name, way.cost, np.where(np.isfinite(squares), squares, np.inf))
