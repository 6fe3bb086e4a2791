"""Compiled code for a batch, on a GPU captured as a CUDA graph; made from the same functions that run eagerly.

A decoder's layers share one compilation, the last one has its own. All that belongs to a block or a nonce
is an argument, so that one compilation serves every block hash. What the compiler made is kept in the
folders that TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR name, from one process to the next.
"""

from __future__ import annotations

import functools
import os
import time
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from pocd.compute import stages
from pocd.compute.engine import block_run, padded_rows
from pocd.compute.flat import FlatDecoder
from pocd.compute.memory import is_fault, is_out_of_memory, with_causes
from pocd.compute.model import NOT_COMPILED, Execution
from pocd.compute.random import fill_normal, to_device
from pocd.compute.segments import Standard
from pocd.compute.stages import BlockTensors
from pocd.compute.toolchain import find_lack
from pocd.compute.transforms import join_of
from pocd.protocol.errors import CaptureError, ComputeError, OutOfMemoryError
from pocd.protocol.names import default_tolerance

if TYPE_CHECKING:
    from collections.abc import Callable

    from pocd.compute.engine import BlockRun
    from pocd.compute.model import Model, Program
    from pocd.protocol.names import Compile
    from pocd.protocol.schemes import Scheme

WARM_UPS = 3  # before a capture: the first compiles, then cuBLAS and the allocator settle
AGREEING = 0.99  # share of a batch whose compiled distances have to be the eager ones, within the dtype's tolerance
VARIANTS = 64  # compilations of one function in a process: shapes, dtypes, transforms
OWN_HEADS = ("trained", "embedding")  # that are the model's own memory, whatever is drawn into it
BLOCK = "compiling"  # as block hash and key: any will do
FOR_GPUS: dict[str, Any] = {  # how torch's compiler makes kernels for them
    "emulate_precision_casts": True,  # rounds where the eager path rounds, else each layer adds a difference
    "realize_opcount_threshold": 64,  # operations: those roundings are no reason to cut a kernel in two
}


class WrongDistancesError(Exception):
    """Compiled or captured code gives other distances than the eager path."""


class Compiled:
    """A batch in three parts: generator, decoder layers, and what follows them.

    Args:
        run: The model prepared for the scheme and any block.
        rows: Nonces of each batch, with padding.
    """

    def __init__(self, run: BlockRun, rows: int) -> None:
        model, decoder = run.model, run.model.decoder
        assert isinstance(decoder, FlatDecoder), "only flat decoders are compiled"
        self._scheme, self._shape = run.scheme, (run.scheme, run.seq_len, rows)
        self._join = join_of(run.scheme.layer_step, model.layers)
        self._all_positions = run.scheme.reads_all
        # Cosines and sines once: some models' own code for them waits for the GPU, which ends a capture.
        like = torch.empty(1, run.seq_len, model.hidden_size, dtype=model.dtype, device=model.device)
        self._decoder = replace(decoder, layer=_compile(decoder.layer), rotations=decoder.rotate(like))
        self.measure = _compile(functools.partial(stages.measure_states, scheme=run.scheme))
        self._draw = _generator(model.device.type)
        self.new_inputs = functools.partial(
            torch.empty, rows, run.seq_len, model.hidden_size, dtype=model.dtype, device=model.device
        )

    def serves(self, scheme: Scheme, seq_len: int, rows: int) -> bool:
        """Tell whether the code was compiled for this scheme, sequence length and padded batch size."""
        return (scheme, seq_len, rows) == self._shape

    def __call__(self, seeds: torch.Tensor, block: BlockTensors) -> torch.Tensor:
        """Compute distances, float32 [B] on the device, or vectors [B, VECTOR_SIZE], from seeds on the host."""
        inputs = self.new_inputs()
        there = to_device(seeds, inputs.device)
        self.fill(inputs, there)
        return self.decode(inputs, there, block)

    def fill(self, inputs: torch.Tensor, seeds: torch.Tensor) -> None:
        """Overwrite input embeddings [B, S, H] with those of `seeds`."""
        stages.fill_inputs(inputs, seeds, self._scheme, self._draw)

    def decode(self, inputs: torch.Tensor, seeds: torch.Tensor, block: BlockTensors) -> torch.Tensor:
        """Compute distances [B], or vectors [B, VECTOR_SIZE], from inputs [B, S, H]; all on the device."""
        return self.measure(self.run_layers(inputs, block), seeds, block)

    def run_layers(self, inputs: torch.Tensor, block: BlockTensors) -> torch.Tensor:
        """Compute hidden states after the final norm from inputs: of the last position [B, H], or of all [B, S, H]."""
        return self._decoder(inputs, self._join, block.vectors, all_positions=self._all_positions)


