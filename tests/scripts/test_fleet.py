"""A fleet in virtual time: what its chain node and its receiver are asked, with and without jitter."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from scripts.trials import virtual_time
from scripts.trials.fleet import over, rows
from scripts.trials.fleet_world import Plan, Seen, simulate

HOSTS = 40
PLAN = Plan(HOSTS, receiver=200.0, node_down=(180.0, 240.0), receiver_down=(300.0, 420.0), drained=900.0)
USUAL = (PLAN.steady, PLAN.new_round)


@pytest.fixture(scope="module")
def spread() -> Seen:
    return virtual_time.run(simulate(PLAN))


@pytest.fixture(scope="module")
def in_step() -> Seen:
    return virtual_time.run(simulate(replace(PLAN, has_jitter=False)))


def test_virtual_time_leaps_to_what_is_due_next() -> None:
    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        woken = []

        async def sleep(seconds: float) -> None:
            await asyncio.sleep(seconds)
            woken.append(loop.time())

        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1e6):
                await asyncio.gather(sleep(3e5), sleep(1.5), asyncio.Event().wait())
        return [*woken, loop.time()]

    assert virtual_time.run(main()) == pytest.approx([1.5, 3e5, 1e6])


def test_hosts_that_started_together_do_not_go_on_asking_together(spread: Seen, in_step: Seen) -> None:
    mean = HOSTS / PLAN.poll_interval
    assert over(in_step.polls, *USUAL)[0] == pytest.approx(mean)
    assert over(in_step.polls, *USUAL)[1] == HOSTS
    assert over(spread.polls, *USUAL)[0] == pytest.approx(mean, rel=0.05)
    assert over(spread.polls, *USUAL)[1] < 0.8 * HOSTS


def test_a_node_that_fails_is_asked_hardly_more_than_one_that_does_not(spread: Seen) -> None:
    begin, end = PLAN.node_down
    mean = HOSTS / PLAN.poll_interval
    assert over(spread.polls, begin + 10, end)[0] == pytest.approx(mean, rel=0.05), "once a poll"


def test_batches_of_many_hosts_do_not_come_at_once(spread: Seen, in_step: Seen) -> None:
    assert over(in_step.posts, *USUAL)[1] > 0.8 * HOSTS
    assert over(spread.posts, *USUAL)[1] < 0.5 * HOSTS
    begin, end = PLAN.receiver_down
    assert over(in_step.posts, begin + 60, end)[1] > 2 * over(spread.posts, begin + 60, end)[1]


def test_every_batch_arrives_after_an_outage(spread: Seen) -> None:
    assert spread.drained_at is not None
    found = HOSTS * PLAN.proofs * spread.drained_at
    assert spread.proofs.total() == pytest.approx(found, rel=0.05)
    assert rows(PLAN, spread)["queues empty again"] == f"{spread.drained_at - PLAN.receiver_down[1]:,.0f} s later"
