"""Measure what depth does to rounding: honest ways of computing against each other, and against float32 arithmetic.

Usage: python -m scripts.trials.depth [--models NAME …] [--schemes NAME …] [--dtypes bfloat16 float16] [--nonces 32]
           [--seq-len 32] [--hidden-size 256] [--json]

NAME is a model (bundled:NAME, a folder) or random:LAYERS, random weights of the Qwen3 form. The ways differ in where
they round, as kernels do:

- engine: the flat decoder, which rounds after each operation;
- fused: float32 arithmetic within a block, which is rounded once, at its end;
- once: products in float32 whose result is rounded, where the engine leaves it to the library;
- split: products in two halves, each rounded before they are added.

All are in units of the scatter of results between nonces, by float32 arithmetic on the same rounded weights (the
reference). *error*: the root mean square of the difference from the reference, of the worst way. *apart*: the same
between the two ways that lie furthest apart; √2 and more is nothing in common. *correlation*: of the same two.
*flipped*: the share of valid nonces of the one that are invalid for the other, with the default tolerance, where one
nonce in ten is valid.

It needs torch, transformers, numpy, scipy and rich, and a checkout: no installation.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch.nn import functional

from pocd.compute.conditioning import reference_of
from pocd.compute.engine import block_run
from pocd.compute.flat import FlatDecoder, Gated
from pocd.compute.model import adapt, load_model
from pocd.protocol.conditioning import flipped_share
from pocd.protocol.names import DTYPES, default_tolerance
from pocd.protocol.schemes import SCHEMES
from scripts.bench.models import random_model, rounded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from pocd.compute.engine import BlockRun
    from pocd.compute.flat import Form, LayerWeights, Linear
    from pocd.compute.model import Model
    from pocd.compute.transforms import Join

    Product = Callable[[torch.Tensor, Linear], torch.Tensor]

BATCH = 8


# Ways of computing a layer.


def _in_float32(x: torch.Tensor, matrix: Linear) -> torch.Tensor:
    bias = None if matrix.bias is None else matrix.bias.float()
    return functional.linear(x.float(), matrix.weight.float(), bias)


def _rounded_once(x: torch.Tensor, matrix: Linear) -> torch.Tensor:
    return _in_float32(x, matrix).to(x.dtype)


def _split(x: torch.Tensor, matrix: Linear) -> torch.Tensor:
    half = x.shape[-1] // 2
    first = functional.linear(x[..., :half], matrix.weight[:, :half], matrix.bias)
    return first + functional.linear(x[..., half:], matrix.weight[:, half:])


def _norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return functional.rms_norm(x, weight.shape, weight.to(x.dtype), epsilon)


def _rotate(x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * turn[0].to(x.dtype) + torch.cat([-second, first], dim=-1) * turn[1].to(x.dtype)


class Way:
    """Runs one layer as `run_layer` does, with other places at which it rounds.

    Args:
        product: Multiplies by a matrix.
        within: Precision of what is between products; None for the model's own.
    """

    def __init__(self, product: Product, within: torch.dtype | None = None) -> None:
        self._product = product
        self._within = within

    def __call__(
        self,
        stream: torch.Tensor,
        weights: LayerWeights,
        turn: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        vector: torch.Tensor,
        *,
        form: Form,
        join: Join,
        first: int,
    ) -> torch.Tensor:
        """Run one layer, with all positions; see `run_layer`."""
        dtype, product = stream.dtype, self._product
        x = stream.to(self._within or dtype)
        h = _norm(x, weights.input_norm, form.epsilon)
        size = turn[0].shape[-1]  # of a head
        query, key, value = (product(h, part).unflatten(-1, (-1, size)) for part in weights.attention.parts)
        if weights.query_norm is not None and weights.key_norm is not None:
            query = _norm(query, weights.query_norm, form.epsilon)
            key = _norm(key, weights.key_norm, form.epsilon)
        mixed = functional.scaled_dot_product_attention(
            _rotate(query, turn).transpose(1, 2),
            _rotate(key, turn).transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            scale=form.scale,
            enable_gqa=form.heads != form.kv_heads,
        )
        x = (product(mixed.transpose(1, 2).flatten(2), weights.output) + x).to(dtype).to(x.dtype)
        h = _norm(x, weights.mlp_norm, form.epsilon)
        mlp = weights.mlp
        assert isinstance(mlp, Gated), "mixtures of experts have no other ways here"
        gate, up = (product(h, part) for part in mlp.gate_up.parts)
        branch = product(form.activation(gate) * up, mlp.down)
        return join(branch, x, vector).to(dtype)[:, first:]


WAYS = {"fused": Way(_in_float32, torch.float32), "once": Way(_rounded_once), "split": Way(_split)}


# Measuring.


@dataclass(frozen=True)
class Row:
    """Figures of one model, dtype and scheme; of the ways that lie furthest apart, and which those are."""

    model: str
    layers: int
    dtype: str
    scheme: str
    error: float
    apart: float
    correlation: float
    flipped: float | None
    between: str


def build(name: str, dtype: str, hidden_size: int) -> Model:
    """Make a model, or load it."""
    kind, _, layers = name.partition(":")
    if kind != "random":
        return load_model(name, dtype=dtype, device="cpu")
    causal = random_model(
        "Qwen3",
        num_hidden_layers=int(layers),
        hidden_size=hidden_size,
        intermediate_size=5 * hidden_size // 2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
    )
    return adapt(rounded(causal, getattr(torch, dtype)), name=name)


def results(run: BlockRun, decoder: Any, nonces: int) -> NDArray[np.float64]:  # noqa: ANN401 - of any kind
    """Return distances [n], or vectors' numbers [12 n], of one way."""
    way = replace(run, model=replace(run.model, decoder=decoder))
    return way.values(range(nonces), batch_size=BATCH).double().flatten().numpy()


