"""Standard Webhooks signatures: how a receiver knows who sent a batch, and that nobody changed it.

The signed content is `webhook-id.webhook-timestamp.body`; the signature is HMAC-SHA256 over it,
written `v1,` + base64. While a key is rotated every key signs, and one match is enough.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

ID_HEADER = "webhook-id"
TIMESTAMP_HEADER = "webhook-timestamp"
SIGNATURE_HEADER = "webhook-signature"

TOLERANCE_S = 300
"""How far, in seconds, a timestamp may be from the verifier's clock before it counts as a replay."""

_MIN_KEY_BYTES = 16
_SECRET_PREFIX = "whsec_"  # noqa: S105 - the public prefix of every secret, not a secret
# Printable ASCII without white space, so that it fits a header, and without the dot that delimits the
# signed content: with a dot, one signature could be read as that of another id, timestamp and body.
_MESSAGE_ID = re.compile(r"[!-\-/-~]{1,256}")
_TIMESTAMP = re.compile(r"[0-9]{1,15}")


class SecretError(ValueError):
    """A secret cannot be used; the message says where it stands and what is wrong, never the secret."""


class SignatureError(Exception):
    """A message is not what its sender signed, or not recent; the message says which check failed."""


def is_message_id(text: str) -> bool:
    """Tell whether `text` may be a webhook-id: 1 to 256 printable ASCII characters, no space, no dot.

    Source: Standard Webhooks specification, "Signature scheme" (no dot in the message id).
    """
    return _MESSAGE_ID.fullmatch(text) is not None


def unsigned_headers(message_id: str, timestamp: int) -> dict[str, str]:
    """Return the headers that identify a message and one attempt to deliver it, unsigned.

    Source: docs/protocol.md section 6; Standard Webhooks specification, "Webhook headers".

    Args:
        message_id: Id of the message, equal on every attempt, of the form that `is_message_id` checks.
        timestamp: Time of this attempt, in whole seconds since the Unix epoch.

    Raises:
        ValueError: `message_id` cannot be a webhook-id.
    """
    if not is_message_id(message_id):
        raise ValueError(f"{message_id!r} cannot be a {ID_HEADER}: 1 to 256 printable ASCII characters, no '.'")
    return {ID_HEADER: message_id, TIMESTAMP_HEADER: str(timestamp)}


@dataclass(frozen=True, slots=True)
class WebhookKeys:
    """The keys that sender and receiver share; more than one while a key is rotated.

    Built by `parse` or `from_file`, which check what they read.
    """

    keys: tuple[bytes, ...] = field(repr=False)

    @classmethod
    def parse(cls, text: str, source: str = "secrets") -> WebhookKeys:
        """Read one secret a line: base64, usually prefixed `whsec_`. Blank lines and # comments are skipped.

        Source: Standard Webhooks specification, "Signature scheme" (24 to 64 bytes are recommended).

        Args:
            text: Contents of a secret file.
            source: Name of the text in error messages, such as the file's path.

        Raises:
            SecretError: There is no secret, or one is not base64 or shorter than 16 bytes.
        """
        lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1)]
        keys = tuple(
            _decode_secret(line, f"{source}, line {number}") for number, line in lines if line and line[0] != "#"
        )
        if not keys:
            raise SecretError(f"{source}: holds no secret; put one on a line, as whsec_ and base64")
        return cls(keys)

    @classmethod
    def from_file(cls, path: Path) -> WebhookKeys:
        """Read the secret file at `path`, as `parse` does.

        Raises:
            SecretError: The file is missing, unreadable or not UTF-8, or `parse` refuses what it holds.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise SecretError(f"{path}: cannot be read: {error.strerror}") from error
        except UnicodeDecodeError:
            raise SecretError(f"{path}: is not UTF-8 text") from None  # the cause carries the file's bytes
        return cls.parse(text, source=str(path))

    def headers(self, message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
        """Return the headers that identify one attempt to deliver `body`, signed with every key.

        Source: docs/protocol.md section 6; Standard Webhooks specification, "Webhook headers".

        Args:
            message_id: Id of the message, equal on every attempt, of the form that `is_message_id` checks.
            timestamp: Time of this attempt, in whole seconds since the Unix epoch.
            body: The exact bytes that are sent.

        Raises:
            ValueError: `message_id` cannot be a webhook-id.
        """
        headers = unsigned_headers(message_id, timestamp)
        signatures = self._signatures(message_id, headers[TIMESTAMP_HEADER], body)
        return headers | {SIGNATURE_HEADER: " ".join(signatures)}

    def verify(self, headers: Mapping[str, str], body: bytes, now: float) -> None:
        """Check that one of these keys signed `body` recently.

        Source: Standard Webhooks specification, "Verifying webhook authenticity".

        Args:
            headers: Headers of the request; names in lower case unless the mapping ignores case.
            body: The exact bytes that arrived.
            now: Seconds since the Unix epoch, by the verifier's clock.

        Raises:
            SignatureError: A header is missing or malformed, the timestamp is more than 300 s away, or no
                signature matches.
        """
        message_id = _required(headers, ID_HEADER)
        timestamp = _required(headers, TIMESTAMP_HEADER)
        signatures = _required(headers, SIGNATURE_HEADER)
        if not is_message_id(message_id):
            raise SignatureError(f"{ID_HEADER} is malformed: 1 to 256 printable ASCII characters, no '.'")
        if _TIMESTAMP.fullmatch(timestamp) is None:
            raise SignatureError(f"{TIMESTAMP_HEADER} is malformed: whole seconds since the Unix epoch")
        if abs(now - int(timestamp)) > TOLERANCE_S:
            raise SignatureError(f"{TIMESTAMP_HEADER} is more than {TOLERANCE_S} s from the receiver's clock")

        # Other versions (v1a is asymmetric) are for other verifiers.
        offered = [signature for signature in signatures.split(" ") if signature.startswith("v1,")]
        if not offered:
            raise SignatureError(f"{SIGNATURE_HEADER} is malformed: it holds no v1 signature")
        expected = self._signatures(message_id, timestamp, body)
        if not any(_same(mine, theirs) for mine in expected for theirs in offered):
            raise SignatureError("no signature matches: another key, or the message was changed on its way")

    def _signatures(self, message_id: str, timestamp: str, body: bytes) -> list[str]:
        content = f"{message_id}.{timestamp}.".encode() + body
        digests = [hmac.digest(key, content, hashlib.sha256) for key in self.keys]
        return [f"v1,{base64.b64encode(digest).decode()}" for digest in digests]


def _decode_secret(line: str, where: str) -> bytes:
    encoded = line.removeprefix(_SECRET_PREFIX).rstrip("=")
    try:
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except ValueError:
        raise SecretError(f"{where}: is not base64 (with or without the prefix {_SECRET_PREFIX})") from None
    if len(key) < _MIN_KEY_BYTES:
        raise SecretError(f"{where}: {len(key)} bytes are too few; at least {_MIN_KEY_BYTES}, better 32")
    return key


def _required(headers: Mapping[str, str], name: str) -> str:
    value = headers.get(name)
    if not value:
        raise SignatureError(f"{name} is missing")
    return value


def _same(mine: str, theirs: str) -> bool:
    """Compare in constant time; header text may hold undecodable bytes as surrogates."""
    return hmac.compare_digest(mine.encode(), theirs.encode("utf-8", "surrogatepass"))
