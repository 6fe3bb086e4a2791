"""POST to a receiver: the request, its signature and limits, and the outcome."""

from __future__ import annotations

import asyncio
import contextlib
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import aiohttp

from pocd.delivery.policy import Outcome
from pocd.http import addresses, webhooks
from pocd.http.client import open_session
from pocd.http.retry_after import longest_wait
from pocd.http.urls import below
from pocd.observe.mask import excerpt, mask_url, url_secrets
from pocd.process import SHORT

if TYPE_CHECKING:
    from typing import Self

    from pocd.clock import Clock

CONNECT_SECONDS = 3.0
ATTEMPT_SECONDS = 15.0  # for all of it, up to the head of the answer
ANSWER_BYTES = 16 * 1024  # of the answer to a batch that was not accepted
ANSWER_SECONDS = 2.0  # for that, after its head
SHOWN = 200  # characters of what a receiver says
SEQUENCE_HEADER = "pocd-sequence"


@dataclass(frozen=True, slots=True)
class Receiver:
    """A receiver of batches.

    Attributes:
        name: Name of the receiver's queue in the store; the URL may change, the queue stays.
        url: Callback URL; batches are POSTed to `{url}/generated`.
        keys: Keys that sign the batches; None for unsigned batches.
    """

    name: str
    url: str
    keys: webhooks.WebhookKeys | None


class Poster:
    """Client of one receiver, for one request at a time; a context manager that closes the connection.

    Args:
        receiver: The receiver to POST to.
        clock: Time of the requests' signatures, and of Retry-After.
        connect: Seconds that a connection may take.
        total: Seconds that a request may take, up to the head of the answer.

    Attributes:
        certificate_expires: When the receiver's certificate expires, seconds since the epoch; None until one was seen.
    """

    def __init__(self, receiver: Receiver, *, clock: Clock, connect: float, total: float) -> None:
        self._receiver = receiver
        self._clock = clock
        self._connect = connect
        self._total = total
        self._barred: str | None = None  # why an address was not called, in the request under way
        timeout = aiohttp.ClientTimeout(total=total, connect=connect)
        self.certificate_expires: float | None = None
        self._session = open_session(
            timeout, window=ANSWER_BYTES, refuse=self._refuse, certificate=self._note_certificate
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def post(self, kind: str, message_id: str, body: bytes, *, sequence: int | None = None) -> Outcome:
        """POST `body` once, and return the outcome.

        Args:
            kind: Last part of the path.
            message_id: The webhook-id.
            body: Exact bytes to send, a JSON object.
            sequence: Number of the batch in the receiver's queue; None for a probe, which is in no queue.
        """
        keys, timestamp = self._receiver.keys, int(self._clock.wall())
        signed = keys.headers(message_id, timestamp, body) if keys else webhooks.unsigned_headers(message_id, timestamp)
        place = {} if sequence is None else {SEQUENCE_HEADER: str(sequence)}
        headers = {"Content-Type": "application/json", **place, **signed}
        self._barred = None
        unsent = io.BytesIO(body)
        try:
            url = below(self._receiver.url, kind)
            async with self._session.post(url, data=unsent, headers=headers, allow_redirects=False) as response:
                if response.status < 300 and unsent.tell() < len(body):
                    return Outcome(None, f"HTTP {response.status} before the batch was sent", broke=True)
                return await self._outcome(response)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            # An address that is barred is the reason, whether or not the others of its name could be reached.
            if self._barred is not None:
                return Outcome(None, self._barred, barred=True)
            untrusted = isinstance(error, aiohttp.ClientConnectorCertificateError)
            return Outcome(None, self.describe(error), untrusted=untrusted, short=error.errno in SHORT)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return Outcome(None, self.describe(error), broke=not isinstance(error, ValueError))

    def _note_certificate(self, expires: float) -> None:
        self.certificate_expires = expires

    def _refuse(self, address: str) -> str | None:
        reason = addresses.refusal(address)
        if reason is not None:
            self._barred = min(self._barred or reason, reason)  # of several always the same: their order changes
        return reason

    async def _outcome(self, response: aiohttp.ClientResponse) -> Outcome:
        """Read a receiver's answer. Of a 2xx the status is enough: the body may be broken or never come."""
        detail = f"HTTP {response.status}"
        if 200 <= response.status < 300:
            return Outcome(response.status, detail)
        said, whole = await _read_answer(response)
        location = response.headers.get("Location")
        if 300 <= response.status < 400 and location:
            detail = f"{detail} to {self._shown(mask_url(location))}, not followed"
        elif said:
            detail = f"{detail}: {self._shown(said, cut=not whole)}"
        asked = response.headers.getall("Retry-After", [])
        retry_after = longest_wait(asked, self._clock.wall())
        if asked and retry_after is None:
            detail = f"{detail} (Retry-After makes no sense: {self._shown(asked[0], 40)})"
        return Outcome(response.status, detail, retry_after)

    def describe(self, error: Exception) -> str:
        """Return a text that says why there is no answer, without the receiver's credentials."""
        match error:
            case aiohttp.ConnectionTimeoutError():
                return f"no connection within {self._connect:g} s"
            case TimeoutError():
                return f"no answer within {self._total:g} s"
            case aiohttp.ClientConnectorError():
                return f"no connection: {self._shown(error.strerror or type(error.os_error).__name__)}"
            case aiohttp.ClientResponseError():  # its own text quotes the URL
                return f"no HTTP: {self._shown(error.message)}"
        name, text = type(error).__name__, str(error)
        # A text that names the URL may show its credentials in a form that is not known.
        return name if "://" in text else f"{name}: {self._shown(text)}"

    def _shown(self, said: bytes | str, limit: int = SHOWN, *, cut: bool = False) -> str:
        """Return a part of an answer, fit to be shown: some receivers send back the request with its credentials."""
        return excerpt(said, limit, secrets=url_secrets(self._receiver.url), cut=cut)


async def _read_answer(response: aiohttp.ClientResponse) -> tuple[bytes, bool]:
    """Read the beginning of an answer's body, as far as it comes; returns it, and whether that is all of it."""
    body = bytearray()
    with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError):
        async with asyncio.timeout(ANSWER_SECONDS):
            while len(body) < ANSWER_BYTES:
                chunk = await response.content.read(ANSWER_BYTES - len(body))
                if not chunk:
                    return bytes(body), True
                body += chunk
    return bytes(body), False
