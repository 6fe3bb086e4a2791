"""Alarms and dashboard: they name only metrics that a real daemon has, and each alarm rings when it is to."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
import pytest

from tests.support.processes import Chain, config, running

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent.parent
RULES = ROOT / "docs" / "prometheus" / "alerts.yml"
DASHBOARD = ROOT / "docs" / "prometheus" / "grafana.json"
PROMTOOL = ROOT / ".tools" / "promtool"
NAME = re.compile(r"\bpocd_[a-z0-9_]+")

needs_promtool = pytest.mark.skipif(not PROMTOOL.exists(), reason="promtool is not there (scripts/setup-promtool)")


def promtool(*arguments: str, text: str | None = None) -> str:
    done = subprocess.run([PROMTOOL, *arguments], input=text, capture_output=True, text=True, check=False, cwd=ROOT)
    return f"{done.returncode}: {done.stdout}{done.stderr}"


async def scrape(folder: Path) -> str:
    """What a daemon in a live round says, with a receiver that is not there."""
    async with Chain().served() as chain:
        async with running(config(folder, chain.url, {"one": "http://127.0.0.1:9"})) as daemon:
            await daemon.until(lambda body: body["total_valid"] and body["round"]["expected_valid_rate"])
            async with aiohttp.ClientSession() as session, session.get(f"{daemon.url}/metrics") as response:
                return await response.text()


def queries(dashboard: dict[str, Any]) -> Iterator[str]:
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    for variable in dashboard["templating"]["list"]:
        query = variable["query"]
        yield query["query"] if isinstance(query, dict) else query


async def test_alarms_and_dashboard_name_only_metrics_that_exist_and_all_are_well_named(tmp_path: Path) -> None:
    metrics = await scrape(tmp_path)
    families = set(re.findall(r"^# TYPE (\S+)", metrics, re.MULTILINE))
    assert len(families) > 30
    rules = RULES.read_text()
    in_rules = {name for line in rules.splitlines() if "#" not in line for name in NAME.findall(line)}
    in_dashboard = {name for query in queries(orjson.loads(DASHBOARD.read_bytes())) for name in NAME.findall(query)}
    assert len(in_rules) > 10
    assert len(in_dashboard) > 15
    assert in_rules | in_dashboard <= families
    if PROMTOOL.exists():
        # Its complaints are of names and units; it knows nothing of state sets, nor of info and derived families.
        assert [line for line in promtool("check", "metrics", text=metrics).splitlines() if "pocd_" in line] == []


@needs_promtool
def test_the_rules_are_well_formed_and_each_alarm_rings_when_it_is_to() -> None:
    names = re.findall(r"alert: (\w+)", RULES.read_text())
    assert promtool("check", "rules", str(RULES)).endswith(f"SUCCESS: {len(names)} rules found\n\n")
    tests = ROOT / "tests" / "data" / "alerts_test.yml"
    assert promtool("test", "rules", str(tests)).startswith("0: Unit Testing")
    for name in names:
        assert len(re.findall(rf"alertname: {name}\b", tests.read_text())) >= 2, f"{name} is silent once and rings once"


def test_the_dashboards_panels_lie_side_by_side() -> None:
    dashboard = orjson.loads(DASHBOARD.read_bytes())
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    cells = [(x, place["y"]) for place in places for x in range(place["x"], place["x"] + place["w"])]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) == 23
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(places)
