"""Numbers of the status as text for people."""

from __future__ import annotations

from datetime import UTC, datetime


def percent(rate: float | None) -> str:
    """Return a share as a percentage, or a dash while it is unknown."""
    return "–" if rate is None else f"{100 * rate:.2f}%"


MAIN_STAGES = ("checked", "valid", "stored", "delivered")


def funnel_text(funnel: dict[str, int]) -> str:
    """Return the funnel on one line; stages of nonces that were not accepted only where there are any."""
    lost = [f"{stage} {count}" for stage, count in funnel.items() if stage not in MAIN_STAGES and count]
    return " → ".join(f"{stage} {funnel[stage]}" for stage in MAIN_STAGES) + "".join(f", {each}" for each in lost)


def age(seconds: float) -> str:
    """Return a span of time as people say it."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def local_time(seconds: float, form: str = "%H:%M:%S") -> str:
    """Return a time, in seconds since the epoch, as the reader's clock shows it; data stay in UTC."""
    return datetime.fromtimestamp(seconds, UTC).astimezone().strftime(form)
