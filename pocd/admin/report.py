"""The status, as a person reads it."""

from __future__ import annotations

from typing import Any

import orjson


def as_json(body: dict[str, Any]) -> str:
    """Return the whole status as indented JSON."""
    return orjson.dumps(body, option=orjson.OPT_INDENT_2).decode()


def percent(rate: float | None) -> str:
    """Return a share as a percentage, or a dash while it is unknown."""
    return "–" if rate is None else f"{100 * rate:.2f}%"


def as_text(body: dict[str, Any]) -> str:
    """Return the lines that `pocd status` prints."""
    funnel, rates, chain, worker, round_ = (body[key] for key in ("funnel", "rates", "chain", "worker", "round"))
    rows = [
        ("state", body["state"]),
        ("chain", f"{chain['chain_id'] or '–'}, height {chain['height'] or '–'}"),
    ]
    if round_:
        block = f"block {round_['block_height']} {round_['block_hash'][:16]}…"
        observed, expected = percent(round_["observed_valid_rate"]), percent(round_["expected_valid_rate"])
        rows += [
            ("round", f"{block}, {round_['scheme']} on {round_['model']}"),
            ("valid rate", f"{observed} observed, {expected} expected ({round_['valid']} of {round_['checked']})"),
        ]
    minute, quarter = rates["checked_per_second_1m"], rates["checked_per_second_15m"]
    device = "{device}, {dtype}, batches of {batch_size}".format(**worker) if "device" in worker else "not ready"
    rows += [
        ("rate", f"{minute:.1f} nonces/s over 1 min, {quarter:.1f} over 15 min"),
        ("funnel", " → ".join(f"{stage} {count}" for stage, count in funnel.items())),
        ("worker", f"{device}, {worker['restarts']} restarts, {worker['refused_batches']} batches refused"),
    ]
    if "fingerprint" in worker:
        rows.append(("weights", worker["fingerprint"]))
    if worker["last_refusal"]:
        rows.append(("refused", worker["last_refusal"]))
    for receiver in body["receivers"]:
        trouble = f", last error: {receiver['last_error']}" if receiver["last_error"] else ""
        counts = f"{receiver['delivered_batches']} batches delivered, {receiver['pending_batches']} pending"
        rows.append(("receiver", f"{receiver['name']}: {counts}{trouble}"))
    rows += [("problem", f"{problem['part']}: {problem['reason']}") for problem in body["problems"]]
    return "\n".join(f"{name:10} {text}" for name, text in rows)
