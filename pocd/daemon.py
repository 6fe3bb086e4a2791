"""The composition root: makes the parts, runs them, and stops them in order."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import signal
import sqlite3
import time
from typing import TYPE_CHECKING

from pocd.admin import status
from pocd.admin.server import AdminApi
from pocd.admin.status import Parts
from pocd.chain.cometbft import CometBFT
from pocd.chain.failover import Failover
from pocd.chain.follower import ChainHealth, follow
from pocd.compute.names import AUTO_BATCH_SIZE
from pocd.delivery.dispatcher import Batcher, Dispatcher, Receiver, open_session
from pocd.delivery.outbox import OutboxThread
from pocd.delivery.signing import SecretError, WebhookKeys
from pocd.delivery.store import StoreError
from pocd.exits import EXIT_CONFIG, EXIT_CRASH, EXIT_NO_DEVICE, EndedError
from pocd.miner import Miner
from pocd.nonces import Node
from pocd.proof import Round
from pocd.rounds import RoundPolicy, active_start
from pocd.serving import listening
from pocd.settings import ConfigError, check_model
from pocd.worker.messages import Load
from pocd.worker.supervisor import Limits, Supervisor, WorkerRefusedError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine
    from pathlib import Path
    from typing import Any

    import aiohttp
    from structlog.typing import FilteringBoundLogger

    from pocd.chain.source import ChainSource, Head
    from pocd.observe.notify import Notifier
    from pocd.settings import Settings

FINISH_SECONDS = 5.0  # for the batches being computed, when stopping
DELIVER_SECONDS = 5.0  # for the last deliveries
REPORT_SECONDS = 60.0  # between two log lines with the funnel
STATUS_SECONDS = 10.0  # between two STATUS= lines to the service manager


async def run(settings: Settings, *, log: FilteringBoundLogger, notifier: Notifier) -> None:
    """Run the daemon until SIGTERM, SIGINT or `POST /shutdown`.

    Raises:
        ConfigError: A file, the store or the address that the settings name cannot be used.
        EndedError: The worker cannot work on this machine, or as configured.
    """
    check_model(settings)
    token = read_token(settings.admin.token_file)
    receivers = _receivers(settings)
    try:
        outbox = OutboxThread(settings.store.path)
    except StoreError as error:
        raise ConfigError(str(error)) from error
    with contextlib.closing(outbox):
        async with open_session() as session:
            daemon = Daemon(settings, outbox, session, receivers, log=log, notifier=notifier)
            async with _api(daemon, token):
                await daemon.run()


def read_token(path: Path | None) -> str | None:
    """Read the admin API's token.

    Raises:
        ConfigError: The file cannot be read or holds nothing.
    """
    if path is None:
        return None
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"admin.token_file {path} cannot be read: {error}") from None
    if not token or not token.isascii():
        raise ConfigError(f"admin.token_file {path} must hold one token of ASCII characters")
    return token


def _receivers(settings: Settings) -> list[Receiver]:
    made = []
    for receiver in settings.delivery.receivers:
        try:
            keys = WebhookKeys.from_file(receiver.secret_file) if receiver.secret_file else None
        except SecretError as error:
            raise ConfigError(f"delivery.receivers, {receiver.name}: {error}") from None
        made.append(Receiver(receiver.name, receiver.url, keys))
    return made


@contextlib.asynccontextmanager
async def _api(daemon: Daemon, token: str | None) -> AsyncIterator[None]:
    """Serve the admin API while the context lasts."""
    admin = daemon.settings.admin
    app = AdminApi(daemon.parts, daemon.shut_down).application(token)
    async with contextlib.AsyncExitStack() as stack:
        try:
            url = await stack.enter_async_context(listening(app, admin.host, admin.port, shutdown_timeout=2.0))
        except OSError as error:
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
        session: aiohttp.ClientSession,
        receivers: list[Receiver],
        *,
        log: FilteringBoundLogger,
        notifier: Notifier,
    ) -> None:
        self.settings = settings
        self.log = log
        self._notifier = notifier
        self._stop = asyncio.Event()
        round_ = settings.round
        self._policy = RoundPolicy(round_.every, round_.offset, round_.duration)
        self._source: ChainSource = Failover([CometBFT(session, url) for url in settings.chain.urls])
        node = Node(settings.node.node_id, settings.node.node_count)
        miner = Miner(outbox, node, paused=outbox.outbox.paused, clock=time.monotonic, wall=time.time)
        start = AUTO_BATCH_SIZE[settings.model.device.partition(":")[0]]
        load = Load(
            model=settings.model.name,
            dtype=settings.model.dtype,
            device=settings.model.device,
            scheme=round_.scheme,
            seq_len=round_.seq_len,
            batch_size=start if settings.worker.batch_size == "auto" else settings.worker.batch_size,
            shrink=settings.worker.batch_size == "auto",
            revision=settings.model.revision,
        )
        supervisor = Supervisor(load, miner, Limits(batch=settings.worker.batch_timeout), clock=time.monotonic, log=log)
        dispatchers = [
            Dispatcher(receiver, outbox, session, wall=time.time, jitter=lambda: random.uniform(-1, 1), log=log)  # noqa: S311 - it spreads load, it hides nothing
            for receiver in receivers
        ]
        self._batcher = Batcher(
            miner,
            outbox,
            dispatchers,
            size=settings.delivery.batch_nonces,
            age=settings.delivery.batch_seconds,
            wall=time.time,
        )
        self.parts = Parts(settings, outbox, miner, supervisor, ChainHealth(), dispatchers, time.monotonic())

    def shut_down(self) -> None:
        """Ask the daemon to stop; returns at once."""
        self._stop.set()

    async def run(self) -> None:
        """Run everything until asked to stop, then stop it in order."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.shut_down)
        parts = self.parts
        if not parts.dispatchers:
            self.log.warning("no receiver is configured: proofs are kept until one is", action="no_receiver")
        try:
            async with asyncio.TaskGroup() as group:
                chain = group.create_task(self._follow_chain())
                worker = group.create_task(parts.supervisor.run())
                batcher = group.create_task(self._batcher.run())
                deliveries = [group.create_task(dispatcher.run()) for dispatcher in parts.dispatchers]
                reports = [group.create_task(part) for part in self._reports()]

                await self._stop.wait()
                self.log.info("stopping", action="stopping")
                self._notifier.stopping()
                await _cancel(chain)
                await parts.miner.close(FINISH_SECONDS)
                await _cancel(worker, batcher)
                await self._batcher.form()
                await self._deliver_last()
                await _cancel(*deliveries, *reports)
        except BaseExceptionGroup as errors:
            raise _translate(errors.exceptions[0]) from None  # the first is the cause, the others were cancelled
        finally:
            self.log.info("stopped", action="stopped", funnel=status.summary(parts))

    async def _follow_chain(self) -> None:
        await follow(
            self._source,
            poll_interval=self.settings.chain.poll_interval,
            on_head=self._on_head,
            health=self.parts.chain,
            log=self.log,
        )

    async def _on_head(self, head: Head) -> None:
        """Mine the round that should be active at `head`."""
        miner = self.parts.miner
        start = active_start(head.block.height, self._policy)
        mined = miner.mining.round.block_height if miner.mining else None
        if start == mined:
            return
        if start is None:
            self.log.info("no round is active", action="round_end", height=head.block.height)
            await miner.set_round(None)
            return
        if mined is not None and start < mined:
            self.log.warning("head went back, round kept", action="head_back", height=head.block.height, round=mined)
            return
        block = head.block if start == head.block.height else await self._source.block(start)
        settings = self.settings
        round_ = Round(
            block_hash=block.hash,
            block_height=block.height,
            public_key=settings.node.public_key,
            r_target=settings.round.r_target,
            scheme=settings.round.scheme,
            model=settings.model.name,
            seq_len=settings.round.seq_len,
        )
        await miner.set_round(round_)
        self.log.info("round begins", action="round_begin", height=start, block_hash=block.hash, round=round_.id)

    def _reports(self) -> list[Coroutine[Any, Any, None]]:
        reports = [self._announce_ready(), self._report_status(), self._log_funnel()]
        return [*reports, self._feed_watchdog()] if self._notifier.watchdog_seconds else reports

    async def _announce_ready(self) -> None:
        self._notifier.status("loading the model")
        await self.parts.supervisor.ready.wait()
        self._notifier.ready()

    async def _report_status(self) -> None:
        while True:
            await asyncio.sleep(STATUS_SECONDS)
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

    async def _feed_watchdog(self) -> None:
        assert self._notifier.watchdog_seconds
        while True:
            self._notifier.alive()
            await asyncio.sleep(self._notifier.watchdog_seconds / 2)

    async def _deliver_last(self) -> None:
        """Give the receivers a moment for what is left; what they do not take stays in the store."""
        try:
            async with asyncio.timeout(DELIVER_SECONDS):
                for dispatcher in self.parts.dispatchers:
                    await dispatcher.settled.wait()
        except TimeoutError:
            self.log.info("deliveries go on at the next start", action="delivery_deadline")


async def _cancel(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def _translate(error: BaseException) -> BaseException:
    if isinstance(error, WorkerRefusedError):
        return EndedError(EXIT_NO_DEVICE if error.kind == "device" else EXIT_CONFIG, str(error))
    if isinstance(error, sqlite3.Error):
        return EndedError(
            EXIT_CRASH, f"the store failed: {error}; nothing stored is lost, check the disk and start again"
        )
    return error
