"""Quantised matrices of every format by plain NumPy, from the formats' descriptions: random codes as files hold them,
and the float32 values that they stand for. Shares no code with pocd."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

Array = np.ndarray[Any, np.dtype[Any]]
Parts = dict[str, tuple[str, Array]]  # by the end of the name: element type in safetensors, and its bits
Packed = tuple[Parts, Array]

F4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def e4m3(code: int) -> float:
    sign, exponent, fraction = -1.0 if code & 128 else 1.0, (code >> 3) & 15, code & 7
    return sign * (fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))


F8 = np.array([e4m3(code) for code in range(256)], np.float32)  # 127 and 255 are NaN, and are not drawn


def bfloat16(values: Array) -> Array:
    """Round to nearest, ties to even, and return the 16 bits."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def of_bfloat16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def codes8(rng: np.random.Generator, *shape: int) -> Array:
    return (rng.integers(0, 127, shape) | (rng.integers(0, 2, shape) << 7)).astype(np.uint8)


def scales(rng: np.random.Generator, *shape: int) -> Array:
    return (rng.random(shape) * 0.01 + 0.001).astype(np.float32)


def by_element(value: Callable[[int, int], np.float32], rows: int, columns: int) -> Array:
    return np.array([[value(row, column) for column in range(columns)] for row in range(rows)], np.float32)


def whole(rng: np.random.Generator, rows: int, columns: int) -> Packed:
    """A matrix that is not quantised, in bfloat16."""
    bits = bfloat16(rng.standard_normal((rows, columns)))
    return {"weight": ("BF16", bits)}, of_bfloat16(bits)


