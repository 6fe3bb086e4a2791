"""The daemon's status: one view for the API, the metrics, the log and the service manager."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import astuple
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pocd import __version__
from pocd.admin.answers import (
    CardStatus,
    ControlStatus,
    Funnel,
    MachineStatus,
    NodeStatus,
    Problem,
    Rates,
    ReadyWorkersStatus,
    ReceiverStatus,
    RequestedRound,
    RoundingStatus,
    RoundStatus,
    SensorValues,
    Status,
    ValidationCounts,
    WorkersStatus,
    WorkerStatus,
)
from pocd.admin.chain import chain_status
from pocd.admin.text import progress
from pocd.mining.phases import Mode, state_of
from pocd.observe.mask import mask_url
from pocd.pool.causes import Cause
from pocd.protocol.proof import Proofs
from pocd.protocol.schemes import SCHEMES
from pocd.store.callbacks import ENDED
from pocd.store.outbox import Queue, ReceiverState, Totals

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pocd.admin.parts import Parts
    from pocd.delivery.dispatcher import Dispatcher
    from pocd.mining.control import Control
    from pocd.mining.miner import Miner, Mining
    from pocd.mining.phases import DaemonState
    from pocd.pool.cards import CardReading, Cards
    from pocd.pool.pool import Pool
    from pocd.pool.processes import Place
    from pocd.pool.state import WorkerState
    from pocd.protocol.conditioning import Conditioning
    from pocd.protocol.proof import Round
    from pocd.worker.messages import CardIdentity, Ready


STALLED_SECONDS = 60.0  # without a nonce, after which a daemon that mines is not ready


def state(parts: Parts) -> DaemonState:
    """Return what the daemon is doing, in one word."""
    miner = parts.miner
    ready, mining = parts.workers.ready.is_set(), miner.current is not None and not miner.is_done
    return state_of(parts.control.mode, ready=ready, mining=mining)


def problems(parts: Parts) -> list[Problem]:
    """List the problems that keep the daemon from mining."""
    found = []
    if parts.control.mode is Mode.STOPPED:
        by_hand = "mining was stopped by hand; POST /api/v1/pow/resume goes on"
        found.append(Problem(part="miner", reason=parts.control.foreign or by_hand))
    if not parts.workers.ready.is_set():
        found += _cluster(parts.workers)
        found += [
            Problem(part=worker_name(parts.workers, worker), reason=why_not_ready(worker))
            for worker in parts.workers.workers
        ]
    if parts.miner.held:
        found.append(Problem(part="store", reason=parts.miner.held))
    if parts.miner.is_done and parts.miner.mining:
        scheme = SCHEMES[parts.miner.mining.round.scheme]
        reason = (
            f"scheme {scheme.name!r} has no nonce above {scheme.largest_nonce}, and all of this node's are checked, or "
            "gave no result; mining goes on with the next round"
        )
        found.append(Problem(part="miner", reason=reason))
    if _is_stalled(parts):
        reason = (
            f"no nonce was computed for {STALLED_SECONDS:.0f} s or more; the worker's device hangs or is far too slow"
        )
        found.append(Problem(part="miner", reason=reason))
    chain = parts.chain.problem(parts.clock.wall(), parts.settings.chain.poll_interval)
    if chain and parts.control.mode is Mode.FOLLOWING:  # else nothing waits for the chain
        found.append(Problem(part="chain", reason=chain))
    if parts.chain.epoch and parts.chain.epoch.refused and parts.control.mode is Mode.FOLLOWING:
        found.append(Problem(part="chain", reason=parts.chain.epoch.refused))
    return found


def _is_stalled(parts: Parts) -> bool:
    """Tell whether a round is mined with a model that is ready, and yet nothing was computed for a while."""
    mining = parts.miner.mining
    return (
        state(parts) == "GENERATING"
        and mining is not None
        and parts.clock.monotonic() - mining.started_at >= STALLED_SECONDS
        and parts.miner.checked_rate.per_second(STALLED_SECONDS) == 0
    )


def alarms(parts: Parts) -> list[Problem]:
    """List the problems that only a person can solve, though mining goes on."""
    workers = [
        Problem(part=worker_name(parts.workers, worker), reason=reason)
        for worker in parts.workers.workers
        for reason in (worker.alarm, worker.rounding_alarm)
        if reason
    ]
    cards = [Problem(part="cards", reason=parts.cards.problem)] if parts.cards.problem else []
    return [*_cluster(parts.workers), *workers, *cards] + [
        Problem(part=f"receiver {dispatcher.receiver.name}", reason=reason)
        for dispatcher in parts.receivers
        if (reason := dispatcher.alarm or parked(dispatcher.state))
    ]


def _cluster(workers: Pool) -> list[Problem]:
    """List why the cluster that workers come from has no room for all of them."""
    reason = workers.cluster.problem if workers.cluster else None
    return [Problem(part="cluster", reason=reason)] if reason else []


def worker_name(workers: Pool, worker: WorkerState) -> str:
    """Return what a worker is called among `problems` and `alarms`."""
    return "worker" if len(workers.workers) == 1 else f"worker {worker.number} ({_where(worker)})"


def _where(worker: WorkerState) -> str:
    """Return a worker's device, and the machine of a cluster that it is on."""
    return f"{worker.device} on {worker.place.node}" if worker.place else worker.device


