"""The daemon's parts, made from its settings: every part is made here, and none is run."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pocd.admin.parts import Parts
from pocd.chain.failover import Failover
from pocd.chain.make import confirmations_of, make_sources
from pocd.chain.rpc import Rpc
from pocd.clock import SYSTEM, SteadyClock
from pocd.config.secrets import read_keys
from pocd.config.settings import ConfigError
from pocd.config.types import CALLBACK_PREFIX, MOST_DEVICES
from pocd.daemon.rounds import make_late, make_scheduler, withdraws
from pocd.delivery.batcher import Batcher
from pocd.delivery.dispatcher import Dispatcher
from pocd.delivery.keeper import MIB, Keeper, StoreLimits
from pocd.delivery.policy import LONGEST_WAIT
from pocd.delivery.posting import Receiver
from pocd.delivery.receivers import Receivers
from pocd.mining.control import Control
from pocd.mining.follower import ChainHealth
from pocd.mining.miner import Miner
from pocd.observe.changes import Changes
from pocd.observe.events import Events
from pocd.pool.cards import Cards, NoDriverError, list_cards
from pocd.pool.cluster import Cluster
from pocd.pool.limits import WorkerLimits
from pocd.pool.placement import NoDeviceError, name_cards, place
from pocd.pool.pool import Pool, cache_folder
from pocd.process import EXIT_NO_DEVICE, EndedError
from pocd.protocol.names import largest_batch_size
from pocd.protocol.nonces import Node
from pocd.protocol.schemes import LIVE_SCHEME
from pocd.store.rounds import recent_rounds
from pocd.validation.jobs import Jobs
from pocd.validation.paired import Paired
from pocd.validation.queue import Validator
from pocd.worker.messages import Load

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import aiohttp
    from structlog.typing import FilteringBoundLogger

    from pocd.chain.source import ChainSource
    from pocd.clock import Clock
    from pocd.config.settings import Settings
    from pocd.delivery.late import LateArtifacts
    from pocd.mining.epochs import EpochScheduler, EpochWatcher
    from pocd.mining.scheduler import RoundScheduler
    from pocd.protocol.names import ChainKind
    from pocd.protocol.proof import Round
    from pocd.store.thread import OutboxThread

WINDOW_SECONDS = 5.0  # between two attempts to deliver what the live network takes for minutes only
KNOWN_ROUNDS = 256  # whose block hashes are held against what nodes say after a restart


@dataclass(frozen=True, slots=True)
class Orchestrated:
    """What runs where rounds come from an orchestrator.

    Attributes:
        jobs: Does what is asked for by a list of nonces.
        paired: Has what jobs have judged judged by differences too.
    """

    jobs: Jobs
    paired: Paired


@dataclass(frozen=True, slots=True)
class Composition:
    """Everything that the daemon runs.

    Attributes:
        parts: The parts that the admin API reads and calls.
        changes: Notices of what changed, for the reports.
        source: The chain; None where a proof engine has none.
        scheduler: Decides which round the chain wants at each head; where rounds come from an orchestrator it tells the
            epoch only, or is None.
        batcher: Forms batches of what was found.
        keeper: Keeps the store small, and mining within what the disk can take.
        late: Sets aside what a round of the live network found and nobody took in time; None where what was found is
            kept.
        orchestrated: What runs for an orchestrator only; None where rounds come from the chain.
    """

    parts: Parts
    changes: Changes
    source: ChainSource | None
    scheduler: RoundScheduler | EpochScheduler | EpochWatcher | None
    batcher: Batcher
    keeper: Keeper
    late: LateArtifacts | None
    orchestrated: Orchestrated | None


def jitter() -> float:
    """Return a number in [-1, 1]: by it hosts that would do the same at the same moment do not."""
    return random.uniform(-1, 1)  # noqa: S311 - it spreads load, it hides nothing


def compose(
    settings: Settings,
    outbox: OutboxThread,
    source: Failover | None,
    receivers: Sequence[Receiver],
    loads: Sequence[Load],
    *,
    clock: Clock,
    log: FilteringBoundLogger,
) -> Composition:
    """Make the daemon's parts, over a store and a chain that are there already.

    Args:
        settings: The whole configuration.
        outbox: The open store.
        source: The chain; None where a proof engine has none.
        receivers: Receivers of the configuration, see `make_receivers`.
        loads: One for each worker, see `make_loads`.
        clock: The time, for all parts; they see a jump of its wall clock when the store's times are moved.
        log: The logger, for all parts.
    """
    steady = SteadyClock(clock)
    events = Events(steady)
    node = Node(settings.node.node_id, settings.node.node_count)
    changes = Changes()
    miner = Miner(outbox, changes, clock=steady)
    control = Control(miner, outbox, node, runs=runs(settings), clock=steady, log=log, events=events)
    limits = WorkerLimits(batch=settings.worker.batch_timeout)
    cache = cache_folder(settings)
    workers = Pool(
        loads,
        miner,
        limits,
        cache=cache,
        changes=changes,
        clock=steady,
        log=log,
        events=events,
        cluster=make_cluster(settings, changes, log),
    )
    served = make_delivery(settings, receivers, outbox, miner, clock=steady, log=log, events=events)
    jobs = None
    if settings.orchestrator.is_on:
        jobs = Jobs(outbox, workers, served, lambda: control.mode, changes, clock=steady, log=log)
    validator = Validator(
        outbox,
        workers,
        served,
        most=settings.validation.max_queued,
        clock=steady,
        log=log,
        events=events,
        until_free=jobs.until_idle if jobs else None,
    )
    known = outbox.view.chain
    parts = Parts(
        settings=settings,
        outbox=outbox,
        miner=miner,
        control=control,
        workers=workers,
        cards=Cards(workers.card_uuids, clock=steady, log=log),
        validator=validator,
        chain=ChainHealth(highest=known.height if known else 0, followed=bool(settings.chain.urls)),
        receivers=served,
        clock=steady,
        started_at=steady.monotonic(),
        log=log,
        events=events,
    )
    orchestrated = None
    if jobs is not None:
        paired = Paired(validator, workers, settings.validation, revision=settings.model.revision, log=log)
        orchestrated = Orchestrated(jobs, paired)
    return Composition(
        parts=parts,
        changes=changes,
        source=source,
        scheduler=make_scheduler(parts, source) if source else None,
        batcher=make_batcher(parts),
        keeper=make_keeper(parts, steady),
        late=make_late(parts),
        orchestrated=orchestrated,
    )


def make_cluster(settings: Settings, changes: Changes, log: FilteringBoundLogger) -> Cluster | None:
    """Return the cluster that workers come from; None where they are processes of this machine."""
    if settings.worker.engine == "local":
        return None
    gpus = 0 if settings.model.device == "cpu" else 1
    return Cluster(
        settings.ray,
        ranks=settings.model.parallel,
        gpus=gpus,
        environment=os.environ,
        changed=changes.notify,
        log=log,
    )


def runs(settings: Settings) -> dict[str, str | None]:
    """Return what decides a distance beside a round's block and key, by the key of the configuration."""
    return {
        "model.name": settings.model.name,
        "model.revision": settings.model.revision,
        "model.dtype": settings.model.dtype,
        "round.scheme": settings.round.scheme,
    }


