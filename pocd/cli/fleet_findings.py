"""What is wrong in a fleet of daemons, from their statuses. Pure functions."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import combinations, islice, product
from math import gcd
from typing import TYPE_CHECKING, Any, Literal

from pocd.admin.text import age

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

SHOWN = 8  # names in one sentence; the rest are counted

Kind = Literal["away", "problem", "twice", "differs", "alarm", "gap", "version"]
SEVERE: tuple[Kind, ...] = ("away", "problem", "twice", "differs")


@dataclass(frozen=True, slots=True)
class Member:
    """One daemon of the fleet, as it was seen last.

    Attributes:
        name: Name in the list, or the address.
        url: Address of its API.
        status: Last answer of `GET /api/v1/pow/status`; None before the first.
        age_seconds: Seconds since that answer.
        away: Why it does not answer now; None when it does.
    """

    name: str
    url: str
    status: dict[str, Any] | None = None
    age_seconds: float = 0.0
    away: str | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that the fleet's operator should know.

    Attributes:
        kind: away: no answer; problem, alarm: as the daemon says itself; twice: nonces that two daemons check;
            differs: one key's daemons mine different rounds; gap: nonces that no daemon listed checks;
            version: different releases of pocd.
        names: Names of the daemons concerned.
        reason: Sentence for people.
    """

    kind: Kind
    names: tuple[str, ...]
    reason: str


def findings(members: Sequence[Member]) -> list[Finding]:
    """List what is wrong, the worst first."""
    found = [finding for member in members for finding in _own(member)]
    for group in _networks(members):
        found += [*_twice(group), *_gaps(group), *_differences(group)]
    found += _versions(members)
    order: tuple[Kind, ...] = (*SEVERE, "alarm", "gap", "version")
    return sorted(found, key=lambda finding: order.index(finding.kind))


def _own(member: Member) -> Iterator[Finding]:
    """Yield what one daemon's status says, or that there is none."""
    names = (member.name,)
    if member.away:
        since = f", last {age(member.age_seconds)} ago" if member.status else ""
        yield Finding("away", names, f"{member.away}{since}")
    elif member.status:
        for kind in ("problem", "alarm"):
            for each in member.status[f"{kind}s"]:
                yield Finding(kind, names, f"{each['part']}: {each['reason']}")


def _networks(members: Iterable[Member]) -> Iterator[list[Member]]:
    """Yield the daemons that mine or would for one public key on one chain, by the last that each of them said."""
    groups: dict[tuple[str, str | None], list[Member]] = defaultdict(list)
    for member in members:
        if member.status and member.status["control"]["mode"] != "STOPPED":
            groups[member.status["node"]["public_key"], member.status["chain"]["chain_id"]].append(member)
    yield from groups.values()


def _shares(group: Iterable[Member]) -> dict[tuple[int, int], list[Member]]:
    """Return the daemons by (node_id, node_count)."""
    shares: dict[tuple[int, int], list[Member]] = defaultdict(list)
    for member in group:
        node = (member.status or {})["node"]
        shares[node["node_id"], node["node_count"]].append(member)
    return shares


def _twice(group: list[Member]) -> Iterator[Finding]:
    """Yield the daemons that check the same nonces.

    Two shares id + count · x meet where the ids agree modulo the greatest common divisor of the counts.
    """
    shares = _shares(group)
    advice = "the later proofs count for nothing; give each daemon a node_id of its own"
    for (node_id, count), same in shares.items():
        if len(same) > 1:
            yield Finding("twice", _names(same), f"all are node {node_id} of {count}: {advice}")
    for count, other in combinations(sorted({count for _, count in shares}), 2):
        common = gcd(count, other)
        for (first, of), (second, of_second) in product(shares, shares):
            if (of, of_second) == (count, other) and (first - second) % common == 0:
                both = shares[first, count] + shares[second, other]
                reason = (
                    f"node {first} of {count} and node {second} of {other} share nonces: set one node_count for all"
                )
                yield Finding("twice", _names(both), reason)


def _gaps(group: list[Member]) -> Iterator[Finding]:
    """Yield the shares of a node_count that no daemon of the group has."""
    shares = _shares(group)
    for count in sorted({count for _, count in shares}):
        present = {node_id for node_id, of in shares if of == count}
        if 1 < len(present) < count:  # one alone has siblings elsewhere, which are not this fleet's
            absent = (str(node_id) for node_id in itertools.count() if node_id not in present)
            lacking = count - len(present)
            told = ", ".join(islice(absent, min(lacking, SHOWN))) + (", …" if lacking > SHOWN else "")
            names = _names(member for (_, of), same in shares.items() if of == count for member in same)
            yield Finding("gap", names, f"of {count} nodes, {lacking} are not listed: {told}")


def _differences(group: list[Member]) -> Iterator[Finding]:
    """Yield what must be the same for all daemons of one key and is not."""
    for what, of in (("scheme", _round), ("model", _round), ("seq_len", _round), ("fingerprint", _worker)):
        seen: dict[str, list[Member]] = defaultdict(list)
        for member in group:
            value = of(member).get(what)
            if value is not None:
                seen[str(value)].append(member)
        if len(seen) > 1:
            common = max(seen, key=lambda value: len(seen[value]))
            odd = [member for value, having in seen.items() if value != common for member in having]
            told = "; ".join(f"{value}: {_listed(_names(having))}" for value, having in seen.items())
            yield Finding("differs", _names(odd), f"different {what} under one public key: {told}")


def _round(member: Member) -> dict[str, Any]:
    return (member.status or {})["round"] or {}


def _worker(member: Member) -> dict[str, Any]:
    worker: dict[str, Any] = (member.status or {})["worker"]
    return worker


def _versions(members: Iterable[Member]) -> Iterator[Finding]:
    versions = Counter(member.status["version"] for member in members if member.status)
    if len(versions) > 1:
        common = versions.most_common(1)[0][0]
        odd = [member for member in members if member.status and member.status["version"] != common]
        told = ", ".join(f"{version} on {count}" for version, count in versions.most_common())
        yield Finding("version", _names(odd), f"different releases of pocd: {told}")


def _names(members: Iterable[Member]) -> tuple[str, ...]:
    return tuple(member.name for member in members)


def _listed(names: Sequence[str]) -> str:
    """Return names as text, the first few of many."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def told(finding: Finding) -> str:
    """Return a finding as one line; who is listed is no trouble of theirs where others are not."""
    return finding.reason if finding.kind == "gap" else f"{_listed(finding.names)}: {finding.reason}"
