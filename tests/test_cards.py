"""Readings of cards, by a driver that answers, fails and hangs; a real one is asked in test_gpu.py."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import structlog.testing

from pocd.observe import cards
from pocd.observe.cards import PATIENCE_SECONDS, Cards, Reading

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pytest

COOL = Reading(temperature=40.0, power=200.5, memory_used=2**30, memory_total=80 * 2**30, utilization=0.98)
UUID = "GPU-1"


class Driver:
    """Answers what it is told to, when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self.answers: dict[str, Reading] = {UUID: COOL}
        self.problem: str | None = None
        self.asked = threading.Semaphore(0)
        self.answer = threading.Semaphore(0)

    def read(self, uuids: Iterable[str]) -> tuple[dict[str, Reading], str | None]:
        assert set(uuids) == {UUID}
        self.asked.release()
        assert self.answer.acquire(timeout=60)
        return self.answers, self.problem

    def turn(self) -> None:
        """Let it answer one question, and wait for the next, before which the answer is taken."""
        self.answer.release()
        assert self.asked.acquire(timeout=60)


def test_readings_come_go_and_hang_and_each_trouble_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "READ_SECONDS", 0.0)
    driver = Driver()
    with structlog.testing.capture_logs() as logs:
        watched = Cards(lambda: {UUID}, clock=lambda: driver.now, log=structlog.get_logger(), read=driver.read)
        assert watched.reading(UUID) is None
        watched.start()
        assert driver.asked.acquire(timeout=60)
        driver.turn()
        assert (watched.reading(UUID), watched.reading("GPU-2"), watched.reading(None)) == (COOL, None, None)
        assert watched.problem is None
        driver.now += PATIENCE_SECONDS + 1  # it was asked before, and says nothing
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

    watched = Cards(used, clock=lambda: 0.0, log=structlog.get_logger(), read=Driver().read)
    watched.start()
    for _ in range(3):
        assert looked.acquire(timeout=60)
    watched.close()
    assert watched.problem is None
