"""Prometheus metrics, read from the daemon's own view at each scrape: no number is kept twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, StateSetMetricFamily
from prometheus_client.registry import Collector

from pocd.admin import status
from pocd.mining.phases import STATES
from pocd.pool.causes import Cause

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

    from pocd.admin.parts import Parts

INFO = ("model", "fingerprint", "dtype", "device", "decoder", "execution", "torch")
READINGS = {
    "temperature": ("temperature_celsius", "Temperature."),
    "power": ("power_watts", "Power drawn."),
    "memory_used": ("memory_used_bytes", "Memory in use, by all processes."),
    "memory_total": ("memory_total_bytes", "Memory in all."),
    "utilization": ("utilization_ratio", "Share of the last second or so in which the card computed."),
}
STAGES = {
    "checked": "Nonces that were computed and committed.",
    "valid": "Nonces that were found valid and committed.",
    "stored": "Valid nonces in a batch on disk.",
    "delivered": "Valid nonces that every receiver accepted.",
    "purged": "Valid nonces that an operator gave up.",
}
VERDICTS = ("honest", "fraud", "undecidable", "failed", "not_paired")
SET_ASIDE = {
    "dead": "Valid nonces that a receiver refused or failed at.",
    "expired": "Valid nonces that became too old for a receiver.",
    "withdrawn": "Valid nonces of replaced blocks that were not sent.",
}


class DaemonCollector(Collector):
    """Turns the daemon's parts into metric families."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def collect(self) -> Iterator[Metric]:
        """Yield all families, of the state right now."""
        yield from self._funnel()
        yield from self._round()
        yield from self._chain()
        yield from self._workers()
        yield from self._cards()
        yield from self._receivers()
        text = "Validations that ended, by verdict, or were not begun."
        verdicts = CounterMetricFamily("pocd_validations", text, labels=["verdict"])
        for verdict in VERDICTS:
            verdicts.add_metric([verdict], self._parts.validator.results[verdict])
        yield verdicts
        listeners = self._parts.events.listeners
        yield GaugeMetricFamily("pocd_event_listeners", "Open streams of events.", listeners)

    def _funnel(self) -> Iterator[Metric]:
        totals = self._parts.outbox.view.totals
        for stage, text in STAGES.items():
            yield CounterMetricFamily(
                f"pocd_nonces_{stage}", f"{text} Since the store was made.", getattr(totals, stage)
            )
        for stage, text in SET_ASIDE.items():
            yield GaugeMetricFamily(f"pocd_nonces_{stage}", f"{text} Now.", getattr(totals, stage))

    def _round(self) -> Iterator[Metric]:
        states = StateSetMetricFamily("pocd_state", "What the daemon is doing.", labels=[])
        states.add_metric([], {name: name == status.state(self._parts) for name in STATES})
        yield states
        node = self._parts.settings.node
        share = InfoMetricFamily("pocd_node", "Which share of the nonces this daemon checks, and for whom.", labels=[])
        known = self._parts.outbox.view.chain
        chain = self._parts.settings.chain.id or (known.chain_id if known else "")
        named = {"public_key": node.public_key or "", "chain_id": chain}
        share.add_metric([], named | {"node_id": str(node.node_id), "node_count": str(node.node_count)})
        yield share
        mining = self._parts.miner.mining
        if mining is None:
            return
        info = InfoMetricFamily("pocd_round", "Scheme and model of the active round.", labels=[])
        info.add_metric([], {"scheme": mining.round.scheme, "model": mining.round.model})
        yield info
        yield GaugeMetricFamily("pocd_round_height", "Block height of the active round.", mining.round.block_height)
        yield GaugeMetricFamily("pocd_round_checked", "Nonces checked in the active round.", mining.checked)
        yield GaugeMetricFamily("pocd_round_valid", "Nonces found valid in the active round.", mining.valid)
        if mining.expected_valid_rate is not None:
            yield GaugeMetricFamily(
                "pocd_round_expected_valid_ratio", "Share of valid nonces by theory.", mining.expected_valid_rate
            )

    def _chain(self) -> Iterator[Metric]:
        chain = self._parts.chain
        if chain.head is not None:
            yield GaugeMetricFamily(
                "pocd_chain_head_height", "Newest block that the chain's node reported.", chain.head.block.height
            )
            yield GaugeMetricFamily(
                "pocd_chain_head_timestamp_seconds",
                "Time of that block, by the chain.",
                chain.head.block.time.timestamp(),
            )
        yield GaugeMetricFamily("pocd_chain_failures", "Polls that failed in a row.", chain.failures)
        problem = chain.problem(self._parts.clock.wall(), self._parts.settings.chain.poll_interval)
        yield GaugeMetricFamily(
            "pocd_chain_degraded", "1 while no node answers, or it lags or catches up.", int(problem is not None)
        )
        held = self._parts.miner.held is not None
        yield GaugeMetricFamily("pocd_store_held", "1 while mining waits for the store.", int(held))

    def _workers(self) -> Iterator[Metric]:
        labels = ["worker"]
        ready = GaugeMetricFamily("pocd_worker_ready", "1 while the worker has a model ready.", labels=labels)
        restarts = CounterMetricFamily(
            "pocd_worker_restarts", "How often the worker ended, by cause.", labels=[*labels, "cause"]
        )
        alarm = GaugeMetricFamily("pocd_worker_alarm", "1 while the worker fails again and again.", labels=labels)
        size = GaugeMetricFamily("pocd_worker_batch_size", "Nonces per forward pass.", labels=labels)
        computed = CounterMetricFamily(
            "pocd_worker_computed_nonces", "Nonces that the worker computed for what is mined.", labels=labels
        )
        error = GaugeMetricFamily(
            "pocd_worker_rounding_error_ratio",
            "Distance of results from those of float32 arithmetic, as a share of their scatter between nonces.",
            labels=labels,
        )
        flipped = GaugeMetricFamily(
            "pocd_worker_flipped_ratio",
            "Share of honest valid nonces that another honest host would find invalid, for rounding.",
            labels=labels,
        )
        own_share = GaugeMetricFamily(
            "pocd_worker_own_share_ratio",
            "Share of the squares of the model's outputs that is the nonce's own.",
            labels=labels,
        )
        turned = GaugeMetricFamily(
            "pocd_worker_turned_ratio",
            "Share of nonces of which a router chooses other experts on a host that rounds otherwise.",
            labels=labels,
        )
        rounding = GaugeMetricFamily(
            "pocd_worker_rounding_alarm", "1 while rounding decides too much of the worker's results.", labels=labels
        )
        info = InfoMetricFamily("pocd_worker", "What the worker runs, and how.", labels=labels)
        place = InfoMetricFamily(
            "pocd_worker_place", "Machine of a Ray cluster that runs the worker, several joined by +.", labels=labels
        )
        for worker in self._parts.workers.workers:
            name = [str(worker.number)]
            if worker.place:
                place.add_metric(name, {"node": worker.place.node, "address": worker.place.address})
            ready.add_metric(name, int(worker.ready))
            for cause in Cause:
                restarts.add_metric([*name, cause], worker.causes[cause])
            alarm.add_metric(name, int(worker.alarm is not None and not worker.ready))
            size.add_metric(name, worker.batch_size)
            computed.add_metric(name, worker.computed)
            rounding.add_metric(name, int(worker.rounding_alarm is not None))
            measured = worker.info.conditioning if worker.info else None
            if measured is not None:
                if measured.error is not None:
                    error.add_metric(name, measured.error)
                own_share.add_metric(name, measured.own_share)
                if measured.turned is not None:
                    turned.add_metric(name, measured.turned)
                if measured.flipped is not None:
                    flipped.add_metric(name, measured.flipped)
            if worker.info is not None:
                info.add_metric(name, {key: str(getattr(worker.info, key) or "") for key in INFO})
        yield from (ready, restarts, alarm, size, computed, error, flipped, own_share, turned, rounding, info, place)
        cluster = self._parts.workers.cluster
        degraded = int(cluster is not None and cluster.problem is not None)
        yield GaugeMetricFamily(
            "pocd_cluster_degraded",
            "1 while the Ray cluster is away or lacks room; 0 where workers run on this machine.",
            degraded,
        )
        yield CounterMetricFamily(
            "pocd_worker_refused_batches",
            "Batches without a result, since the model gave NaN or infinity.",
            self._parts.miner.refused_batches,
        )
        yield CounterMetricFamily(
            "pocd_worker_non_finite_nonces",
            "Nonces without a result: all of refused batches, and those whose vectors have NaN or infinity.",
            self._parts.miner.non_finite,
        )

    def _cards(self) -> Iterator[Metric]:
        parts, labels = self._parts, ["worker", "device"]
        families = {
            field: GaugeMetricFamily(f"pocd_card_{name}", f"{text} Of a worker's card.", labels=labels)
            for field, (name, text) in READINGS.items()
        }
        info = InfoMetricFamily("pocd_card", "A worker's card.", labels=labels)
        for worker in parts.workers.workers:
            for device, card in worker.cards.items():
                info.add_metric([str(worker.number), device], {"name": card.name, "uuid": card.uuid})
                reading = parts.cards.reading(card.uuid)
                for field, family in families.items():
                    if (value := getattr(reading, field, None)) is not None:
                        family.add_metric([str(worker.number), device], value)
        yield from (info, *families.values())
        problem = int(parts.cards.problem is not None)
        yield GaugeMetricFamily("pocd_card_unreadable", "1 while the driver cannot read a card's sensors.", problem)

    def _receivers(self) -> Iterator[Metric]:
        labels = ["receiver"]
        held = GaugeMetricFamily(
            "pocd_receiver_batches", "Batches that are not accepted, by state.", labels=[*labels, "state"]
        )
        waiting = GaugeMetricFamily("pocd_receiver_pending_nonces", "Valid nonces not accepted yet.", labels=labels)
        accepted = CounterMetricFamily("pocd_receiver_delivered_batches", "Batches accepted.", labels=labels)
        failures = GaugeMetricFamily("pocd_receiver_failures", "Attempts that failed in a row.", labels=labels)
        alarm = GaugeMetricFamily(
            "pocd_receiver_alarm", "1 while the receiver has a problem that only a person can solve.", labels=labels
        )
        certificate = GaugeMetricFamily(
            "pocd_receiver_certificate_expiry_timestamp_seconds",
            "When the receiver's certificate expires, where it has one.",
            labels=labels,
        )
        for dispatcher in self._parts.receivers:
            if dispatcher.certificate_expires is not None:
                certificate.add_metric([dispatcher.receiver.name], dispatcher.certificate_expires)
        for each in status.receivers(self._parts):
            for state in ("pending", "dead", "expired", "withdrawn"):
                held.add_metric([each.name, state], getattr(each, f"{state}_batches"))
            waiting.add_metric([each.name], each.pending_nonces)
            accepted.add_metric([each.name], each.delivered_batches)
            failures.add_metric([each.name], each.failures_in_a_row)
            alarm.add_metric([each.name], int(each.alarm is not None))
        yield from (held, waiting, accepted, failures, alarm, certificate)


def registry(parts: Parts) -> CollectorRegistry:
    """Return a registry of the daemon's metrics and its process's own."""
    made = CollectorRegistry(auto_describe=False)
    made.register(DaemonCollector(parts))
    ProcessCollector(registry=made)
    PlatformCollector(registry=made)
    GCCollector(registry=made)
    return made
