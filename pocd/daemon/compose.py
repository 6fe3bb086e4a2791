"""The daemon's parts, made from its settings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pocd.chain.failover import Failover
from pocd.chain.make import confirmations_of, make_sources
from pocd.chain.rpc import Rpc
from pocd.clock import SYSTEM
from pocd.config.settings import ConfigError
from pocd.delivery.posting import Receiver
from pocd.http.webhooks import SecretError, WebhookKeys
from pocd.pool.cards import NoDriverError, count
from pocd.pool.placement import NoDeviceError, place
from pocd.process import EXIT_NO_DEVICE, EndedError
from pocd.protocol.names import AUTO_BATCH_SIZE
from pocd.store.outbox import Outbox
from pocd.worker.messages import Load

if TYPE_CHECKING:
    import aiohttp
    from structlog.typing import FilteringBoundLogger

    from pocd.config.settings import Settings
    from pocd.store.thread import OutboxThread

KNOWN_ROUNDS = 256  # whose block hashes are held against what nodes say after a restart


def make_receivers(settings: Settings) -> list[Receiver]:
    """Return the configured receivers with their keys.

    Raises:
        ConfigError: A file of secrets cannot be used.
    """
    made = []
    for receiver in settings.delivery.receivers:
        try:
            keys = WebhookKeys.from_file(receiver.secret_file) if receiver.secret_file else None
        except SecretError as error:
            raise ConfigError(f"delivery.receivers, {receiver.name}: {error}") from None
        made.append(Receiver(receiver.name, receiver.url, keys))
    return made


async def make_chain(
    settings: Settings, outbox: OutboxThread, sessions: list[aiohttp.ClientSession], log: FilteringBoundLogger
) -> Failover:
    """Return the configured nodes, which stand in for one another; each has its own HTTP session.

    Raises:
        ConfigError: The store belongs to another chain than the configured one.
    """
    chain, known = settings.chain, outbox.view.chain
    if known is not None and chain.id not in {None, known.chain_id}:
        raise ConfigError(
            f"chain.id is {chain.id}, but the store {settings.store.path} belongs to chain {known.chain_id}; "
            "another chain needs another store.path"
        )
    attempts = 1 if len(sessions) > 1 else 3  # with several nodes the next one is the second attempt
    nodes = [Rpc(session, url, attempts=attempts) for session, url in zip(sessions, chain.urls, strict=True)]
    rounds = await outbox(Outbox.recent_rounds, KNOWN_ROUNDS)
    return Failover(
        make_sources(chain.kind, nodes, confirmations=confirmations_of(chain.kind, chain.confirmations)),
        chain_id=known.chain_id if known else chain.id,
        hashes={round_.block_height: round_.block_hash for round_ in rounds},
        highest=known.height if known else None,
        clock=SYSTEM,
        log=log,
    )


def make_loads(settings: Settings) -> list[Load]:
    """Return for each worker its model and devices.

    Raises:
        EndedError: There are fewer GPUs than configured.
    """
    model, worker = settings.model, settings.worker
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        placed = place(model.device, model.parallel, lambda: count(visible))
    except (NoDeviceError, NoDriverError) as error:
        raise EndedError(EXIT_NO_DEVICE, str(error)) from None
    return [
        Load(
            model=model.name,
            dtype=model.dtype,
            devices=devices,
            scheme=settings.round.scheme,
            seq_len=settings.round.seq_len,
            batch_size=AUTO_BATCH_SIZE[devices[0].partition(":")[0]]
            if worker.batch_size == "auto"
            else worker.batch_size,
            shrink=worker.batch_size == "auto",
            revision=model.revision,
            compile=worker.compile,
        )
        for devices in placed
    ]


def cache_folder(settings: Settings) -> Path:
    """Return the folder for compiled code: as configured, systemd's CacheDirectory=, or beside the store."""
    if settings.worker.cache is not None:
        return settings.worker.cache
    given = os.environ.get("CACHE_DIRECTORY", "").partition(":")[0]
    return Path(given) if given else settings.store.path.parent / "cache"
