"""The commitment to a round's artifacts on the live network: a sparse Merkle sum tree over nonces (docs/live.md).

A leaf stands at its nonce and counts 1; a node counts what is below it. So the root stands for a number of artifacts,
and a proof says which of them, in the order of their nonces, an artifact is.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

LARGEST_NONCE = 2**31 - 1  # the chain keeps int32
LARGEST_COUNT = 2**32 - 1
LEAST_DEPTH, MOST_DEPTH = 24, 32
HASH_BYTES = 32


@dataclass(frozen=True, slots=True)
class Subtree:
    """The hash of a part of the tree, and the number of artifacts in it."""

    hash: bytes
    count: int


@dataclass(frozen=True, slots=True)
class Proof:
    """An artifact, and what leads from it to the root.

    Attributes:
        index: Number of artifacts in the tree with smaller nonces.
        nonce: The artifact's nonce.
        vector: The artifact's vector.
        siblings: The subtrees beside the way from the root to the leaf, the root's child first.
    """

    index: int
    nonce: int
    vector: bytes
    siblings: tuple[Subtree, ...]


class ProofError(Exception):
    """A proof does not verify; the message says why."""


def _leaf_hash(nonce: int, vector: bytes) -> bytes:
    return sha256(b"\x00" + nonce.to_bytes(4, "little") + vector).digest()


def _node_hash(children: bytes, count: int) -> bytes:
    return sha256(b"\x01" + children + count.to_bytes(4, "little")).digest()


def _empty_hashes() -> list[bytes]:
    hashes = [sha256(b"\x00").digest()]
    while len(hashes) < MOST_DEPTH:
        hashes.append(_node_hash(hashes[-1] * 2, 0))
    return hashes


EMPTY = tuple(Subtree(each, 0) for each in _empty_hashes())
"""The subtrees without artifacts, by their height."""


@dataclass(frozen=True, slots=True)
class _Level:
    """All subtrees of one height that hold artifacts, from left to right.

    Packed, because a million artifacts are some millions of subtrees.
    """

    positions: array[int]
    hashes: bytes
    counts: array[int]

    def at(self, position: int) -> Subtree | None:
        """Return the subtree at a position, None where there are no artifacts."""
        index = bisect_left(self.positions, position)
        if index == len(self.positions) or self.positions[index] != position:
            return None
        return Subtree(self.hashes[HASH_BYTES * index : HASH_BYTES * (index + 1)], self.counts[index])

    def above(self, empty: bytes) -> _Level:
        """Return the level above, where `empty` is the hash of this level's subtrees without artifacts."""
        below, size = self.positions, len(self.positions)
        positions, hashes, counts = array("I"), bytearray(), array("I")
        index = 0
        while index < size:
            position, count, start = below[index], self.counts[index], HASH_BYTES * index
            child = self.hashes[start : start + HASH_BYTES]
            index += 1
            if position & 1:
                children = empty + child
            elif index < size and below[index] == position + 1:
                children = self.hashes[start : start + 2 * HASH_BYTES]
                count += self.counts[index]
                index += 1
            else:
                children = child + empty
            positions.append(position >> 1)
            hashes += _node_hash(children, count)
            counts.append(count)
        return _Level(positions, bytes(hashes), counts)


class Tree:
    """The tree of one participant's artifacts of a round.

    Attributes:
        depth: Number of levels below the root.
        root: Hash of the root.
        count: Number of artifacts.
    """

    def __init__(self, vectors: Mapping[int, bytes]) -> None:
        """Build the tree of `vectors`, one or more, by their nonces."""
        nonces = sorted(vectors)
        assert nonces, "a tree has a leaf"
        assert 0 <= nonces[0] <= nonces[-1] <= LARGEST_NONCE, f"not nonces: {nonces[0]} to {nonces[-1]}"
        self._vectors = vectors
        self._nonces = array("I", nonces)
        self.depth = max(LEAST_DEPTH, nonces[-1].bit_length())
        leaves = b"".join(_leaf_hash(nonce, vectors[nonce]) for nonce in nonces)
        self._levels = [_Level(self._nonces, leaves, array("I", [1]) * len(nonces))]
        for empty in EMPTY[: self.depth]:
            self._levels.append(self._levels[-1].above(empty.hash))
        root = self._levels.pop()
        self.root, self.count = root.hashes, root.counts[0]

    def proof(self, nonce: int) -> Proof:
        """Return the proof of an artifact.

        Raises:
            KeyError: The tree has no such nonce.
        """
        vector = self._vectors[nonce]
        siblings = [level.at((nonce >> height) ^ 1) or EMPTY[height] for height, level in enumerate(self._levels)]
        return Proof(bisect_left(self._nonces, nonce), nonce, vector, tuple(reversed(siblings)))


def verify(proof: Proof, root: bytes, count: int) -> None:
    """Check that a committed root of `count` artifacts has this artifact, and has it at this index.

    Raises:
        ProofError: The artifact, its index or a sibling is not what was committed.
    """
    depth = len(proof.siblings)
    if not LEAST_DEPTH <= depth <= MOST_DEPTH:
        raise ProofError(f"it has {depth} siblings, not {LEAST_DEPTH} to {MOST_DEPTH}")
    if proof.nonce >> depth:
        raise ProofError(f"nonce {proof.nonce} lies outside a tree of depth {depth}")
    own, rank = Subtree(_leaf_hash(proof.nonce, proof.vector), 1), 0
    for height, sibling in enumerate(reversed(proof.siblings)):
        total = own.count + sibling.count
        if total > count:
            raise ProofError(f"it counts {total} artifacts or more, not {count}")
        if proof.nonce >> height & 1:
            rank += sibling.count
            children = sibling.hash + own.hash
        else:
            children = own.hash + sibling.hash
        own = Subtree(_node_hash(children, total), total)
    if own.count != count:
        raise ProofError(f"it counts {own.count} artifacts, not {count}")
    if own.hash != root:
        raise ProofError(f"it leads to the root {own.hash.hex()}")
    if rank != proof.index:
        raise ProofError(f"nonce {proof.nonce} has index {rank}, not {proof.index}")
