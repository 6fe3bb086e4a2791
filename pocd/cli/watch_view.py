"""The view of `pocd watch`: a pure function of status, events and rate samples, for a terminal of any size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rich.text import Text

from pocd.admin.text import MAIN_STAGES, age, card_text, epoch_text, funnel_text, local_time, percent
from pocd.observe.mask import clean

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console, ConsoleOptions, RenderResult

    from pocd.admin.client import ServerEvent

LABEL_WIDTH = 10
NARROW = 56  # columns, below which labels have no column of their own
SPARK_WIDTH = 24
SPARKS = "▁▂▃▄▅▆▇█"
LEAST_SPAN = 5.0  # seconds of a sparkline's mark: what is committed in less comes in lumps
LATE_SECONDS = 5.0  # after which the age of what is shown is told
Z_99 = 2.5758293035489004  # the 99.5% quantile of the normal distribution

STATE_STYLES = {"GENERATING": "bold green", "VALIDATING": "bold cyan", "STOPPED": "bold red"}
OUTCOME_STYLES = {"delivered": "green", "retry": "yellow"}


@dataclass(frozen=True, slots=True)
class Sample:
    """How many nonces the store had counted as checked, at a time in seconds from an unknown start."""

    at: float
    checked: int


@dataclass(frozen=True, slots=True)
class Seen:
    """All that the view shows.

    Attributes:
        url: Address of the daemon's API.
        now: Seconds since the epoch.
        status: The last answer of `GET /api/v1/pow/status`; None before the first.
        status_age: Seconds since that answer.
        away: Why the daemon does not answer now; None when it does.
        events: Latest events, newest last.
        deaf: Why no events come; None when they do.
        samples: Samples of the number of checked nonces, oldest first.
    """

    url: str
    now: float
    status: dict[str, Any] | None = None
    status_age: float = 0.0
    away: str | None = None
    events: Sequence[ServerEvent] = ()
    deaf: str | None = None
    samples: Sequence[Sample] = ()


@dataclass(frozen=True, slots=True)
class View:
    """A rich renderable that fits what it is given: events fill the height, and what does not fit is counted."""

    seen: Seen

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the lines."""
        width, height = options.max_width, options.height
        lines = [line for label, text in _rows(self.seen) for line in _wrapped(label, text, console, width)]
        room = len(self.seen.events) if height is None else max(height - len(lines), 0)
        shown = self.seen.events[-room:] if room else []
        lines += [_event_line(event, width, is_first=index == 0) for index, event in enumerate(reversed(shown))]
        if height is not None and len(lines) > height:
            hidden = len(lines) - height + 1
            lines = [*lines[: height - 1], Text(f"… {hidden} more lines do not fit", "dim")]
        for line in lines:
            line.no_wrap, line.overflow = True, "ellipsis"
            yield line


def _wrapped(label: str, text: Text, console: Console, width: int) -> list[Text]:
    """Return a row's lines: beside its label, or behind it where there is little room."""
    text.plain = clean(text.plain)
    if width < NARROW:
        return list(Text.assemble((f"{label} " if label else "", "dim"), text).wrap(console, width))
    lines = text.wrap(console, width - LABEL_WIDTH)
    heads = [label] + [""] * (len(lines) - 1)
    return [Text.assemble((f"{head:{LABEL_WIDTH}}", "dim"), line) for head, line in zip(heads, lines, strict=True)]


def _event_line(event: ServerEvent, width: int, *, is_first: bool) -> Text:
    label = f"{'events' if is_first else '':{LABEL_WIDTH}}" if width >= NARROW else ""
    when = local_time(event.data["time"]) if "time" in event.data else ""
    text = event_text(event)
    text.plain = clean(text.plain)
    return Text.assemble((f"{label}{when:8}  ", "dim"), text)


def _rows(seen: Seen) -> Iterator[tuple[str, Text]]:
    """Yield label and text of every row but the events."""
    yield "pocd", _head(seen)
    if seen.away:
        yield "away", Text(f"{seen.away} (trying again)", "bold red")
    if seen.status is None:
        yield "", Text("" if seen.away else "asking the daemon …", "dim")
        return
    status = seen.status
    for alarm in status["alarms"]:
        yield "ALARM", Text(f"{alarm['part']}: {alarm['reason']}", "bold red")
    for problem in status["problems"]:
        yield "PROBLEM", Text(f"{problem['part']}: {problem['reason']}", "bold yellow")
    yield "state", _state(status)
    yield "funnel", _funnel(status["funnel"])
    if broken := status["worker"].get("non_finite_nonces"):
        yield "NaN", Text(f"{broken:,} nonces without a result: the model gave NaN or infinity", "yellow")
    yield "rate", _rate(status["rates"], seen.samples)
    if status["round"]:
        yield "valid", _valid(status["round"])
        yield "round", _round(status["round"])
    yield "chain", _chain(status["chain"], seen.now)
    yield from _labelled("machines", list(map(_machine, status.get("machines", []))))
    yield from _labelled("workers", [line for worker in status["workers"] for line in _worker(worker)])
    yield from _labelled("receivers", list(map(_receiver, status["receivers"])))
    if seen.deaf:
        yield "events", Text(f"none come: {seen.deaf}", "yellow")
    elif not seen.events:
        yield "events", Text("none yet", "dim")