def _compile(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    compiled: Callable[..., torch.Tensor] = torch.compile(function, fullgraph=True, dynamic=False)
    return compiled


def _generator(device: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return the function that fills rows with normal numbers: torch's operations, which on a GPU are many kernels."""
    if device == "cpu":
        return fill_normal
    from pocd.compute import kernels  # noqa: PLC0415 - Triton is there only with torch's builds for GPUs

    return kernels.fill_normal


class Captured:
    """A batch as one CUDA graph: the decoder and all that follows it.

    A graph knows addresses, so its tensors are its own, and what comes from outside is copied into them.
    The generator works on a stream of its own, into a buffer of its own: on the next batch's inputs, while
    the graph works on the present ones.

    Args:
        compiled: The compiled batch to capture; compiles here, unless it has before.
        seeds: Seeds of any batch, on the host, int32 bits [B, K].
        run: The model prepared for the scheme and any block.
    """

    def __init__(self, compiled: Compiled, seeds: torch.Tensor, run: BlockRun) -> None:
        self.serves = compiled.serves
        self._fill = compiled.fill
        self._scheme = run.scheme
        self._side = torch.cuda.Stream(run.model.device)
        self._taken = torch.cuda.Event()  # what was staged has been copied, and may be overwritten
        self._staged_seeds, self._staged_inputs = to_device(seeds, run.model.device), compiled.new_inputs()
        self._seeds, self._inputs = self._staged_seeds.clone(), compiled.new_inputs()
        self._block = _own(run.block, run.scheme)
        self._fill(self._inputs, self._seeds)
        main = torch.cuda.current_stream(run.model.device)
        self._side.wait_stream(main)
        with torch.cuda.stream(self._side):
            for _ in range(WARM_UPS):
                compiled.decode(self._inputs, self._seeds, self._block)
        main.wait_stream(self._side)
        self._graph = torch.cuda.CUDAGraph()
        # What other threads ask of the driver does not concern the capture.
        with torch.cuda.graph(self._graph, stream=self._side, capture_error_mode="thread_local"):
            self._distances = compiled.decode(self._inputs, self._seeds, self._block)
        self._taken.record(main)

    def __call__(self, seeds: torch.Tensor, block: BlockTensors) -> torch.Tensor:
        """Compute distances, float32 [B] on the device, from seeds on the host; they hold until the next call."""
        main = torch.cuda.current_stream(self._seeds.device)
        self._side.wait_event(self._taken)
        with torch.cuda.stream(self._side):
            self._staged_seeds.copy_(seeds.pin_memory(), non_blocking=True)
            self._fill(self._staged_inputs, self._staged_seeds)
        main.wait_stream(self._side)
        self._seeds.copy_(self._staged_seeds)
        self._inputs.copy_(self._staged_inputs)
        self._taken.record(main)
        # Anew for each batch: two runs may take turns, and it costs less than finding out.
        for own, given in zip(_copied(self._block, self._scheme), _copied(block, self._scheme), strict=True):
            assert own.shape == given.shape, "the block's tensors are those of the scheme and model that were captured"
            own.copy_(given)
        self._graph.replay()
        return self._distances


def _copied(block: BlockTensors, scheme: Scheme) -> list[torch.Tensor]:
    """Return the tensors of a block that a graph has copies of: all but a head that is the model's own."""
    head = None if scheme.head in OWN_HEADS else block.head
    standard = (None, None) if block.standard is None else (block.standard.mean, block.standard.deviation)
    return [tensor for tensor in (block.vectors, head, block.target, *standard) if tensor is not None]


def _own(block: BlockTensors, scheme: Scheme) -> BlockTensors:
    """Return a block with copies of the tensors that `_copied` lists."""

    def copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.clone()

    standard = block.standard
    return BlockTensors(
        vectors=block.vectors.clone(),
        head=block.head if scheme.head in OWN_HEADS else copy(block.head),
        target=copy(block.target),
        standard=None if standard is None else Standard(standard.mean.clone(), standard.deviation.clone()),
    )


def compile_model(
    model: Model, mode: Compile, *, scheme: Scheme, seq_len: int, batch_size: int, capture: bool = True
) -> Model:
    """Return `model` with compiled code for batches of one scheme and shape, in place of what it had before.

    Its `execution` says which path these take, and why. The code is checked against the eager path.

    Args:
        model: The model to compile; no run of a scheme that draws weights may be under way.
        mode: "never": eager. "always": compiled, and captured on a GPU, or an error. "auto": as "always" on a GPU,
            falling back to eager; eager on the CPU, where compiling gains too little for its cost.
        scheme: The scheme to compile for.
        seq_len: Sequence length S to compile for.
        batch_size: Nonces per batch to compile for.
        capture: Whether to capture what was compiled, on a GPU; a process in which that failed is not to try again.

    Raises:
        InputError: The model or the scheme does not allow `seq_len`.
        OutOfMemoryError: A batch of this size does not fit.
        NonFiniteError: The model gave NaN or infinity.
        CaptureError: The capture failed; the GPU can be used again in another process only, without a capture.
        ComputeError: The mode is "always", and the model cannot be compiled; the message says why.
        RuntimeError: The device failed.
    """
    model = replace(model, program=None, execution=NOT_COMPILED)
    hindrance, lacks_memory = _hindrance(model, mode), False
    rows, start = padded_rows(batch_size, seq_len), time.perf_counter()
    if hindrance is None:
        try:
            with block_run(model, scheme, block_hash=BLOCK, public_key=BLOCK, seq_len=seq_len) as run:
                program, execution = _build(run, rows, mode, capture=capture)
            execution = replace(execution, seconds=time.perf_counter() - start)
            return replace(model, program=program, execution=execution)
        except CaptureError as error:
            if mode == "always":
                raise ComputeError(f"{error}; ask for 'auto' or 'never'") from error
            raise
        except ComputeError:
            raise
        except Exception as error:  # whatever a compiler may raise: the eager path needs none
            lacks_memory = any(map(is_out_of_memory, with_causes(error)))
            if not lacks_memory and any(map(is_fault, with_causes(error))):
                raise
            hindrance = f"compiling failed: {_summary(error)}"
    if lacks_memory:  # outside the handler, whose traceback would hold the memory
        raise OutOfMemoryError(f"a batch of {rows} × {seq_len} positions, compiled, does not fit; a smaller one may")
    if mode == "always":
        raise ComputeError(f"model {model.name!r} cannot be compiled: {hindrance}; ask for 'auto' or 'never'")
    return replace(model, execution=Execution("eager", hindrance, time.perf_counter() - start))


def _hindrance(model: Model, mode: Compile) -> str | None:
    """Return why `model` is not to be compiled, as far as that is known beforehand; None otherwise."""
    if mode == "never":
        return "as the settings say"
    if not isinstance(model.decoder, FlatDecoder):
        return "its layers are transformers' own, which are not compiled"
    if model.device.type == "cpu" and mode == "auto":
        return "on the CPU compiling gains too little for what it costs"
    lack = find_lack(model.device.type, os.environ)
    return None if lack is None else f"{lack.text}: {lack.remedy}"


@torch.inference_mode()
def _build(run: BlockRun, rows: int, mode: Compile, *, capture: bool) -> tuple[Program, Execution]:
    """Compile, capture on a GPU, and check either against the eager path."""
    import torch._dynamo.config  # noqa: PLC0415 - the compiler takes seconds to import
    import torch._inductor.config  # noqa: PLC0415 - the compiler takes seconds to import

    is_gpu = run.model.device.type == "cuda"
    expected = run.values(range(rows), batch_size=rows)
    seeds = run.host_seeds(range(rows))
    with (
        torch.cuda.device(run.model.device if is_gpu else -1),  # -1 changes nothing
        torch._dynamo.config.patch(recompile_limit=VARIANTS),  # noqa: SLF001 - as its documentation has it
        torch._inductor.config.patch(  # noqa: SLF001 - as its documentation has it
            compile_threads=1,  # no processes beside this one
            **(FOR_GPUS if is_gpu else {}),
        ),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)  # the compiler's own
        warnings.filterwarnings("ignore", message="TensorFloat32")  # the protocol wants none
        warnings.filterwarnings("ignore", message="CUDA libdevice not found")  # powers are squares alone
        compiled = Compiled(run, rows)
        _check(run, compiled(seeds, run.block), expected)
        if not is_gpu:
            return compiled, Execution("compiled", "as the settings say", 0.0)
        if not capture:
            return compiled, Execution("compiled", "capturing it as a CUDA graph failed in a process before", 0.0)
        captured = _capture(compiled, seeds, run)
        try:
            _check(run, captured(seeds, run.block), expected)
        except WrongDistancesError as error:
            if mode == "always":
                raise
            return compiled, Execution("compiled", f"captured as a CUDA graph it is wrong: {_summary(error)}", 0.0)
        return captured, Execution("captured", "the device is a GPU, and a compiler is there", 0.0)


def _capture(compiled: Compiled, seeds: torch.Tensor, run: BlockRun) -> Captured:
    """Capture a batch; raises CaptureError where that fails for a reason other than memory or the device."""
    try:
        return Captured(compiled, seeds, run)
    except Exception as error:
        if not spoils_process(error):
            raise
        # A stream may still be the current one, and the allocator keep what it has for the capture's end.
        raise CaptureError(f"capturing {run.model.name!r} as a CUDA graph failed: {_summary(error)}") from error


def spoils_process(error: Exception) -> bool:
    """Tell whether an error of a capture is due to the capture itself, and not to memory or a device that failed."""
    chain = list(with_causes(error))
    if any(map(is_out_of_memory, chain)):
        return False
    return any("captur" in str(each) for each in chain) or not any(map(is_fault, chain))


def _check(run: BlockRun, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare a batch's results with the eager ones; raise WrongDistancesError where they differ too much."""
    dtype = str(run.model.dtype).removeprefix("torch.")
    tolerance = default_tolerance(dtype, run.scheme, run.model.hidden_size)
    difference = (found.cpu() - expected).abs()
    if not (difference <= tolerance).float().mean() >= AGREEING:
        raise WrongDistancesError(
            f"distances differ from the eager ones by up to {difference.max():.1e}, where {dtype} allows {tolerance:g}"
        )


def _summary(error: BaseException) -> str:
    """Return an error's class and the first two lines of its text: torch's begins with the part that raised it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join([f"{type(error).__name__}:", *lines[:2]])
