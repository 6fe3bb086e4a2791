"""Train the two bundled models, `tiny-qwen3` and `tiny-llama`, and `deep-qwen3` of the tests, on the CPU.

Usage: .venv/bin/python -m scripts.tools.train_models [--only tiny-qwen3] [--steps 1200]

The text is the source code of Python's own standard library, as installed with the
interpreter that runs this script (licence: PSF License Version 2). It is read as bytes,
so the vocabulary is the 256 byte values and no tokenizer is needed. Every fiftieth file is
held out; the loss reported is on held-out files, after rounding the weights to bfloat16,
in nats per byte. Everything is seeded: the same Python, torch and processor give the same weights.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parent.parent.parent
SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 320,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONTEXT = 256


@dataclass(frozen=True)
class Recipe:
    """How one model is made.

    Attributes:
        folder: Folder that it is written to.
        purpose: Purpose of the model, for its card.
        form: Name of its form in transformers.
        shape: What differs from `SHAPE`.
        batch: Windows of text per step.
        rate: The peak learning rate.
        spread: Standard deviation of the first weights, with a layer's two outputs divided by √(2·layers)
            (GPT-2's rule); None for transformers' 0.02. A deep and narrow model learns nothing from 0.02.
        goal: Loss to be reached, in nats per byte.
    """

    folder: Path
    purpose: str
    form: str
    goal: float
    batch: int = 16
    rate: float = 4e-3
    spread: float | None = None
    shape: dict[str, Any] = field(default_factory=dict)

    def untrained(self) -> Qwen3ForCausalLM | LlamaForCausalLM:
        """Build the model with random weights, in float32."""
        shape = SHAPE | self.shape
        if self.spread is not None:
            shape["initializer_range"] = self.spread
        if self.form == "Qwen3":
            model: Qwen3ForCausalLM | LlamaForCausalLM = Qwen3ForCausalLM(Qwen3Config(**shape))
        else:
            model = LlamaForCausalLM(LlamaConfig(**shape))
        if self.spread is not None:
            for name, weight in model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight.data /= math.sqrt(2 * shape["num_hidden_layers"])
        return model


BUNDLED = "small enough to travel inside pocd: for the demo, the tests and a first look"
DEEP = "as deep as a real model and very narrow: for tests of what depth does to rounding"
RECIPES = {
    "tiny-qwen3": Recipe(ROOT / "pocd" / "models", BUNDLED, "Qwen3", 1.6),
    "tiny-llama": Recipe(ROOT / "pocd" / "models", BUNDLED, "Llama", 1.6),
    "deep-qwen3": Recipe(
        ROOT / "tests" / "models",
        DEEP,
        "Qwen3",
        1.8,
        batch=8,
        rate=3e-3,
        spread=0.1,
        shape={"num_hidden_layers": 24, "hidden_size": 64, "intermediate_size": 160, "head_dim": 16},
    ),
}
CARD = """# {name}

A byte-level {form} decoder, {purpose}.
It is trained, because what pocd has to cope with (outputs that cluster) shows only in trained models.
It proves nothing about a GPU: mine with a real model.

- Shape: {layers} layers, hidden size {hidden}, 4 heads of {head} (2 key-value heads), MLP {mlp}, 256 byte tokens,
  tied embeddings.
- Weights: {parameters:,} parameters, bfloat16, safetensors ({size:,} bytes).
- Text: the Python {python} standard library's source code, {train_bytes:,} bytes (PSF License Version 2).
- Loss on held-out files: {loss:.3f} nats per byte (a uniform guess has 5.545).
- Made by: `python -m scripts.tools.train_models --only {name} --steps {steps}`, seed {seed},
  torch {torch}, {minutes:.1f} minutes on {threads} CPU threads.
- Licence: Apache-2.0, as pocd.
"""


def standard_library_text() -> tuple[torch.Tensor, torch.Tensor]:
    """Read the standard library's modules, in the order of their names.

    Returns:
        Training bytes and held-out bytes, uint8, each [length].
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3", "idlelib", "turtledemo"}
    files = sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
    train, held_out = bytearray(), bytearray()
    for number, path in enumerate(files):
        (held_out if number % 50 == 0 else train).extend(path.read_bytes())
    return (torch.frombuffer(train, dtype=torch.uint8), torch.frombuffer(held_out, dtype=torch.uint8))


def windows(text: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Cut windows of CONTEXT + 1 bytes at `starts`: int64 [len(starts), CONTEXT + 1]."""
    return text[starts[:, None] + torch.arange(CONTEXT + 1)].long()


def loss_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return the mean next-byte cross entropy in nats, a scalar."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, text: torch.Tensor) -> float:
    """Return the mean loss over evenly spaced held-out windows, in nats per byte."""
    starts = torch.linspace(0, len(text) - CONTEXT - 2, 256).long()
    losses = [loss_of(model, windows(text, part)).item() for part in starts.split(32)]
    return sum(losses) / len(losses)


def train(name: str, steps: int, seed: int) -> float:
    """Train one model, save it with its card, and return its held-out loss."""
    began = time.monotonic()
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(mode=True)
    train_text, held_out = standard_library_text()
    recipe = RECIPES[name]
    model = recipe.untrained()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.1)
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))) + 0.01),
    )
    with Progress() as progress:
        task = progress.add_task(name, total=steps)
        for _ in range(steps):
            starts = torch.randint(len(train_text) - CONTEXT - 1, (recipe.batch,))
            loss = loss_of(model, windows(train_text, starts))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.update(task, advance=1, description=f"{name} {loss.item():.2f}")

    target, config = recipe.folder / name, model.config
    model.bfloat16().save_pretrained(target)
    model.float()  # type: ignore[no-untyped-call] # transformers wraps it without annotations
    reached = held_out_loss(model, held_out)
    (target / "README.md").write_text(
        CARD.format(
            name=name,
            form=recipe.form,
            purpose=recipe.purpose,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            head=config.head_dim,
            mlp=config.intermediate_size,
            parameters=sum(p.numel() for p in model.parameters()),
            size=(target / "model.safetensors").stat().st_size,
            python=platform.python_version(),
            train_bytes=len(train_text),
            loss=reached,
            steps=steps,
            seed=seed,
            torch=torch.__version__,
            minutes=(time.monotonic() - began) / 60,
            threads=torch.get_num_threads(),
        )
    )
    return reached


def main() -> int:
    """Train the named models; exit 1 when one of them misses its goal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=RECIPES)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    missed = False
    for name in [arguments.only] if arguments.only else RECIPES:
        loss, goal = train(name, arguments.steps, arguments.seed), RECIPES[name].goal
        missed |= loss >= goal
        print(f"{name}: {loss:.3f} nats per byte on held-out files (goal: below {goal})")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
