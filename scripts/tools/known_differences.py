"""Write `tests/data/differences.json`: squared errors of honest and cheap ways of computing vectors, to draw from.

Usage: python -m scripts.tools.known_differences [--nonces 64]

Of the bundled models, scheme `poc4`, bfloat16, 64 positions: for each way the expected squared error of a number, by
nonce, relative to the mean of the validator's own; and the validator's own.

It needs torch, transformers and numpy, and a checkout: no installation.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pocd.lab.calibration import Plan
from pocd.lab.cheap import HONEST
from pocd.lab.command import measure_claims

OUT = Path(__file__).parent.parent.parent / "tests" / "data" / "differences.json"
MODELS = ("bundled:tiny-qwen3", "bundled:tiny-llama")
WAYS = (
    *(HONEST, "8-bit weights", "8-bit weights, float32", "W8A8", "W8A8, last quarter", "FP8 W8A8", "FP8, last layer"),
    *("keys, values in FP8", "NF4 weights", "2:4 weights", "without layer 2", "without position 1", "mean output"),
)


def main() -> None:
    """Measure, and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nonces", type=int, default=64)
    options = parser.parse_args()
    models = {}
    for name in MODELS:
        plan = Plan(name, "poc4", 0.1, 1, options.nonces, 64, "bfloat16", "cpu", 32, "audit", "pocd")
        (found,) = measure_claims(plan, lambda _: None)
        unit = float(found.own.mean())
        ways = {way.name: [round(error, 5) for error in (way.errors / unit).tolist()] for way in found.ways}
        models[name] = {
            "own": [round(error, 5) for error in (found.own / unit).tolist()],
            "blank": round(found.blank / unit, 1),
            "ways": {way: ways[way] for way in WAYS},
        }
    OUT.write_text(json.dumps(models) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
