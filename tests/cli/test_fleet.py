"""`pocd fleet`: what it finds wrong among many daemons, what it shows, and real APIs asked."""

from __future__ import annotations

import copy
import io
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.segment import Segment

from pocd.cli.fleet_answer import check_answer
from pocd.cli.fleet_findings import Finding, Member, findings, told
from pocd.cli.fleet_list import addresses
from pocd.cli.fleet_view import FleetView, total
from pocd.cli.fleet_viewer import Fleet
from pocd.config.settings import ConfigError
from pocd.process import EXIT_CONFIG, EXIT_CRASH
from tests.support.command_line import pocd_here
from tests.support.processes import free_port
from tests.support.watched import Watched, on_machines, sample, troubled

if TYPE_CHECKING:
    from pathlib import Path


def member(name: str, node_id: int, node_count: int, **changes: Any) -> Member:  # noqa: ANN401 - any field of a status
    """A healthy daemon of the fleet, with what differs in its status."""
    status = copy.deepcopy(sample())
    status["node"] |= {"node_id": node_id, "node_count": node_count}
    status["worker"]["fingerprint"] = "5a5a"
    for field, value in changes.items():
        status[field] = {**status[field], **value} if isinstance(value, dict) else value
    return Member(name, f"http://{name}:8460", status)


def kinds(found: list[Finding]) -> list[tuple[str, tuple[str, ...]]]:
    return [(finding.kind, finding.names) for finding in found]


def test_a_whole_fleet_that_is_well_has_no_findings() -> None:
    assert findings([member("a", 0, 3), member("b", 1, 3), member("c", 2, 3)]) == []


def test_what_is_wrong_is_told_worst_first() -> None:
    members = [
        member("old", 0, 8, version="0.0.9"),
        member("b", 1, 8, alarms=[{"part": "cards", "reason": "too hot"}]),
        member("twin", 1, 8),
        member("other", 2, 8, worker={"fingerprint": "0000"}),
        Member("gone", "http://gone:8460", away="nothing listens"),
        Member("new", "http://new:8460"),
    ]
    found = findings(members)
    assert kinds(found) == [
        ("away", ("gone",)),
        ("twice", ("b", "twin")),
        ("differs", ("other",)),
        ("alarm", ("b",)),
        ("gap", ("old", "b", "twin", "other")),
        ("version", ("old",)),
    ]
    assert told(found[1]).startswith("b, twin: all are node 1 of 8: ")
    assert found[4].reason == "of 8 nodes, 5 are not listed: 3, 4, 5, 6, 7"


def test_a_daemon_that_is_away_still_holds_its_share_and_says_since_when() -> None:
    gone = member("gone", 1, 2)
    gone = Member(gone.name, gone.url, gone.status, age_seconds=600.0, away="nothing listens")
    found = findings([member("a", 0, 2), gone, member("b", 1, 2)])
    assert kinds(found) == [("away", ("gone",)), ("twice", ("gone", "b"))]
    assert found[0].reason == "nothing listens, last 10 min ago"


def test_daemons_that_do_not_compete_are_not_compared() -> None:
    members = [
        member("a", 0, 2),
        member("other key", 0, 2, node={"public_key": "another"}),
        member("other chain", 0, 2, chain={"chain_id": "gonka-testnet"}),
        member("stand-by", 0, 2, control={"mode": "STOPPED"}),
        member("b", 1, 2),
    ]
    assert findings(members) == []


@given(
    st.lists(st.integers(1, 12).flatmap(lambda count: st.tuples(st.integers(0, count - 1), st.just(count))), max_size=6)
)
def test_shares_meet_exactly_where_they_have_a_nonce_in_common(shares: list[tuple[int, int]]) -> None:
    members = [member(str(place), *share) for place, share in enumerate(shares)]
    paired = {
        frozenset((one, other))
        for finding in findings(members)
        if finding.kind == "twice"
        for one in finding.names
        for other in finding.names
        if one != other
    }
    nonces = [set(range(node_id, 12 * 12, count)) for node_id, count in shares]
    assert paired == {
        frozenset((str(one), str(other)))
        for one in range(len(shares))
        for other in range(one)
        if nonces[one] & nonces[other]
    }


def test_sums_count_the_rates_of_those_that_answer_and_the_proofs_of_all() -> None:
    away = Member("b", "http://b", sample(), age_seconds=9.0, away="gone")
    sums = total([member("a", 0, 2), away, Member("c", "http://c")])
    one = sample()
    assert (sums["daemons"], sums["answering"], sums["generating"]) == (3, 1, 1)
    assert sums["rates"] == one["rates"]
    assert sums["funnel"] == {stage: 2 * count for stage, count in one["funnel"].items()}


def drawn(members: list[Member], width: int = 120, height: int | None = None) -> list[str]:
    """The lines of a view."""
    console = Console(width=width, file=io.StringIO(), highlight=False)
    options = (
        console.options.update(width=width) if height is None else console.options.update_dimensions(width, height)
    )
    lines = Segment.split_lines(console.render(FleetView(members, 0.0), options))
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


def test_the_view_shows_those_in_trouble_first() -> None:
    gone = Member("gone", "http://gone", away="nothing listens")
    lines = drawn([member("well", 0, 40), Member("ill\x1b[31m", "http://ill", troubled()), gone])
    assert lines[0].startswith("2 of 3 daemons answer, 2 generate, ")
    text = "\n".join(lines)
    assert "\x1b" not in text
    assert text.index("AWAY") < text.index("PROBLEM") < text.index("ALARM")
    rows = [line.split()[0] for line in lines[-3:]]
    assert rows[0] == "gone"
    assert rows[2] == "well"
    assert "0 of 40" in lines[-1]


