"""Measure what is open about vectors: the branch's weight, long sequences, and routers at a boundary.

Usage: python -m scripts.trials.vectors beta [--models NAME …] [--nonces 32] [--seq-len 32] [--dtype bfloat16]
       python -m scripts.trials.vectors length [--models NAME …] [--nonces 16] [--lengths 64 256 1024]
       python -m scripts.trials.vectors routing [--nonces 64] [--seq-len 32] [--experts 8]

NAME is a model (bundled:NAME, a folder) or random:LAYERS, as for `scripts.trials.depth`. All of scheme `poc4`.

- beta: the branch counts β = factor/√L. *Error*: of the dtype, as a share of a vector's size. *Own*: the least and
  the largest share of the outputs' squares that is the nonce's own, over four blocks: how even outputs are. *Last
  layer* and *8 bits*: error without the last layer, and with 8-bit weights and activations, in units of the dtype's.
- length: the same figures for longer sequences, and for *one position* missing; and *other way*: transformers' layers
  with products rounded once, which are honest.
- routing: a mixture of experts of random weights. *Flips*: the share of choices of an expert, by nonce, position and
  layer, that float32 arithmetic makes otherwise. *Touched*: nonces with at least one. *Error*: as above, of the nonces
  with few flips and of those with many, each half of them; *largest*: of one nonce, as a multiple of the median's.
  *Spread*: standard deviation of ln(its squared error / that of transformers' layers with products rounded once).

It needs torch, transformers, numpy, scipy and rich, and a checkout: no installation.
"""

from __future__ import annotations

import argparse
import functools
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch.nn.functional import linear

from pocd.compute.conditioning import OwnShare
from pocd.compute.engine import block_run
from pocd.compute.model import adapt
from pocd.compute.reference import reference_of
from pocd.compute.transforms import join_of
from pocd.lab.cheap import multiplying
from pocd.lab.few_bits import to_bits
from pocd.protocol.schemes import SCHEMES
from scripts.bench.models import random_model, rounded
from scripts.bench.rounding import rounded_once
from scripts.trials.depth import build

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from pocd.compute.engine import BlockRun
    from pocd.compute.model import Model
    from pocd.compute.transforms import Join
    from pocd.lab.cheap import Product

    Floats = NDArray[np.float64]

BATCH = 8
FACTORS = (0.25, 0.5, 1.0, 2.0)
BLOCKS = ("one", "two", "three", "four")
POC4 = SCHEMES["poc4"]


@dataclass(frozen=True)
class Weighing:
    """A decoder whose layers give their branch another weight than the scheme says."""

    decoder: Any
    weight: float
    kind = "weighing"

    def __call__(self, embeddings: torch.Tensor, _: Join, vectors: torch.Tensor, **options: bool) -> torch.Tensor:
        """Run the decoder; see `LayerDecoder`."""
        base = join_of(POC4.layer_step, 1)  # a partial, of weight 1
        assert isinstance(base, functools.partial), "it takes a weight"
        states: torch.Tensor = self.decoder(
            embeddings, functools.partial(base.func, weight=self.weight), vectors, **options
        )
        return states


def weighed(run: BlockRun, decoder: Any, weight: float) -> BlockRun:  # noqa: ANN401 - as above
    """Return the run with a decoder and a weight of the branch."""
    return replace(run, model=replace(run.model, decoder=cast("Any", Weighing(decoder, weight)), program=None))


@torch.inference_mode()
def readouts(run: BlockRun, nonces: int, share: OwnShare | None = None) -> Floats:
    """Return what is projected of each nonce [nonces, H], with the inputs of the model's dtype."""
    found = []
    for start in range(0, nonces, BATCH):
        batch = range(start, min(start + BATCH, nonces))
        states = run.states(batch)
        if share is not None:
            share.add(states)
        found.append(run.readout(states, batch).double().numpy())
    return np.concatenate(found)


def size(differences: Floats) -> float:
    """Return the root mean square of vectors' lengths."""
    return float(np.sqrt(np.square(differences).sum(axis=1).mean()))


def eight_bits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiply 8-bit activations by 8-bit weights."""
    return linear(to_bits(x, 8), to_bits(weight, 8), bias)


def by_product(model: Model, product: Product) -> AbstractContextManager[None]:
    """Let a model's layers multiply in another way while the context lasts."""
    return multiplying(model.by_layers.layers, product)


def without_last(run: BlockRun, nonces: int) -> Floats:
    """Return the readouts without the last layer, by its input."""
    layers = run.model.by_layers
    shorter = replace(layers, layers=layers.layers[:-1], forms=layers.forms[:-1])
    weight = run.model.decoder.weight if isinstance(run.model.decoder, Weighing) else run.model.layers**-0.5
    return readouts(weighed(run, shorter, weight), nonces)


