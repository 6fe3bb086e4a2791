"""Check of the receivers: each gets a signed empty probe, sent as a batch would be."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import orjson

from pocd.check.finding import Finding, Level, green, red, yellow
from pocd.delivery import policy
from pocd.delivery.posting import Poster
from pocd.observe.mask import mask_url

if TYPE_CHECKING:
    from pocd.clock import Clock
    from pocd.delivery.policy import Outcome
    from pocd.delivery.posting import Receiver

PROBE = orjson.dumps({"probe": True, "nonces": []})


async def check_receiver(receiver: Receiver, *, clock: Clock, limit: float) -> Finding:
    """Send the probe to `receiver`, and judge its answer, which has `limit` seconds to come."""
    async with Poster(receiver, clock=clock, connect=limit, total=limit) as poster:
        outcome = await poster.post("generated", f"pocd-check-{secrets.token_hex(8)}", PROBE)
    found = judge(receiver, outcome)
    expiry = policy.certificate_problem(poster.certificate_expires, clock.wall())
    if found.level is Level.GREEN and expiry:
        return yellow(found.name, f"{found.text}; {expiry}", "renew the certificate of its url, or ask its operator to")
    return found


def judge(receiver: Receiver, outcome: Outcome) -> Finding:
    """Return a finding about the outcome of the probe, judged as delivery/policy.py judges those of batches."""
    name, where, status = f"receiver {receiver.name}", mask_url(receiver.url), outcome.status
    signed = "a signed" if receiver.keys else "an unsigned"
    if status is None:
        reach = "check that it runs, its url, and firewalls between"
        renew = "have its certificate renewed, or its authority trusted by this host (ca-certificates)"
        remedy = renew if outcome.untrusted else reach
        return red(name, f"{where}: {outcome.detail}", remedy)
    if outcome.accepted:
        return green(name, f"{where} accepts {signed} probe")
    if status in policy.REFUSED:
        return green(name, f"{where} answers, and refuses {signed} but empty probe, as it may (HTTP {status})")
    text = f"{where} answers {outcome.detail}"
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
