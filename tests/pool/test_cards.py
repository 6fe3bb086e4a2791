"""Readings of cards, by a driver that answers, fails and hangs; a real one is asked in test_gpu.py."""

from __future__ import annotations

import dataclasses
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import structlog.testing

from pocd.admin import status
from pocd.admin.metrics import DaemonCollector
from pocd.admin.text import card_text
from pocd.clock import SYSTEM
from pocd.pool import cards
from pocd.pool.cards import PATIENCE_SECONDS, CardReading, Cards
from pocd.worker.messages import CardIdentity
from tests.support.clocks import ManualClock
from tests.support.waiting import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pytest

    from pocd.admin.status import Parts

COOL = CardReading(temperature=40.0, power=200.5, memory_used=2**30, memory_total=80 * 2**30, utilization=0.98)
UUID = "GPU-1"


class Driver:
    """Answers what it is told to, when it is told to."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.answers: dict[str, CardReading] = {UUID: COOL}
        self.problem: str | None = None
        self.asked = threading.Semaphore(0)
        self.answer = threading.Semaphore(0)

    def read(self, uuids: Iterable[str]) -> tuple[dict[str, CardReading], str | None]:
        assert set(uuids) == {UUID}
        self.asked.release()
        assert self.answer.acquire(timeout=PATIENCE)
        return self.answers, self.problem

    def turn(self) -> None:
        """Let it answer one question, and wait for the next, before which the answer is taken."""
        self.answer.release()
        assert self.asked.acquire(timeout=PATIENCE)


def test_readings_come_go_and_hang_and_each_trouble_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "READ_SECONDS", 0.0)
    driver = Driver()
    with structlog.testing.capture_logs() as logs:
        watched = Cards(lambda: {UUID}, clock=driver.clock, log=structlog.get_logger(), read=driver.read)
        assert watched.reading(UUID) is None
        watched.start()
        assert driver.asked.acquire(timeout=PATIENCE)
        driver.turn()
        assert (watched.reading(UUID), watched.reading("GPU-2")) == (COOL, None)
        assert watched.problem is None
        driver.clock.advance(PATIENCE_SECONDS + 1)  # it was asked before, and says nothing
        assert watched.reading(UUID) is None
        assert watched.problem == "the driver has not said for 30 s how the cards are"
        driver.answers, driver.problem = {}, "the driver does not say how card GPU-1 is: GPU is lost"
        driver.turn()
        driver.turn()
        assert watched.problem == driver.problem
        assert watched.reading(UUID) is None
        driver.answers, driver.problem = {UUID: COOL}, None
        driver.turn()
        assert (watched.problem, watched.reading(UUID)) == (None, COOL)
        watched.close()
        driver.answer.release()
    assert [entry["event"] for entry in logs] == ["the driver does not say how card GPU-1 is: GPU is lost"]


def test_nobody_is_asked_while_no_worker_uses_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "READ_SECONDS", 0.0)
    looked = threading.Semaphore(0)

    def used() -> set[str]:
        looked.release()
        return set()

    watched = Cards(used, clock=SYSTEM, log=structlog.get_logger(), read=Driver().read)
    watched.start()
    for _ in range(3):
        assert looked.acquire(timeout=PATIENCE)
    watched.close()
    assert watched.problem is None


def test_a_card_is_shown_with_what_it_tells_in_metrics_status_and_to_people() -> None:
    """As far as that goes without a card: what a worker would say of it, and what the driver would."""
    told = dataclasses.replace(COOL, power=None)
    worker = SimpleNamespace(
        number=3, cards={"cuda:3": CardIdentity("NVIDIA H200", UUID), "cuda:4": CardIdentity("NVIDIA H200", "GPU-2")}
    )
    watched = SimpleNamespace(reading={UUID: told}.get, problem="the driver does not say how card GPU-2 is")
    parts = cast("Parts", SimpleNamespace(workers=SimpleNamespace(workers=[worker]), cards=watched))
    families = {family.name: family for family in DaemonCollector(parts)._cards()}
    at = {"worker": "3", "device": "cuda:3"}
    assert [(sample.labels, sample.value) for sample in families["pocd_card_temperature_celsius"].samples] == [(at, 40)]
    assert families["pocd_card_power_watts"].samples == []
    assert families["pocd_card_memory_used_bytes"].samples[0].value == 2**30
    assert families["pocd_card_unreadable"].samples[0].value == 1
    assert {sample.labels["uuid"] for sample in families["pocd_card"].samples} == {UUID, "GPU-2"}
    views = [status._card_view(parts.cards, device, card) for device, card in worker.cards.items()]
    assert views[0] == {"device": "cuda:3", "name": "NVIDIA H200", "uuid": UUID, "reading": dataclasses.asdict(told)}
    assert views[1]["reading"] is None
    assert [card_text(view) for view in views] == ["40 °C 1/80 GiB 98% H200", "H200"]
