"""Measure the engine against the bare model, and against the protocol written plainly.

Usage: python -m scripts.bench.engine [--models NAME …] [--seq-len 256] [--batch-size N] [--dtype float32]
           [--device cpu] [--repeats 7] [--scheme poc2] [--compiled] [--profile] [--growth] [--json]

In one process, interleaved, each figure the median of several samples, as nonces per second:
(a) plain: `tests/reference/plain_torch.py`, one nonce at a time, for `poc2`; for another scheme the engine with `poc2`;
(b) bare: transformers' decoder on ready inputs, model.model(inputs_embeds=…, use_cache=False);
(c) engine: from nonces to distances; on a GPU several batches, with the next under way.
The ratios c/a and c/b are medians over the rounds of sampling, each of samples taken one after the
other, so that a machine that others use too distorts them least. FLOP/s count the bare model's
forward pass; their share is of the rate that a large matrix product reaches here.

It needs torch, transformers, numpy, scipy and rich, and a checkout: no installation.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import platform
import re
import statistics
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table

from pocd.compute.compiled import compile_model
from pocd.compute.engine import BlockRun, block_run
from pocd.compute.model import Model, adapt
from pocd.protocol.names import DTYPES, largest_batch_size
from pocd.protocol.schemes import SCHEMES
from scripts.bench.models import LARGE, NAMES, build, random_model
from scripts.bench.profiling import shares
from scripts.bench.roofline import predict_path
from tests.reference.plain_torch import PlainRun

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from pocd.protocol.schemes import Scheme

BLOCK, KEY = "block_alpha", "bench"
BATCHES = {"cpu": 1, "cuda": 8}  # of the engine in one sample
SMALL = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Figures:
    """Measurements of one model in one shape. Rates are nonces per second, memory is MiB above what was held before."""

    model: str
    path: str
    scheme: str
    parameters: int
    hidden_size: int
    dtype: str
    seq_len: int
    batch_size: int
    plain: float | None
    poc2: float | None
    bare: float
    engine: float
    engine_over_plain: float | None
    engine_over_poc2: float | None
    engine_over_bare: float
    gflop_per_nonce: float
    bare_gflops: float
    engine_gflops: float
    engine_share_of_matrix_rate: float
    generator_share: float
    round_seconds: float
    bare_memory: float
    engine_memory: float
    predicted: float | None
    profile: dict[str, float] | None = None
    compile_seconds: float | None = None
    compiled_bare_seconds: float | None = None


def flop_per_nonce(model: Model, seq_len: int) -> float:
    """Return the FLOP of one bare forward pass: two per multiply-add of matrices and of attention's causal half."""
    config = model.causal.config
    matrices = sum(p.numel() for layer in model.by_layers.layers for p in layer.parameters() if p.dim() == 2)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention: float = 2 * seq_len**2 * config.num_attention_heads * head_dim * model.layers
    return 2 * matrices * seq_len + attention


class Bench:
    """Times calls on one device."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, repeats: int, scheme: Scheme, *, profiled: bool
    ) -> None:
        self.device, self.dtype, self.repeats, self.scheme = device, dtype, repeats, scheme
        self.profiled = profiled
        is_gpu = device.type == "cuda"
        self.machine = torch.cuda.get_device_name(device) if is_gpu else platform.processor() or "cpu"

    def seconds(self, call: Callable[[], object]) -> float:
        """Return the seconds that `call` takes, with all that it leaves to the device."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Wait until the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def interleaved(self, calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Return the seconds of each call, `repeats` times, in turns; after one run of each that does not count."""
        for call in calls.values():
            call()
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(self.repeats):
            for name, call in calls.items():
                samples[name].append(self.seconds(call))
        return samples

    def peak_memory(self, call: Callable[[], object]) -> float:
        """Return the MiB that `call` needs at its peak, above what is held before it."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            call()
            return float(torch.cuda.max_memory_allocated() - held) / 2**20
        ctypes.CDLL(None).malloc_trim(0)  # what is free must not hide what the call takes
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak (proc(5))
        held = status_kib("VmRSS")
        call()
        return (status_kib("VmHWM") - held) / 1024

    def reserved(self) -> float:
        """Return the MiB of a GPU that are in use or in a graph's own pool; 0 on the CPU, which holds nothing."""
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved() / 2**20 if self.device.type == "cuda" else 0.0

    @torch.inference_mode()
    def matrix_rate(self) -> float:
        """Return the FLOP/s of a large matrix product, the best of several."""
        size = 8192 if self.device.type == "cuda" else 2048
        a = torch.randn(size, size, device=self.device).to(self.dtype)
        fastest = min(self.seconds(lambda: a @ a) for _ in range(5 + self.repeats))
        return 2.0 * size * size * size / fastest