def _labelled(label: str, lines: list[Text]) -> Iterator[tuple[str, Text]]:
    for index, line in enumerate(lines):
        yield label if index == 0 else "", line


def _head(seen: Seen) -> Text:
    status = seen.status
    version = f"{status['version']} at {seen.url}, up {age(status['uptime_seconds'])}" if status else f"at {seen.url}"
    late = status is not None and seen.status_age >= LATE_SECONDS
    return Text.assemble(
        (version, "bold"),
        (f"  as of {age(seen.status_age)} ago" if late else "", "bold yellow"),
        (f"  {local_time(seen.now)}", "dim"),
    )


def _state(status: dict[str, Any]) -> Text:
    mode = status["control"]["mode"]
    who = "the chain decides" if mode == "FOLLOWING" else "the API decides"
    node = "node {node_id} of {node_count}".format(**status["node"])
    return Text.assemble(
        (status["state"], STATE_STYLES.get(status["state"], "bold yellow")), (f"  {who}, {node}", "dim")
    )


def _funnel(funnel: dict[str, int]) -> Text:
    accepted, comma, lost = funnel_text(funnel).partition(", ")
    text = Text(accepted)
    text.highlight_words(MAIN_STAGES, "dim")
    text.highlight_regex(r"[\d,]+", "bold")
    return text.append(f"{comma}{lost}", "red")


def _rate(rates: dict[str, float], samples: Sequence[Sample]) -> Text:
    marks = sparkline(seen_rates(samples, SPARK_WIDTH))
    return Text.assemble(
        (f"{rates['checked_per_second_1m']:,.1f}", "bold"),
        ("/s in 1 min, ", "dim"),
        (f"{rates['checked_per_second_15m']:,.1f}", "bold"),
        ("/s in 15 min  ", "dim"),
        (marks, "cyan"),
        (f" {age(samples[-1].at - samples[0].at)}" if marks else "", "dim"),
    )


def _valid(round_: dict[str, Any]) -> Text:
    observed, expected = round_["observed_valid_rate"], round_["expected_valid_rate"]
    if observed is None:
        return Text.assemble(("none checked yet, ", "dim"), percent(expected), (" expected", "dim"))
    low, high = wilson_interval(round_["valid"], round_["checked"])
    inside = expected is None or low <= expected <= high
    return Text.assemble(
        (percent(observed), "bold"),
        (f" of {round_['checked']:,} (99%: {100 * low:.2f}–{100 * high:.2f}%), ", "dim"),
        (percent(expected), "" if inside else "yellow"),
        (" expected", "dim"),
    )


def _round(round_: dict[str, Any]) -> Text:
    block = f"block {round_['block_height']:,} {round_['block_hash'][:12]}…"
    return Text.assemble(block, (f"  {round_['scheme']} on {round_['model']}", "dim"))


def _chain(chain: dict[str, Any], now: float) -> Text:
    if chain["height"] is None:
        return Text(f"no block yet: {chain['problem']}", "yellow") if chain["problem"] else Text("none is followed")
    old = max(now - datetime.fromisoformat(chain["block_time"]).timestamp(), 0)
    text = Text.assemble(
        f"{chain['chain_id'] or '–'}, block {chain['height']:,} {chain['hash'][:12]}…",
        (f", {age(old)} old", "yellow" if chain["problem"] else "dim"),
    )
    if epoch := chain.get("epoch"):
        text.append(f"; epoch {epoch_text(epoch)}")
    return text.append(f"; {chain['problem']}", "yellow") if chain["problem"] else text


def _machine(machine: dict[str, Any]) -> Text:
    text = Text.assemble((machine["node"], "bold"), (f" {machine['address']}  ", "dim"))
    all_ready = machine["ready"] == machine["workers"]
    text.append(f"{machine['ready']} of {machine['workers']} workers  ", "dim" if all_ready else "yellow")
    return text.append(f"{machine['computed_per_second_1m']:,.1f}", "bold").append("/s", "dim")


def _worker(worker: dict[str, Any]) -> list[Text]:
    """Return a worker's line, with its card; where its model is split, a line for each further card."""
    text = Text.assemble(f"{worker['number']} ", (worker["device"], "bold"), no_wrap=True, overflow="ellipsis")
    if worker.get("node"):
        text.append(f" on {worker['node']}", "dim")
    if worker["ready"]:
        text.append(f"  {worker['execution'] or ''}  ", "dim")
        text.append(f"{worker['computed_per_second_1m']:,.1f}", "bold").append("/s", "dim")
    else:
        text.append(f"  {worker['stage'] or 'not ready'}", "yellow")
    if worker["restarts"]:
        text.append(f"  {worker['restarts']} restarts", "yellow")
    cards = list(map(card_text, worker["cards"]))
    return [text.append(f"  {cards[0]}" if cards else ""), *(Text(f"  {card}", no_wrap=True) for card in cards[1:])]


