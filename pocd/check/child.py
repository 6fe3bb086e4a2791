"""The process that imports torch for `pocd check`, which itself never does.

It prints a JSON object for each thing that it found out, so that what hangs or fails later takes nothing back:
`torch` and `cuda_build` (versions), then `parameters` and `longest_seq_len`, then `fingerprint`, or `model_error` for
what of these failed, then `cards` or `cuda_error`.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from pocd.process import importing


def _tell(**found: object) -> None:
    print(json.dumps(found), flush=True)  # noqa: T201 - this is how it answers


def _look_at_model(folder: Path) -> None:
    with importing():
        from pocd.compute.checkpoint import read_config
        from pocd.compute.fingerprint import stored_fingerprint
        from pocd.compute.harmless import is_harmless
        from pocd.compute.model import longest_seq_len
        from pocd.compute.stored import read_headers
        from pocd.compute.ways import matrices
        from pocd.protocol.errors import ModelError

    try:
        stored = read_headers(folder)
        config, way = read_config(str(folder), "main")
        weights = [each for each in matrices(stored, way, name=str(folder)) if not is_harmless(each.name)]
        _tell(parameters=sum(math.prod(each.shape) for each in weights), longest_seq_len=longest_seq_len(config))
        _tell(fingerprint=stored_fingerprint(stored, config, way))  # reads all over the disk
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ModelError) as error:
        _tell(model_error=str(error).partition("\n")[0] or type(error).__name__)


def _look_at_cards() -> None:
    import torch

    try:
        cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    except (RuntimeError, AssertionError) as error:
        _tell(cuda_error=f"{type(error).__name__}: {error}")
    else:
        _tell(cards=[f"GPU-{card.uuid}" for card in cards])


def main(folder: str, device: str) -> None:
    """Look at torch, at the model in `folder` unless that is empty, and at the cards unless `device` is "cpu"."""
    with importing():
        import torch

    _tell(torch=torch.__version__, cuda_build=torch.version.cuda)
    if folder:
        _look_at_model(Path(folder))
    if device != "cpu":
        _look_at_cards()


if __name__ == "__main__":
    main(*sys.argv[1:])