def make_batcher(parts: Parts) -> Batcher:
    """Return what forms batches."""
    return Batcher(
        parts.miner,
        parts.outbox,
        parts.receivers,
        size=parts.settings.delivery.batch_nonces,
        age=parts.settings.delivery.batch_seconds,
        withdraw=withdraws(parts.settings),
        is_live=parts.settings.orchestrator.is_on,
        clock=parts.clock,
        jitter=jitter,
        events=parts.events,
    )


def make_keeper(parts: Parts, clock: SteadyClock) -> Keeper:
    """Return what keeps the store within its limits."""
    store, delivery = parts.settings.store, parts.settings.delivery
    limits = StoreLimits(
        keep_delivered=delivery.keep_delivered,
        expire_after=delivery.expire_after,
        size=store.size_limit_mib * MIB,
        free=store.free_space_mib * MIB,
    )
    return Keeper(store.path, parts.outbox, parts.miner, parts.receivers, limits=limits, clock=clock, log=parts.log)


def make_delivery(
    settings: Settings,
    receivers: Sequence[Receiver],
    outbox: OutboxThread,
    miner: Miner,
    *,
    clock: Clock,
    log: FilteringBoundLogger,
    events: Events,
) -> Receivers:
    """Return all receivers with their dispatchers: the configured ones, and callback URLs of allowed origins."""

    def make(receiver: Receiver) -> Dispatcher:
        by_epoch = settings.chain.kind == "gonka"
        hurries = receiver.name.startswith(CALLBACK_PREFIX) if settings.orchestrator.is_on else by_epoch
        return Dispatcher(
            receiver,
            outbox,
            expire_after=settings.delivery.expire_after,
            longest_wait=WINDOW_SECONDS if hurries else LONGEST_WAIT,
            clock=clock,
            jitter=jitter,
            log=log,
            events=events,
        )

    origins = settings.admin.callback_origins
    return Receivers(receivers, make, outbox, origins=origins, at_work=miner.rounds_at_work, log=log)


