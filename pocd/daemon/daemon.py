"""The daemon's life: its resources are opened, its parts run, and all of it is stopped in order."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import uuid
from functools import partial
from typing import TYPE_CHECKING

from pocd.admin import status
from pocd.admin.orchestrator.api import OrchestratorApi
from pocd.admin.server import AdminApi
from pocd.chain.make import CHAIN_TIMEOUT
from pocd.clock import SYSTEM
from pocd.config.model import check_engine, check_model
from pocd.config.secrets import ORCHESTRATOR_TOKEN, read_token
from pocd.daemon.compose import compose, jitter, make_chain, make_loads, make_receivers
from pocd.daemon.reload import Reloader
from pocd.daemon.reports import Reports
from pocd.http.client import open_session
from pocd.http.server import listening, listening_at
from pocd.mining.follower import follow
from pocd.observe import logs
from pocd.pool.causes import Cause, WorkerRefusedError
from pocd.process import EXIT_CONFIG, EXIT_NO_DEVICE, EXIT_SIGNALLED, EndedError, exit_status
from pocd.store.errors import StoreUnavailableError
from pocd.store.place import copies, exposure
from pocd.store.thread import OutboxThread
from pocd.tasks import crash_logged, first_error, start

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Iterator
    from pathlib import Path
    from typing import Any

    from structlog.typing import FilteringBoundLogger

    from pocd.chain.source import Head
    from pocd.config.listeners import AdminSettings, OrchestratorSettings
    from pocd.config.settings import Settings
    from pocd.daemon.compose import Composition
    from pocd.observe.notify import Notifier

FINISH_SECONDS = 5.0  # for the batches being computed, when stopping
DELIVER_SECONDS = 5.0  # for the last deliveries


async def run(settings: Settings, path: Path, *, log: FilteringBoundLogger, notifier: Notifier) -> None:
    """Run the daemon until SIGTERM, SIGINT or `POST /shutdown`; at SIGHUP `path` is read again.

    Raises:
        ConfigError: A file or the address that the settings name cannot be used.
        EndedError: The store cannot be used, or the worker cannot work on this machine, or as configured.
    """
    check_engine(settings)
    check_model(settings)
    token = read_token(settings.admin.token_file, path)
    calls_token = read_token(settings.orchestrator.token_file, path, ORCHESTRATOR_TOKEN)
    receivers = make_receivers(settings, path)
    loads = make_loads(settings)
    with _open_outbox(settings.store.path, log) as outbox:
        async with contextlib.AsyncExitStack() as stack:
            sessions = [await stack.enter_async_context(open_session(CHAIN_TIMEOUT)) for _ in settings.chain.urls]
            source = await make_chain(settings, outbox, sessions, log)
            made = compose(settings, outbox, source, receivers, loads, clock=SYSTEM, log=log)
            daemon = Daemon(made, path, notifier)
            daemon.reloader.heed()  # before the API can be asked, as whoever sees it may send SIGHUP
            if made.orchestrated is not None:
                served = OrchestratorApi(made.parts, made.orchestrated.jobs, lambda: str(uuid.uuid4()))
                url = await stack.enter_async_context(_orchestrator_api(served, settings.orchestrator, calls_token))
                log.info("orchestrators' API listens", action="orchestrator_listening", url=url)
            async with _api(AdminApi(made.parts, daemon.stop), settings.admin, token, log) as url:
                log.info("admin API listens", action="listening", url=url)
                await daemon.run()


@contextlib.contextmanager
def _open_outbox(path: Path, log: FilteringBoundLogger) -> Iterator[OutboxThread]:
    """Open the store while the context lasts, and say what a person has to know of its files."""
    outbox = OutboxThread(path, lambda why: log.warning("the store is waited for", action="store_wait", cause=why))
    if exposed := exposure(path):
        log.warning("the store is open to every user", action="store_exposed", cause=exposed)
    for copy in copies(path):
        log.warning(
            "a store that was saved aside lies here: take it up with `pocd outbox restore`, or remove it",
            action="store_aside",
            file=str(copy),
        )
    try:
        yield outbox
    finally:
        outbox.close()
        place = outbox.view.place
        if place.saved:
            log.error("the store was not at its path and is saved aside", action="store_saved", remedy=place.remedy)


@contextlib.asynccontextmanager
async def _api(api: AdminApi, admin: AdminSettings, token: str | None, log: FilteringBoundLogger) -> AsyncIterator[str]:
    """Serve the admin API while the context lasts, and give its URL."""
    app = api.application(token)
    async with contextlib.AsyncExitStack() as stack:
        try:
            server = (
                listening_at(app, admin.socket, shutdown_timeout=2.0, told=partial(log.warning, action="api_socket"))
                if admin.socket
                else listening(app, admin.host, admin.port, shutdown_timeout=2.0)
            )
            url = await stack.enter_async_context(server)
        except OSError as error:
            where = str(admin.socket) if admin.socket else f"{admin.host}:{admin.port}"
            keys = "admin.socket" if admin.socket else "admin.host or admin.port"
            raise _cannot_listen("admin API", where, keys, error) from None
        yield url


@contextlib.asynccontextmanager
async def _orchestrator_api(
    api: OrchestratorApi, settings: OrchestratorSettings, token: str | None
) -> AsyncIterator[str]:
    """Serve the orchestrators' API while the context lasts, and give its URL."""
    assert settings.port is not None, "it is on"
    async with contextlib.AsyncExitStack() as stack:
        try:
            server = listening(api.application(token), settings.host, settings.port, shutdown_timeout=2.0)
            url = await stack.enter_async_context(server)
        except OSError as error:
            where, keys = f"{settings.host}:{settings.port}", "orchestrator.host or orchestrator.port"
            raise _cannot_listen("orchestrators' API", where, keys, error) from None
        yield url


