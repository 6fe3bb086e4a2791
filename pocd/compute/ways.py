"""The ways in which checkpoints are quantised, by their configurations, and their tensors when it is undone.

Weights are always dequantised when they are loaded, on every device: cards differ in which quantised weights they can
keep, and those that can round activations, too. What is not read exactly is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from pocd.compute import quantised
from pocd.compute.harmless import is_harmless
from pocd.compute.quantised import REAL, Matrix
from pocd.compute.stored import some
from pocd.protocol.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch

    from pocd.compute.stored import Stored

    Finder = Callable[[str, Mapping[str, Stored]], Matrix | None]

UNPACKED = "take the model's unquantised checkpoint (bfloat16), or dequantise it into a folder of its own first"
PACKED_FORMATS = {
    *("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "nvfp4-pack-quantized"),
    *("mixed-precision", "dense", None),
}
GPTQ_ZEROS = {"gptq": 1, "gptq_v2": 0}  # what is added to the zero points of a form of its files
MODELOPT = {"FP8": "whole", "FP8_PER_CHANNEL_PER_TOKEN": "row", "FP8_PB_WO": (128, 128)}


@dataclass(frozen=True, slots=True)
class Way:
    """A way in which weights are quantised.

    Attributes:
        title: What its matrices are, for people.
        finders: Functions that find a matrix by the name of the tensor with its codes; None: it is none of theirs.
        decides: What of the configuration decides the values; part of the fingerprint.
    """

    title: str
    finders: tuple[Finder, ...]
    decides: dict[str, Any] = field(default_factory=dict)


def read_way(quantization: Mapping[str, Any], model_type: str) -> Way:
    """Return the way that a `quantization_config` describes.

    Raises:
        ModelError: The way is none that is read exactly; the message is a clause that says why.
    """
    method = quantization.get("quant_method")
    if method == "mxfp4" and model_type != "gpt_oss":
        raise ModelError(f"quant_method 'mxfp4' is not read exactly in a {model_type}")
    read = WAYS.get(str(method))
    if read is None:
        raise ModelError(f"quant_method {method!r} is not read exactly")
    try:
        return read(quantization)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"its description is not understood ({type(error).__name__}: {error})") from error


def _block_of(sizes: Iterable[Any]) -> tuple[int, int]:
    """Return height and width of a block; a ValueError says that they are none."""
    height, width = (int(size) for size in sizes)
    if min(height, width) < 1:
        raise ValueError(f"a block of {height} by {width}")
    return height, width


def _fp8(quantization: Mapping[str, Any]) -> Way:
    sizes = quantization.get("weight_block_size")
    block = None if sizes is None else _block_of(sizes)
    find = partial(
        quantised.find_scaled, scale="_scale_inv", codes="F8_E4M3", blocks=("whole" if block is None else block,)
    )
    return Way("FP8 in blocks of weight_block_size with their scales", (find,), {"method": "fp8", "block": block})


def _fbgemm(_quantization: Mapping[str, Any]) -> Way:
    find = partial(quantised.find_scaled, scale="_scale", codes="F8_E4M3", blocks=("row",))
    return Way("FP8 with a scale for each row", (find,), {"method": "fbgemm_fp8"})


def _mxfp4(_quantization: Mapping[str, Any]) -> Way:
    return Way("MXFP4 blocks with their scales", (quantised.find_mxfp4,), {"method": "mxfp4"})


def _awq(quantization: Mapping[str, Any]) -> Way:
    bits = quantization.get("bits", quantization.get("w_bit"))
    version = str(quantization.get("version") or quantization.get("format") or "gemm").lower()
    if (bits, version) != (4, "gemm"):
        raise ModelError(f"AWQ of {bits} bits in the form {version!r} is not read exactly; 4 bits in 'gemm' is")
    return Way("AWQ's qweight, qzeros and scales", (quantised.find_awq,), {"method": "awq"})


def _gptq(quantization: Mapping[str, Any]) -> Way:
    bits = quantization["bits"]
    form = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
    if bits not in {2, 4, 8} or form not in GPTQ_ZEROS:
        raise ModelError(f"GPTQ of {bits} bits in the form {form!r} is not read exactly; 2, 4 and 8 in 'gptq' are")
    find = partial(quantised.find_gptq, bits=bits, more=GPTQ_ZEROS[form])
    return Way("GPTQ's qweight, qzeros, scales and g_idx", (find,), {"method": form, "bits": bits})


def _bitsandbytes(_quantization: Mapping[str, Any]) -> Way:
    finders = (quantised.find_four_bits, quantised.find_eight_bits)
    return Way("bitsandbytes' codes with what describes them", finders, {"method": "bitsandbytes"})


def _modelopt(quantization: Mapping[str, Any]) -> Way:
    layers = quantization.get("quantized_layers") or {}
    algorithm = quantization.get("quant_algo")
    named = sorted({layer["quant_algo"] for layer in layers.values()}) if layers else [algorithm]
    finders: list[Finder] = []
    for each in named:
        if each in MODELOPT:
            block: Any = MODELOPT[each]
            finders.append(partial(quantised.find_scaled, scale="_scale", codes="F8_E4M3", blocks=(block,)))
        elif each == "NVFP4":
            find = partial(quantised.find_nvfp4, suffix=".weight", whole="weight_scale_2", divided=False)
            finders.append(find)
        else:
            raise ModelError(f"ModelOpt's quant_algo {each!r} is not read exactly")
    return Way("ModelOpt's codes with their scales", tuple(finders), {"method": "modelopt", "algorithms": named})


def _compressed_tensors(quantization: Mapping[str, Any]) -> Way:
    for key in ("sparsity_config", "transform_config"):
        said = quantization.get(key) or {}
        if said and said.get("format") != "dense":
            raise ModelError(f"compressed-tensors with a {key} is not read exactly")
    groups = list(quantization["config_groups"].values())
    for form in (quantization.get("format"), *(group.get("format") for group in groups)):
        if form not in PACKED_FORMATS:
            raise ModelError(f"compressed-tensors' format {form!r} is not read exactly")
    schemes = []
    for group in groups:
        said = group.get("weights")
        scheme = said and {
            key: said.get(key) for key in ("num_bits", "type", "strategy", "group_size", "block_structure", "actorder")
        }
        if scheme and scheme not in schemes:
            schemes.append(scheme)
    finders = tuple(find for scheme in schemes for find in _finders(scheme))
    title = "compressed-tensors' codes with their scales"
    return Way(title, finders, {"method": "compressed-tensors", "schemes": sorted(schemes, key=repr)})


def _finders(scheme: Mapping[str, Any]) -> list[Finder]:
    """Return what finds the matrices of a scheme of compressed-tensors."""
    bits, kind, strategy, size = (scheme[key] for key in ("num_bits", "type", "strategy", "group_size"))
    if (bits, kind, strategy, size) == (4, "float", "tensor_group", 16):
        return [partial(quantised.find_nvfp4, suffix=".weight_packed", whole="weight_global_scale", divided=True)]
    if strategy == "block":
        block: Any = _block_of(scheme["block_structure"])
    elif strategy == "group":
        block = _block_of((1, size))
    else:
        block = {"tensor": "whole", "channel": "row"}.get(strategy)
    finders: list[Finder] = []
    if block is not None and bits == 8:
        codes = {"float": "F8_E4M3", "int": "I8"}[kind]
        finders.append(partial(quantised.find_scaled, scale="_scale", codes=codes, blocks=(block,)))
    if block is not None and kind == "int" and bits in {2, 4, 8}:
        sides = {"whole": (None, None), "row": (1, None)}.get(block, block)
        needs_places = scheme["actorder"] in {"group", True}
        finders.append(partial(quantised.find_int_packed, bits=bits, block=sides, needs_places=needs_places))
    if not finders:
        raise ModelError(f"compressed-tensors' weights of {bits} bits ({kind}, {strategy}) are not read exactly")
    return finders


WAYS: dict[str, Callable[[Mapping[str, Any]], Way]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm,
    "mxfp4": _mxfp4,
    "awq": _awq,
    "gptq": _gptq,
    "bitsandbytes": _bitsandbytes,
    "modelopt": _modelopt,
    "compressed-tensors": _compressed_tensors,
}
"""Functions that read the description of a method of quantisation, by its name."""


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def matrices(stored: Mapping[str, Stored], way: Way | None, *, name: str) -> list[Matrix]:
    """Return all tensors of a checkpoint, each as it is in the files or as it is dequantised.

    Args:
        stored: Tensors of the files.
        way: How they are quantised; None: they are not.
        name: Name of the model.

    Raises:
        ModelError: Tensors are packed or scaled in a way that is not read exactly.
    """
    packed = {key for key, at in stored.items() if at.dtype not in REAL and not is_harmless(key)}
    if way is None:
        if packed and all(stored[key].dtype == "I64" for key in packed):
            raise ModelError(
                f"model {name!r}: {some(packed)} are whole numbers (I64), such as experts by token, and here "
                "embeddings come from nonces, which have none: take another model"
            )
        if packed:
            raise ModelError(
                f"model {name!r}: {some(packed)} are quantised or packed ({stored[min(packed)].dtype}), and its "
                f"config.json has no quantization_config: {UNPACKED}"
            )
        return [Matrix(key, at.shape, {key: at}, _as_it_is) for key, at in stored.items()]
    found: list[Matrix] = []
    for key in sorted(packed):
        fits = [matrix for find in way.finders if (matrix := find(key, stored)) is not None]
        if len(fits) == 1:
            found += fits
    used = {key for matrix in found for key in matrix.parts}
    if wrong := packed - used:
        raise ModelError(f"model {name!r} is quantised, and {some(wrong)} are not {way.title}; {UNPACKED}")
    if not found:
        raise ModelError(
            f"model {name!r} is quantised, says its configuration, but none of its tensors is {way.title}: if they are "
            "whole, remove the quantization_config from config.json (and the files beside it that describe one)"
        )
    if twice := {matrix.name for matrix in found if matrix.name in stored and matrix.name not in matrix.parts}:
        raise ModelError(f"model {name!r} has {some(twice)} both quantised and whole: remove the wrong ones")
    rest = [Matrix(key, at.shape, {key: at}, _as_it_is) for key, at in stored.items() if key not in used]
    return [*found, *rest]
