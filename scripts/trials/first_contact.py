"""First contact with a GPU: what pocd has assumed of one, measured in a few minutes, step by step.

Each step is a process of its own, so that one which fails, hangs or spoils its GPU stops no other. What it finds is
written to facts.json as it ends, and what it says to a file of its name. A step for which too little time is left is
left out. Nothing is judged: docs/performance.md says what to look for. With --steps only those are run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pocd.compute.model import pick_device
from pocd.protocol.names import largest_batch_size
from scripts.bench.models import NAMES
from scripts.trials.first_contact_steps import (
    LENGTH,
    TINY,
    Trial,
    agreement,
    attention,
    generator,
    machine,
    products,
)
from scripts.trials.steps import Steps

if TYPE_CHECKING:
    from collections.abc import Callable

    from scripts.trials.steps import Facts

ROOT = Path(__file__).parents[2]
# Without the project's settings, whose plugins such a machine lacks; of the schemes, one.
TESTS = ("pytest", "-q", "-c", os.devnull, "--noconftest", "tests/compute/test_gpu.py", "-k", "poc2 or not scheme")


def called(name: str, folder: Path, *arguments: str) -> Facts:
    """Run a module of Python in a process of its own; what it writes goes to a file."""
    with (folder / f"{name}.out").open("w") as out:
        done = subprocess.run(  # noqa: S603 - modules of our own
            [sys.executable, "-m", *arguments], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, check=False
        )
    lines = (folder / f"{name}.out").read_text().splitlines()
    return {"status": done.returncode, "last line": lines[-1] if lines else ""}


def main() -> None:
    """Run all steps, the most telling ones first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to rehearse")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--model", default="qwen3-0.6b", choices=NAMES)
    parser.add_argument(
        "--larger", default=["llama-8b", "qwen3-30b-a3b"], nargs="*", choices=NAMES, help="models, of which 6 layers"
    )
    parser.add_argument("--rows", type=int, help="nonces per batch; default: as many as make 64k positions")
    parser.add_argument("--seconds", type=float, default=460.0, help="time for all steps")
    parser.add_argument("--steps", nargs="+", help="names of the steps that are to run; default: all")
    parser.add_argument("--out", type=Path, required=True, help="folder for facts.json, and for what the steps say")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    steps = Steps(options.out, options.seconds)
    for name, (step, least) in plan(options).items():
        if options.steps is None or name in options.steps:
            steps.run(name, step, least=least)


def plan(options: argparse.Namespace) -> dict[str, tuple[Callable[[], Facts], float]]:
    """Return all steps by their names, each with the least seconds that have to be left for it."""

    def on_device(step: Callable[..., Facts], *arguments: Any) -> Callable[[], Facts]:  # noqa: ANN401 - the steps' own
        return lambda: step(pick_device(options.device), *arguments)

    def module(name: str, *arguments: str) -> Callable[[], Facts]:
        return partial(called, name, options.out, *arguments)

    device = torch.device(options.device)
    dtype, usual = getattr(torch, options.dtype), options.rows or largest_batch_size(LENGTH)
    trial = Trial(options.model, options.dtype, device, usual)
    bench = ["--device", options.device, "--compiled", "--models", TINY]
    found: dict[str, tuple[Callable[[], Facts], float]] = {
        "machine": (on_device(machine), 0),
        "products": (on_device(products, dtype), 15),
        "attention": (on_device(attention, dtype), 10),
        "generator": (on_device(generator, dtype), 10),
        "paths": (trial.paths, 40),
        "bare": (trial.bare, 30),
        "profile": (trial.profile, 20),
        **{f"agreement in {each}": (on_device(agreement, each), 30) for each in (options.dtype, "float32")},
        "poc3": (partial(trial.paths, "poc3"), 30),
        **{f"6 layers of {each}": (Trial(each, options.dtype, device, usual, 6).paths, 40) for each in options.larger},
        "not captured": (trial.uncaptured, 20),
        "transformers' layers": (trial.by_layers, 15),
        "a quarter of the rows": (replace(trial, rows=max(1, usual // 4)).paths, 30),
        "four times the rows": (replace(trial, rows=4 * usual).paths, 40),
        "other roundings": (trial.unrounded, 40),
        "tests": (module("tests", *TESTS), 60),
        "agreement table": (module("agreement table", "scripts.bench.agreement", *bench, "--nonces", "128"), 60),
        "bench": (module("bench", "scripts.bench.engine", *bench, "--dtype", options.dtype), 60),
    }
    return found


if __name__ == "__main__":
    main()
