"""The daemon's status: one view for the API, the metrics, the log and the service manager."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pocd import __version__
from pocd.admin.text import progress
from pocd.mining.phases import Mode, state_of
from pocd.observe.mask import mask_url
from pocd.pool.causes import Cause
from pocd.store.outbox import Queue, ReceiverState, Totals

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from pocd.clock import Clock
    from pocd.config.settings import Settings
    from pocd.delivery.dispatcher import Dispatcher
    from pocd.delivery.receivers import Receivers
    from pocd.mining.control import Control
    from pocd.mining.follower import ChainHealth
    from pocd.mining.miner import Miner, Mining
    from pocd.mining.phases import DaemonState
    from pocd.observe.events import Events
    from pocd.pool.cards import CardReading, Cards
    from pocd.pool.pool import Pool
    from pocd.pool.state import WorkerState
    from pocd.protocol.proof import Round
    from pocd.store.thread import OutboxThread
    from pocd.validation.queue import Validator
    from pocd.worker.messages import CardIdentity, Ready


@dataclass(slots=True)
class Parts:
    """The daemon's parts that the API reads.

    Attributes:
        settings: Settings in effect; replaced as a whole when the configuration is read again.
    """

    settings: Settings
    outbox: OutboxThread
    miner: Miner
    control: Control
    workers: Pool
    cards: Cards
    validator: Validator
    chain: ChainHealth
    receivers: Receivers
    clock: Clock
    started_at: float  # monotonic
    log: FilteringBoundLogger
    events: Events


def state(parts: Parts) -> DaemonState:
    """Return what the daemon is doing, in one word."""
    ready, mining = parts.workers.ready.is_set(), parts.miner.current is not None
    return state_of(parts.control.mode, ready=ready, mining=mining)


def problems(parts: Parts) -> list[dict[str, str]]:
    """List the problems that keep the daemon from mining."""
    found = []
    if parts.control.mode is Mode.STOPPED:
        found.append({"part": "miner", "reason": "mining was stopped by hand; POST /api/v1/pow/resume goes on"})
    if not parts.workers.ready.is_set():
        found += [
            {"part": worker_name(parts.workers, worker), "reason": why_not_ready(worker)}
            for worker in parts.workers.workers
        ]
    if parts.miner.held:
        found.append({"part": "store", "reason": parts.miner.held})
    chain = parts.chain.problem(parts.clock.wall(), parts.settings.chain.poll_interval)
    if chain and parts.control.mode is Mode.FOLLOWING:  # else nothing waits for the chain
        found.append({"part": "chain", "reason": chain})
    return found


def alarms(parts: Parts) -> list[dict[str, str]]:
    """List the problems that only a person can solve, though mining goes on."""
    workers = [
        {"part": worker_name(parts.workers, worker), "reason": reason}
        for worker in parts.workers.workers
        if (reason := worker.alarm)
    ]
    cards = [{"part": "cards", "reason": parts.cards.problem}] if parts.cards.problem else []
    return [*workers, *cards] + [
        {"part": f"receiver {dispatcher.receiver.name}", "reason": reason}
        for dispatcher in parts.receivers
        if (reason := dispatcher.alarm or parked(dispatcher.state))
    ]


def worker_name(workers: Pool, worker: WorkerState) -> str:
    """Return what a worker is called among `problems` and `alarms`."""
    return "worker" if len(workers.workers) == 1 else f"worker {worker.number} ({worker.device})"


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


def _fields(value: Totals | Queue | Round | Ready | CardReading | CardIdentity) -> dict[str, Any]:
    """Return a flat dataclass as a dictionary. `asdict` copies deeply, which is most of what a status would cost."""
    return {name: getattr(value, name) for name in value.__slots__}


def _round_view(mining: Mining) -> dict[str, Any]:
    return {
        **_fields(mining.round),
        "id": mining.round.id,
        "node_id": mining.node.id,
        "node_count": mining.node.count,
        "checked": mining.checked,
        "valid": mining.valid,
        "expected_valid_rate": mining.expected_valid_rate,
        "observed_valid_rate": mining.valid / mining.checked if mining.checked else None,
    }


def _chain_view(chain: ChainHealth, problem: str | None) -> dict[str, Any]:
    block = chain.head.block if chain.head else None
    return {
        "chain_id": block.chain_id if block else None,
        "height": block.height if block else None,
        "hash": block.hash if block else None,
        "block_time": block.time.isoformat() if block else None,
        "problem": problem,
    }


def _workers_view(workers: Pool, miner: Miner) -> dict[str, Any]:
    """Return all workers together: the first one's details, counts of all, and the last error."""
    first = workers.workers[0]
    return {
        **({} if workers.info is None else _fields(workers.info)),
        "ready": workers.ready.is_set(),
        "stage": first.stage,
        "pid": first.pids[0] if first.pids else None,
        "restarts": workers.restarts,
        "last_error": workers.last_error,
        "batch_size": workers.batch_size,
        "refused_batches": miner.refused_batches,
        "last_refusal": next((each.last_refusal for each in workers.workers if each.last_refusal), None),
    }


