"""Measure how far a mixture of experts gives other results when a nonce has other neighbours, or other kernels round.

Usage: python -m scripts.trials.mixtures [--forms NAME …] [--layers 24] [--nonces 24] [--seq-len 32] [--scheme poc2]
           [--dtypes float32 bfloat16] [--json]

Each row compares two ways of computing the same nonces, on random weights of hidden size 64 with 128 experts of which
8 compute a position: the largest difference of a result, the share of nonces further apart than the default tolerance,
and milliseconds per nonce of the first way and of the second. The first rows must be 0: nothing but a nonce's
neighbours differs. In the others other kernels round elsewhere, and a router turns where two experts are all but equal.
What a verdict makes of that is the same in each row of a form and dtype: the mean chance that a router turns a nonce,
and the share of nonces that are near a router's boundary. None that is not near should be beyond the tolerance.

It needs torch, transformers and rich, and a checkout: no installation.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from pocd.compute.engine import block_run
from pocd.compute.margins import measure_chances
from pocd.compute.model import adapt
from pocd.protocol.mixtures import NEAR
from pocd.protocol.names import DTYPES, default_tolerance
from pocd.protocol.schemes import SCHEMES
from scripts.bench.models import random_model, rounded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pocd.compute.model import Model
    from pocd.protocol.schemes import Scheme

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 8,
}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": ("Qwen3Moe", {"num_experts": 128, "moe_intermediate_size": 32, "norm_topk_prob": True}),
    "minimax-m2": ("MiniMaxM2", {"num_local_experts": 128, "intermediate_size": 32}),
    "dense": ("Qwen3", {"intermediate_size": 256}),
}
ROWS = 8  # of a batch


@dataclass(frozen=True)
class Row:
    """How far two ways of computing the same nonces lie apart; milliseconds are per nonce.

    Attributes:
        beyond: Share of nonces further apart than the default tolerance.
        turned: Mean chance that a router turns; None in a dense model, as `near` is.
        near: Share of nonces near a router's boundary.
        wide_beyond: Share of all nonces that are not near, and further apart than the tolerance.
    """

    form: str
    dtype: str
    between: str
    largest: float
    beyond: float
    first_ms: float
    second_ms: float
    turned: float | None
    near: float | None
    wide_beyond: float


class Sampler:
    """Computes the same nonces of a model in different ways."""

    def __init__(self, scheme: Scheme, count: int, seq_len: int) -> None:
        self.scheme, self.seq_len = scheme, seq_len
        self.nonces = list(range(count))

    def of(
        self, model: Model, *, batch_size: int = ROWS, nonces: list[int] | None = None
    ) -> tuple[torch.Tensor, float]:
        """Return results in the order of the nonces' numbers, and milliseconds per nonce."""
        order = self.nonces if nonces is None else nonces
        with block_run(model, self.scheme, block_hash="a", public_key="b", seq_len=self.seq_len) as run:
            run.values(order[:batch_size], batch_size=batch_size)
            start = time.perf_counter()
            values = run.values(order, batch_size=batch_size)
            taken = 1000 * (time.perf_counter() - start) / len(order)
        return values[torch.tensor(order).argsort()], taken

    def chances(self, model: Model) -> torch.Tensor | None:
        """Return how probable it is that a router turns, by nonce; None in a dense model."""
        with block_run(model, self.scheme, block_hash="a", public_key="b", seq_len=self.seq_len) as run:
            return measure_chances(run, self.nonces, batch_size=ROWS)


def pairs(
    model: Model, sampler: Sampler
) -> Iterator[tuple[str, tuple[torch.Tensor, float], tuple[torch.Tensor, float]]]:
    """Yield two ways of computing, and what they give."""
    base = sampler.of(model)
    others = torch.randperm(len(sampler.nonces), generator=torch.Generator().manual_seed(0)).tolist()
    yield "neighbours", base, sampler.of(model, nonces=others)
    for size in (1, 4):
        yield f"batch size {ROWS} and {size}", base, sampler.of(model, batch_size=size)
    by_layers = replace(model, decoder=model.by_layers)
    layers = sampler.of(by_layers)
    yield "by layers: batch size 8 and 1", layers, sampler.of(by_layers, batch_size=1)
    if model.decoder is not model.by_layers:
        yield "flat and layers", base, layers
    own = model.causal.config._experts_implementation  # noqa: SLF001 - transformers has no other name for it
    model.causal.set_experts_implementation("eager")
    yield "by layers: our experts and transformers' eager", layers, sampler.of(by_layers)
    model.causal.set_experts_implementation(own)
    model.causal.set_attn_implementation("eager")
    yield "by layers: SDPA and eager attention", layers, sampler.of(by_layers)
    model.causal.set_attn_implementation("sdpa")


def measure(options: argparse.Namespace, tell: Callable[[Row], None]) -> None:
    """Measure every form in every dtype."""
    scheme = SCHEMES[options.scheme]
    sampler = Sampler(scheme, options.nonces, options.seq_len)
    for form in options.forms:
        family, shape = FORMS[form]
        for dtype in options.dtypes:
            causal = random_model(family, num_hidden_layers=options.layers, **COMMON, **shape)
            model = adapt(rounded(causal, getattr(torch, dtype)), name=form)
            tolerance, chances = default_tolerance(dtype, scheme, model.hidden_size), sampler.chances(model)
            is_near = torch.zeros(options.nonces, dtype=torch.bool) if chances is None else chances > NEAR
            turned, near = (None, None) if chances is None else (float(chances.mean()), float(is_near.float().mean()))
            for between, (one, first_ms), (other, second_ms) in pairs(model, sampler):
                apart = (one - other).abs().view(len(one), -1).amax(dim=1)
                is_beyond = apart > tolerance
                beyond, wide = (float(each.float().mean()) for each in (is_beyond, is_beyond & ~is_near))
                tell(Row(form, dtype, between, float(apart.max()), beyond, first_ms, second_ms, turned, near, wide))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--nonces", type=int, default=24)
    parser.add_argument("--seq-len", type=int, default=32)
    parser.add_argument("--scheme", default="poc2", choices=list(SCHEMES))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(DTYPES))
    parser.add_argument("--json", action="store_true", help="print one line of JSON per row")
    options = parser.parse_args()
    if options.json:
        measure(options, lambda row: print(json.dumps(asdict(row)), flush=True))
        return
    table = Table(
        "form",
        "dtype",
        "between",
        "largest",
        "beyond",
        "ms",
        "ms",
        "turned",
        "near",
        "not near, beyond",
        box=box.SIMPLE,
    )

    def tell(row: Row) -> None:
        figures = f"{row.largest:.1e}", f"{row.beyond:.0%}", f"{row.first_ms:.1f}", f"{row.second_ms:.1f}"
        weighed = ("–" if row.turned is None else f"{row.turned:.1%}", "–" if row.near is None else f"{row.near:.0%}")
        table.add_row(row.form, row.dtype, row.between, *figures, *weighed, f"{row.wide_beyond:.0%}")

    measure(options, tell)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
