"""What quantised weights are worth: functions from the tensors of a file to the matrix, in float32.

Each operation is one of IEEE's, correctly rounded, on numbers that are exact in float32, in the order written here. So
every device gets the same bits, and docs/models.md can say them.
"""

from __future__ import annotations

import torch

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # E2M1, by code
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # which four bits of a word of AWQ hold each of eight columns
INT8_STEP = 0.007874015718698502  # 1/127, as bitsandbytes writes it


def powers_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """Return 2^(e - 127) for exponents e in uint8 (E8M0); 255 is NaN."""
    bits = exponents.int() << 23
    bits = torch.where(exponents == 0, 1 << 22, bits)  # 2^-127 is subnormal
    return torch.where(exponents == 255, 0x7FC00000, bits).to(torch.int32).view(torch.float32)


def numbers(scale: torch.Tensor) -> torch.Tensor:
    """Return scales as float32; exponents in uint8 are powers of two."""
    return powers_of_two(scale) if scale.dtype == torch.uint8 else scale.float()


def spread(scale: torch.Tensor, shape: torch.Size, block: tuple[int, int]) -> torch.Tensor:
    """Return the scale of each element of a matrix, or of a stack of them.

    Args:
        scale: One for each block [..., ceil(rows / height), ceil(columns / width)].
        shape: Shape of the matrix.
        block: Height and width of a block; the last ones of a matrix may be cut.
    """
    for dim, size in zip((-2, -1), block, strict=True):
        scale = scale if scale.shape[dim] == 1 else scale.repeat_interleave(size, dim)
    return scale[..., : shape[-2], : shape[-1]]


def scaled(codes: torch.Tensor, scale: torch.Tensor, *, block: tuple[int, int]) -> torch.Tensor:
    """Multiply each element (FP8 or int8) with its block's scale."""
    return codes.float().mul_(spread(numbers(scale), codes.shape, block))


def shifted(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, *, block: tuple[int, int]) -> torch.Tensor:
    """Multiply each element less its block's zero point (whole numbers) with its block's scale."""
    return (codes.float() - spread(zero.float(), codes.shape, block)) * spread(numbers(scale), codes.shape, block)


