"""What the first contact with a GPU asks of it: each function answers one question, see `first_contact`."""

from __future__ import annotations

import statistics
import time
import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from pocd.compute import compiled, random
from pocd.compute.compiled import compile_model
from pocd.compute.engine import block_run
from pocd.compute.flat import FlatDecoder
from pocd.compute.model import adapt, load_model
from pocd.compute.transforms import join_of
from pocd.protocol.schemes import SCHEMES
from scripts.bench.models import SHAPES, build, made_on
from scripts.bench.profiling import shares
from scripts.bench.roofline import predict_path

if TYPE_CHECKING:
    from collections.abc import Callable

    from pocd.compute.model import Model
    from scripts.trials.steps import Facts

LENGTH = 256  # positions of the models that are measured
RATE_SECONDS = {"cuda": 4.0, "cpu": 0.2}  # for which a rate is measured; on the CPU the steps are only rehearsed
TINY = "bundled:tiny-qwen3"
PRODUCTS = ((8192, 8192, 8192), (65536, 4096, 1024), (65536, 6144, 1024), (65536, 1024, 3072), (65536, 28672, 4096))


def wait(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    """Return the median of a call's seconds, after two calls that do not count."""
    call()
    call()
    found = []
    for _ in range(repeats):
        wait(device)
        began = time.perf_counter()
        call()
        wait(device)
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def machine(device: torch.device) -> Facts:
    """Return versions, and the GPU's properties."""
    found: Facts = {"torch": torch.__version__, "cuda": torch.version.cuda, "device": str(device)}
    if device.type == "cuda":
        found |= {"properties": str(torch.cuda.get_device_properties(device)), "cudnn": torch.backends.cudnn.version()}
    return found


@torch.inference_mode()
def products(device: torch.device, dtype: torch.dtype) -> Facts:
    """Return the rate of copies (TB/s) and of products of matrices (TFLOP/s) by their shapes."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found: Facts = {"copy": 2 * source.numel() / timed(lambda: target.copy_(source), device) / 1e12}
    for rows, outs, ins in PRODUCTS if device.type == "cuda" else ((256, 256, 256),):
        x, weight = (torch.randn(n, ins, device=device).to(dtype) for n in (rows, outs))
        took = timed(partial(functional.linear, x, weight), device)
        found[f"{rows}x{outs}x{ins}"] = 2 * rows * outs * ins / took / 1e12
    return found


@torch.inference_mode()
def attention(device: torch.device, dtype: torch.dtype) -> Facts:
    """Return the seconds of causal attention by each of torch's kernels: cuDNN's is ruled out, see `engine`."""
    rows = 64 if device.type == "cuda" else 1
    query, key, value = (torch.randn(rows, heads, LENGTH, 128, device=device).to(dtype) for heads in (16, 8, 8))
    found: Facts = {}
    torch.backends.cuda.enable_cudnn_sdp(True)
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(backend):
            attend = partial(
                functional.scaled_dot_product_attention, query, key, value, is_causal=True, enable_gqa=True
            )
            try:
                found[backend.name] = timed(attend, device)
            except RuntimeError as error:  # there is no such kernel here
                found[backend.name] = str(error).partition("\n")[0]
    torch.backends.cuda.enable_cudnn_sdp(False)
    return found


@torch.inference_mode()
def generator(device: torch.device, dtype: torch.dtype) -> Facts:
    """Compare the generator with the CPU's, and time it."""
    seeds = random.seeds_tensor([f"seed {number}" for number in range(64)])
    there, index = seeds.to(device), torch.arange(2**16, dtype=torch.int32)
    same = torch.equal(random.hash32(index, seeds[:, None]), random.hash32(index.to(device), there[:, None]).cpu())
    expected = random.normal(seeds[:4], 2**16)
    apart = (expected - random.normal(there[:4], 2**16).cpu()).abs().max().item()
    out = torch.empty(64 if device.type == "cuda" else 2, LENGTH * 1024, dtype=dtype, device=device)
    found: Facts = {"hash exact": same, "largest difference": apart}
    found[f"eager seconds of {len(out)}"] = timed(lambda: random.fill_normal(out, there[: len(out)]), device)
    if device.type == "cuda":
        from pocd.compute import kernels  # noqa: PLC0415 - Triton is there only with torch's builds for GPUs

        drawn = kernels.fill_normal(torch.empty(4, 2**16, device=device), there[:4]).cpu()
        found["kernel's largest difference"] = (expected - drawn).abs().max().item()
        found["kernel seconds of 64"] = timed(lambda: kernels.fill_normal(out, there), device)
    return found


def distances(model: Model, scheme: str, length: int, rows: int, nonces: range) -> torch.Tensor:
    """Return the distances of some nonces in batches of `rows`."""
    with block_run(model, SCHEMES[scheme], block_hash="first", public_key="contact", seq_len=length) as run:
        return torch.tensor(run.distances(nonces, batch_size=rows))


def rate(model: Model, scheme: str, rows: int) -> Facts:
    """Return nonces per second and milliseconds per batch, as mined: two batches under way."""
    with block_run(model, SCHEMES[scheme], block_hash="first", public_key="contact", seq_len=LENGTH) as run:
        run.distances(range(rows), batch_size=rows)
        began = time.perf_counter()
        run.distances(range(2 * rows), batch_size=rows)
        batches = max(3, min(100, int(RATE_SECONDS[model.device.type] / (time.perf_counter() - began))))
        began = time.perf_counter()
        run.distances(range(batches * rows), batch_size=rows)
        took = time.perf_counter() - began
    found: Facts = {
        "nonces/s": batches * rows / took,
        "ms per batch": took / batches * 1e3,
        "path": model.execution.path,
    }
    if model.device.type == "cuda":
        card, dtype = torch.cuda.get_device_name(model.device), str(model.dtype).removeprefix("torch.")
        predicted = predict_path(card, model.causal.config, SCHEMES[scheme], LENGTH, dtype, model.execution.path)
        found["predicted"] = predicted
    return found


def apart(one: torch.Tensor, other: torch.Tensor) -> Facts:
    """Return how far distances lie apart: the largest and the 99th percentile, and the share that is equal."""
    difference = (one - other).abs()
    return {
        "largest": difference.max().item(),
        "p99": difference.quantile(0.99).item(),
        "equal": (difference == 0).float().mean().item(),
    }


def paths(model: Model, scheme: str, rows: int) -> Facts:
    """Measure the eager path and the one that "auto" takes, how far they lie apart, and the memory held."""
    found: Facts = {"rows": rows, "eager": rate(model, scheme, rows)}
    base = distances(model, scheme, LENGTH, rows, range(rows))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fast = compile_model(model, "auto", scheme=SCHEMES[scheme], seq_len=LENGTH, batch_size=rows)
    found |= {"warnings": sorted({str(each.message)[:160] for each in told}), "reason": fast.execution.reason}
    found |= {"compile seconds": fast.execution.seconds, "fast": rate(fast, scheme, rows)}
    found["apart"] = apart(base, distances(fast, scheme, LENGTH, rows, range(rows)))
    if model.device.type == "cuda":
        found["GiB allocated, reserved"] = [torch.cuda.memory_allocated() / 2**30, torch.cuda.memory_reserved() / 2**30]
    return found


def agreement(device: torch.device, dtype: str) -> Facts:
    """Compare a bundled model with the CPU, and with itself in other places, batches and paths."""
    model, cpu = (load_model(TINY, dtype=dtype, device=str(where)) for where in (device, "cpu"))
    fast = compile_model(model, "auto", scheme=SCHEMES["poc2"], seq_len=64, batch_size=32)
    count = 128 if device.type == "cuda" else 64
    of = partial(distances, scheme="poc2", length=64, rows=32, nonces=range(count))
    base, turned = of(model), range(count - 1, -1, -1)
    return {
        "path": fast.execution.path,
        "cpu": apart(base, of(cpu)),
        "another place, eager": apart(base.flip(0), of(model, nonces=turned)),
        "another place, fast": apart(of(fast).flip(0), of(fast, nonces=turned)),
        "another batch size": apart(base, of(model, rows=count)),
        "flat, layers": apart(base, of(replace(model, decoder=model.by_layers))),
        "eager, fast": apart(base, of(fast)),
    }


def made(name: str, dtype: str, device: torch.device, layers: int | None = None) -> Model:
    """Return a model with its weights made on the device, with so many layers."""
    if name not in SHAPES:
        return build(name, getattr(torch, dtype), device)
    family, shape = SHAPES[name]
    if layers is not None:
        shape = shape | {"num_hidden_layers": layers}
    return adapt(made_on(str(device), getattr(torch, dtype), family, shape), name=name, fingerprint=name)


@dataclass(frozen=True, slots=True)
class Trial:
    """What is measured of one model: a step for each question.

    Attributes:
        name: One of the benchmarks' models.
        dtype: Precision of its weights.
        device: The device.
        rows: Nonces per batch.
        layers: How many layers; None for all.
    """

    name: str
    dtype: str
    device: torch.device
    rows: int
    layers: int | None = None

    def model(self) -> Model:
        """Make the model."""
        return made(self.name, self.dtype, self.device, self.layers)

    def fast(self, *, capture: bool = True) -> Model:
        """Make the model, compiled as "auto" has it."""
        shape = {"seq_len": LENGTH, "batch_size": self.rows}
        return compile_model(self.model(), "auto", scheme=SCHEMES["poc2"], capture=capture, **shape)

    def paths(self, scheme: str = "poc2") -> Facts:
        """Measure the eager path and the one that "auto" takes; see `paths`."""
        return paths(self.model(), scheme, self.rows)

    def profile(self) -> Facts:
        """Return the shares of a batch's time by groups of kernels."""
        with block_run(self.fast(), SCHEMES["poc2"], block_hash="first", public_key="contact", seq_len=LENGTH) as run:
            return dict(shares(run, self.rows, 3))

    def bare(self) -> Facts:
        """Measure the compiled layers without transforms, generator and head, and the engine beside them."""
        model = self.fast()
        seconds = bare_seconds(model, self.rows)
        engine = rate(model, "poc2", self.rows)
        return {
            "bare nonces/s": self.rows / seconds,
            "engine": engine,
            "engine/bare": engine["nonces/s"] * seconds / self.rows,
        }

    def uncaptured(self) -> Facts:
        """Measure the compiled path without a capture."""
        return rate(self.fast(capture=False), "poc2", self.rows)

    def by_layers(self) -> Facts:
        """Measure transformers' own layers."""
        model = self.model()
        return rate(replace(model, decoder=model.by_layers), "poc2", self.rows)

    def unrounded(self) -> Facts:
        """Measure compiled code that does not round where the eager path rounds."""
        compiled.FOR_GPUS["emulate_precision_casts"] = False
        return paths(self.model(), "poc2", self.rows)


@torch.inference_mode()
def bare_seconds(model: Model, rows: int) -> float:
    """Return the seconds of a batch in the bare compiled layers; on a GPU they are captured as a graph."""
    assert isinstance(model.decoder, FlatDecoder), "others are not compiled"
    inputs = torch.zeros(rows, LENGTH, model.hidden_size, dtype=model.dtype, device=model.device)
    vectors = inputs.new_zeros(model.layers, model.hidden_size)
    layer = torch.compile(model.decoder.layer, fullgraph=True, dynamic=False)
    decoder = replace(model.decoder, layer=layer, rotations=model.decoder.rotate(inputs))
    run = partial(decoder, inputs, join_of("none", model.layers), vectors)
    if model.device.type == "cpu":
        return timed(run, model.device, repeats=1)
    from torch._inductor import config  # noqa: PLC0415 - the compiler takes seconds to import

    with config.patch(**compiled.FOR_GPUS):
        for _ in range(3):
            run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return timed(graph.replay, model.device)
