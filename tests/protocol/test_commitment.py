"""The live network's commitment: known trees, an implementation of its own, and what no other proof may pass."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocd.protocol.commitment import LARGEST_COUNT, LARGEST_NONCE, Proof, ProofError, Subtree, Tree, verify
from tests.reference import plain_commitment as plain

if TYPE_CHECKING:
    from collections.abc import Callable

KNOWN = json.loads((Path(__file__).parent.parent / "data" / "live_trees.json").read_text())

nonces = st.integers(0, 40) | st.integers(0, LARGEST_NONCE)
trees = st.dictionaries(nonces, st.binary(min_size=24, max_size=24), min_size=1, max_size=8)


def packed(siblings: tuple[Subtree, ...]) -> list[str]:
    return [(each.hash + each.count.to_bytes(4, "little")).hex() for each in siblings]


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: f"{known['count']} leaves, depth {known['depth']}")
def test_the_known_trees(known: dict[str, Any]) -> None:
    tree = Tree({int(nonce): bytes.fromhex(vector) for nonce, vector in known["leaves"].items()})
    assert (tree.root.hex(), tree.count, tree.depth) == (known["root"], known["count"], known["depth"])
    proofs = [tree.proof(nonce) for nonce in known["dense_order"]]
    assert packed(proofs[0].siblings) == known["proof_of_dense_0"]
    assert [proof.index for proof in proofs] == list(range(len(proofs)))
    for proof in proofs:
        verify(proof, bytes.fromhex(known["root"]), known["count"])


@given(leaves=trees)
def test_every_tree_is_that_of_a_plain_implementation_and_every_proof_verifies(leaves: plain.Leaves) -> None:
    tree, depth = Tree(leaves), plain.least_depth(leaves)
    assert (tree.root, tree.count) == plain.subtree(leaves, depth)
    for index, nonce in enumerate(sorted(leaves)):
        proof = tree.proof(nonce)
        assert (proof.index, proof.nonce, proof.vector) == (index, nonce, leaves[nonce])
        assert [(each.hash, each.count) for each in proof.siblings] == plain.siblings(leaves, nonce, depth)
        verify(proof, tree.root, tree.count)


@given(leaves=trees, data=st.data())
def test_a_tree_does_not_depend_on_the_order_of_arrival(leaves: plain.Leaves, data: st.DataObject) -> None:
    arrived = data.draw(st.permutations(list(leaves.items())))
    assert Tree(dict(arrived)).root == Tree(leaves).root


@pytest.mark.parametrize(
    ("largest", "depth"), [(0, 24), (2**24 - 1, 24), (2**24, 25), (2**25 - 1, 25), (2**30, 31), (LARGEST_NONCE, 31)]
)
def test_the_depth_is_24_or_what_the_largest_nonce_needs(largest: int, depth: int) -> None:
    assert Tree({0: b"a", largest: b"b"}).depth == depth


def flipped(data: bytes, bit: int) -> bytes:
    number = int.from_bytes(data, "big") ^ (1 << bit % (8 * len(data)))
    return number.to_bytes(len(data), "big")


def with_sibling(proof: Proof, level: int, sibling: Subtree) -> Proof:
    siblings = list(proof.siblings)
    siblings[level] = sibling
    return replace(proof, siblings=tuple(siblings))


@st.composite
def changed(draw: Callable[..., Any], proof: Proof, root: bytes, count: int) -> tuple[Proof, bytes, int]:
    """Give a proof, a root and a count of which one thing is not what it was."""
    bit = draw(st.integers(0, 255))
    level = draw(st.integers(0, len(proof.siblings) - 1))
    sibling = proof.siblings[level]
    other_count = st.integers(0, LARGEST_COUNT)
    match draw(st.sampled_from(["vector", "nonce", "index", "hash", "sum", "longer", "shorter", "root", "count"])):
        case "vector":
            proof = replace(proof, vector=flipped(proof.vector, bit))
        case "nonce":
            proof = replace(proof, nonce=draw(nonces.filter(lambda other: other != proof.nonce)))
        case "index":
            proof = replace(proof, index=draw(other_count.filter(lambda other: other != proof.index)))
        case "hash":
            proof = with_sibling(proof, level, replace(sibling, hash=flipped(sibling.hash, bit)))
        case "sum":
            other = draw(other_count.filter(lambda other: other != sibling.count))
            proof = with_sibling(proof, level, replace(sibling, count=other))
        case "longer":
            proof = replace(proof, siblings=(*proof.siblings[:level], sibling, *proof.siblings[level:]))
        case "shorter":
            proof = replace(proof, siblings=proof.siblings[:level] + proof.siblings[level + 1 :])
        case "root":
            root = flipped(root, bit)
        case "count":
            count = draw(other_count.filter(lambda other: other != count))
    return proof, root, count


@given(leaves=trees, data=st.data())
def test_a_proof_of_which_anything_is_changed_does_not_verify(leaves: plain.Leaves, data: st.DataObject) -> None:
    tree = Tree(leaves)
    proof = tree.proof(data.draw(st.sampled_from(sorted(leaves))))
    with pytest.raises(ProofError):
        verify(*data.draw(changed(proof, tree.root, tree.count)))


@given(leaves=trees, data=st.data())
def test_artifacts_moved_from_one_sibling_to_another_do_not_verify(leaves: plain.Leaves, data: st.DataObject) -> None:
    """The sum is right, what is below is not."""
    tree = Tree(leaves)
    proof = tree.proof(data.draw(st.sampled_from(sorted(leaves))))
    one, other = data.draw(st.lists(st.integers(0, tree.depth - 1), min_size=2, max_size=2, unique=True))
    giver, taker = proof.siblings[one], proof.siblings[other]
    moved = with_sibling(proof, one, replace(giver, count=giver.count + 1))
    moved = with_sibling(moved, other, replace(taker, count=max(0, taker.count - 1)))
    with pytest.raises(ProofError):
        verify(moved, tree.root, tree.count)


@pytest.mark.parametrize("depth", [24, 32])
def test_any_depth_that_the_network_allows_verifies(depth: int) -> None:
    leaves = {3: b"a", 5: b"b", 9: b"c"}
    root, count = plain.subtree(leaves, depth)
    siblings = tuple(Subtree(*each) for each in plain.siblings(leaves, 5, depth))
    assert plain.led_to(5, b"b", plain.siblings(leaves, 5, depth)) == ((root, count), 1)
    verify(Proof(1, 5, b"b", siblings), root, count)


@pytest.mark.parametrize("depth", [0, 3, 23, 33])
def test_another_depth_does_not_verify(depth: int) -> None:
    siblings = tuple(Subtree(*plain.nothing(height)) for height in reversed(range(depth)))
    (root, count), _ = plain.led_to(0, b"a", [(each.hash, each.count) for each in siblings])
    with pytest.raises(ProofError, match=f"it has {depth} siblings, not 24 to 32"):
        verify(Proof(0, 0, b"a", siblings), root, count)


def test_a_nonce_that_the_tree_has_no_place_for_does_not_verify() -> None:
    """Its low bits alone would lead to the root."""
    beside = [plain.nothing(height) for height in reversed(range(24))]
    own, _ = plain.led_to(2**24, b"a", [])
    for sibling in reversed(beside):
        own = plain.joined(own, sibling)
    with pytest.raises(ProofError, match="nonce 16777216 lies outside a tree of depth 24"):
        verify(Proof(0, 2**24, b"a", tuple(Subtree(*each) for each in beside)), *own)


def test_why_a_proof_does_not_verify_is_said() -> None:
    tree = Tree({nonce: bytes([nonce]) * 24 for nonce in (3, 5, 7)})
    proof = tree.proof(5)
    for wrong, root, count, why in [
        (replace(proof, index=2), tree.root, 3, "nonce 5 has index 1, not 2"),
        (proof, tree.root, 2, "it counts 3 artifacts or more, not 2"),
        (proof, tree.root, 4, "it counts 3 artifacts, not 4"),
        (proof, bytes(32), 3, f"it leads to the root {tree.root.hex()}"),
    ]:
        with pytest.raises(ProofError) as error:
            verify(wrong, root, count)
        assert str(error.value) == why