def fp8(height: int | None, width: int | None, *, scale: str = "weight_scale_inv", dtype: str = "F32") -> Any:  # noqa: ANN401 - a function
    """FP8 with a scale for each block; None: the whole side of the matrix."""

    def pack(rng: np.random.Generator, rows: int, columns: int) -> Packed:
        tall, wide = height or rows, width or columns
        grid = (-(-rows // tall), -(-columns // wide))
        codes, factors = codes8(rng, rows, columns), scales(rng, *grid)
        stored: tuple[str, Array] = ("F32", factors)
        if dtype == "BF16":
            stored = ("BF16", bfloat16(factors))
            factors = of_bfloat16(stored[1])
        elif dtype == "F8_E8M0":
            stored = ("F8_E8M0", rng.integers(110, 125, grid).astype(np.uint8))
            factors = np.float32(2) ** (stored[1].astype(np.float32) - 127)
        if height is None and width is None:
            stored = (stored[0], stored[1].reshape(()))
        truth = by_element(
            lambda row, column: F8[codes[row, column]] * factors[row // tall, column // wide], rows, columns
        )
        return {"weight": ("F8_E4M3", codes), scale: stored}, truth

    return pack


def int8_rows(rng: np.random.Generator, rows: int, columns: int) -> Packed:
    codes, factors = rng.integers(-128, 128, (rows, columns)).astype(np.int8), scales(rng, rows, 1)
    zero = rng.integers(-20, 20, (rows, 1)).astype(np.int8)
    truth = by_element(
        lambda row, column: np.float32(int(codes[row, column]) - int(zero[row, 0])) * factors[row, 0], rows, columns
    )
    parts: Parts = {"weight": ("I8", codes), "weight_scale": ("F32", factors), "weight_zero_point": ("I8", zero)}
    return parts, truth


def words(codes: Array, bits: int, order: tuple[int, ...] | None = None) -> Array:
    """Pack codes along the last dimension into int32, the first into the lowest bits; `order` permutes each word's."""
    count = 32 // bits
    padded = np.zeros((*codes.shape[:-1], -(-codes.shape[-1] // count) * count), np.uint64)
    padded[..., : codes.shape[-1]] = codes
    of_word = padded.reshape(*padded.shape[:-1], -1, count)
    packed = np.zeros(of_word.shape[:-1], np.uint64)
    for place in range(count):
        packed |= of_word[..., order[place] if order else place] << np.uint64(bits * place)
    return packed.astype(np.uint32).view(np.int32)


def int_packed(bits: int, group: int | None, *, zero: bool = False, places: bool = False) -> Any:  # noqa: ANN401 - a function
    def pack(rng: np.random.Generator, rows: int, columns: int) -> Packed:
        size = group or columns
        groups = -(-columns // size)
        codes = rng.integers(0, 2**bits, (rows, columns))
        bits16 = bfloat16(scales(rng, rows, groups))
        factors = of_bfloat16(bits16)
        points = rng.integers(0, 2**bits, (rows, groups)) if zero else np.full((rows, groups), 2 ** (bits - 1))
        index = np.arange(columns) // size
        if places:
            rng.shuffle(index)
        truth = by_element(
            lambda row, column: (
                np.float32(codes[row, column] - points[row, index[column]]) * factors[row, index[column]]
            ),
            rows,
            columns,
        )
        parts: Parts = {
            "weight_packed": ("I32", words(codes, bits)),
            "weight_scale": ("BF16", bits16),
            "weight_shape": ("I64", np.array([rows, columns])),
        }
        if zero:
            parts["weight_zero_point"] = ("I32", np.ascontiguousarray(words(points.T, bits).T))
        if places:
            parts["weight_g_idx"] = ("I32", index.astype(np.int32))
        return parts, truth

    return pack


def awq(rng: np.random.Generator, rows: int, columns: int, group: int = 16) -> Packed:
    order = (0, 2, 4, 6, 1, 3, 5, 7)  # the column whose code is in each four bits of a word
    codes, points = rng.integers(0, 16, (columns, rows)), rng.integers(0, 16, (columns // group, rows))
    factors = scales(rng, columns // group, rows).astype(np.float16)
    truth = by_element(
        lambda row, column: (
            np.float32(codes[column, row] - points[column // group, row]) * np.float32(factors[column // group, row])
        ),
        rows,
        columns,
    )
    parts: Parts = {
        "qweight": ("I32", words(codes, 4, order)),
        "qzeros": ("I32", words(points, 4, order)),
        "scales": ("F16", factors.view(np.uint16)),
    }
    return parts, truth


def gptq(bits: int, *, first_form: bool, shuffled: bool, group: int = 16) -> Any:  # noqa: ANN401 - a function
    def pack(rng: np.random.Generator, rows: int, columns: int) -> Packed:
        codes = rng.integers(0, 2**bits, (columns, rows))
        points = rng.integers(1, 2**bits, (columns // group, rows))
        factors = scales(rng, columns // group, rows).astype(np.float16)
        index = np.arange(columns) // group
        if shuffled:
            rng.shuffle(index)
        truth = by_element(
            lambda row, column: (
                np.float32(codes[column, row] - points[index[column], row]) * np.float32(factors[index[column], row])
            ),
            rows,
            columns,
        )
        parts: Parts = {
            "qweight": ("I32", np.ascontiguousarray(words(codes.T, bits).T)),
            "qzeros": ("I32", words(points - 1 if first_form else points, bits)),
            "scales": ("F16", factors.view(np.uint16)),
            "g_idx": ("I32", index.astype(np.int32)),
        }
        return parts, truth

    return pack


def nvfp4(*, divided: bool) -> Any:  # noqa: ANN401 - a function
    def pack(rng: np.random.Generator, rows: int, columns: int) -> Packed:
        codes = rng.integers(0, 16, (rows, columns)).astype(np.uint8)
        of_group = codes8(rng, rows, columns // 16) & 127
        whole = np.float32(rng.random() * 300 + 5) if divided else np.float32(rng.random() * 0.001 + 0.0001)

        def value(row: int, column: int) -> np.float32:
            scale = F8[of_group[row, column // 16]]
            return np.float32(F4[codes[row, column]] * (scale / whole if divided else scale * whole))

        parts: Parts = {
            "weight_packed" if divided else "weight": ("U8", codes[:, 0::2] | (codes[:, 1::2] << 4)),
            "weight_scale": ("F8_E4M3", of_group),
            "weight_global_scale" if divided else "weight_scale_2": (
                "F32",
                np.array([whole]).reshape([1] if divided else []),
            ),
        }
        return parts, by_element(value, rows, columns)

    return pack


def bits4(*, nested: bool, size: int = 64, inner: int = 8) -> Any:  # noqa: ANN401 - a function
    """bitsandbytes' NF4: blocks run through rows; the high four bits of a byte come first."""

    def pack(rng: np.random.Generator, rows: int, columns: int) -> Packed:
        table = np.sort(rng.random(16) * 2 - 1).astype(np.float32)
        codes = rng.integers(0, 16, rows * columns).astype(np.uint8)
        blocks = -(-codes.size // size)
        absmax = scales(rng, blocks)
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": size, "dtype": "bfloat16", "shape": [rows, columns]}
        parts: Parts = {}
        if nested:
            inner_codes, inner_table = rng.integers(0, 256, blocks).astype(np.uint8), np.sort(rng.random(256) * 2 - 1)
            largest, offset = scales(rng, -(-blocks // inner)), np.float32(0.0123)
            inner_table = inner_table.astype(np.float32)
            absmax = np.array(
                [inner_table[code] * largest[block // inner] + offset for block, code in enumerate(inner_codes)],
                np.float32,
            )
            state |= {"nested_blocksize": inner, "nested_dtype": "float32", "nested_offset": float(offset)}
            parts = {
                "weight.absmax": ("U8", inner_codes),
                "weight.nested_absmax": ("F32", largest),
                "weight.nested_quant_map": ("F32", inner_table),
            }
        else:
            parts = {"weight.absmax": ("F32", absmax)}
        truth = np.array([table[code] * absmax[place // size] for place, code in enumerate(codes)], np.float32)
        said = np.frombuffer(json.dumps(state).encode(), np.uint8)
        parts |= {
            "weight": ("U8", ((codes[0::2] << 4) | codes[1::2]).reshape(-1, 1)),
            "weight.quant_map": ("F32", table),
            "weight.quant_state.bitsandbytes__nf4": ("U8", said.copy()),
        }
        return parts, truth.reshape(rows, columns)

    return pack


def bits8(rng: np.random.Generator, rows: int, columns: int) -> Packed:
    """bitsandbytes' int8, whose largest number of a row is worth 127."""
    codes, largest = rng.integers(-127, 128, (rows, columns)).astype(np.int8), scales(rng, rows)
    step = np.float32(7.874015718698502e-3)
    truth = by_element(lambda row, column: np.float32(codes[row, column]) * largest[row] * step, rows, columns)
    parts: Parts = {"weight": ("I8", codes), "SCB": ("F32", largest), "weight_format": ("U8", np.array(0, np.uint8))}
    return parts, truth
