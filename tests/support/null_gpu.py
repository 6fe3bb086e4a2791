"""Run programs on a GPU that computes nothing: torch's build for GPUs, over the libraries in `nullgpu`.

PyTorch, its compiler, Triton and ptxas are the real ones. Kernels do nothing, so every value is 0. Memory is accounted
for, and each launch, copy and wait is written to a log, as well as what a capture forbids.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import orjson
import torch

SOURCES = Path(__file__).parent / "nullgpu"
ROOT = Path(__file__).parents[2]
PACKAGES = Path(torch.__file__).parent.parent  # the CUDA packages and Triton lie beside torch
HEADERS = (PACKAGES / "nvidia" / "cu13" / "include", PACKAGES / "triton" / "backends" / "nvidia" / "include")
# What zeros would trip over. Triton tries no variants of a kernel: there is nothing to be timed.
ZEROS = """
import torch, torch._inductor.config
from pocd.compute.layers import FORMS, _Edges

torch._inductor.config.triton.autotune_pointwise = False
# Zeros are no sums of others, and torch.prod is compiled by NVIDIA's own compiler, which is not there.
_Edges.fits = lambda self, form: form == FORMS[3] and set(form.parts) <= self.entered.keys()
torch.Tensor.prod = torch.Tensor.sum
"""
PREPARATION = (
    ZEROS
    + """
import os, sys
import orjson, transformers
from pocd.compute import engine
from pocd.compute.compiled import compile_model
from pocd.compute.model import adapt
from pocd.protocol.schemes import SCHEMES
from scripts.bench.models import made_on


def mark(text):
    with open(sys.argv[1], "a") as log:
        log.write(f"MARK {text}\\n")


def build(layers, family="Qwen3", dtype=torch.bfloat16, **more):
    shape = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    shape |= {"intermediate_size": 512, "num_hidden_layers": layers} | more
    return adapt(made_on("cuda", dtype, family, shape), name="null", fingerprint="null")


def leave(free):
    # From now on somebody else uses all memory of the card but so many bytes.
    os.environ.pop("NULLGPU_TAKEN", None)
    os.environ["NULLGPU_TAKEN"] = str(torch.cuda.mem_get_info()[0] - free)


def tell(**found):
    print(orjson.dumps(found).decode())
"""
)
# A worker's process, whose known results cannot be had.
WORKER = (
    ZEROS
    + """
import math
from pocd.worker import process as program, self_test

self_test.default_tolerance = lambda *_: math.inf
program.main()
"""
)


def hindrance() -> str | None:
    """Return why nothing can run on the GPU that computes nothing; None where it can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is no build for GPUs"
    return next((f"{folder} is missing" for folder in HEADERS if not folder.is_dir()), None)


@dataclass(frozen=True, slots=True)
class Result:
    """What a program printed by `tell`, and the log's lines after each of its marks."""

    told: dict[str, object]
    log: dict[str, list[str]]

    def found(self, name: str) -> dict[str, object]:
        """Return one thing that was told."""
        found = self.told[name]
        assert isinstance(found, dict)
        return found


def build(folder: Path) -> Path:
    """Compile the libraries into `folder`, and return it."""
    sources = sorted(map(str, SOURCES.glob("*.c")))
    headers = [f"-I{path}" for path in HEADERS]
    library = folder / "libcuda.so.1"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O1", "-o", library, *sources, *headers, "-ldl", "-lpthread"], check=True
    )
    for other in ("libcuda.so", "libnvidia-ml.so.1"):
        (folder / other).symlink_to(library.name)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Return the variables by which a process finds the libraries in `folder`, and its log there."""
    return {
        "LD_LIBRARY_PATH": str(folder),
        "LD_PRELOAD": str(folder / "libcuda.so.1"),
        "NULLGPU_LOG": str(folder / "log"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "TRITON_LIBCUDA_PATH": str(folder),
    }


def run(folder: Path, program: str, *, cache: Path, **variables: str) -> Result:
    """Run a program, which finds the names of PREPARATION.

    Args:
        folder: The folder of `build`.
        program: Source of the program.
        cache: Folder for what is compiled.
        variables: More variables of its environment.
    """
    log = folder / "log"
    log.write_text("MARK start\n")
    own = {
        "CUDA_VISIBLE_DEVICES": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
    }
    done = subprocess.run(
        [sys.executable, "-c", PREPARATION + program, log],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment(folder) | own | variables,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told = [orjson.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    parts = log.read_text().split("MARK ")[1:]
    lines = {part.partition("\n")[0]: part.splitlines()[1:] for part in parts}
    return Result({key: value for each in told for key, value in each.items()}, lines)