def make_receivers(settings: Settings, config: Path) -> list[Receiver]:
    """Return the receivers of the configuration in the file `config`, with their keys.

    Raises:
        ConfigError: A file of secrets cannot be used.
    """
    return [
        Receiver(each.name, each.url, read_keys(each.secret_file, config, each.name))
        for each in settings.delivery.receivers
    ]


async def make_chain(
    settings: Settings, outbox: OutboxThread, sessions: list[aiohttp.ClientSession], log: FilteringBoundLogger
) -> Failover | None:
    """Return the configured nodes, which stand in for one another; None where none is configured.

    Each node has its own HTTP session.

    Raises:
        ConfigError: The store belongs to another chain than the configured one.
    """
    chain, known = settings.chain, outbox.view.chain
    if not chain.urls:
        return None
    if known is not None and chain.id not in {None, known.chain_id}:
        raise ConfigError(
            f"chain.id is {chain.id}, but the store {settings.store.path} belongs to chain {known.chain_id}; "
            "another chain needs another store.path"
        )
    attempts = 1 if len(sessions) > 1 else 3  # with several nodes the next one is the second attempt
    nodes = [Rpc(session, url, attempts=attempts) for session, url in zip(sessions, chain.urls, strict=True)]
    rounds = await outbox(recent_rounds, KNOWN_ROUNDS)
    return Failover(
        make_sources(chain.kind, nodes, confirmations=confirmations_of(chain.kind, chain.confirmations)),
        chain_id=known.chain_id if known else chain.id,
        hashes=_hashes(chain.kind, rounds),
        highest=known.height if known else None,
        clock=SYSTEM,
        log=log,
    )


def _hashes(kind: ChainKind, rounds: Mapping[Round, bool]) -> dict[int, str]:
    """Return the known block hashes by height, from rounds and whether the block of each was replaced."""
    if kind == "gonka":  # a confirmation round's hash is not that of the block at its height
        return {}
    return {round_.block_height: round_.block_hash for round_, replaced in rounds.items() if not replaced}


def make_loads(settings: Settings) -> list[Load]:
    """Return for each worker its model and devices.

    Raises:
        EndedError: There are fewer GPUs than configured.
    """
    model, worker = settings.model, settings.worker
    if worker.engine == "ray":  # each machine names its own cards
        count = MOST_DEVICES if settings.ray.workers == "auto" else settings.ray.workers
        (devices,) = place("cpu" if model.device == "cpu" else "cuda", model.parallel, lambda: 0)
        return [_load(settings, devices, ())] * count
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        visible = list_cards(given) if given is not None or model.device == "auto" else None
        placed = place(model.device, model.parallel, lambda: len(visible or ()))
    except (NoDeviceError, NoDriverError) as error:
        raise EndedError(EXIT_NO_DEVICE, str(error)) from None
    return [_load(settings, devices, name_cards(devices, visible)) for devices in placed]


def _load(settings: Settings, devices: tuple[str, ...], cards: tuple[str, ...]) -> Load:
    """Return what a worker on these devices loads."""
    model, worker = settings.model, settings.worker
    return Load(
        model=model.name,
        dtype=model.dtype,
        devices=devices,
        cards=cards,
        scheme=LIVE_SCHEME if settings.orchestrator.is_on else settings.round.scheme,
        seq_len=settings.round.seq_len,
        batch_size=largest_batch_size(settings.round.seq_len) if worker.batch_size == "auto" else worker.batch_size,
        is_auto=worker.batch_size == "auto",
        revision=model.revision,
        compile=worker.compile,
        conditioning=worker.conditioning,
    )