def _worker_view(parts: Parts, worker: WorkerState) -> dict[str, Any]:
    return {
        "number": worker.number,
        "device": worker.device,
        "ready": worker.ready,
        "stage": worker.stage,
        "pids": worker.pids,
        "restarts": sum(worker.causes.values()),
        "causes": {cause.value: worker.causes[cause] for cause in Cause},
        "last_error": worker.last_error,
        "alarm": worker.alarm,
        "batch_size": worker.batch_size,
        "execution": worker.info.execution if worker.info else None,
        "execution_reason": worker.info.execution_reason if worker.info else None,
        "computed_per_second_1m": worker.computed_rate.per_second(60),
        "computed_per_second_15m": worker.computed_rate.per_second(900),
        "cards": [_card_view(parts.cards, device, card) for device, card in worker.cards.items()],
    }


def _card_view(cards: Cards, device: str, card: CardIdentity) -> dict[str, Any]:
    reading = cards.reading(card.uuid)
    return {"device": device, **_fields(card), "reading": _fields(reading) if reading else None}


def _control_view(control: Control) -> dict[str, Any]:
    asked = control.asked
    return {
        "mode": control.mode,
        "asked": None
        if asked is None
        else {
            "block_hash": asked.round.block_hash,
            "block_height": asked.round.block_height,
            "fraud_threshold": asked.fraud_threshold,
            "callback": asked.callback,
        },
    }


def _receiver_view(
    name: str, dispatcher: Dispatcher | None, queue: Queue, state: ReceiverState, now: float
) -> dict[str, Any]:
    return {
        "name": name,
        "url": mask_url(dispatcher.receiver.url) if dispatcher else None,
        **_fields(queue),
        "last_error": state.error,
        "failures_in_a_row": state.failures,
        "next_attempt_seconds": max(0.0, state.next_at - now) if state.failures and dispatcher else None,
        "parked": state.parked_at is not None,
        "alarm": (dispatcher.alarm if dispatcher else None) or parked(state),
    }


def receiver_views(parts: Parts) -> list[dict[str, Any]]:
    """Return each receiver's queue and health; also of receivers that are no longer configured."""
    queues, states, now = parts.outbox.view.queues, parts.outbox.view.receivers, parts.clock.wall()
    views = [
        _receiver_view(each.receiver.name, each, queues.get(each.receiver.name, Queue()), each.state, now)
        for each in parts.receivers
    ]
    served = {dispatcher.receiver.name for dispatcher in parts.receivers}
    return views + [
        _receiver_view(name, None, queue, states.get(name, ReceiverState()), now)
        for name, queue in queues.items()
        if name not in served
    ]


def view(parts: Parts) -> dict[str, Any]:
    """Return the body of `GET /api/v1/pow/status`.

    The fields before `round` are those of the existing API and describe the active round. `funnel` counts
    nonces since the store was made; each stage is on disk or was accepted by every receiver.
    """
    miner, settings = parts.miner, parts.settings
    mining = miner.mining
    now, monotonic = parts.clock.wall(), parts.clock.monotonic()
    elapsed = monotonic - mining.started_at if mining else 0.0
    latest = list(mining.latest) if mining else []
    ready, now_state = parts.workers.ready.is_set(), state(parts)
    return {
        "state": now_state,
        "status": now_state,  # as an earlier API called it, like the next one
        "is_model_initialized": ready,
        "valid_nonces": [proof.nonce for proof in latest],
        "valid_distances": [proof.distance for proof in latest],
        "total_checked": mining.checked if mining else 0,
        "total_valid": mining.valid if mining else 0,
        "elapsed_seconds": elapsed,
        "rate_per_second": (mining.checked - mining.checked_before) / elapsed if mining and elapsed else 0.0,
        "r_target": mining.round.r_target if mining else settings.round.r_target,
        "round": _round_view(mining) if mining else None,
        "control": _control_view(parts.control),
        "node": settings.node.model_dump(),
        "funnel": _fields(parts.outbox.view.totals),
        "rates": {
            "checked_per_second_1m": miner.checked_rate.per_second(60),
            "checked_per_second_15m": miner.checked_rate.per_second(900),
            "valid_per_second_1m": miner.valid_rate.per_second(60),
            "valid_per_second_15m": miner.valid_rate.per_second(900),
        },
        "chain": _chain_view(parts.chain, parts.chain.problem(now, settings.chain.poll_interval)),
        "worker": _workers_view(parts.workers, miner),
        "workers": [_worker_view(parts, worker) for worker in parts.workers.workers],
        "receivers": receiver_views(parts),
        "problems": problems(parts),
        "alarms": alarms(parts),
        "version": __version__,
        "uptime_seconds": monotonic - parts.started_at,
    }


def summary(parts: Parts) -> str:
    """Return the funnel as one short line."""
    totals, now = parts.outbox.view.totals, str(state(parts))
    if now == "LOADING":
        stages = {worker.stage for worker in parts.workers.workers} - {None}
        now += f" ({', '.join(sorted(map(str, stages)))})" if stages else ""
    mining = parts.miner.mining
    height = mining.round.block_height if mining else None
    return progress(now, height, parts.miner.checked_rate.per_second(60), _fields(totals))