def why_not_ready(worker: WorkerState) -> str:
    """Return the stage of a worker that is not ready, and why it ended last."""
    if worker.last_error is None:
        return worker.stage or "starting"
    return f"no model is ready ({worker.stage or 'waiting to be started again'}); last error: {worker.last_error}"


def parked(state: ReceiverState) -> str | None:
    """Return the text for a receiver that asked for no more batches; None for any other."""
    if state.parked_at is None:
        return None
    since = datetime.fromtimestamp(state.parked_at, UTC).isoformat(timespec="seconds")
    return f"parked since {since} ({state.error}); `pocd outbox retry` asks it again"


def _fields(value: Totals | Queue | Round | Ready | Conditioning | CardReading | CardIdentity) -> dict[str, Any]:
    """Return a flat dataclass as a dictionary. `asdict` copies deeply, which is most of what a status would cost."""
    return {name: getattr(value, name) for name in value.__slots__}


def _round(mining: Mining) -> RoundStatus:
    return RoundStatus(
        **_fields(mining.round),
        id=mining.round.id,
        node_id=mining.node.id,
        node_count=mining.node.count,
        checked=mining.checked,
        valid=mining.valid,
        expected_valid_rate=mining.expected_valid_rate,
        observed_valid_rate=mining.valid / mining.checked if mining.checked else None,
    )


def _workers(workers: Pool, miner: Miner) -> WorkersStatus:
    """Return all workers together: the first one's details, counts of all, and the last error."""
    first = workers.workers[0]
    counts: dict[str, Any] = {
        "ready": workers.ready.is_set(),
        "stage": first.stage,
        "pid": first.pids[0] if first.pids else None,
        "restarts": workers.restarts,
        "last_error": workers.last_error,
        "batch_size": workers.batch_size,
        "refused_batches": miner.refused_batches,
        "non_finite_nonces": miner.non_finite,
        "last_refusal": next((each.last_refusal for each in workers.workers if each.last_refusal), None),
    }
    if workers.info is None:
        return WorkersStatus(**counts)
    return ReadyWorkersStatus(**_fields(workers.info) | counts)


def _worker(parts: Parts, worker: WorkerState) -> WorkerStatus:
    measured = worker.info.conditioning if worker.info else None
    return WorkerStatus(
        number=worker.number,
        device=worker.device,
        ready=worker.ready,
        stage=worker.stage,
        node=worker.place.node if worker.place else None,
        address=worker.place.address if worker.place else None,
        pids=worker.pids,
        restarts=sum(worker.causes.values()),
        causes={cause: worker.causes[cause] for cause in Cause},
        last_error=worker.last_error,
        alarm=worker.alarm,
        batch_size=worker.batch_size,
        execution=worker.info.execution if worker.info else None,
        execution_reason=worker.info.execution_reason if worker.info else None,
        computed_per_second_1m=worker.computed_rate.per_second(60),
        computed_per_second_15m=worker.computed_rate.per_second(900),
        cards=[_card(parts.cards, device, card) for device, card in worker.cards.items()],
        rounding=RoundingStatus(**_fields(measured), alarm=measured.alarm) if measured else None,
    )


def machines(workers: Iterable[WorkerState]) -> list[MachineStatus]:
    """Return the machines of a cluster that workers are on now, each with the sum of its workers' rates."""
    found: defaultdict[Place, list[WorkerState]] = defaultdict(list)
    for worker in workers:
        if worker.place:
            found[worker.place].append(worker)
    return [
        MachineStatus(
            node=place.node,
            address=place.address,
            workers=len(there),
            ready=sum(worker.ready for worker in there),
            computed_per_second_1m=sum(worker.computed_rate.per_second(60) for worker in there),
            computed_per_second_15m=sum(worker.computed_rate.per_second(900) for worker in there),
        )
        for place, there in sorted(found.items(), key=lambda each: (each[0].node, each[0].address))
    ]


def _card(cards: Cards, device: str, card: CardIdentity) -> CardStatus:
    reading = cards.reading(card.uuid)
    return CardStatus(device=device, **_fields(card), reading=SensorValues(**_fields(reading)) if reading else None)