def betas(model: Model, options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """Yield a row for each weight."""
    for factor in FACTORS:
        weight = factor * model.layers**-0.5
        shares = []
        for block in BLOCKS:
            with block_run(model, POC4, block_hash=block, public_key="b", seq_len=options.seq_len) as run:
                share, wide = OwnShare(), reference_of(run)
                exact = readouts(weighed(wide, wide.model.decoder, weight), options.nonces, share)
                shares.append(share.value())
                if block != BLOCKS[0]:
                    continue
                own = size(readouts(weighed(run, run.model.decoder, weight), options.nonces) - exact)
                shorter = size(without_last(weighed(run, run.model.decoder, weight), options.nonces) - exact)
                with by_product(model, eight_bits):
                    cheap = size(readouts(weighed(run, model.by_layers, weight), options.nonces) - exact)
                figures = (own / size(exact), shorter / own, cheap / own)
        error, last, bits = figures
        evenness = f"{min(shares):.2f} to {max(shares):.2f}"
        yield model.name, f"{factor:g}/√{model.layers}", f"{error:.2%}", evenness, f"{last:.1f}", f"{bits:.2f}"


def lengths(model: Model, options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """Yield a row for each length."""
    for length in options.lengths:
        with block_run(model, POC4, block_hash="one", public_key="b", seq_len=length) as run:
            exact = readouts(reference_of(run), options.nonces)
            own = size(readouts(run, options.nonces) - exact)
            by_layers, ways = weighed(run, model.by_layers, model.layers**-0.5), []
            for product in (rounded_once, eight_bits):
                with by_product(model, product):
                    ways.append(size(readouts(by_layers, options.nonces) - exact))
            ways += [size(way(run, options.nonces) - exact) for way in (without_last, one_missing)]
        yield model.name, str(length), f"{own / size(exact):.2%}", *(f"{way / own:.2f}" for way in ways)


@torch.inference_mode()
def one_missing(run: BlockRun, nonces: int) -> Floats:
    """Return the readouts where the last position was not computed, and counts nothing."""
    found = []
    for start in range(0, nonces, BATCH):
        batch = range(start, min(start + BATCH, nonces))
        states = run.states(batch).float()
        whole = run.readout(states, batch)
        states[:, -1] *= -1
        found.append(((whole + run.readout(states, batch)) / 2).double().numpy())
    return np.concatenate(found)


class Choices:
    """The experts that routers choose, in the order in which they are asked."""

    def __init__(self, causal: Any, hooks: ExitStack) -> None:  # noqa: ANN401 - transformers gives its classes no type
        self.found: list[torch.Tensor] = []
        self._most = causal.config.num_experts_per_tok
        for name, module in causal.named_modules():
            if name.endswith("mlp.gate"):
                hooks.enter_context(module.register_forward_hook(self._note))

    def _note(self, _module: object, _inputs: object, output: Any) -> None:  # noqa: ANN401 - a tensor, or several
        logits = output[0] if isinstance(output, tuple) else output
        self.found.append(logits.float().topk(self._most, dim=-1).indices.sort(dim=-1).values.view(-1, self._most))

    def take(self, layers: int, nonces: int) -> torch.Tensor:
        """Return the choices so far [nonces, layers · positions · experts], and forget them."""
        batches = [torch.stack(self.found[i : i + layers]) for i in range(0, len(self.found), layers)]
        self.found = []
        parts = [batch.unflatten(1, (BATCH, -1)).transpose(0, 1).flatten(1) for batch in batches]
        return torch.cat(parts)[:nonces]


def routing(options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """Yield a row for each dtype and depth."""
    for layers in (4, 12, 24):
        for dtype in ("bfloat16", "float16"):
            causal = random_model(
                "Qwen3Moe",
                num_hidden_layers=layers,
                hidden_size=128,
                intermediate_size=256,
                moe_intermediate_size=64,
                num_experts=options.experts,
                num_experts_per_tok=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=32,
            )
            model = adapt(rounded(causal, getattr(torch, dtype)), name=f"Qwen3-MoE, {layers} layers")
            with (
                ExitStack() as hooks,
                block_run(model, POC4, block_hash="one", public_key="b", seq_len=options.seq_len) as run,
            ):
                choices = Choices(model.causal, hooks)
                exact = readouts(reference_of(run), options.nonces)
                wide = choices.take(layers, options.nonces)
                by_layers = weighed(run, model.by_layers, layers**-0.5)
                errors = np.square(readouts(by_layers, options.nonces) - exact).sum(axis=1)
                own = choices.take(layers, options.nonces)
                with by_product(model, rounded_once):
                    others = np.square(readouts(by_layers, options.nonces) - exact).sum(axis=1)
            flips = (own != wide).float().mean(dim=1).numpy()
            order = np.argsort(flips, kind="stable")
            few, many = (float(np.sqrt(errors[half].mean())) for half in np.array_split(order, 2))
            largest = float(np.sqrt(errors.max() / np.median(errors)))
            spread = float(np.log(others / errors).std())
            shares = (f"{flips.mean():.2%}", f"{(flips > 0).mean():.0%}")
            scale = size(exact)
            yield (
                model.name,
                dtype,
                *shares,
                f"{few / scale:.2%}",
                f"{many / scale:.2%}",
                f"{largest:.2f}",
                f"{spread:.2f}",
            )


HEADS = {
    "beta": ("model", "β", "error", "own", "last layer", "8 bits"),
    "length": ("model", "positions", "error", "other way", "8 bits", "last layer", "one position"),
    "routing": ("model", "dtype", "flips", "touched", "error, few", "many", "largest", "spread"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=HEADS)
    parser.add_argument("--models", nargs="+", default=["bundled:tiny-qwen3", "bundled:tiny-llama"], metavar="NAME")
    parser.add_argument("--nonces", type=int, default=32, help=f"a multiple of {BATCH}")
    parser.add_argument("--seq-len", type=int, default=32)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--experts", type=int, default=8)
    options = parser.parse_args(arguments)
    made = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for head in HEADS[options.what]:
        made.add_column(head, justify="left" if head in {"model", "dtype", "β"} else "right")
    if options.what == "routing":
        rows = list(routing(options))
    else:
        each = betas if options.what == "beta" else lengths
        models = (build(name, options.dtype, 256) for name in options.models)
        rows = [row for model in models for row in each(model, options)]
    for row in rows:
        made.add_row(*row)
    Console(highlight=False, width=max(110, Console().width)).print(made)


if __name__ == "__main__":
    main()