def unpacked(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Return the unsigned numbers of `bits` bits that int32 words hold along `dim`, the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    parts: torch.Tensor = (words.movedim(dim, -1).unsqueeze(-1) >> shifts) & (2**bits - 1)
    return parts.flatten(-2).movedim(-1, dim)


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Return the codes of four bits that bytes hold along the last dimension, the low ones first."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def fp4_values(packed: torch.Tensor) -> torch.Tensor:
    """Return the numbers (E2M1) that bytes hold along the last dimension, the low ones first."""
    return torch.tensor(FP4, device=packed.device)[nibbles(packed).long()]


def mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return gpt-oss' experts [E, in, out] from blocks of 16 bytes [E, out, in / 32, 16] and their exponents."""
    values = fp4_values(blocks) * powers_of_two(scales).unsqueeze(-1)
    return values.flatten(-2).transpose(-2, -1).contiguous()


def nvfp4(packed: torch.Tensor, scale: torch.Tensor, whole: torch.Tensor, *, divided: bool) -> torch.Tensor:
    """Return a matrix of NVFP4: FP4 in groups of 16 with a scale in FP8, and a scale of the whole.

    Args:
        packed: Two codes in a byte [rows, columns / 2].
        scale: Scales of the groups, FP8 [rows, columns / 16].
        whole: Scale of the whole, one number.
        divided: Whether groups' scales are divided by it (compressed-tensors) or multiplied with it (ModelOpt).
    """
    of_group = scale.float() / whole.float() if divided else scale.float() * whole.float()
    values = fp4_values(packed)
    return values * spread(of_group, values.shape, (1, 16))


def int_packed(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    columns_groups: torch.Tensor | None,
    *,
    bits: int,
    shape: tuple[int, int],
    block: tuple[int, int],
) -> torch.Tensor:
    """Return a matrix of compressed-tensors' packed integers.

    Args:
        packed: Unsigned codes along the rows, int32 [rows, columns · bits / 32].
        scale: Scale of each block.
        zero: Zero points packed along the columns; None: the middle of the codes.
        columns_groups: Group of each column; None: they are in order.
        bits: Bits of a code.
        shape: Rows and columns.
        block: Height and width of what has one scale.
    """
    codes = unpacked(packed, bits, 1)[:, : shape[1]].float()
    middle = torch.full((1, 1), 2.0 ** (bits - 1), device=codes.device)
    points = middle if zero is None else unpacked(zero, bits, 0)[: scale.shape[0]].float()
    if columns_groups is not None:
        places = columns_groups.long()
        points = points if zero is None else points[:, places]
        return (codes - points) * numbers(scale)[:, places]
    return (codes - spread(points, codes.shape, block)) * spread(numbers(scale), codes.shape, block)


def awq(packed: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return a matrix [out, in] of AWQ's "gemm": codes of four bits int32 [in, out / 8], grouped along `in`."""

    def ordered(words: torch.Tensor) -> torch.Tensor:
        parts = unpacked(words, 4, 1).unflatten(1, (-1, 8))[..., list(AWQ_ORDER)]
        numbers: torch.Tensor = parts.flatten(1).float()
        return numbers

    size = packed.shape[0] // scales.shape[0]
    zero, scale = (part.repeat_interleave(size, 0) for part in (ordered(zeros), scales.float()))
    return ((ordered(packed) - zero) * scale).t().contiguous()


def gptq(
    packed: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, groups: torch.Tensor, *, bits: int, more: int
) -> torch.Tensor:
    """Return a matrix [out, in] of GPTQ.

    Args:
        packed: Codes int32 [in · bits / 32, out].
        zeros: Zero points of each group int32 [groups, out · bits / 32].
        scales: Scales of each group [groups, out].
        groups: Group of each input [in].
        bits: Bits of a code.
        more: What is added to a zero point: 1 in the first form of GPTQ's files, 0 in the second ("gptq_v2").
    """
    codes, places = unpacked(packed, bits, 0).float(), groups.long()
    points = (unpacked(zeros, bits, 1) + more).float()
    return ((codes - points[places]) * scales.float()[places]).t().contiguous()


def by_table(codes: torch.Tensor, table: torch.Tensor, absmax: torch.Tensor, size: int) -> torch.Tensor:
    """Return table[code] · absmax of its block of `size` elements, in one dimension, as many as there are codes."""
    return table.float()[codes.long()] * absmax.float().repeat_interleave(size)[: len(codes)]


def four_bits(
    packed: torch.Tensor,
    table: torch.Tensor,
    absmax: torch.Tensor,
    nested: tuple[torch.Tensor, torch.Tensor, float, int] | None,
    *,
    shape: tuple[int, ...],
    size: int,
) -> torch.Tensor:
    """Return a matrix of bitsandbytes' NF4 or FP4.

    Args:
        packed: Two codes in a byte, the high one first.
        table: Values of the codes [16].
        absmax: Largest number of each block; codes of it where they are nested.
        nested: Table of those codes, largest number of each of their blocks, their offset, and elements of a block.
        shape: Shape of the matrix.
        size: Elements of a block.
    """
    flat = packed.flatten()
    codes = torch.stack([flat >> 4, flat & 15], -1).flatten()
    if nested is not None:
        values, largest, offset, inner = nested
        absmax = by_table(absmax, values, largest, inner) + offset
    count = torch.Size(shape).numel()
    return by_table(codes[:count], table, absmax, size).reshape(shape)


def eight_bits(codes: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Return a matrix of bitsandbytes' int8: code · the row's largest number · 1/127."""
    return codes.float() * largest.float().reshape(-1, 1) * INT8_STEP
