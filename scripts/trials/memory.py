"""Load checkpoints of about a gigabyte, and say how much memory each took at most.

    python -m scripts.trials.memory [MIB]

The host's memory must hold the weights once: a peak of at most 1.1 times what they take in the model's dtype.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

MOST = 1.1  # of the weights' size
MOST_SECONDS = 1200.0  # until a checkpoint is loaded
BLOCK = 128
LOAD = """
import ctypes, gc, re, sys, threading
from pathlib import Path
from pocd.compute.model import load_model
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
def peak_of(folder, dtype):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # nothing that was freed is at hand for this one
    before, peak, stop = resident(), 0, threading.Event()
    def watch():
        nonlocal peak
        while not stop.is_set():
            peak = max(peak, resident())
            stop.wait(0.001)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    model = load_model(folder, dtype=dtype, device="cpu")
    stop.set()
    thread.join()
    return (peak - before) / sum(each.numel() * each.element_size() for each in model.causal.parameters())
load_model("bundled:tiny-llama", dtype="bfloat16", device="cpu")  # imports what loading needs
for asked in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    print(peak_of(*asked))
"""


def peaks_of(*asked: tuple[Path, str]) -> list[float]:
    """Load checkpoints in one process, one after another; return each peak of memory, in sizes of the weights."""
    command = [sys.executable, "-c", LOAD, *(str(each) for pair in asked for each in pair)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=MOST_SECONDS)  # noqa: S603 - our own Python
    return [float(line) for line in done.stdout.splitlines()]


def _shape(mib: int) -> dict[str, Any]:
    """Return a configuration of about `mib` in bfloat16: of 32 layers, so that what is at hand of one is little."""
    hidden = max(256, int((mib * 2**20 / 2 / 32 / 12) ** 0.5) // 256 * 256)
    return {
        "vocab_size": 256,
        "hidden_size": hidden,
        "intermediate_size": hidden * 8 // 3 // BLOCK * BLOCK,
        "num_hidden_layers": 32,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
    }


def dense(folder: Path, mib: int) -> None:
    """Write a Llama in bfloat16."""
    _random(LlamaForCausalLM, LlamaConfig(**_shape(mib))).save_pretrained(folder)


def mixture(folder: Path, mib: int) -> None:
    """Write a Mixtral in bfloat16, whose experts are joined when it is loaded."""
    shape = _shape(mib)
    shape["intermediate_size"] = shape["hidden_size"] // 4
    shape |= {"num_local_experts": 8, "num_experts_per_tok": 2}
    _random(MixtralForCausalLM, MixtralConfig(**shape)).save_pretrained(folder)


def fp8(folder: Path, mib: int) -> None:
    """Write a Llama whose projections are FP8 in blocks."""
    dense(folder, mib)
    file = folder / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        if "_proj" in name:
            grid = [-(-size // BLOCK) for size in tensor.shape]
            tensors[name], tensors[f"{name}_scale_inv"] = tensor.to(torch.float8_e4m3fn), torch.full(grid, 0.5)
        else:
            tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    (folder / "config.json").write_text(json.dumps(config))


def _random(kind: type[PreTrainedModel], config: Any) -> Any:  # noqa: ANN401 - transformers gives its classes no common type
    with torch.device("meta"):
        model: Any = kind(config).bfloat16()
    model.to_empty(device="cpu")
    for weights in model.parameters():
        weights.data.normal_(std=0.02)
    return model


KINDS = {"dense": dense, "fp8": fp8, "mixture": mixture}


def main(mib: int) -> int:
    """Measure each kind of checkpoint; the exit status is 1 where one took too much."""
    worst = 0.0
    for kind, write in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), mib)
            dtypes = ("bfloat16", "float32")
            for dtype, peak in zip(dtypes, peaks_of(*((Path(folder), each) for each in dtypes)), strict=True):
                worst = max(worst, peak)
                print(f"{kind:8} {dtype:9} peak {peak:.2f} of the weights' size")
    return int(worst > MOST)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1024))
