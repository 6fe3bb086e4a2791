"""Rounds and batches of proofs, their canonical JSON and ids."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import chain, compress
from struct import pack, unpack
from typing import TYPE_CHECKING, Any, ClassVar, Self

import orjson

from pocd.protocol.schemes import SCHEMES, VECTOR_BYTES, VECTOR_ENCODING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from pocd.protocol.schemes import Output
    from pocd.protocol.verdicts import DifferenceVerdict, MixtureVerdict, Result

MOST_NONCES = 100_000  # that a batch to be validated may have
MISMATCH = 5e-4  # share of an honest miner's nonces that may recompute as invalid (docs/protocol.md section 5)
LIVE_FIELDS = ("public_key", "block_hash", "block_height", "node_id", "artifacts", "encoding")  # docs/live.md
FRAUD_THRESHOLD = 0.01  # fraud is when an honest miner is less probable than this (docs/protocol.md section 5)


def canonical_json(value: object) -> bytes:
    """Encode `value` with sorted keys and no white space, so that equal values are equal bytes."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def content_id(value: object) -> str:
    """Return a name of `value` by its content: the first 32 hex digits of SHA-256 of its canonical JSON."""
    return hash_name(canonical_json(value))


def hash_name(content: bytes) -> str:
    """Return the first 32 hex digits of the SHA-256 of `content`, which identify it."""
    return hashlib.sha256(content).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Round:
    """The search for nonces that count under one block hash (docs/protocol.md section 5).

    Attributes:
        block_hash: The chain's hash, an opaque string, as the node wrote it.
        block_height: Height of that block.
        public_key: The miner's key, an opaque string.
        r_target: A nonce counts when its distance (in [0, 2]) is below this; None for a scheme of vectors, where every
            nonce with a finite vector counts.
        scheme: Name of the scheme, see `pocd.protocol.schemes`.
        model: Name of the model, as configured.
        seq_len: Sequence length in positions.
    """

    block_hash: str
    block_height: int
    public_key: str
    r_target: float | None
    scheme: str
    model: str
    seq_len: int

    @property
    def output(self) -> Output:
        """What a nonce of the round has: a distance, or a vector."""
        return SCHEMES[self.scheme].output

    @property
    def named(self) -> dict[str, Any]:
        """The fields that the round has, by their names: a round of vectors has no r_target."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def id(self) -> str:
        """Hash of all the fields: another r_target or model is another round."""
        return content_id(self.named)


@dataclass(frozen=True, slots=True)
class Proofs:
    """Nonces that count, and the result of each.

    Attributes:
        nonces: The nonces, in the order in which they were checked.
        results: Results in that order, packed: distances as float64, or vectors of float16, little endian.
    """

    nonces: tuple[int, ...] = ()
    results: bytes = b""

    def __post_init__(self) -> None:
        assert len(self.results) % max(1, len(self)) == 0, "results are of one size"

    @classmethod
    def of_distances(cls, pairs: Iterable[tuple[int, float]]) -> Self:
        """Return the proofs of pairs of a nonce and its distance."""
        found = list(pairs)
        return cls(tuple(nonce for nonce, _ in found), pack(f"<{len(found)}d", *(distance for _, distance in found)))

    @classmethod
    def joined(cls, parts: Sequence[Proofs]) -> Self:
        """Return all of `parts`, one after the other."""
        nonces = tuple(chain.from_iterable(part.nonces for part in parts))
        return cls(nonces, b"".join(part.results for part in parts))

    def __len__(self) -> int:
        return len(self.nonces)

    def __getitem__(self, part: slice) -> Proofs:
        start, stop, step = part.indices(len(self))
        assert step == 1, "the order is that in which they were checked"
        return Proofs(self.nonces[start:stop], self.results[self._width * start : self._width * stop])

    def only(self, counts: Sequence[bool]) -> Proofs:
        """Return the proofs that count, by one truth for each."""
        if all(counts):
            return self
        width = self._width
        kept = (self.results[width * i : width * (i + 1)] for i in compress(range(len(self)), counts))
        return Proofs(tuple(compress(self.nonces, counts)), b"".join(kept))

    @property
    def _width(self) -> int:
        """Bytes of one result."""
        return len(self.results) // max(1, len(self))

    @property
    def distances(self) -> tuple[float, ...]:
        """The distances, where the results are distances."""
        return unpack(f"<{len(self)}d", self.results)

    @property
    def vectors(self) -> list[bytes]:
        """The vectors, `VECTOR_BYTES` each, where the results are vectors."""
        assert len(self.results) == VECTOR_BYTES * len(self)
        return [self.results[start : start + VECTOR_BYTES] for start in range(0, len(self.results), VECTOR_BYTES)]


@dataclass(frozen=True)
class ProofBatch:
    """Proofs of one round, as receivers get them (docs/protocol.md section 5).

    Attributes:
        model_fingerprint: Fingerprint of the weights; None where an earlier version stored the proofs.
        dtype: Precision in which the proofs were computed; None where an earlier version stored them.
        is_live: Whether the batch is sent in the live network's body (docs/live.md).
    """

    kind: ClassVar = "generated"

    round: Round
    node_id: int
    model_fingerprint: str | None
    dtype: str | None
    proofs: Proofs
    is_live: bool = False

    @property
    def size(self) -> int:
        """Number of nonces in the batch."""
        return len(self.proofs)

    @cached_property  # of a thousand vectors it takes a millisecond
    def _content(self) -> dict[str, Any]:
        of = {"node_id": self.node_id, "model_fingerprint": self.model_fingerprint, "dtype": self.dtype}
        if self.round.output == "distance":
            return self.round.named | of | {"nonces": self.proofs.nonces, "dist": self.proofs.distances}
        artifacts = [
            {"nonce": nonce, "vector_b64": b64encode(vector).decode()}
            for nonce, vector in zip(self.proofs.nonces, self.proofs.vectors, strict=True)
        ]
        return self.round.named | of | {"artifacts": artifacts, "encoding": VECTOR_ENCODING}

    @cached_property
    def id(self) -> str:
        """Hash of the content: the same proofs always travel under the same id."""
        return content_id(self._content)

    def to_json(self) -> bytes:
        """The exact bytes of every POST of this batch: canonical JSON with `batch_id`; or the live network's body."""
        if self.is_live:
            return canonical_json({name: self._content[name] for name in LIVE_FIELDS})
        return canonical_json(self._content | {"batch_id": self.id})


