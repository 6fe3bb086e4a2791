"""A span committed as the miner commits it, and results that no other nonce has."""

from collections.abc import Iterable
from struct import pack

from pocd.protocol.nonces import Node, Span
from pocd.protocol.proof import Proofs, Round
from pocd.protocol.schemes import VECTOR_SIZE
from pocd.store.outbox import Outbox
from pocd.store.proofs import CheckedSpan, Counted, Weights, commit_spans

VECTORS = Round("AB", 10, "miner", None, "poc4", "tiny", 16)


def commit_span(  # noqa: PLR0917 - all that a span has
    outbox: Outbox, round_: Round, node: Node, span: Span, proofs: Proofs, weights: Weights, now: float
) -> Counted:
    """Commit one span with what was found in it."""
    (counted,) = commit_spans(outbox, [CheckedSpan(round_, node, span, proofs, weights)], now)
    return counted


def vector_of(nonce: int) -> bytes:
    """Return a vector that only this nonce has: its bytes, as numbers."""
    return pack(f"<{VECTOR_SIZE}e", *nonce.to_bytes(VECTOR_SIZE, "little"))


def proofs_of(round_: Round, nonces: Iterable[int]) -> Proofs:
    """Return proofs of all `nonces`, of the kind that the round has."""
    found = list(nonces)
    if round_.output == "vector":
        return Proofs(tuple(found), b"".join(map(vector_of, found)))
    return Proofs.of_distances((nonce, 1 + nonce / 2**20) for nonce in found)
