"""The status as text for people: the same words wherever it is shown."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pocd.observe.mask import clean


def percent(rate: float | None) -> str:
    """Return a share as a percentage, or a dash while it is unknown."""
    return "–" if rate is None else f"{100 * rate:.2f}%"


MAIN_STAGES = ("checked", "valid", "stored", "delivered")


def funnel_text(funnel: dict[str, int]) -> str:
    """Return the funnel on one line; stages of nonces that were not accepted only where there are any."""
    lost = [f"{stage} {count:,}" for stage, count in funnel.items() if stage not in MAIN_STAGES and count]
    return " → ".join(f"{stage} {funnel[stage]:,}" for stage in MAIN_STAGES) + "".join(f", {each}" for each in lost)


def speed(nonces_per_second: float) -> str:
    """Return a rate with its unit."""
    return f"{nonces_per_second:,.1f} nonces/s"


def progress(state: str, height: int | None, nonces_per_second: float, funnel: dict[str, int]) -> str:
    """Return on one line: the state, the active round's block height (None without a round), rate and funnel."""
    where = "no round" if height is None else f"block {height}"
    return f"{state}, {where}, {speed(nonces_per_second)}, {funnel_text(funnel)}"


def rates_text(rates: dict[str, float]) -> str:
    """Return the rate of checked nonces over one minute and over a quarter of an hour."""
    return f"{speed(rates['checked_per_second_1m'])} over 1 min, {rates['checked_per_second_15m']:,.1f} over 15 min"


def valid_rate_text(round_: dict[str, Any]) -> str:
    """Return a round's valid rate, with what was expected and counted."""
    observed, expected = percent(round_["observed_valid_rate"]), percent(round_["expected_valid_rate"])
    return f"{observed} observed, {expected} expected ({round_['valid']:,} of {round_['checked']:,})"


def card_text(card: dict[str, Any]) -> str:
    """Return a GPU's sensor values, as far as they are known, and its name."""
    reading = card["reading"] or {}
    used, total = reading.get("memory_used"), reading.get("memory_total")
    parts = [
        (reading.get("temperature"), "{:.0f} °C"),
        (reading.get("power"), "{:.0f} W"),
        (None if used is None or total is None else f"{used / 2**30:.0f}/{total / 2**30:.0f} GiB", "{}"),
        (reading.get("utilization"), "{:.0%}"),
    ]
    told = [form.format(value) for value, form in parts if value is not None]
    return " ".join([*told, clean(card["name"].removeprefix("NVIDIA "))])


def age(seconds: float) -> str:
    """Return a span of time as people say it."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def local_time(seconds: float, form: str = "%H:%M:%S") -> str:
    """Return a time, in seconds since the epoch, as the reader's clock shows it; data stay in UTC.

    A time that no calendar here has, as a chain may name one, is told in seconds.
    """
    try:
        return datetime.fromtimestamp(seconds, UTC).astimezone().strftime(form)
    except (OverflowError, ValueError, OSError):
        return f"{seconds:.0f} s after 1970"


def epoch_text(epoch: dict[str, Any]) -> str:
    """Return the phase of the live network's epoch, what it waits for and until when."""
    until = "" if epoch["until"] is None else f" until block {epoch['until']}"
    return f"{epoch['number']}, {epoch['phase']}{until}, then {epoch['awaits']}"
