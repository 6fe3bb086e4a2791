"""Load a transformers causal decoder and check that its layers are the ones we know how to transform."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from pocd.compute.errors import DeviceError, ModelError
from pocd.compute.names import check_device, check_dtype, resolve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    class DecoderLayer(nn.Module):
        """A decoder layer of the Llama form, for the type checker."""

        mlp: nn.Module
        post_attention_layernorm: nn.Module


# Families whose decoder layer is: residual + self_attn(input_layernorm(residual)), then
# residual + mlp(post_attention_layernorm(residual)). Others use the same names for other
# things (Gemma 2's post_attention_layernorm normalises the branch), so names alone are no proof.
LLAMA_FORM = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded decoder, ready to be fed embeddings.

    Attributes:
        name: As configured.
        decoder: Embeddings [B, S, H] in, hidden states after the final norm [B, S, H] out.
        layers: Its decoder layers.
        hidden_size: H.
        max_positions: The longest sequence that its positions allow.
        dtype: Of weights and activations.
        device: Where it lives.
    """

    name: str
    decoder: nn.Module
    layers: Sequence[DecoderLayer]
    hidden_size: int
    max_positions: int
    dtype: torch.dtype
    device: torch.device


def pick_device(name: str) -> torch.device:
    """Return the device called `name` (cpu, cuda, cuda:N), checked to exist.

    Raises:
        InputError: It is no device's name.
        DeviceError: A GPU was asked for and is not there. There is no fall-back to the CPU.
    """
    check_device(name)
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise DeviceError(
                f"device {name!r} is configured, but torch {torch.__version__} sees no GPU; check the driver "
                "(nvidia-smi) and that this torch is a CUDA build, or set device = 'cpu'"
            )
        count = torch.cuda.device_count()
        if device.index is not None and device.index >= count:
            raise DeviceError(f"device {name!r} does not exist; this machine has cuda:0 to cuda:{count - 1}")
    return device


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def load_model(name: str, *, dtype: str, device: str) -> Model:
    """Load `name` for inference.

    Args:
        name: A local path, a hub id, or `bundled:NAME`.
        dtype: float32, float16 or bfloat16.
        device: cpu, cuda or cuda:N.

    Raises:
        InputError: An unknown dtype or device name.
        DeviceError: The device is not there.
        ModelError: The model cannot be found or read, or is of a family that we cannot transform.
    """
    check_dtype(dtype)
    target = pick_device(device)
    source = resolve(name)
    transformers_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ModelError(f"model {name!r} cannot be loaded: {_first_line(error)}") from error
    if config.model_type not in LLAMA_FORM:
        raise ModelError(
            f"model {name!r} is of type {config.model_type!r}, whose layers are not known to be of the Llama form; "
            f"supported types are: {', '.join(LLAMA_FORM)}"
        )
    try:
        loader: Any = AutoModelForCausalLM  # its annotation knows nothing of output_loading_info
        causal, loading = loader.from_pretrained(
            source, config=config, dtype=getattr(torch, dtype), output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model {name!r} cannot be loaded: {_first_line(error)}") from error
    # transformers only warns, and draws at random what a checkpoint lacks: distances nobody else would get.
    if lacking := sorted(loading["missing_keys"]):
        raise ModelError(f"model {name!r} lacks weights: {', '.join(lacking[:3])}{', …' if len(lacking) > 3 else ''}")
    return adapt(causal.to(target), name=name)


def adapt(causal: Any, *, name: str) -> Model:  # noqa: ANN401 - transformers gives its classes no common type
    """Wrap a transformers model of the Llama form for the engine, in evaluation mode.

    Raises:
        ModelError: The model is of another form; the message names its class and what is missing.
    """
    decoder = getattr(causal, "model", None)
    layers = getattr(decoder, "layers", None)
    if decoder is None or not layers or causal.config.model_type not in LLAMA_FORM:
        raise ModelError(f"model {name!r} ({type(causal).__name__}) has no decoder of the Llama form in .model.layers")
    for part in ("self_attn", "input_layernorm", "post_attention_layernorm", "mlp"):
        if not hasattr(layers[0], part):
            raise ModelError(f"model {name!r}: its layer {type(layers[0]).__name__} has no {part}")
    causal.requires_grad_(requires_grad=False).eval()
    weight = next(decoder.parameters())
    return Model(
        name=name,
        decoder=decoder,
        layers=list(layers),
        hidden_size=causal.config.hidden_size,
        max_positions=causal.config.max_position_embeddings,
        dtype=weight.dtype,
        device=weight.device,
    )