def _control(control: Control) -> ControlStatus:
    asked = control.asked
    if asked is None:
        return ControlStatus(mode=control.mode, asked=None)
    requested = RequestedRound(
        block_hash=asked.round.block_hash,
        block_height=asked.round.block_height,
        fraud_threshold=asked.fraud_threshold,
        callback=asked.callback,
    )
    return ControlStatus(mode=control.mode, asked=requested)


def _receiver(
    name: str, dispatcher: Dispatcher | None, queue: Queue, state: ReceiverState, now: float
) -> ReceiverStatus:
    return ReceiverStatus(
        name=name,
        url=mask_url(dispatcher.receiver.url) if dispatcher else None,
        **_fields(queue),
        last_error=state.error,
        failures_in_a_row=state.failures,
        next_attempt_seconds=max(0.0, state.next_at - now) if state.failures and dispatcher else None,
        parked=state.parked_at is not None,
        alarm=(dispatcher.alarm if dispatcher else None) or parked(state),
    )


def receivers(parts: Parts) -> list[ReceiverStatus]:
    """Return each receiver's queue and health; also of others that have batches left, and what the rest got in all."""
    queues, states, now = parts.outbox.view.queues, parts.outbox.view.receivers, parts.clock.wall()
    found = [
        _receiver(each.receiver.name, each, queues.get(each.receiver.name, Queue()), each.state, now)
        for each in parts.receivers
    ]
    served = {dispatcher.receiver.name for dispatcher in parts.receivers}
    others = {name: queue for name, queue in queues.items() if name not in served}
    found += [
        _receiver(name, None, queue, states.get(name, ReceiverState()), now)
        for name, queue in others.items()
        if _holds_batches(queue)
    ]
    ended = [astuple(queue) for queue in others.values() if not _holds_batches(queue)]
    total = Queue(*map(sum, zip(*ended, strict=True)))
    return [*found, _receiver(ENDED, None, total, ReceiverState(), now)] if ended else found


def _holds_batches(queue: Queue) -> bool:
    """Tell whether a batch waits, or was set aside and can be sent again."""
    return bool(queue.pending_batches or queue.dead_batches or queue.expired_batches or queue.withdrawn_batches)


def view(parts: Parts) -> Status:
    """Return the body of `GET /api/v1/pow/status`.

    The fields before `round` are those of the existing API and describe the active round. `funnel` counts
    nonces since the store was made; each stage is on disk or was accepted by every receiver.
    """
    miner, settings = parts.miner, parts.settings
    mining = miner.mining
    now, monotonic = parts.clock.wall(), parts.clock.monotonic()
    elapsed = monotonic - mining.started_at if mining else 0.0
    latest = mining.latest if mining else Proofs()
    now_state = state(parts)
    return Status(
        state=now_state,
        status=now_state,
        is_model_initialized=parts.workers.ready.is_set(),
        valid_nonces=list(latest.nonces),
        valid_distances=list(latest.distances) if mining and mining.round.output == "distance" else [],
        total_checked=mining.checked if mining else 0,
        total_valid=mining.valid if mining else 0,
        elapsed_seconds=elapsed,
        rate_per_second=(mining.checked - mining.checked_before) / elapsed if mining and elapsed else 0.0,
        r_target=mining.round.r_target if mining else settings.round.target,
        round=_round(mining) if mining else None,
        control=_control(parts.control),
        node=NodeStatus(role=settings.role, models=settings.names_of_model, **settings.node.model_dump()),
        funnel=Funnel(**_fields(parts.outbox.view.totals)),
        rates=Rates(
            checked_per_second_1m=miner.checked_rate.per_second(60),
            checked_per_second_15m=miner.checked_rate.per_second(900),
            valid_per_second_1m=miner.valid_rate.per_second(60),
            valid_per_second_15m=miner.valid_rate.per_second(900),
        ),
        validations=ValidationCounts(**parts.validator.results),
        chain=chain_status(parts.chain, parts.chain.problem(now, settings.chain.poll_interval)),
        worker=_workers(parts.workers, miner),
        workers=[_worker(parts, worker) for worker in parts.workers.workers],
        machines=machines(parts.workers.workers),
        receivers=receivers(parts),
        problems=problems(parts),
        alarms=alarms(parts),
        version=__version__,
        uptime_seconds=monotonic - parts.started_at,
    )


def summary(parts: Parts) -> str:
    """Return the funnel as one short line."""
    totals, now = parts.outbox.view.totals, str(state(parts))
    if now == "LOADING":
        stages = {worker.stage for worker in parts.workers.workers} - {None}
        now += f" ({', '.join(sorted(map(str, stages)))})" if stages else ""
    mining = parts.miner.mining
    height = mining.round.block_height if mining else None
    return progress(now, height, parts.miner.checked_rate.per_second(60), _fields(totals))
