"""Check of the receivers: each gets a signed empty probe, sent as a batch would be."""

from __future__ import annotations

import io
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

import aiohttp
import orjson

from pocd.check.finding import Finding, green, red, yellow
from pocd.delivery import policy
from pocd.delivery.dispatcher import ANSWER_BYTES, read_answer
from pocd.http import addresses, webhooks
from pocd.http.client import open_session
from pocd.observe.mask import excerpt, mask_url, url_secrets

if TYPE_CHECKING:
    from collections.abc import Callable

    from pocd.delivery.dispatcher import Receiver

PROBE = orjson.dumps({"probe": True, "nonces": []})


@dataclass(frozen=True, slots=True)
class Answer:
    """A receiver's answer to the probe.

    Attributes:
        status: The HTTP status; None without an answer.
        said: The beginning of the body, or why there is no status; fit to be shown.
    """

    status: int | None
    said: str


async def check_receiver(receiver: Receiver, *, wall: Callable[[], float], limit: float) -> Finding:
    """Send the probe to `receiver`, and judge its answer, which has `limit` seconds to come."""
    barred: list[str] = []

    def refuse(address: str) -> str | None:
        reason = addresses.refusal(address)
        barred.extend([] if reason is None else [reason])
        return reason

    timeout = aiohttp.ClientTimeout(total=limit)
    async with open_session(timeout, window=ANSWER_BYTES, refuse=refuse) as session:
        answer = await _ask(session, receiver, wall, limit)
    if answer.status is None and barred:
        answer = Answer(None, min(barred))
    return judge(receiver, answer)


async def _ask(session: aiohttp.ClientSession, receiver: Receiver, wall: Callable[[], float], limit: float) -> Answer:
    message_id, timestamp = f"pocd-check-{secrets.token_hex(8)}", int(wall())
    signed = (
        receiver.keys.headers(message_id, timestamp, PROBE)
        if receiver.keys
        else webhooks.unsigned_headers(message_id, timestamp)
    )
    # Without pocd-sequence: a probe has no place in the queue.
    headers = {"Content-Type": "application/json", **signed}
    url = f"{receiver.url.rstrip('/')}/generated"
    hidden = url_secrets(receiver.url)  # some send back the request
    try:
        async with session.post(url, data=io.BytesIO(PROBE), headers=headers, allow_redirects=False) as response:
            location = response.headers.get("Location") if 300 <= response.status < 400 else None
            said, whole = (mask_url(location), True) if location else await read_answer(response)
            return Answer(response.status, excerpt(said, 160, secrets=hidden, cut=not whole) if said else "")
    except aiohttp.ClientConnectorError as error:
        return Answer(
            None, f"no connection: {excerpt(error.os_error.strerror or str(error.os_error), 160, secrets=hidden)}"
        )
    except TimeoutError:
        return Answer(None, f"no answer within {limit:g} s")
    except aiohttp.ClientResponseError as error:  # its own text quotes the URL, secrets included
        return Answer(None, f"no HTTP: {excerpt(error.message, 160, secrets=hidden)}")
    except (aiohttp.ClientError, OSError, ValueError) as error:
        text = str(error)
        shown = excerpt(text, 160, secrets=hidden)
        return Answer(None, type(error).__name__ if not text or "://" in text else shown)


def judge(receiver: Receiver, answer: Answer) -> Finding:
    """Return a finding about an answer to the probe, judged as delivery/policy.py judges answers to batches."""
    name, where, status = f"receiver {receiver.name}", mask_url(receiver.url), answer.status
    signed = "a signed" if receiver.keys else "an unsigned"
    if status is None:
        return red(
            name, f"{where}: {answer.said}", "check that it runs, its url, its certificate, and firewalls between"
        )
    if 200 <= status < 300:
        return green(name, f"{where} accepts {signed} probe")
    if status in policy.REFUSED:
        return green(name, f"{where} answers, and refuses {signed} but empty probe, as it may (HTTP {status})")
    text = f"{where} answers HTTP {status}" + (f": {answer.said}" if answer.said else "")
    if status >= 500 or status in policy.PASSING:
        return yellow(name, text, "ask its operator; the daemon tries again until it is well")
    if status == 404:
        return yellow(name, text, "check the path of its url: batches go to url + /generated")
    return red(name, text, _remedy(status, signs=receiver.keys is not None))


def _remedy(status: int, *, signs: bool) -> str:
    """Return the remedy for an answer that will not change by itself."""
    if status in {401, 403} and not signs:
        return "set its secret_file: it wants batches signed"
    if status in {401, 403}:
        return "put the secret that this receiver has into its secret_file (and keep both clocks by NTP)"
    if status == policy.GONE:
        return "it wants nothing any more: ask its operator, or take it out of delivery.receivers"
    return "check its url: batches go to url + /generated, and redirects are not followed"
