"""The status page, looked at in a real Chromium: live, clean, alone with its origin, on a phone and in the dark."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any

import aiohttp

from pocd.admin.page import HEADERS, PAGE, policy
from pocd.admin.text import percent
from pocd.cli.watch_view import wilson_interval
from tests.admin.test_outbox_api import Moody
from tests.support.browser import browsing, needs_chromium
from tests.support.processes import Chain, config, free_port, running
from tests.support.waiting import until
from tests.support.watched import Watched, on_machines, receiver, sample, troubled

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

PHONE = (360, 740)
OVERFLOW = "document.documentElement.scrollWidth - window.innerWidth"
EVENTS = "document.querySelectorAll('#events li').length"

# The smallest contrast of a text to what is behind it, by WCAG 2.2; 4.5 is enough for any text (criterion 1.4.3).
CONTRAST = """
(() => {
  const light = (color) => color.match(/[\\d.]+/g).slice(0, 3).map((each) => each / 255)
    .map((each) => each <= .04045 ? each / 12.92 : ((each + .055) / 1.055) ** 2.4)
    .reduce((sum, each, index) => sum + each * [.2126, .7152, .0722][index], 0);
  const behind = (node) => {
    const color = getComputedStyle(node).backgroundColor;
    return color !== "rgba(0, 0, 0, 0)" ? color : behind(node.parentElement);
  };
  const found = [];
  for (const node of document.body.querySelectorAll("*")) {
    const shows = [...node.childNodes].some((each) => each.nodeType === 3 && each.data.trim());
    if (!shows || !node.getClientRects().length) continue;
    const [dark, bright] = [light(getComputedStyle(node).color), light(behind(node))].sort((a, b) => a - b);
    found.push([(bright + .05) / (dark + .05), node.textContent]);
  }
  return found.sort((a, b) => a[0] - b[0])[0];
})()
"""


def number(text: str) -> int:
    return int(text.replace(",", ""))


# Without a browser.


async def test_it_is_served_to_all_with_a_policy_of_its_own_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Watched(sample(), token="correct-horse").served(monkeypatch) as watched, aiohttp.ClientSession() as http:
        async with http.get(watched.url) as answer:
            assert (answer.status, answer.content_type) == (200, "text/html")
            assert await answer.text() == PAGE
            sent = answer.headers
        assert {name: sent[name] for name in HEADERS} == HEADERS
        assert "unsafe" not in sent["Content-Security-Policy"]
        async with http.get(f"{watched.url}/api/v1/pow/status") as answer:
            assert answer.status == 401, "the data are not"


def test_a_changed_script_has_another_policy() -> None:
    assert policy(PAGE.replace("const POLL_MS", "const  POLL_MS")) != policy(PAGE) == HEADERS["Content-Security-Policy"]


def test_it_needs_nothing_from_outside_and_takes_data_as_text() -> None:
    assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|\sstyle=|\son\w+=", PAGE)
    assert re.findall(r"(?:src|href)=\"([^\"]*)\"", PAGE) == ["data:,", "/docs"]


# In one.


@needs_chromium
async def test_a_real_daemon_seen_live(tmp_path: Path) -> None:
    async with Chain().served() as chain, Moody().served() as receiver_:
        path = config(tmp_path, chain.url, {"main": receiver_.url})
        async with running(path) as daemon, browsing(tmp_path) as browser:
            tab = await browser.open(daemon.url)
            await tab.until("document.querySelector('#state').textContent === 'GENERATING'")
            checked = "document.querySelector('#funnel dd').textContent"
            before = number(await tab.until(checked))
            chain.height += 1
            await tab.until(
                "[...document.querySelectorAll('#events li')].some((each) => /block 2 /.test(each.textContent))"
            )
            await tab.until(f"Number({checked}.replaceAll(',', '')) > {before}")
            await tab.until("/main.*accepts/s.test(document.querySelector('#receivers').textContent)")
            assert "cpu" in await tab.text("#workers")
            await tab.until("document.querySelector('#expected').textContent === '48.91%'")  # not between two rounds
            assert tab.complaints == []
            assert tab.origins() == {daemon.url}
            assert {url.partition("?")[0].removeprefix(daemon.url) for url in tab.requests if "data:" not in url} == {
                "/",
                "/api/v1/pow/status",
                "/api/v1/pow/events",
            }


@needs_chromium
async def test_it_fits_a_phone_and_reads_well_by_day_and_night(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    body = troubled()
    body["machines"] = on_machines(sample())["machines"]
    body["alarms"].append({"part": "store", "reason": "x" * 300})
    body["receivers"].append(receiver("r" * 64, last_error="y" * 300))
    body["workers"][0]["cards"][0]["name"] = "z" * 100
    watched = Watched(body)
    watched.happenings()
    async with watched.served(monkeypatch), browsing(tmp_path) as browser:
        tab = await browser.open(watched.url)
        await tab.until(f"{EVENTS} === 14")
        grounds = set()
        for dark in (False, True):
            for size in (PHONE, (320, 568), (700, 900), (1400, 900)):
                await tab.shape(*size, dark=dark)
                assert await tab.value(OVERFLOW) <= 0, size
            ratio, text = await tab.value(CONTRAST)
            assert ratio >= 4.5, (dark, text)
            grounds.add(await tab.value("getComputedStyle(document.documentElement).backgroundColor"))
        assert len(grounds) == 2
        text = await tab.text()
        for part in (
            "1 of 1 workers",
            "Alarm: worker 1 (cuda:1)",
            "Problem: chain",
            "loading the model",
            "HTTP 503",
            "again in 42 s",
        ):
            assert part in text
        low, high = wilson_interval(body["round"]["valid"], body["round"]["checked"])
        assert f"99% interval {percent(low)} to {percent(high)}; the expected rate is outside" in text
        assert tab.complaints == []
        assert watched.events.listeners == 1
        await tab.value("Object.defineProperty(document, 'hidden', {get: () => true})")
        await tab.value("document.dispatchEvent(new Event('visibilitychange')) && null")
        await until(lambda: not watched.events.listeners)  # where nobody looks, nobody listens


@needs_chromium
async def test_the_token_is_asked_for_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    enter = "document.querySelector('#token').value = '{}'; document.querySelector('#ask button').click()"
    asks, shows = "!document.querySelector('#ask').hidden", "!document.querySelector('#main').hidden"
    async with Watched(sample(), token="correct-horse").served(monkeypatch) as watched, browsing(tmp_path) as browser:
        watched.block(5)
        tab = await browser.open(watched.url)
        await tab.until(asks)
        assert not await tab.value(shows)
        await tab.value(enter.format("battery-staple"))
        await tab.until("document.querySelector('#refused').textContent === 'This token was refused.'")
        await tab.value(enter.format("correct-horse"))
        await tab.until(f"{shows} && {EVENTS} === 1")
        assert not await tab.value(asks)
        await tab.load(watched.url)
        await tab.until(shows)
        assert not await tab.value(asks)
        assert all("401" in complaint for complaint in tab.complaints)
        assert not any("correct" in url for url in tab.requests)


@needs_chromium
async def test_a_daemon_that_ends_and_comes_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    watched, port = Watched(sample()), free_port()
    async with browsing(tmp_path) as browser:
        async with contextlib.AsyncExitStack() as life:
            await life.enter_async_context(watched.served(monkeypatch, port))
            watched.block(1)
            tab = await browser.open(watched.url)
            await tab.until(f"{EVENTS} === 1")
        await tab.until("/does not answer/.test(document.querySelector('#troubles').textContent)")
        assert await tab.value("document.querySelector('#main').classList.contains('stale')")
        reborn = Watched(sample())
        async with reborn.served(monkeypatch, port):
            reborn.block(2)
            await tab.until("document.querySelector('#troubles').hidden")
            await tab.until(f"{EVENTS} === 2 && document.querySelector('#deaf').textContent === ''")


@needs_chromium
async def test_strangers_text_stays_text_and_foreign_script_does_not_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    body: dict[str, Any] = sample()
    evil = "<img src=x onerror=window.owned=1>"
    body["receivers"] = [receiver(evil, last_error=evil)]
    body["alarms"] = [{"part": evil, "reason": evil}]
    body["chain"]["chain_id"] = body["round"]["model"] = evil
    async with Watched(body).served(monkeypatch) as watched, browsing(tmp_path) as browser:
        watched.events.publish("chain", problem=evil)
        tab = await browser.open(watched.url)
        await tab.until(f"{EVENTS} === 1")
        assert (await tab.text()).count(evil) >= 6
        assert await tab.value("document.images.length") == 0
        assert tab.complaints == []
        await tab.value("window.node = document.createElement('script'); node.textContent = 'window.owned = 1'")
        await tab.value("document.body.append(node)")
        assert await tab.value("window.owned") is None
        assert (
            await tab.value(f"fetch('{watched.url.replace('127.0.0.1', 'localhost')}/healthz').then(() => 1, () => 0)")
            == 0
        )
        assert sum("Content Security Policy" in complaint for complaint in tab.complaints) >= 2
