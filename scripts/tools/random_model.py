"""Write a model of random weights to a folder, for `--models FOLDER` of the laboratory and for `pocd --model`.

Usage: python -m scripts.tools.random_model FOLDER [--form qwen3] [--layers 4] [--hidden-size 128] [--seed 0]

The shape is the bundled models' but for layers and hidden size; weights are transformers' own start values.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from scripts.tools.train_models import SHAPE

if TYPE_CHECKING:
    from collections.abc import Sequence

FORMS = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the model, and save it as float32."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--form", choices=FORMS, default="qwen3")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=128, help="a multiple of 16")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    hidden = options.hidden_size
    shape = SHAPE | {
        "num_hidden_layers": options.layers,
        "hidden_size": hidden,
        "intermediate_size": 5 * hidden // 2,
        "head_dim": hidden // SHAPE["num_attention_heads"],
    }
    config, model = FORMS[options.form]
    torch.manual_seed(options.seed)
    model(config(**shape)).save_pretrained(options.folder)


if __name__ == "__main__":
    main()
