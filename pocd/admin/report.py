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
    lines = [
        f"state      {body['state']}",
        f"chain      {chain['chain_id'] or '–'}, height {chain['height'] or '–'}",
    ]
    if round_:
        lines += [
            f"round      block {round_['block_height']} {round_['block_hash'][:16]}…, {round_['scheme']} on {round_['model']}",
            f"valid rate {percent(round_['observed_valid_rate'])} observed, "
            f"{percent(round_['expected_valid_rate'])} expected ({round_['valid']} of {round_['checked']})",
        ]
    lines += [
        f"rate       {rates['checked_per_second_1m']:.1f} nonces/s over 1 min, "
        f"{rates['checked_per_second_15m']:.1f} over 15 min",
        f"funnel     checked {funnel['checked']} → valid {funnel['valid']} → stored {funnel['stored']}"
        f" → delivered {funnel['delivered']}",
        f"worker     {worker.get('device', '–')}, {worker.get('dtype', '–')}, {worker['restarts']} restarts",
    ]
    for receiver in body["receivers"]:
        trouble = f", last error: {receiver['last_error']}" if receiver["last_error"] else ""
        lines.append(
            f"receiver   {receiver['name']}: {receiver['delivered_batches']} batches delivered, "
            f"{receiver['pending_batches']} pending{trouble}"
        )
    lines += [f"problem    {problem['part']}: {problem['reason']}" for problem in body["problems"]]
    return "\n".join(lines)
