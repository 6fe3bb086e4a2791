"""What waits for jobs of orchestrators, and for what they are asked about."""

from __future__ import annotations

import asyncio
from contextlib import closing
from typing import TYPE_CHECKING, cast

import structlog

from pocd.mining.phases import Mode
from pocd.observe.changes import Changes
from pocd.store.thread import OutboxThread
from pocd.validation.jobs import Jobs
from tests.support.clocks import ManualClock
from tests.support.waiting import soon

if TYPE_CHECKING:
    from pathlib import Path

    from pocd.delivery.receivers import Receivers
    from pocd.pool.pool import Pool
    from pocd.protocol.live_jobs import LiveJob


async def no_pair(_job: LiveJob) -> str | None:
    return None


async def test_validations_wait_until_nothing_is_generated_and_no_job_waits(tmp_path: Path) -> None:
    mode, changes = [Mode.GENERATING], Changes()
    workers, receivers = cast("Pool", None), cast("Receivers", None)
    with closing(OutboxThread(tmp_path / "outbox.db")) as outbox:
        log = structlog.get_logger()
        jobs = Jobs(outbox, workers, receivers, lambda: mode[0], changes, clock=ManualClock(), log=log)
        free = asyncio.create_task(jobs.until_idle())
        running = asyncio.create_task(jobs.run(no_pair))
        changes.notify()
        await asyncio.sleep(0)
        assert not free.done()
        assert not jobs.idle
        mode[0] = Mode.STOPPED
        changes.notify()
        await soon(free)
        assert jobs.idle
        mode[0] = Mode.GENERATING
        again = asyncio.create_task(jobs.until_idle())
        changes.notify()
        await asyncio.sleep(0)
        assert not again.done()
        again.cancel()
        running.cancel()
        await asyncio.gather(again, running, return_exceptions=True)