def _cannot_listen(api: str, where: str, keys: str, error: OSError) -> EndedError:
    hint = "another program has the port" if error.errno == errno.EADDRINUSE and ":" in where else error.strerror
    return EndedError(exit_status(error), f"{api} cannot listen on {where}: {hint}; change {keys}")


class Daemon:
    """Runs the parts: starts them, waits until it is asked to stop, and stops them in order.

    Args:
        made: The parts.
        path: File of the configuration, which is read again at SIGHUP.
        notifier: Gets READY=1, STOPPING=1 and what there is to tell between them.

    Attributes:
        reloader: Reads the configuration again.
    """

    def __init__(self, made: Composition, path: Path, notifier: Notifier) -> None:
        self._made = made
        self._notifier = notifier
        self.reloader = Reloader(path, made.parts, made.batcher, notifier)
        self._log = made.parts.log
        self._reports = Reports(made.parts, made.changes, notifier)
        self._stop = asyncio.Event()
        self._signalled = False

    async def run(self) -> None:
        """Run everything until asked to stop, then stop it in order."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = self._start(group)
                await self._stop.wait()
                with crash_logged("stopping", self._log):
                    await self._shut_down(tasks)
        except BaseExceptionGroup as errors:
            raise _translate(first_error(errors)) from None
        finally:
            self._made.parts.cards.close()
            self._log.info("stopped", action="stopped", funnel=status.summary(self._made.parts))

    def stop(self) -> None:
        """Ask the daemon to stop; returns at once."""
        self._stop.set()

    def _start(self, group: asyncio.TaskGroup) -> dict[str, asyncio.Task[None]]:
        """Start everything; returns the tasks by their names."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._heed, number)
        parts = self._made.parts
        if not parts.receivers.configured:
            self._log.warning("no receiver is configured: proofs are kept until one is", action="no_receiver")
        parts.cards.start()
        return {name: start(group, name, work, self._log) for name, work in self._work().items()}

    def _work(self) -> dict[str, Coroutine[Any, Any, None]]:
        """Return what runs, by name; each runs until it is cancelled."""
        parts, asked, orchestrated = self._made.parts, self._made.parts.control.asked, self._made.orchestrated
        return {
            "deliveries": parts.receivers.run(asked.callback if asked else None),
            "chain": self._follow_chain(),
            "reloader": self.reloader.run(),
            "workers": parts.workers.run(),
            "batcher": self._made.batcher.run(),
            "keeper": self._made.keeper.run(),
            "validations": parts.validator.run(),
            **({"jobs": orchestrated.jobs.run(orchestrated.paired.ask)} if orchestrated else {}),
            **({"late": self._made.late.run()} if self._made.late else {}),
            **self._reports.work(),
        }

    async def _shut_down(self, tasks: dict[str, asyncio.Task[None]]) -> None:
        """Stop everything in order: what was found is stored first, then delivered as far as that goes in time."""
        self._log.info("stopping", action="stopping")
        self._notifier.stopping()
        await _cancel(tasks.pop("chain"), tasks.pop("reloader"))
        await self._made.parts.miner.close(FINISH_SECONDS)
        ended = {"workers", "validations", "jobs", "late", "batcher", "keeper"} & tasks.keys()
        await _cancel(*map(tasks.pop, ended))
        with contextlib.suppress(StoreUnavailableError):  # they are formed at the next start
            await self._made.batcher.form()
        await self._deliver_last()
        await _cancel(*tasks.values())

    def _heed(self, number: signal.Signals) -> None:
        """Stop in order at the first signal, and at once at the second: what is stored outlives that too."""
        if self._signalled:
            self._log.warning("ended at once by a second signal", action="forced", signal=number.name)
            logs.flush()
            os._exit(EXIT_SIGNALLED + number)  # workers end when their sockets close
        self._signalled = True
        self.stop()

    async def _follow_chain(self) -> None:
        parts = self._made.parts
        await parts.control.restore()
        if self._made.source is None:
            await asyncio.Event().wait()  # until cancelled
            return
        await follow(
            self._made.source,
            poll_interval=parts.settings.chain.poll_interval,
            on_head=self._on_head,
            on_problem=lambda problem: parts.events.publish("chain", problem=problem),
            health=parts.chain,
            log=self._log,
            clock=parts.clock,
            jitter=jitter,
        )

    async def _on_head(self, head: Head) -> None:
        self._reports.head(head.block)
        if self._made.scheduler is not None:
            await self._made.scheduler.on_head(head)

    async def _deliver_last(self) -> None:
        """Give the receivers a few seconds for the last batches; the others stay in the store."""
        try:
            async with asyncio.timeout(DELIVER_SECONDS):
                for dispatcher in self._made.parts.receivers:
                    await dispatcher.settled.wait()
        except TimeoutError:
            self._log.info("deliveries go on at the next start", action="delivery_deadline")


async def _cancel(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def _translate(error: BaseException) -> BaseException:
    if isinstance(error, WorkerRefusedError):
        return EndedError(EXIT_NO_DEVICE if error.cause is Cause.DEVICE else EXIT_CONFIG, str(error))
    return error