def status_kib(field: str) -> int:
    """Return one of the memory figures of this process (proc(5)), in KiB."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match, field
    return int(match[1])


def measure(bench: Bench, model: Model, seq_len: int, batch_size: int, *, plain: bool, rate: float) -> Figures:
    """Measure one model in one shape."""
    inputs = torch.randn(batch_size, seq_len, model.hidden_size, device=bench.device).to(bench.dtype)
    bare_model = model.by_layers.decoder

    @torch.inference_mode()
    def bare() -> object:
        return bare_model(inputs_embeds=inputs, use_cache=False)

    def prepare() -> None:
        with block_run(model, bench.scheme, block_hash="another", public_key=KEY, seq_len=seq_len):
            pass

    with ExitStack() as runs:
        run, baseline = (
            runs.enter_context(block_run(model, scheme, block_hash=BLOCK, public_key=KEY, seq_len=seq_len))
            for scheme in (bench.scheme, SCHEMES["poc2"])
        )
        nonces, batches = list(range(batch_size)), BATCHES[bench.device.type]
        calls: dict[str, Callable[[], object]] = {
            "bare": bare,
            "engine": lambda: run.values(range(batches * batch_size), batch_size=batch_size),
            "generator": lambda: generate(run, nonces),
        }
        if bench.scheme.name != "poc2":
            calls["poc2"] = lambda: baseline.distances(nonces, batch_size=batch_size)
        elif plain:
            calls = {"plain": plain_call(model, seq_len)} | calls
        samples = bench.interleaved(calls)
        samples["engine"] = [seconds / batches for seconds in samples["engine"]]
        memory = {name: bench.peak_memory(calls[name]) for name in ("bare", "engine")}
        profile = shares(run, batch_size, bench.repeats) if bench.profiled else None
    middle = {name: statistics.median(values) for name, values in samples.items()}
    flop, dtype = flop_per_nonce(model, seq_len), str(model.dtype).removeprefix("torch.")

    def over(name: str, nonces_per_sample: int) -> float | None:
        if name not in samples:
            return None
        pairs = zip(samples[name], samples["engine"], strict=True)
        return statistics.median(batch_size / nonces_per_sample * other / engine for other, engine in pairs)

    return Figures(
        model=model.name,
        path=model.execution.path,
        scheme=bench.scheme.name,
        parameters=sum(p.numel() for p in model.causal.parameters()),
        hidden_size=model.hidden_size,
        dtype=dtype,
        seq_len=seq_len,
        batch_size=batch_size,
        plain=1 / middle["plain"] if "plain" in middle else None,
        poc2=batch_size / middle["poc2"] if "poc2" in middle else None,
        bare=batch_size / middle["bare"],
        engine=batch_size / middle["engine"],
        engine_over_plain=over("plain", 1),
        engine_over_poc2=over("poc2", batch_size),
        engine_over_bare=cast("float", over("bare", batch_size)),
        gflop_per_nonce=flop / 1e9,
        bare_gflops=flop * batch_size / middle["bare"] / 1e9,
        engine_gflops=flop * batch_size / middle["engine"] / 1e9,
        engine_share_of_matrix_rate=flop * batch_size / middle["engine"] / rate,
        generator_share=middle["generator"] / middle["engine"],
        round_seconds=statistics.median(bench.seconds(prepare) for _ in range(bench.repeats)),
        bare_memory=memory["bare"],
        engine_memory=memory["engine"],
        predicted=predict_path(bench.machine, model.causal.config, bench.scheme, seq_len, dtype, model.execution.path),
        profile=profile,
    )


@torch.inference_mode()
def generate(run: BlockRun, nonces: list[int]) -> None:
    """Draw and use all random numbers of a batch: inputs, and the reflections' vectors or the signs."""
    run.hidden(run.readout(run.inputs(nonces), nonces), nonces)


def plain_call(model: Model, seq_len: int) -> Callable[[], object]:
    """Return the call of (a), the plain protocol: the next nonce each time; head, vectors and target are drawn once."""
    plain, nonces = PlainRun(model.causal, BLOCK, KEY, seq_len), itertools.count()
    return lambda: plain.distance(next(nonces))


def compiled(bench: Bench, model: Model, figures: Figures, rate: float) -> Figures:
    """Measure once more with the bare decoder and the engine's both compiled; compile times are separate."""
    before = bench.reserved()
    fast = compile_model(model, "always", scheme=bench.scheme, seq_len=figures.seq_len, batch_size=figures.batch_size)
    held = bench.reserved() - before
    start = time.perf_counter()
    fast = replace(
        fast, by_layers=replace(model.by_layers, decoder=cast("nn.Module", torch.compile(model.by_layers.decoder)))
    )
    shape = (figures.batch_size, figures.seq_len, model.hidden_size)
    with torch.inference_mode():
        fast.by_layers.decoder(
            inputs_embeds=torch.zeros(shape, device=bench.device, dtype=bench.dtype), use_cache=False
        )
    bare_seconds = time.perf_counter() - start
    found = measure(bench, fast, figures.seq_len, figures.batch_size, plain=False, rate=rate)
    return replace(
        found,
        model=f"{model.name}+c",
        engine_memory=found.engine_memory + held,
        compile_seconds=fast.execution.seconds,
        compiled_bare_seconds=bare_seconds,
    )


