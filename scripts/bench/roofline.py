"""Predict what a card does for a model: nonces per second, from the arithmetic and the traffic of each layer.

Usage: python -m scripts.bench.roofline [--card "NVIDIA H200"] [--models NAME …] [--scheme poc2] [--seq-len 256]

What a card reaches was measured of it, or is a share of its data sheet, as `CARDS` says. What kernels read and write
is what the captured path's compiled kernels do; eagerly there are more of them, which `EAGER` stands for. What is
small beside this, and what the host does meanwhile, is left out. `bench.engine` prints the prediction beside what it
measures. It needs transformers and rich, and no GPU.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from pocd.protocol.schemes import SCHEMES

if TYPE_CHECKING:
    from pocd.protocol.schemes import Scheme

HALF = 2  # bytes of a number
OVERLAPPED = 0.5  # of a product's traffic, which its arithmetic hides
PRODUCTS = 0.91  # share of a large product's rate that others reach, beside the traffic
GROUPED = 0.55  # share of that which products of groups of rows reach; assumed
ELEMENTWISE = 0.88  # share of a copy's rate that other kernels reach
ATTENTION = 0.38  # share of a large product's rate that attention reaches
EAGER = 152 / 48  # traffic between products, eagerly, over that of compiled kernels
DRAWING = 7.2e-12 * 4.3e12  # bytes in whose time one normal number is drawn


@dataclass(frozen=True, slots=True)
class Card:
    """What a GPU reaches.

    Attributes:
        copy: Bytes per second of a copy, read and written.
        product: FLOP per second of a large product of matrices in half precision.
        basis: Where both come from.
    """

    copy: float
    product: float
    basis: str


def _by_data_sheet(bandwidth: float, product: float) -> Card:
    return Card(0.9 * bandwidth, 0.8 * product, "of the data sheet as much as an H200 reaches")


# By the names that CUDA gives them.
CARDS = {
    "NVIDIA H200": Card(4.3e12, 790e12, "measured, not by this project"),
    "NVIDIA H100 80GB HBM3": _by_data_sheet(3.35e12, 989e12),
    "NVIDIA A100-SXM4-80GB": _by_data_sheet(2.04e12, 312e12),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a decoder of the Llama form.

    Attributes:
        layers: Number of layers.
        hidden: Size of hidden states.
        queries: Size of all heads of queries.
        keys: Size of all heads of keys, and that of values.
        inner: Inner size of the MLP, or of one expert.
        experts: Number of experts; 0 for a plain MLP.
        top: Experts that compute a position; 1 for a plain MLP.
    """

    layers: int
    hidden: int
    queries: int
    keys: int
    inner: int
    experts: int = 0
    top: int = 1


def shape_of(config: Any) -> Shape:  # noqa: ANN401 - transformers gives its configurations no common type
    """Return the shape that a configuration of transformers has."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    experts: int = getattr(config, "num_experts", 0) or getattr(config, "num_local_experts", 0)
    return Shape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        queries=config.num_attention_heads * head,
        keys=config.num_key_value_heads * head,
        inner=getattr(config, "moe_intermediate_size", config.intermediate_size),
        experts=experts,
        top=config.num_experts_per_tok if experts else 1,
    )


def predict(card: Card, shape: Shape, scheme: Scheme, seq_len: int, *, is_eager: bool = False) -> float:
    """Return nonces per second in half precision.

    Args:
        card: What the GPU reaches.
        shape: The model's shape.
        scheme: The scheme; one that reads the last position only leaves out most of the last layer.
        seq_len: Positions of each nonce.
        is_eager: Whether each kernel runs by itself, rather than compiled with others.
    """
    more = EAGER if is_eager else 1.0
    whole = _products(card, shape) + _attention(card, shape, seq_len) + more * _between(card, shape)
    layers = seq_len * whole * shape.layers
    if not scheme.reads_all:  # of the last layer only keys and values of all positions are there
        alone = _product(card, shape.hidden, 2 * shape.keys)
        alone += more * (2 * shape.hidden + 2 * shape.keys) * HALF / (ELEMENTWISE * card.copy)
        layers += seq_len * (alone - whole)
    drawing = seq_len * shape.hidden * DRAWING / card.copy
    reading = seq_len * shape.hidden * HALF / (ELEMENTWISE * card.copy) if scheme.reads_all else 0.0
    return 1 / (layers + drawing + reading)


def predict_path(card: str, config: Any, scheme: Scheme, seq_len: int, dtype: str, path: str) -> float | None:  # noqa: ANN401 - as above
    """Return nonces per second of a model's path on a card of this name; None where nothing is known of it."""
    if card not in CARDS or dtype == "float32":
        return None
    return predict(CARDS[card], shape_of(config), scheme, seq_len, is_eager=path == "eager")


def _product(card: Card, ins: int, outs: int, *, share: float = 1.0) -> float:
    """Return the seconds of a product for one position, of so many inputs and outputs."""
    return 2 * ins * outs / (share * PRODUCTS * card.product) + OVERLAPPED * (ins + outs) * HALF / card.copy


def _products(card: Card, shape: Shape) -> float:
    """Return the seconds of a layer's products for one position: of what has the same input, one."""
    seconds = _product(card, shape.hidden, shape.queries + 2 * shape.keys) + _product(card, shape.queries, shape.hidden)
    share = GROUPED if shape.experts else 1.0
    inner = _product(card, shape.hidden, 2 * shape.inner, share=share)
    inner += _product(card, shape.inner, shape.hidden, share=share)
    return seconds + shape.top * inner + (_product(card, shape.hidden, shape.experts) if shape.experts else 0.0)


def _attention(card: Card, shape: Shape, seq_len: int) -> float:
    """Return the seconds of attention for one position: its scores are causal, so half of them."""
    traffic = (2 * shape.queries + 2 * shape.keys) * HALF
    return 2 * seq_len * shape.queries / (ATTENTION * card.product) + OVERLAPPED * traffic / card.copy


def _between(card: Card, shape: Shape) -> float:
    """Return the seconds of a layer's other kernels for one position.

    They are: norm; norm and turn of queries and keys; sum and norm; gate times up; join.
    """
    numbers = (2 + 3 + 4) * shape.hidden + 2 * (shape.queries + shape.keys) + 3 * shape.top * shape.inner
    if shape.experts:  # rows are sorted by expert; results are put back, and added up
        numbers += 2 * (shape.top + 1) * shape.hidden
    return numbers * HALF / (ELEMENTWISE * card.copy)


def main() -> None:
    """Print predictions."""
    from scripts.bench.models import LARGE, SHAPES, config_of  # noqa: PLC0415 - the prediction itself needs no torch

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--card", choices=CARDS, default="NVIDIA H200")
    parser.add_argument("--models", nargs="+", choices=LARGE, default=LARGE)
    parser.add_argument("--scheme", choices=SCHEMES, default="poc2")
    parser.add_argument("--seq-len", type=int, default=256)
    options = parser.parse_args()
    card, scheme = CARDS[options.card], SCHEMES[options.scheme]
    table = Table("model", "captured", "eager", box=box.SIMPLE)
    for name in options.models:
        shape = shape_of(config_of(*SHAPES[name]))
        rates = (predict(card, shape, scheme, options.seq_len, is_eager=is_eager) for is_eager in (False, True))
        table.add_row(name, *(f"{rate:,.0f}" for rate in rates))
    console = Console(highlight=False)
    console.print(f"{options.card} ({card.basis}), {scheme.name}, {options.seq_len} positions: nonces/s, predicted")
    console.print(table)


if __name__ == "__main__":
    main()