def nonces_in(batch: Mapping[str, Any]) -> list[int]:
    """Return the nonces in the JSON of a ProofBatch."""
    if "artifacts" in batch:
        return [artifact["nonce"] for artifact in batch["artifacts"]]
    return list(batch["nonces"])


def results_in(batch: Mapping[str, Any]) -> list[tuple[int, float | str]]:
    """Return each nonce in the JSON of a ProofBatch with its distance, or with its vector in base64."""
    if "artifacts" in batch:
        return [(artifact["nonce"], artifact["vector_b64"]) for artifact in batch["artifacts"]]
    return list(zip(nonces_in(batch), batch["dist"], strict=True))


_OF_ONE_OUTPUT = (
    *("received_dist", "dist", "reference_dist"),
    *("received_vectors", "vectors", "reference_vectors"),
)


@dataclass(frozen=True, slots=True)
class ValidatedBatch:
    """The verdict on a batch of claims, with the recomputed results (docs/protocol.md section 5, "Verdict").

    The lists stand beside each other: the entries of the batch whose nonces were recomputed, as they came, repeats
    included. The counts are of distinct nonces, but for `duplicates` and `non_finite`. Of the fields of distances and
    of those of vectors, the batch has the ones of its scheme; the others are None, and left out of the JSON.

    Attributes:
        round: Round that the distances were recomputed for.
        node_id: Index of the node that the batch names.
        node_count: Number of nodes that share the nonces.
        model_fingerprint: Fingerprint of the weights that recomputed the distances.
        dtype: Precision in which the distances were recomputed.
        nonces: Nonce of each entry.
        received_dist: Claimed distance of each entry; None where the claim was no finite number.
        dist: Recomputed distance of each entry, in [0, 2].
        reference_dist: Distance of each entry by the reference; None where there is no `differences`.
        received_vectors: Claimed vector of each entry, float16 in base64; None where it was no finite vector.
        vectors: Recomputed vector of each entry, float16 in base64.
        reference_vectors: Vector of each entry by the reference, float32 in base64.
        valid: Whether each entry's nonce is valid, by all its claims and its recomputed distance; of vectors, by its
            claims alone.
        n: Number of recomputed nonces.
        n_invalid: Number of recomputed nonces that are not valid.
        n_batch: Number of nonces in the whole batch.
        impossible_claims: Number of nonces in the whole batch with a claim outside [0, r_target), or that is no vector
            of finite numbers.
        duplicates: Entries in the whole batch that repeat an earlier one's nonce.
        non_finite: Entries in the whole batch whose claim is no finite number.
        density: The share of the node's nonces up to the largest of the batch that are in it, see section 5.
        sparse: Whether `density` is 1% or less.
        shifted: Recomputed nonces with a finite claim, some number of which is further than `tolerance` from the
            recomputed one.
        largest_difference: Largest difference of a finite claim's numbers from the recomputed ones; None without such
            claims.
        tolerance: How far above `r_target` a recomputed distance still counts as valid.
        mismatch: The probability that an honest miner's nonce recomputes as invalid.
        fraud_threshold: The batch is fraud when the probability of an honest miner is below this.
        probability_honest: Probability that an honest miner has at least as many invalid nonces, or impossible claims;
            of the latter alone where `mixture` is not decidable.
        differences: The verdict by differences and all that it follows from; None where rounding cannot be measured:
            for distances in float32.
        verdict: "honest", "fraud" or "undecidable": of distances by `probability_honest`, and undecidable where that is
            no fraud and `mixture` is not decidable; of vectors by `differences`, or fraud by `probability_honest`.
        fraud_detected: Whether the verdict is "fraud".
        sample: Number of nonces drawn for recomputation; None for all.
        seed: Seed of the sample; None for all.
        suspicions: Names of what is odd about the batch, but no fraud by itself.
        mixture: What the routers of a mixture of experts leave of the verdict on distances; None where there are none.
    """

    kind: ClassVar = "validated"

    round: Round
    node_id: int
    node_count: int
    model_fingerprint: str
    dtype: str
    nonces: tuple[int, ...]
    received_dist: tuple[float | None, ...] | None
    dist: tuple[float, ...] | None
    reference_dist: tuple[float, ...] | None
    received_vectors: tuple[str | None, ...] | None
    vectors: tuple[str, ...] | None
    reference_vectors: tuple[str, ...] | None
    valid: tuple[bool, ...]
    n: int
    n_invalid: int
    n_batch: int
    impossible_claims: int
    duplicates: int
    non_finite: int
    density: float
    sparse: bool
    shifted: int
    largest_difference: float | None
    tolerance: float
    mismatch: float
    fraud_threshold: float
    probability_honest: float
    differences: DifferenceVerdict | None
    verdict: Result
    fraud_detected: bool
    sample: int | None
    seed: str | None
    suspicions: tuple[str, ...]
    mixture: MixtureVerdict | None = None

    @property
    def size(self) -> int:
        """Number of entries in the batch."""
        return len(self.nonces)

    def _content(self) -> dict[str, Any]:
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "round"}
        for name in (*_OF_ONE_OUTPUT, "mixture"):
            if own[name] is None:
                del own[name]
        return self.round.named | own

    @property
    def id(self) -> str:
        """Hash of the content: the same verdict always travels under the same id."""
        return content_id(self._content())

    def to_json(self) -> bytes:
        """The exact bytes of every POST of this verdict: canonical JSON with `batch_id`."""
        return canonical_json(self._content() | {"batch_id": self.id})