def measure(model: Model, scheme: str, dtype: str, nonces: int, seq_len: int) -> Row:
    """Compare all ways."""
    assert isinstance(model.decoder, FlatDecoder), "the ways are of the flat decoder"
    with block_run(model, SCHEMES[scheme], block_hash="block_alpha", public_key="depth", seq_len=seq_len) as run:
        exact = reference_of(run).values(range(nonces), batch_size=BATCH).double().flatten().numpy()
        found = {"engine": results(run, model.decoder, nonces)}
        found |= {name: results(run, replace(model.decoder, layer=way), nonces) for name, way in WAYS.items()}
    scatter = exact.std()

    def size(difference: NDArray[np.float64]) -> float:
        return float(np.sqrt(np.mean(difference**2)) / scatter)

    one, other = max(itertools.combinations(found, 2), key=lambda pair: size(found[pair[0]] - found[pair[1]]))
    apart = size(found[one] - found[other])
    is_vector = SCHEMES[scheme].output == "vector"
    tolerance = default_tolerance(dtype, SCHEMES[scheme], model.hidden_size) / scatter
    return Row(
        model=model.name,
        layers=model.layers,
        dtype=dtype,
        scheme=scheme,
        error=max(size(each - exact) for each in found.values()),
        apart=apart,
        correlation=float(np.corrcoef(found[one], found[other])[0, 1]),
        flipped=None if is_vector else flipped_share(apart / np.sqrt(2), float(tolerance)),
        between=f"{one}, {other}",
    )


def table(rows: Sequence[Row]) -> Table:
    """Return the rows for people."""
    made = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for head in ("model", "layers", "dtype", "scheme", "error", "apart", "correlation", "flipped", "between"):
        made.add_column(head, justify="left" if head in {"model", "dtype", "scheme", "between"} else "right")
    for row in rows:
        flipped = "–" if row.flipped is None else f"{row.flipped:.2%}"
        figures = (f"{row.error:.3f}", f"{row.apart:.3f}", f"{row.correlation:.3f}", flipped)
        made.add_row(row.model, str(row.layers), row.dtype, row.scheme, *figures, row.between)
    return made


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    models = ["bundled:tiny-qwen3", "bundled:tiny-llama", *(f"random:{layers}" for layers in (4, 8, 16, 24, 28))]
    parser.add_argument("--models", nargs="+", default=models, metavar="NAME")
    parser.add_argument("--schemes", nargs="+", default=["poc2", "poc3", "trained", "poc4"], choices=SCHEMES)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"], choices=DTYPES)
    parser.add_argument("--nonces", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=32)
    parser.add_argument("--hidden-size", type=int, default=256, help="of random models, a multiple of 16")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print."""
    options = parse(arguments)
    rows = []
    for name, dtype in itertools.product(options.models, options.dtypes):
        model = build(name, dtype, options.hidden_size)
        rows += [measure(model, scheme, dtype, options.nonces, options.seq_len) for scheme in options.schemes]
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    console = Console(highlight=False, width=max(110, Console().width))
    console.print(f"{options.nonces} nonces, sequence length {options.seq_len}, torch {torch.__version__}")
    console.print(table(rows))


if __name__ == "__main__":
    main()
