"""A batch as compiled work, on a GPU captured whole; made from the same functions that run eagerly.

A decoder's layers share one compilation, the last one has its own. All that belongs to a block or a nonce
is an argument, so that one compilation serves every block hash. What the compiler made is kept in the
folders that TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR name, from one process to the next.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from pocd.compute import stages
from pocd.compute.engine import block_run, is_out_of_memory, padded_rows
from pocd.compute.errors import ComputeError, OutOfMemoryError
from pocd.compute.flat import FlatDecoder
from pocd.compute.model import Execution
from pocd.compute.names import default_tolerance
from pocd.compute.stages import Block
from pocd.compute.transforms import JOIN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pocd.compute.engine import BlockRun
    from pocd.compute.model import Model, Program
    from pocd.compute.schemes import Scheme

    Mode = Literal["auto", "always", "never"]

WARM_UPS = 3  # before a capture: the first compiles, cuBLAS and the allocator settle
AGREEING = 0.99  # share of a batch whose compiled distances have to be the eager ones, within the dtype's tolerance
VARIANTS = 64  # compilations of one function in a process: shapes, dtypes, transforms
BLOCK = "compiling"  # any block hash and key will do


class CannotCompileError(Exception):
    """There is no compiler, or what it made is wrong; the message says what."""


@contextmanager
def _settings() -> Iterator[None]:
    """Let torch compile in this process alone, and each function for as many shapes as are asked for."""
    import torch._dynamo.config  # noqa: PLC0415 - the compiler takes seconds to import
    import torch._inductor.config  # noqa: PLC0415

    with (
        torch._dynamo.config.patch(recompile_limit=VARIANTS),  # noqa: SLF001 - the documented way to it
        torch._inductor.config.patch(compile_threads=1),  # noqa: SLF001
    ):
        yield


def _compile(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    compiled: Callable[..., torch.Tensor] = torch.compile(function, fullgraph=True, dynamic=False)
    return compiled


class Compiled:
    """A batch in three parts: generator, decoder, and what follows it."""

    def __init__(self, model: Model, scheme: Scheme, seq_len: int, rows: int) -> None:
        assert isinstance(model.decoder, FlatDecoder), "only flat decoders are compiled"
        self._shape = scheme, seq_len, rows
        self._device = model.device
        self._join = JOIN[scheme.layer_step]
        self._all_positions = scheme.reads == "segments"
        self._decoder = replace(model.decoder, layer=_compile(model.decoder.layer))
        draw = functools.partial(
            stages.draw_inputs, seq_len=seq_len, hidden_size=model.hidden_size, dtype=model.dtype
        )
        self.draw = _compile(draw)
        self._measure = _compile(functools.partial(stages.measure_states, scheme=scheme))

    def serves(self, scheme: Scheme, seq_len: int, rows: int) -> bool:
        """Whether it was made for such batches."""
        return (scheme, seq_len, rows) == self._shape

    def __call__(self, seeds: torch.Tensor, block: Block) -> torch.Tensor:
        """Compute distances, float32 [B] on the device, from seeds on the host."""
        there = to_device(seeds, self._device)
        return self.decode(self.draw(there), there, block)

    def decode(self, inputs: torch.Tensor, seeds: torch.Tensor, block: Block) -> torch.Tensor:
        """From inputs [B, S, H] to distances [B]."""
        states = self._decoder(inputs, self._join, block.vectors, all_positions=self._all_positions)
        return self._measure(states, seeds, block)


class Captured:
    """A batch whose decoder and all that follows it are one CUDA graph.

    The generator works on a stream of its own, into a buffer of its own: on the next batch's inputs, while
    the graph works on the present ones. All of a batch's own buffers are fixed, for a graph knows addresses;
    what comes from outside is copied into them, in the order of the streams.
    """

    def __init__(self, compiled: Compiled, seeds: torch.Tensor, run: BlockRun) -> None:
        self._compiled = compiled
        self.serves = compiled.serves
        self._side = torch.cuda.Stream(run.model.device)
        self._taken = torch.cuda.Event()  # the staged seeds and inputs were copied
        self._staged_seeds = to_device(seeds, run.model.device)
        self._staged_inputs = compiled.draw(self._staged_seeds)
        self._seeds, self._inputs = self._staged_seeds.clone(), self._staged_inputs.clone()
        self._block = own_copy(run.block, run.scheme)
        self._graph = torch.cuda.CUDAGraph()
        with on_stream(self._side):  # as the documentation of CUDA graphs in torch has it
            for _ in range(WARM_UPS):
                compiled.decode(self._inputs, self._seeds, self._block)
        with torch.cuda.graph(self._graph):
            self._distances = compiled.decode(self._inputs, self._seeds, self._block)
        self._taken.record()

    def __call__(self, seeds: torch.Tensor, block: Block) -> torch.Tensor:
        """Compute distances, float32 [B] on the device, from seeds on the host; they hold until the next call."""
        main = torch.cuda.current_stream(self._seeds.device)
        with torch.cuda.stream(self._side):
            self._side.wait_event(self._taken)
            self._staged_seeds.copy_(seeds.pin_memory(), non_blocking=True)
            self._staged_inputs.copy_(self._compiled.draw(self._staged_seeds))
        main.wait_stream(self._side)
        self._seeds.copy_(self._staged_seeds)
        self._inputs.copy_(self._staged_inputs)
        self._taken.record(main)
        for own, given in zip(_tensors(self._block), _tensors(block), strict=True):
            if own is not given:
                own.copy_(given)
        self._graph.replay()
        return self._distances