def test_the_machines_of_a_daemons_cluster_are_shown_where_there_is_room() -> None:
    status = on_machines(sample())
    status["machines"][1]["node"] = "two\x1b[31m"
    earlier = {name: value for name, value in sample().items() if name != "machines"}  # as an earlier release answers
    members = [Member("cluster", "http://c", status), Member("alone", "http://a", earlier)]
    rows = [line.split() for line in drawn(members)[-4:]]
    assert [row[0] for row in rows] == ["cluster", "on", "on", "alone"]
    assert rows[1] == ["on", "three", "0.0", "0.0", "0/1"]
    assert rows[2] == ["on", "two�[31m", "424.9", "424.9", "1/1"]
    assert "on three" not in "\n".join(drawn(members, height=8))


@pytest.fixture(scope="module")
def thousand() -> list[Member]:
    return [member(f"host-{number}", number % 997, 997) for number in range(1000)]


@pytest.mark.parametrize("height", [6, 12, 24, 60, None])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_thousand_daemons_fit_and_the_rest_is_counted(thousand: list[Member], width: int, height: int | None) -> None:
    lines = drawn(thousand, width, height)
    assert all(cell_len(line) <= width for line in lines)
    if height is not None:
        assert len(lines) <= height
        assert "more daemons do not fit" in lines[-1]


async def test_real_daemons_are_asked_together(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = f"http://127.0.0.1:{free_port()}"
    async with Watched(sample()).served(monkeypatch) as watched:
        fleet = Fleet(addresses([watched.url, silent], None, None))
        assert [each.status for each in fleet.members()] == [None, None]
        await fleet.ask()
        one, other = fleet.members()
    assert one.status is not None
    assert one.status["funnel"] == sample()["funnel"]
    assert (one.away, other.status) == (None, None)
    assert other.away is not None
    assert "nothing listens" in other.away
    await fleet.ask()
    one, _ = fleet.members()
    assert one.away is not None
    assert one.status is not None, "what it said last is kept"


@pytest.mark.parametrize(
    ("status", "told"),
    [
        ({"hello": "world"}, "what answers there is no pocd: state: field required"),
        (sample() | {"version": "0.0.1", "rates": {}}, "it has pocd 0.0.1, whose answer cannot be shown"),
    ],
)
async def test_an_answer_that_cannot_be_shown_is_said_and_hides_no_other(
    status: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.json_response(status)

    app = web.Application()
    app.router.add_get("/api/v1/pow/status", answer)
    async with TestServer(app) as server, Watched(sample()).served(monkeypatch) as watched:
        fleet = Fleet(addresses([str(server.make_url("/")), watched.url], None, None))
        await fleet.ask()
        odd, well = fleet.members()
    assert told in str(odd.away)
    assert odd.status is None
    assert (well.away, well.status is None) == (None, False)
    assert "AWAY" in "\n".join(drawn([odd, well]))


def test_an_earlier_release_that_knows_no_machines_is_shown() -> None:
    check_answer({name: value for name, value in sample().items() if name != "machines"})


@pytest.mark.parametrize("width", [80, 100])
def test_what_is_printed_once_is_whole(width: int) -> None:
    members = [member(f"a-host-in-frankfurt-{number}", min(number, 5), 8) for number in range(7)]
    lines = drawn(members, width)
    printed = " ".join(" ".join(lines).split())
    for found in findings(members):
        assert told(found) in printed
    head = next(line for line in lines if line.startswith("daemon"))
    assert head.split()[-3:] == ["delivered", "waiting", "workers"]


def test_no_daemon_that_answers_is_status_1_and_still_shown() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    ended = pocd_here("fleet", url, "--json")
    assert ended.returncode == EXIT_CRASH
    body = orjson.loads(ended.stdout)
    assert [daemon["url"] for daemon in body["daemons"]] == [url]
    assert [finding["kind"] for finding in body["findings"]] == ["away"]
    assert "none of 1 daemons answers" in ended.stderr
    assert "AWAY" in pocd_here("fleet", url).stdout


def test_a_list_names_daemons_and_tokens(tmp_path: Path) -> None:
    (tmp_path / "a-token").write_text("one\n")
    (tmp_path / "token").write_text("all\n")
    hosts = tmp_path / "hosts"
    hosts.write_text(f"# ours\nhttp://a:1/ rack-1 {tmp_path}/a-token\n\nunix:///run/pocd/admin.sock # here\n")
    found = addresses(["http://c:1"], hosts, tmp_path / "token")
    assert [(each.name, each.url, each.token) for each in found] == [
        ("http://c:1", "http://c:1", "all"),
        ("rack-1", "http://a:1", "one"),
        ("unix:///run/pocd/admin.sock", "unix:///run/pocd/admin.sock", "all"),
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no daemon is named"),
        ("a:1", "line 1: expected http://HOST:PORT"),
        ("http://a:1 name token more", "line 1: expected"),
        ("http://a:1\nhttp://a:1/", "line 2: http://a:1 is named twice"),
        ("http://a:1 x\nhttp://b:1 x", "line 2: x is named twice"),
        ("http://a:1 x /no/such/token", "cannot be read"),
    ],
)
def test_a_bad_list_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(text)
    with pytest.raises(ConfigError, match=reason):
        addresses([], hosts, None)
    assert pocd_here("fleet", "--file", hosts).returncode == EXIT_CONFIG


def test_a_list_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        addresses([], tmp_path / "none", None)
