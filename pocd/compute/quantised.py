"""Quantised matrices among the tensors of a checkpoint: which tensors make one, and how its values are computed.

A function for each format finds the matrix whose codes a tensor holds, by names, element types and shapes. What does
not fit in all of them is no matrix of that format, so that nothing is computed from it.
"""

from __future__ import annotations

import json
import math
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

from pocd.compute.dequantise import (
    awq,
    eight_bits,
    four_bits,
    gptq,
    int_packed,
    mxfp4,
    nvfp4,
    scaled,
    shifted,
    unpacked,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from pocd.compute.stored import Stored

    Block = tuple[int, int] | Literal["whole", "row"]

REAL = frozenset({"F64", "F32", "F16", "BF16"})  # how files call what is no packed or scaled weight
SCALES = REAL | {"F8_E8M0"}
WORD = 32  # bits of the words that codes are packed into


class Matrix(NamedTuple):
    """A weight, and how it is computed from tensors of the files.

    Attributes:
        name: Name that transformers' class has for it.
        shape: Shape of the weight.
        parts: Tensors of the files that it is computed from, by name.
        compute: Computes it, in float32, from these in their order.
    """

    name: str
    shape: tuple[int, ...]
    parts: dict[str, Stored]
    compute: Callable[..., torch.Tensor]


def _matrix_shape(held: Stored) -> tuple[int, int] | None:
    """Return the shape of a matrix that a tensor holds; None: it holds none."""
    if held.shape != (2,) or held.dtype not in {"I32", "I64"}:
        return None
    rows, columns = held.read().tolist()
    return (rows, columns) if min(rows, columns) > 0 else None


def _are_places(places: Stored | None, columns: int, groups: int) -> bool:
    """Tell whether a tensor has the number of a group for each column; a number beyond them would be another's."""
    if places is None or places.dtype not in {"I32", "I64"} or places.shape != (columns,):
        return False
    numbers = places.read()
    return bool((numbers >= 0).all() and (numbers < groups).all())


def _grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of the scales of a matrix, or of a stack of them, with one for each block."""
    return (*shape[:-2], *(-(-size // step) for size, step in zip(shape[-2:], block, strict=True)))


def _is_one(shape: tuple[int, ...]) -> bool:
    return math.prod(shape) == 1


def _form(
    shape: tuple[int, ...], scales: tuple[int, ...], block: Block
) -> tuple[tuple[int, ...], tuple[int, int]] | None:
    """Return the shape that scales are given, and the block that each is for; None where they do not fit."""
    rows, columns = shape[-2:]
    if block == "whole":
        of_each = (*shape[:-2], 1, 1)
        form = of_each if scales == of_each else (1,) * len(shape)
        return (form, (rows, columns)) if _is_one(scales) or scales == of_each else None
    if block == "row":
        form = (*shape[:-1], 1)
        return (form, (1, columns)) if scales in {form, shape[:-1]} else None
    grid = _grid(shape, block)
    is_modelopts = len(shape) == 2 and scales == (grid[0], 1, grid[1], 1)
    return (grid, block) if scales == grid or is_modelopts else None


def find_scaled(
    key: str, stored: Mapping[str, Stored], *, scale: str, codes: str, blocks: tuple[Block, ...]
) -> Matrix | None:
    """Find a matrix whose elements are one tensor's, each times the scale of its block.

    Args:
        key: Name of the tensor with the elements.
        stored: Tensors of the checkpoint.
        scale: What the scales' name ends in, after the key.
        codes: Element type of the matrix.
        blocks: What has one scale: height and width of a block, the whole of a matrix, or a row; one of these.
    """
    weight, of = stored[key], stored.get(f"{key}{scale}")
    if weight.dtype != codes or of is None or of.dtype not in SCALES or len(weight.shape) < 2:
        return None
    shape, fits = weight.shape, [found for block in blocks if (found := _form(weight.shape, of.shape, block))]
    if not fits:
        return None
    form, block = fits[0]
    parts = {key: weight, f"{key}{scale}": of}
    zero = stored.get(f"{key}_zero_point")
    compute: Callable[..., torch.Tensor] = partial(_reshaped, scaled, form=form, block=block)
    if zero is not None:
        if zero.dtype != "I8" or zero.shape != of.shape:
            return None
        parts[f"{key}_zero_point"] = zero
        compute = partial(_reshaped, shifted, form=form, block=block)
    return Matrix(key, shape, parts, compute)


def _reshaped(
    function: Callable[..., torch.Tensor],
    codes: torch.Tensor,
    *scales: torch.Tensor,
    form: tuple[int, ...],
    block: tuple[int, int],
) -> torch.Tensor:
    return function(codes, *(scale.reshape(form) for scale in scales), block=block)


def find_mxfp4(key: str, stored: Mapping[str, Stored]) -> Matrix | None:
    """Find experts of gpt-oss in MXFP4."""
    root = key.removesuffix("_blocks")
    blocks, scales = stored[key], stored.get(f"{root}_scales")
    if root == key or scales is None or not blocks.dtype == scales.dtype == "U8":
        return None
    if blocks.shape != (*scales.shape, 16) or len(scales.shape) != 3:
        return None
    experts, out, groups = scales.shape
    return Matrix(root, (experts, groups * 32, out), {key: blocks, f"{root}_scales": scales}, mxfp4)


def find_nvfp4(key: str, stored: Mapping[str, Stored], *, suffix: str, whole: str, divided: bool) -> Matrix | None:
    """Find a matrix of NVFP4, by what follows its name, and the name of the scale of the whole; see `nvfp4`."""
    root = key.removesuffix(suffix)
    packed, scale, last = stored[key], stored.get(f"{root}.weight_scale"), stored.get(f"{root}.{whole}")
    if root == key or scale is None or last is None or packed.dtype != "U8" or len(packed.shape) != 2:
        return None
    shape = (packed.shape[0], packed.shape[1] * 2)
    if (
        scale.dtype != "F8_E4M3"
        or scale.shape != _grid(shape, (1, 16))
        or last.dtype != "F32"
        or not _is_one(last.shape)
    ):
        return None
    parts = {key: packed, f"{root}.weight_scale": scale, f"{root}.{whole}": last}
    return Matrix(f"{root}.weight", shape, parts, partial(nvfp4, divided=divided))


def find_int_packed(
    key: str,
    stored: Mapping[str, Stored],
    *,
    bits: int,
    block: tuple[int | None, int | None],
    needs_places: bool,
) -> Matrix | None:
    """Find a matrix of compressed-tensors' packed integers; None in `block` is the whole side of a matrix."""
    root = key.removesuffix("_packed")
    packed, scale, shape_of = stored[key], stored.get(f"{root}_scale"), stored.get(f"{root}_shape")
    shape = None if shape_of is None else _matrix_shape(shape_of)
    if root == key or scale is None or shape is None or packed.dtype != "I32" or scale.dtype not in REAL:
        return None
    assert shape_of is not None, "it holds the shape"
    rows, columns = shape
    of = (block[0] or rows, block[1] or columns)
    words = -(-columns * bits // WORD)
    if packed.shape != (rows, words) or scale.shape not in {_grid(shape, of), (1,) if block == (None, None) else None}:
        return None
    parts = {key: packed, f"{root}_scale": scale, f"{root}_shape": shape_of}
    zero, places = stored.get(f"{root}_zero_point"), stored.get(f"{root}_g_idx")
    if zero is not None:
        if zero.dtype != "I32" or zero.shape != (-(-rows * bits // WORD), *scale.shape[1:]):
            return None
        parts[f"{root}_zero_point"] = zero
    is_ordered = places is None or (places.shape == (columns,) and bool((places.read() == -1).all()))
    if (places is None and needs_places) or not (is_ordered or _are_places(places, columns, scale.shape[-1])):
        return None
    if places is not None:
        parts[f"{root}_g_idx"] = places

    def compute(packed: torch.Tensor, scale: torch.Tensor, _shape: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        points = more[0] if zero is not None else None
        groups = None if is_ordered else more[-1]
        return int_packed(
            packed, scale.reshape(_grid(shape, of)), points, groups, bits=bits, shape=(rows, columns), block=of
        )

    return Matrix(root, shape, parts, compute)


def _grouped(key: str, stored: Mapping[str, Stored]) -> tuple[str, Stored, Stored, Stored] | None:
    """Return the root, codes, zero points and scales of a matrix of AWQ or GPTQ."""
    root = key.removesuffix(".qweight")
    zeros, scales = stored.get(f"{root}.qzeros"), stored.get(f"{root}.scales")
    if root == key or zeros is None or scales is None:
        return None
    if not stored[key].dtype == zeros.dtype == "I32" or scales.dtype not in REAL or len(scales.shape) != 2:
        return None
    return root, stored[key], zeros, scales


def find_awq(key: str, stored: Mapping[str, Stored]) -> Matrix | None:
    """Find a matrix of AWQ."""
    found = _grouped(key, stored)
    if found is None:
        return None
    root, packed, zeros, scales = found
    groups, out = scales.shape
    inner = packed.shape[0]
    if packed.shape != (inner, out // 8) or zeros.shape != (groups, out // 8) or out % 8:
        return None
    if not groups or inner % groups:
        return None
    parts = {key: packed, f"{root}.qzeros": zeros, f"{root}.scales": scales}
    return Matrix(f"{root}.weight", (out, inner), parts, awq)


def find_gptq(key: str, stored: Mapping[str, Stored], *, bits: int, more: int) -> Matrix | None:
    """Find a matrix of GPTQ; in the first form of its files a zero point of all ones is either of two."""
    found = _grouped(key, stored)
    if found is None:
        return None
    root, packed, zeros, scales = found
    places = stored.get(f"{root}.g_idx")
    groups, out = scales.shape
    inner = packed.shape[0] * WORD // bits
    if places is None or not _are_places(places, inner, groups) or packed.shape[1:] != (out,):
        return None
    if zeros.shape != (groups, out * bits // WORD) or out * bits % WORD:
        return None
    if more and bool((unpacked(zeros.read(), bits, 1) == 2**bits - 1).any()):
        return None
    parts = {key: packed, f"{root}.qzeros": zeros, f"{root}.scales": scales, f"{root}.g_idx": places}
    return Matrix(f"{root}.weight", (out, inner), parts, partial(gptq, bits=bits, more=more))


def find_four_bits(key: str, stored: Mapping[str, Stored]) -> Matrix | None:
    """Find a matrix of bitsandbytes' NF4 or FP4, which says of itself how it is packed."""
    said = next(
        (name for kind in ("nf4", "fp4") if (name := f"{key}.quant_state.bitsandbytes__{kind}") in stored), None
    )
    absmax, table = stored.get(f"{key}.absmax"), stored.get(f"{key}.quant_map")
    if said is None or absmax is None or table is None or stored[key].dtype != "U8" or table.shape != (16,):
        return None
    try:
        state = json.loads(bytes(stored[said].read().tolist()))
        shape, size = tuple(map(int, state["shape"])), int(state["blocksize"])
        inner, offset = int(state.get("nested_blocksize", 0)), float(state.get("nested_offset", 0.0))
        if min(size, *shape) < 1:
            raise ValueError("sizes below 1")  # noqa: TRY301 - as any that are no numbers
    except (ValueError, KeyError, TypeError):
        return None
    count = math.prod(shape)
    nested = {f"{key}.nested_quant_map", f"{key}.nested_absmax"} & stored.keys()
    if math.prod(stored[key].shape) != -(-count // 2) or absmax.shape != (-(-count // size),) or len(nested) == 1:
        return None
    if (absmax.dtype == "U8") != bool(nested):
        return None
    if nested and (
        stored[f"{key}.nested_quant_map"].shape != (256,)
        or inner < 1
        or stored[f"{key}.nested_absmax"].shape != (-(-absmax.shape[0] // inner),)
    ):
        return None
    names = [key, f"{key}.quant_map", f"{key}.absmax", *sorted(nested, reverse=True), said]

    def compute(packed: torch.Tensor, table: torch.Tensor, absmax: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        values = (more[0], more[1], offset, inner) if nested else None
        return four_bits(packed, table, absmax, values, shape=shape, size=size)

    return Matrix(key, shape, {name: stored[name] for name in names}, compute)


def find_eight_bits(key: str, stored: Mapping[str, Stored]) -> Matrix | None:
    """Find a matrix of bitsandbytes' int8."""
    root = key.removesuffix(".weight")
    codes, largest, form = stored[key], stored.get(f"{root}.SCB"), stored.get(f"{root}.weight_format")
    if (
        root == key
        or largest is None
        or codes.dtype != "I8"
        or len(codes.shape) != 2
        or largest.shape != codes.shape[:1]
    ):
        return None
    parts = {key: codes, f"{root}.SCB": largest}
    if form is not None:
        if form.read().item() != 0:  # not in rows
            return None
        parts[f"{root}.weight_format"] = form
    return Matrix(key, codes.shape, parts, lambda codes, largest, *_: eight_bits(codes, largest))
