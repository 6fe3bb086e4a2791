"""The live network's sparse Merkle sum tree once more, plainly: from the root down, by recursion, nothing kept.

Written from the specification's text and sharing no code with pocd, so that the two can be held against each other.
"""

from __future__ import annotations

import hashlib
import struct
from functools import cache

Sum = tuple[bytes, int]  # a hash, and how many leaves it stands for
Leaves = dict[int, bytes]


def digest(*parts: bytes) -> bytes:
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return state.digest()


def joined(left: Sum, right: Sum) -> Sum:
    count = left[1] + right[1]
    return digest(b"\x01", left[0], right[0], struct.pack("<I", count)), count


@cache
def nothing(depth: int) -> Sum:
    return joined(nothing(depth - 1), nothing(depth - 1)) if depth else (digest(b"\x00"), 0)


def bits(nonce: int, depth: int) -> str:
    return format(nonce, f"0{depth}b")


def subtree(leaves: Leaves, depth: int, prefix: str = "") -> Sum:
    """Return the sum of the leaves whose bits begin with `prefix`."""
    inside = {nonce: vector for nonce, vector in leaves.items() if bits(nonce, depth).startswith(prefix)}
    if not inside:
        return nothing(depth - len(prefix))
    if len(prefix) == depth:
        ((nonce, vector),) = inside.items()
        return digest(b"\x00", struct.pack("<I", nonce), vector), 1
    return joined(subtree(inside, depth, prefix + "0"), subtree(inside, depth, prefix + "1"))


def least_depth(leaves: Leaves) -> int:
    return max(24, len(f"{max(leaves):b}"))


def siblings(leaves: Leaves, nonce: int, depth: int) -> list[Sum]:
    """Return what stands beside the way from the root to a leaf, the root's child first."""
    path = bits(nonce, depth)
    return [subtree(leaves, depth, path[:level] + str(1 - int(path[level]))) for level in range(depth)]


def led_to(nonce: int, vector: bytes, beside: list[Sum]) -> tuple[Sum, int]:
    """Return the root that a leaf and its siblings make, and the number of leaves on the left of it."""

    def up(level: int) -> tuple[Sum, int]:
        if level == len(beside):
            return (digest(b"\x00", struct.pack("<I", nonce), vector), 1), 0
        own, left = up(level + 1)
        if path[level] == "1":
            return joined(beside[level], own), left + beside[level][1]
        return joined(own, beside[level]), left

    path = bits(nonce, len(beside))
    return up(0)
