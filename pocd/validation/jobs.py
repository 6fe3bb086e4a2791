"""Do what orchestrators ask for by a list of nonces: one job after another, while nothing is generated.

A job is on disk before its caller hears that it is queued, and its result before anybody hears of that.
"""

from __future__ import annotations

import asyncio
import contextlib
from base64 import b64decode
from typing import TYPE_CHECKING

from pocd.mining.phases import Mode
from pocd.pool.recomputations import NoResultError
from pocd.protocol.live_jobs import LiveJob, computed, failed
from pocd.store import jobs
from pocd.worker.messages import Vectors

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from structlog.typing import FilteringBoundLogger

    from pocd.clock import Clock
    from pocd.delivery.receivers import Receivers
    from pocd.observe.changes import Changes
    from pocd.pool.pool import Pool
    from pocd.protocol.live_jobs import JobResult
    from pocd.store.jobs import Job
    from pocd.store.thread import OutboxThread

MOST_NONCES = 100_000  # of all jobs that wait
KEPT_SECONDS = 300.0  # that a finished job is kept


class Jobs:
    """Takes jobs in, has their nonces computed, and stores the results.

    Attributes:
        current: Id of the job that is being done; None while there is none.
        judges: Whether the job that is being done judges artifacts.
        idle: Whether no job waits or is being done.
    """

    def __init__(
        self,
        outbox: OutboxThread,
        workers: Pool,
        receivers: Receivers,
        mode: Callable[[], Mode],
        changes: Changes,
        *,
        clock: Clock,
        log: FilteringBoundLogger,
    ) -> None:
        self._outbox = outbox
        self._workers = workers
        self._receivers = receivers
        self._mode = mode
        self._changes = changes
        self._clock = clock
        self._log = log
        self._asked = asyncio.Event()
        self._ended = asyncio.Condition()
        self.current: str | None = None
        self.judges = False
        self.idle = False

    async def ask(self, job: LiveJob, callback_url: str | None) -> bool:
        """Queue a job; returns False where too many nonces wait, and nothing was stored.

        Raises:
            StoreUnavailableError: The store cannot be written now; nothing was stored.
        """
        now = self._clock.wall()
        await self._outbox(jobs.prune, now - KEPT_SECONDS)
        taken = await self._outbox(
            jobs.ask,
            job.id,
            await asyncio.to_thread(job.to_json),
            nonces=len(job.nonces),
            callback=(job.callback or "", callback_url),
            most=MOST_NONCES,
            now=now,
        )
        self._asked.set()
        return taken

    async def waiting(self) -> int:
        """Return the number of nonces of jobs that wait."""
        return await self._outbox(jobs.waiting)

    async def find(self, name: str) -> Job | None:
        """Return a job by its id; None where it is unknown, or was finished too long ago."""
        return await self._outbox(jobs.find, name)

    async def until_ended(self, name: str, limit: float) -> Job | None:
        """Wait up to `limit` seconds until a job is no longer queued, and return it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit), self._ended:
                while (found := await self.find(name)) is not None and found.state == "queued":
                    await self._ended.wait()
                return found
        return await self.find(name)

    async def cancel(self) -> None:
        """Cancel all jobs that wait, and the one that is being done.

        Raises:
            StoreUnavailableError: The store cannot be written now; nothing was cancelled.
        """
        await self._outbox(jobs.cancel, self._clock.wall())
        await self._notify()

    async def run(self, pair: Callable[[LiveJob], Awaitable[str | None]]) -> None:
        """Do queued jobs, oldest first, until cancelled.

        Args:
            pair: Has the artifacts of a job judged by their differences, later; returns the validation's id.
        """
        while True:
            self.idle = False
            self._asked.clear()
            await self._until_free()
            queued = await self._outbox.persistently(jobs.oldest)
            if queued is not None:
                await self._do(*queued, pair)
            elif not self._asked.is_set():
                self.idle = True
                self._changes.notify()
                await self._asked.wait()

    async def until_idle(self) -> None:
        """Wait until nothing is generated, and no job waits or is being done."""
        await self._changes.until(lambda: self.idle and self._mode() is not Mode.GENERATING)

    async def _until_free(self) -> None:
        await self._changes.until(lambda: self._mode() is not Mode.GENERATING)

    async def _do(self, name: str, encoded: bytes, pair: Callable[[LiveJob], Awaitable[str | None]]) -> None:
        job = await asyncio.to_thread(LiveJob.from_json, encoded)
        self.current, self.judges = name, job.claimed is not None
        try:
            vectors = await self._vectors(job)
            if vectors is not None:
                validation = await pair(job) if self.judges else None  # stored first: a job is done once
                await self._finish(job, await asyncio.to_thread(computed, job, vectors, validation))
        except NoResultError as error:
            await self._finish(job, failed(job, str(error)))
        finally:
            self.current, self.judges = None, False
        await self._notify()

    async def _finish(self, job: LiveJob, result: JobResult) -> None:
        if result.failed:
            self._log.error("job has no result", action="job_failed", id=job.id, cause=result.answer.decode())
        await self._outbox.persistently(
            jobs.finish,
            job.id,
            "failed" if result.failed else "completed",
            result.answer,
            verdict=result.verdict,
            receiver=job.callback,
            now=self._clock.wall(),
        )
        self._receivers.wake()

    async def _vectors(self, job: LiveJob) -> bytes | None:
        """Let the workers compute the vectors of a job, a batch at a time; None once it is cancelled.

        Raises:
            NoResultError: The model gives none, its worker ended each time, or another model is loaded now.
        """
        found, done = bytearray(), 0
        while done < len(job.nonces):
            await self._until_free()
            await self._workers.ready.wait()
            info = self._workers.info
            assert info is not None, "a worker that is ready has said what it runs"
            if (info.fingerprint, info.dtype) != (job.fingerprint, job.dtype):
                raise NoResultError("the daemon runs another model or dtype than when this was requested")
            now = await self._outbox.persistently(jobs.find, job.id)
            if now is None or now.state != "queued":
                return None
            part = job.nonces[done : done + self._workers.batch_size]
            done += len(part)
            answer = await self._workers.recomputations.answer(job.round, part, last=done == len(job.nonces))
            assert isinstance(answer, Vectors), "a round of vectors"
            found += b64decode(answer.vectors)
        return bytes(found)

    async def _notify(self) -> None:
        async with self._ended:
            self._ended.notify_all()
