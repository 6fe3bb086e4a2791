"""First contact with a GPU: what pocd has assumed of one, measured in a few minutes, step by step.

Each step is recorded as it ends, in facts.json, and one that fails stops no other. A step for which too little time is
left is left out. Nothing is judged: docs/performance.md says what to look for.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import traceback
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from pocd.compute import random
from pocd.compute.compiled import compile_model
from pocd.compute.engine import block_run
from pocd.compute.model import load_model, pick_device
from pocd.protocol.names import largest_batch_size
from pocd.protocol.schemes import SCHEMES
from scripts.bench.models import NAMES, build

if TYPE_CHECKING:
    from collections.abc import Callable

    from pocd.compute.model import Model

    Facts = dict[str, Any]

LENGTH = 256  # positions of the models that are measured
TINY = "bundled:tiny-qwen3"
PRODUCTS = ((8192, 8192, 8192), (65536, 2048, 1024), (65536, 3072, 1024), (65536, 1024, 3072), (65536, 14336, 4096))


class Steps:
    """Runs steps while there is time for them, and writes down what they find.

    Attributes:
        facts: What was found, by the name of the step.
    """

    def __init__(self, folder: Path, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = folder / "facts.json"
        self._clock = clock
        self._began = clock()
        self._seconds = seconds
        self.facts: Facts = {}

    def run(self, name: str, step: Callable[[], Facts], *, least: float) -> None:
        """Run a step if `least` seconds are left for it; its error is a finding too."""
        began = self._clock()
        left = self._seconds - (began - self._began)
        if left < least:
            found: Facts = {"skipped": f"{left:.0f} s were left, and it takes {least:.0f}"}
        else:
            try:
                found = step()
            except Exception as error:  # noqa: BLE001 - whatever a step meets, the next one is to run
                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {error}"}
        self.facts[name] = found | {"seconds": round(self._clock() - began, 1)}
        self._file.write_text(json.dumps(self.facts, indent=1, default=str))
        print(f"{name}: {json.dumps(self.facts[name], default=str)}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()  # does nothing without a GPU


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


def generator(device: torch.device, dtype: torch.dtype) -> Facts:
    """Compare the generator with the CPU's, and time it."""
    seeds = random.seeds_tensor([f"seed {number}" for number in range(64)])
    there, index = seeds.to(device), torch.arange(2**16, dtype=torch.int32)
    same = torch.equal(random.hash32(index, seeds[:, None]), random.hash32(index.to(device), there[:, None]).cpu())
    expected = random.normal(seeds[:4], 2**16)
    apart = (expected - random.normal(there[:4], 2**16).cpu()).abs().max().item()
    out = torch.empty(64, LENGTH * 1024, dtype=dtype, device=device)
    found: Facts = {"hash exact": same, "largest difference": apart}
    found["eager seconds of 64"] = timed(lambda: random.fill_normal(out, there), device)
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
        batches = max(3, min(100, int(4 / (time.perf_counter() - began))))
        began = time.perf_counter()
        run.distances(range(batches * rows), batch_size=rows)
        took = time.perf_counter() - began
    return {"nonces/s": batches * rows / took, "ms per batch": took / batches * 1e3, "path": model.execution.path}


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
    of = partial(distances, scheme="poc2", length=64, rows=32, nonces=range(128))
    base, turned = of(model), range(127, -1, -1)
    return {
        "path": fast.execution.path,
        "cpu": apart(base, of(cpu)),
        "another place, eager": apart(base.flip(0), of(model, nonces=turned)),
        "another place, fast": apart(of(fast).flip(0), of(fast, nonces=turned)),
        "another batch size": apart(base, of(model, rows=128)),
        "flat, layers": apart(base, of(replace(model, decoder=model.by_layers))),
        "eager, fast": apart(base, of(fast)),
    }


def main() -> None:
    """Run all steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to rehearse")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--model", default="qwen3-0.6b", choices=NAMES)
    parser.add_argument("--rows", type=int, nargs="+", help="batch sizes; default: 64k positions, a quarter, and 1024")
    parser.add_argument("--seconds", type=float, default=290.0, help="after which no step begins")
    parser.add_argument("--out", type=Path, required=True, help="folder for facts.json")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    device, dtype, usual = pick_device(options.device), getattr(torch, options.dtype), largest_batch_size(LENGTH)
    steps = Steps(options.out, options.seconds)
    steps.run("machine", partial(machine, device), least=0)
    with torch.inference_mode():
        steps.run("products", partial(products, device, dtype), least=15)
        steps.run("attention", partial(attention, device, dtype), least=10)
        steps.run("generator", partial(generator, device, dtype), least=10)
    for name in (options.dtype, "float32"):
        steps.run(f"agreement in {name}", partial(agreement, device, name), least=40)
    model = build(options.model, dtype, device)
    for rows in options.rows or (usual, usual // 4, 1024):
        steps.run(f"{options.model}, poc2, {rows} rows", partial(paths, model, "poc2", rows), least=50)
    steps.run(f"{options.model}, poc3", partial(paths, model, "poc3", (options.rows or [usual])[0]), least=50)


if __name__ == "__main__":
    main()
