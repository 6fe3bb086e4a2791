"""A proof server's callbacks: what a relay has to know of them, and nothing else (docs/live.md). Pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import orjson

from pocd.protocol.commitment import LARGEST_NONCE
from pocd.protocol.proof import hash_name

if TYPE_CHECKING:
    from collections.abc import Collection

Kind = Literal["generated", "validated"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MOST_ARTIFACTS = 1_000_000  # in one callback: as many as the network's own programs send


class CallbackError(Exception):
    """A callback is no such thing; the message names the field.

    Attributes:
        field: Name of the field; None for the whole body.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True)
class Callback:
    """A callback as it came.

    Attributes:
        kind: generated: artifacts; validated: a verdict.
        prefix: Path that it was posted below, as it was written.
        body: JSON object of the callback, of which fields that are not known here are passed on.
        round: Kind, path, key and block that its nonces belong to, or its verdict.
        numbers: What must not be passed on twice: the nonces of its artifacts, or the id of the verdict.
    """

    kind: Kind
    prefix: str
    body: dict[str, Any]
    round: str
    numbers: tuple[int | str, ...]

    def without(self, passed: Collection[int | str]) -> Callback | None:
        """Return the callback without what was passed on before; None where nothing is left."""
        if not any(number in passed for number in self.numbers):
            return self
        if self.kind == "validated":
            return None
        kept = [artifact for artifact in self.body["artifacts"] if artifact["nonce"] not in passed]
        numbers = tuple(artifact["nonce"] for artifact in kept)
        return Callback(self.kind, self.prefix, self.body | {"artifacts": kept}, self.round, numbers) if kept else None


@dataclass(frozen=True, slots=True)
class Relayed:
    """A callback as the store keeps it, and the orchestrator gets it.

    Attributes:
        kind: Last part of the path that it is posted to.
        size: Number of artifacts, or 1 for a verdict.
        body: JSON of the callback.
    """

    kind: Kind
    size: int
    body: bytes

    @property
    def id(self) -> str:
        """Hash of the body."""
        return hash_name(self.body)

    def to_json(self) -> bytes:
        """Return the body."""
        return self.body


def relayed(callback: Callback) -> Relayed:
    """Return what the store keeps of a callback."""
    return Relayed(callback.kind, len(callback.numbers), orjson.dumps(callback.body))


def read_callback(kind: Kind, prefix: str, raw: bytes) -> Callback:
    """Read a callback's body.

    A nonce that it names twice is passed on once, with its first artifact.

    Raises:
        CallbackError: The body is not the JSON of such a callback.
    """
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise CallbackError(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise CallbackError("the body has to be a JSON object")
    if kind == "validated":
        return Callback(kind, prefix, body, _round(kind, prefix, body), (_verdict_id(body),))
    for name in ("public_key", "block_hash"):
        if not isinstance(body.get(name), str):
            raise CallbackError(f"{name}: has to be text", name)
    artifacts = body.get("artifacts")
    if not isinstance(artifacts, list) or not artifacts or len(artifacts) > MOST_ARTIFACTS:
        raise CallbackError(f"artifacts: has to be a list of 1 to {MOST_ARTIFACTS} artifacts", "artifacts")
    first: dict[int, dict[str, Any]] = {}
    for place, artifact in enumerate(artifacts):
        nonce = artifact.get("nonce") if isinstance(artifact, dict) else None
        if not isinstance(nonce, int) or isinstance(nonce, bool) or not 0 <= nonce <= LARGEST_NONCE:
            raise CallbackError(
                f"artifacts[{place}].nonce: has to be a whole number from 0 to {LARGEST_NONCE}", "artifacts"
            )
        first.setdefault(nonce, artifact)
    body["artifacts"] = list(first.values())
    return Callback(kind, prefix, body, _round(kind, prefix, body), tuple(first))


def _round(kind: Kind, prefix: str, body: dict[str, Any]) -> str:
    return orjson.dumps([kind, prefix, *map(body.get, ("public_key", "block_hash", "block_height"))]).decode()


def _verdict_id(body: dict[str, Any]) -> str:
    """Return the id of a verdict: that of the request, where it has one, with what was asked for; else all of it."""
    asked = {name: body.get(name) for name in ("request_id", "public_key", "block_hash", "node_id")}
    return hash_name(orjson.dumps(asked if isinstance(asked["request_id"], str) else body, option=orjson.OPT_SORT_KEYS))