def growth(bench: Bench, rate: float) -> list[Figures]:
    """Measure how cost grows with sequence length, batch size and hidden size."""
    model = build("bundled:tiny-qwen3", bench.dtype, bench.device)
    found = [measure(bench, model, length, 8, plain=False, rate=rate) for length in (64, 128, 256, 512, 1024)]
    found += [measure(bench, model, 256, size, plain=False, rate=rate) for size in (1, 4, 16, 64)]
    for hidden in (64, 128, 256, 512, 1024):
        causal = random_model("Qwen3", hidden_size=hidden, head_dim=hidden // 4, intermediate_size=3 * hidden, **SMALL)
        other = adapt(causal.to(bench.device, bench.dtype), name=f"4 layers, hidden {hidden}")
        found.append(measure(bench, other, 256, 8, plain=False, rate=rate))
    return found


def table(title: str, rows: list[Figures]) -> Table:
    """Return a table for 80 columns."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    baseline, ratio = ("poc2", "c/poc2") if any(row.poc2 for row in rows) else ("plain", "c/a")
    for name in ("model", "S", "B", baseline, "bare", "engine", ratio, "c/b", "GFLOP/s", "peak", "gen", "MiB"):
        made.add_column(name, justify="left" if name == "model" else "right", no_wrap=name != "model")
    for row in rows:
        made.add_row(
            row.model.removeprefix("bundled:"),
            str(row.seq_len),
            str(row.batch_size),
            rounded(row.poc2 or row.plain, ".3g"),
            f"{row.bare:.3g}",
            f"{row.engine:.3g}",
            rounded(row.engine_over_poc2 or row.engine_over_plain, ".2f"),
            f"{row.engine_over_bare:.2f}",
            f"{row.engine_gflops:.0f}",
            f"{row.engine_share_of_matrix_rate:.0%}",
            f"{row.generator_share:.0%}",
            f"{row.engine_memory:.0f}",
        )
    return made


def rounded(value: float | None, digits: str) -> str:
    """Return a number as text for the table; empty for None."""
    return "" if value is None else format(value, digits)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES[:3])
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, help="default: as 'auto' begins; 4 for the large ones on the CPU")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--scheme", choices=SCHEMES, default="poc2")
    parser.add_argument("--compiled", action="store_true", help="both compiled too")
    parser.add_argument("--profile", action="store_true", help="where the engine's time goes too")
    parser.add_argument("--growth", action="store_true", help="how cost grows with S, B and H too")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    return parser.parse_args()


def main() -> None:
    """Measure, and print."""
    options = parse()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    device = torch.device(options.device)
    bench = Bench(
        device, getattr(torch, options.dtype), options.repeats, SCHEMES[options.scheme], profiled=options.profile
    )
    rate = bench.matrix_rate()
    rows, more = [], []
    for name in options.models:
        model = build(name, bench.dtype, device)
        small = 4 if name in LARGE else 32
        usual = small if device.type == "cpu" else largest_batch_size(options.seq_len)
        batch_size = options.batch_size or usual
        rows.append(measure(bench, model, options.seq_len, batch_size, plain=True, rate=rate))
        if options.compiled:
            rows.append(compiled(bench, model, rows[-1], rate))
    if options.growth:
        more = growth(bench, rate)
    facts = {
        "device": bench.machine,
        "threads": options.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "matrix_gflops": rate / 1e9,
    }
    if options.json:
        print(json.dumps(facts | {"models": [asdict(row) for row in rows], "growth": [asdict(row) for row in more]}))
        return
    console = Console(highlight=False)
    console.print(
        f"{bench.machine}, {options.threads} threads, torch {torch.__version__}, {options.dtype}, {options.scheme}"
    )
    console.print(f"a large matrix product reaches {rate / 1e9:.0f} GFLOP/s")
    console.print(table("nonces/s of (a) plain, (b) bare and (c) engine", rows))
    console.print("S sequence length, B batch size; peak: GFLOP/s as a share of the product's;")
    console.print("gen: share of the engine's time for random numbers; MiB: its peak above the model;")
    console.print("+c: bare and engine compiled")
    for row in rows:
        line = f"{row.model.removeprefix('bundled:')}: {row.round_seconds * 1000:.0f} ms to prepare a round"
        if row.compile_seconds is not None:
            line += f"; compiled in {row.compile_seconds:.0f} s (the bare decoder: {row.compiled_bare_seconds:.0f} s)"
        if row.predicted is not None:
            line += (
                f"; {row.predicted:,.0f} nonces/s were predicted, so it does {row.engine / row.predicted:.2f} of that"
            )
        console.print(line)
        if row.profile is not None:
            parts = ", ".join(f"{group} {share:.1%}" for group, share in row.profile.items())
            console.print(f"  {row.path}: {parts}")
    if more:
        console.print(table("how cost grows", more))


if __name__ == "__main__":
    main()
