"""The composition root: makes the parts, runs them, and stops them in order."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import signal
from functools import partial
from typing import TYPE_CHECKING

from pocd.admin import status
from pocd.admin.server import AdminApi
from pocd.admin.status import Parts
from pocd.chain.make import CHAIN_TIMEOUT
from pocd.clock import SYSTEM, Clock
from pocd.config.secrets import read_token
from pocd.config.settings import ConfigError, check_model
from pocd.daemon.compose import cache_folder, make_chain, make_loads, make_receivers
from pocd.daemon.reload import Reloader
from pocd.delivery.batcher import Batcher
from pocd.delivery.dispatcher import Dispatcher
from pocd.delivery.keeper import MIB, Keeper, StoreLimits
from pocd.delivery.receivers import Receivers
from pocd.http.client import open_session
from pocd.http.server import listening, listening_at
from pocd.mining.control import Control
from pocd.mining.follower import ChainHealth, follow
from pocd.mining.miner import Miner
from pocd.mining.scheduler import RoundScheduler
from pocd.observe.changes import Changes
from pocd.observe.events import Events
from pocd.pool.cards import Cards
from pocd.pool.causes import Cause, WorkerRefusedError
from pocd.pool.limits import WorkerLimits
from pocd.pool.pool import Pool
from pocd.process import EXIT_CONFIG, EXIT_NO_DEVICE, EndedError
from pocd.protocol.nonces import Node
from pocd.protocol.proof import Round
from pocd.protocol.rounds import RoundPolicy
from pocd.store.errors import StoreError, StoreUnavailableError
from pocd.store.thread import OutboxThread
from pocd.tasks import crash_logged, start
from pocd.validation.queue import Validator

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine
    from pathlib import Path
    from typing import Any

    from structlog.typing import FilteringBoundLogger

    from pocd.chain.source import Block, ChainSource, Head
    from pocd.config.settings import Settings
    from pocd.delivery.posting import Receiver
    from pocd.observe.notify import Notifier
    from pocd.worker.messages import Load

FINISH_SECONDS = 5.0  # for the batches being computed, when stopping
DELIVER_SECONDS = 5.0  # for the last deliveries
REPORT_SECONDS = 60.0  # between two log lines with the funnel
STATUS_SECONDS = 10.0  # between two STATUS= lines to the service manager


async def run(settings: Settings, path: Path, *, log: FilteringBoundLogger, notifier: Notifier) -> None:
    """Run the daemon until SIGTERM, SIGINT or `POST /shutdown`; at SIGHUP `path` is read again.

    Raises:
        ConfigError: A file, the store or the address that the settings name cannot be used.
        EndedError: The worker cannot work on this machine, or as configured.
    """
    check_model(settings)
    token = read_token(settings.admin.token_file)
    receivers = make_receivers(settings)
    loads = make_loads(settings)
    try:
        outbox = OutboxThread(settings.store.path)
    except StoreError as error:
        raise ConfigError(str(error)) from error
    with contextlib.closing(outbox):
        async with contextlib.AsyncExitStack() as stack:
            sessions = [await stack.enter_async_context(open_session(CHAIN_TIMEOUT)) for _ in settings.chain.urls]
            source = await make_chain(settings, outbox, sessions, log)
            daemon = Daemon(settings, outbox, source, receivers, loads, clock=SYSTEM, log=log, notifier=notifier)
            async with _api(daemon, token):
                await daemon.run(path)


@contextlib.asynccontextmanager
async def _api(daemon: Daemon, token: str | None) -> AsyncIterator[None]:
    """Serve the admin API while the context lasts."""
    admin = daemon.parts.settings.admin
    app = AdminApi(daemon.parts, daemon.shut_down).application(token)
    async with contextlib.AsyncExitStack() as stack:
        try:
            server = (
                listening_at(app, admin.socket, shutdown_timeout=2.0)
                if admin.socket
                else listening(app, admin.host, admin.port, shutdown_timeout=2.0)
            )
            url = await stack.enter_async_context(server)
        except OSError as error:
            if admin.socket:
                message = f"admin API cannot listen on {admin.socket}: {error.strerror}; change admin.socket"
                raise ConfigError(message) from None
            hint = "another program has the port" if error.errno == errno.EADDRINUSE else error.strerror
            raise ConfigError(
                f"admin API cannot listen on {admin.host}:{admin.port}: {hint}; change admin.host or admin.port"
            ) from None
        daemon.log.info("admin API listens", action="listening", url=url)
        yield


class Daemon:
    """All parts, and the order in which they start and stop."""

    def __init__(
        self,
        settings: Settings,
        outbox: OutboxThread,
        source: ChainSource,
        receivers: list[Receiver],
        loads: list[Load],
        *,
        clock: Clock,
        log: FilteringBoundLogger,
        notifier: Notifier,
    ) -> None:
        self.log = log
        self._notifier = notifier
        self._stop = asyncio.Event()
        self._clock = clock
        self._source = source
        self._newest_hash: str | None = None  # as it was published
        self.events = Events(clock)
        round_ = settings.round
        node = Node(settings.node.node_id, settings.node.node_count)
        events = self.events
        self._changes = Changes()
        miner = Miner(outbox, self._changes, clock=clock)
        control = Control(miner, outbox, node, clock=clock, log=log, events=events)
        withdraw = settings.chain.replaced_blocks != "deliver"
        self._scheduler = RoundScheduler(
            source,
            control,
            outbox,
            policy=RoundPolicy(round_.every, round_.offset, round_.duration),
            make_round=self._make_round,
            withdraw=withdraw,
            clock=clock,
            log=log,
        )
        workers = Pool(
            loads,
            miner,
            WorkerLimits(batch=settings.worker.batch_timeout),
            cache=cache_folder(settings),
            changes=self._changes,
            clock=clock,
            log=log,
            events=events,
        )
        cards = Cards(workers.card_uuids, clock=clock, log=log)
        delivery = settings.delivery
        dispatchers = Receivers(
            receivers,
            lambda receiver: Dispatcher(
                receiver,
                outbox,
                expire_after=delivery.expire_after,
                clock=clock,
                jitter=lambda: random.uniform(-1, 1),  # noqa: S311 - it spreads load, it hides nothing
                log=log,
                events=events,
            ),
            outbox,
            origins=settings.admin.callback_origins,
            log=log,
        )
        validator = Validator(
            outbox,
            workers,
            dispatchers,
            most=settings.validation.max_queued,
            clock=clock,
            log=log,
            events=events,
        )
        self._batcher = Batcher(
            miner,
            outbox,
            dispatchers,
            size=delivery.batch_nonces,
            age=delivery.batch_seconds,
            withdraw=withdraw,
            clock=clock,
            events=events,
        )
        limits = StoreLimits(
            keep_delivered=delivery.keep_delivered,
            expire_after=delivery.expire_after,
            size=settings.store.size_limit_mib * MIB,
            free=settings.store.free_space_mib * MIB,
        )
        self._keeper = Keeper(settings.store.path, outbox, miner, dispatchers, limits=limits, clock=clock, log=log)
        known = outbox.view.chain
        health = ChainHealth(highest=known.height if known else 0)
        self.parts = Parts(
            settings=settings,
            outbox=outbox,
            miner=miner,
            control=control,
            workers=workers,
            cards=cards,
            validator=validator,
            chain=health,
            receivers=dispatchers,
            clock=clock,
            started_at=clock.monotonic(),
            log=log,
            events=events,
        )

    def shut_down(self) -> None:
        """Ask the daemon to stop; returns at once."""
        self._stop.set()

    async def run(self, path: Path) -> None:
        """Run everything until asked to stop, then stop it in order; `path` is the file of the settings."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.shut_down)
        parts, asked = self.parts, self.parts.control.asked
        if not parts.receivers.names():
            self.log.warning("no receiver is configured: proofs are kept until one is", action="no_receiver")
        parts.cards.start()
        try:
            async with asyncio.TaskGroup() as group:
                begin = partial(start, group, log=self.log)
                deliveries = begin("deliveries", parts.receivers.run(asked.callback if asked else None))
                chain = begin("chain", self._follow_chain())
                reloader = begin("reloader", Reloader(path, parts, self._batcher, self._notifier).run())
                workers = begin("workers", parts.workers.run())
                batcher = begin("batcher", self._batcher.run())
                keeper = begin("keeper", self._keeper.run())
                validations = begin("validations", parts.validator.run())
                reports = [begin(name, report) for name, report in self._reports().items()]
                begin("readiness", self._announce_ready(), returns=True)

                await self._stop.wait()
                with crash_logged("stopping", self.log):
                    self.log.info("stopping", action="stopping")
                    self._notifier.stopping()
                    await _cancel(chain, reloader)
                    await parts.miner.close(FINISH_SECONDS)
                    await _cancel(workers, validations, batcher, keeper)
                    with contextlib.suppress(StoreUnavailableError):  # they are formed at the next start
                        await self._batcher.form()
                    await self._deliver_last()
                    await _cancel(deliveries, *reports)
        except BaseExceptionGroup as errors:
            raise _translate(errors.exceptions[0]) from None  # the first is the cause, the others were cancelled
        finally:
            parts.cards.close()
            self.log.info("stopped", action="stopped", funnel=status.summary(parts))

    async def _follow_chain(self) -> None:
        await self.parts.control.restore()
        await follow(
            self._source,
            poll_interval=self.parts.settings.chain.poll_interval,
            on_head=self._on_head,
            on_problem=lambda problem: self.events.publish("chain", problem=problem),
            health=self.parts.chain,
            log=self.log,
            clock=self._clock,
        )

    async def _on_head(self, head: Head) -> None:
        block = head.block
        if block.hash != self._newest_hash:
            self._newest_hash = block.hash
            self.events.publish("block", height=block.height, hash=block.hash, chain_id=block.chain_id)
        await self._scheduler.on_head(head)

    def _make_round(self, block: Block) -> Round:
        settings = self.parts.settings  # as they are now: r_target may change
        return Round(
            block_hash=block.hash,
            block_height=block.height,
            public_key=settings.node.public_key,
            r_target=settings.round.r_target,
            scheme=settings.round.scheme,
            model=settings.model.name,
            seq_len=settings.round.seq_len,
        )

    def _reports(self) -> dict[str, Coroutine[Any, Any, None]]:
        reports = {"status": self._report_status(), "funnel": self._log_funnel(), "states": self._tell_states()}
        return reports | ({"watchdog": self._feed_watchdog()} if self._notifier.watchdog_seconds else {})

    async def _announce_ready(self) -> None:
        await self.parts.workers.ready.wait()
        self._notifier.ready()

    async def _report_status(self) -> None:
        seen = 0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STATUS_SECONDS):
                    seen = await self._changes.after(seen)
            self._notifier.status(status.summary(self.parts))

    async def _log_funnel(self) -> None:
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            miner = self.parts.miner
            self.log.info(
                status.summary(self.parts),
                action="funnel",
                checked_per_second_1m=round(miner.checked_rate.per_second(60), 2),
                checked_per_second_15m=round(miner.checked_rate.per_second(900), 2),
                valid_per_second_1m=round(miner.valid_rate.per_second(60), 3),
                valid_per_second_15m=round(miner.valid_rate.per_second(900), 3),
            )

    async def _tell_states(self) -> None:
        """Publish each change of the daemon's state."""
        told, seen = None, 0
        while True:
            state = status.state(self.parts)
            if state != told:
                self.events.publish("state", state=state)
            told, seen = state, await self._changes.after(seen)

    async def _feed_watchdog(self) -> None:
        assert self._notifier.watchdog_seconds
        while True:
            self._notifier.alive()
            await asyncio.sleep(self._notifier.watchdog_seconds / 2)

    async def _deliver_last(self) -> None:
        """Give the receivers a few seconds for the last batches; the others stay in the store."""
        try:
            async with asyncio.timeout(DELIVER_SECONDS):
                for dispatcher in self.parts.receivers:
                    await dispatcher.settled.wait()
        except TimeoutError:
            self.log.info("deliveries go on at the next start", action="delivery_deadline")


async def _cancel(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def _translate(error: BaseException) -> BaseException:
    if isinstance(error, WorkerRefusedError):
        return EndedError(EXIT_NO_DEVICE if error.cause is Cause.DEVICE else EXIT_CONFIG, str(error))
    if isinstance(error, StoreError):
        return EndedError(EXIT_CONFIG, str(error))
    return error