def _receiver(receiver: dict[str, Any]) -> Text:
    waiting = receiver["pending_batches"]
    text = Text.assemble((receiver["name"], "bold"), ("  delivered ", "dim"))
    text.append(f"{receiver['delivered_batches']:,}").append(", waiting ", "dim")
    text.append(f"{waiting:,}", "bold yellow" if receiver["failures_in_a_row"] else "")
    for kind in ("dead", "expired", "withdrawn"):
        if receiver[f"{kind}_batches"]:
            text.append(f", {kind} {receiver[f'{kind}_batches']:,}", "red")
    words, style = last_answer(receiver)
    return text.append(f"  {words}", style)


def last_answer(receiver: dict[str, Any]) -> tuple[str, str]:
    """Return how a receiver answered last, and the text's style."""
    if receiver["url"] is None:
        return "no longer configured, its queue is kept", "yellow"
    if receiver["parked"]:
        return "wants nothing any more (HTTP 410)", "red"
    if receiver["last_error"]:
        again = receiver["next_attempt_seconds"]
        return f"{receiver['last_error']}" + (f", again in {again:.0f} s" if again is not None else ""), "yellow"
    return ("accepts", "green") if receiver["delivered_batches"] else ("not asked yet", "dim")


def event_text(event: ServerEvent) -> Text:  # noqa: C901 - one case for each kind
    """Return an event as one line."""
    data = {key: value for key, value in event.data.items() if value is not None}
    style = "yellow"
    match event.kind, data:
        case "block", {"height": height, "hash": hash_}:
            words, style = f"block {height:,} {hash_[:12]}…", ""
        case "chain", {"problem": problem}:
            words = f"chain: {problem}"
        case "chain", _:
            words, style = "chain: followed again", "green"
        case "round", {"height": height, "by": by}:
            words, style = f"round of block {height:,}, by the {'API' if by == 'api' else by}", "bold"
        case "round", _:
            words = "no round is active"
        case "state", {"state": state}:
            words, style = f"state {state}", STATE_STYLES.get(state, "bold yellow")
        case "batch", {"nonces": nonces, "kind": kind}:
            words, style = f"batch stored: {nonces:,} nonces, {kind}", ""
        case "delivery", {"receiver": receiver, "outcome": outcome}:
            words, style = f"batch to {receiver}: {outcome}", OUTCOME_STYLES.get(outcome, "red")
        case "worker", {"what": what}:
            why = ": ".join(data[key] for key in ("cause", "reason") if key in data)
            words = f"worker {data['worker']} {what.replace('_', ' ')}" + (f" ({why})" if why else "")
            style = "green" if what == "ready" else "red"
        case "validation", {"state": state}:
            words, style = f"validation {state}", ""
        case "dropped", {"missed": missed}:
            words = f"{missed} events were missed"
        case kind, _:
            words, style = kind, "dim"
    return Text(words, style)


def seen_rates(samples: Sequence[Sample], most: int) -> list[float]:
    """Return nonces per second in equal spans of time, oldest first: `most` or fewer, each 5 s or longer."""
    if len(samples) < 2:
        return []
    first, last = samples[0].at, samples[-1].at
    count = min(most, int((last - first) / LEAST_SPAN))
    if not count:
        return []
    span = (last - first) / count
    totals = [_checked_at(samples, first + index * span) for index in range(count + 1)]
    return [max(later - earlier, 0.0) / span for earlier, later in pairwise(totals)]


def _checked_at(samples: Sequence[Sample], at: float) -> float:
    """Return the count at a time, on the line between the samples around it."""
    for before, after in pairwise(samples):
        if at <= after.at and after.at > before.at:
            share = max(at - before.at, 0.0) / (after.at - before.at)
            return before.checked + share * (after.checked - before.checked)
    return samples[-1].checked


def sparkline(values: Sequence[float]) -> str:
    """Return a mark for each value, its height from 0 to the largest of them."""
    largest = max(values, default=0.0) or 1.0
    return "".join(SPARKS[round(value / largest * (len(SPARKS) - 1))] for value in values)


def wilson_interval(valid: int, checked: int) -> tuple[float, float]:
    """Return the 99% confidence interval of a rate, `valid` of `checked` (at least 1), after Wilson (1927)."""
    rate, weight = valid / checked, Z_99 * Z_99 / checked
    center = (rate + weight / 2) / (1 + weight)
    half = math.sqrt(rate * (1 - rate) * weight + weight * weight / 4) / (1 + weight)
    return max(center - half, 0.0), min(center + half, 1.0)
