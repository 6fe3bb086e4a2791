"""Write the distances and vectors that a worker has to find before it mines (pocd/worker/known_distances.json).

Usage: python -m scripts.tools.known_distances

They are of the smaller bundled model, computed on the CPU without compiling, for each scheme and dtype. Of the first
nonces those are taken whose distances depend least on how one rounds: so that an honest card, which rounds in another
way, is far from the tolerance, and one that computes wrongly is far beyond it. A test holds the ones in float32 to the
plain implementation of `tests/`. Write them anew when a scheme changes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import orjson

from pocd.compute.engine import block_run
from pocd.compute.model import Model, load_model
from pocd.protocol.names import DTYPES
from pocd.protocol.schemes import SCHEMES, Scheme
from pocd.worker.self_test import KNOWN

MODEL = "bundled:tiny-qwen3"
RUN: dict[str, Any] = {"block_hash": "known", "public_key": "known", "seq_len": 16}
LOOKED_AT = 128
TAKEN = 4


def compute(model: Model, scheme: Scheme) -> Any:  # noqa: ANN401 - of floats, or of lists of floats
    """Compute the distances, or the vectors, of the first nonces."""
    with block_run(model, scheme, **RUN) as run:
        return run.values(range(LOOKED_AT), batch_size=16).tolist()


def main() -> None:
    """Compute, choose and write."""
    models = {dtype: load_model(MODEL, dtype=dtype, device="cpu") for dtype in DTYPES}
    schemes: dict[str, Any] = {}
    for name, scheme in SCHEMES.items():
        found = {dtype: compute(model, scheme) for dtype, model in models.items()}
        others = [compute(replace(model, decoder=model.by_layers), scheme) for model in models.values()]
        exact = np.array(found["float32"])
        apart = np.abs(np.array([*found.values(), *others]) - exact).max(axis=0)
        worst = apart.reshape(LOOKED_AT, -1).max(axis=1)
        nonces = sorted(np.argsort(worst)[:TAKEN].tolist())
        taken = {dtype: [found[dtype][nonce] for nonce in nonces] for dtype in DTYPES}
        schemes[name] = {"nonces": nonces, f"{scheme.output}s": taken}
    known = {"model": MODEL, **RUN, "schemes": schemes}
    KNOWN.write_bytes(orjson.dumps(known, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    print(f"wrote {KNOWN}")


if __name__ == "__main__":
    main()
