"""A daemon to be watched whose status a test sets: the real server, guards, stream and page over one made-up view."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from structlog.testing import CapturingLogger

from pocd.admin import status
from pocd.admin.answers import Status
from pocd.admin.server import AdminApi
from pocd.clock import SYSTEM
from pocd.config.listeners import AdminSettings
from pocd.http.server import listening
from pocd.observe.events import Events
from pocd.pool.causes import Cause

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import pytest

BLOCK_HASH = "9F2E5C7A1B3D4E6F80112233445566778899AABBCCDDEEFF0011223344556677"


def worker(number: int, rate: float, *, ready: bool = True, **changes: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    """A worker on a GPU."""
    reading = {
        "temperature": 61.0 + number,
        "power": 402.7,
        "memory_used": 33_500_000_000,
        "memory_total": 85_899_345_920,
        "utilization": 0.99,
    }
    card = {"device": f"cuda:{number}", "name": "NVIDIA H100 80GB HBM3", "uuid": f"GPU-{number}", "reading": reading}
    return {
        "number": number,
        "device": f"cuda:{number}",
        "ready": ready,
        "stage": None if ready else "loading the model",
        "node": None,
        "address": None,
        "pids": [4000 + number],
        "restarts": 0,
        "causes": {cause.value: 0 for cause in Cause},
        "last_error": None,
        "alarm": None,
        "batch_size": 256,
        "execution": "captured" if ready else None,
        "execution_reason": "as configured" if ready else None,
        "computed_per_second_1m": rate,
        "computed_per_second_15m": rate,
        "cards": [card],
        "rounding": {"error": 0.002, "flipped": 0.0, "own_share": 0.6, "turned": None, "alarm": None}
        if ready
        else None,
        **changes,
    }


def on_machines(body: dict[str, Any]) -> dict[str, Any]:
    """A status with its two workers on two machines of a cluster, the second of which loads its model."""
    places = [("two", "10.0.0.2"), ("three", "10.0.0.3")]
    for each, (node, address) in zip(body["workers"], places, strict=True):
        each.update(node=node, address=address)
    body["workers"][1] = worker(1, 0.0, ready=False, node="three", address="10.0.0.3")
    rates = [("three", "10.0.0.3", 0, 0.0), ("two", "10.0.0.2", 1, 424.9)]
    body["machines"] = [
        {
            "node": node,
            "address": address,
            "workers": 1,
            "ready": ready,
            "computed_per_second_1m": rate,
            "computed_per_second_15m": rate,
        }
        for node, address, ready, rate in rates
    ]
    return checked(body)


def receiver(name: str, **changes: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    """A receiver that takes everything."""
    states = ("pending", "delivered", "dead", "expired", "withdrawn", "purged")
    counts = {f"{state}_{what}": 0 for state in states for what in ("batches", "nonces")}
    return {
        "name": name,
        "url": f"https://{name}.example/pow",
        **counts,
        "delivered_batches": 1204,
        "delivered_nonces": 238_111,
        "last_error": None,
        "failures_in_a_row": 0,
        "next_attempt_seconds": None,
        "parked": False,
        "alarm": None,
        **changes,
    }


def sample() -> dict[str, Any]:
    """What a daemon says that mines well."""
    body: dict[str, Any] = {
        "state": "GENERATING",
        "status": "GENERATING",
        "is_model_initialized": True,
        "valid_nonces": [],
        "valid_distances": [],
        "total_checked": 52_224,
        "total_valid": 5_183,
        "elapsed_seconds": 61.5,
        "rate_per_second": 849.2,
        "r_target": 1.4042,
        "round": {
            "id": "4c1f",
            "block_hash": BLOCK_HASH,
            "block_height": 4_100_040,
            "public_key": "gonka1abc",
            "r_target": 1.4042,
            "scheme": "poc2",
            "model": "Qwen/Qwen3-0.6B",
            "seq_len": 256,
            "node_id": 1,
            "node_count": 40,
            "checked": 52_224,
            "valid": 5_183,
            "expected_valid_rate": 0.1003,
            "observed_valid_rate": 5_183 / 52_224,
        },
        "control": {"mode": "FOLLOWING", "asked": None},
        "node": {
            "role": "miner",
            "public_key": "gonka1abc",
            "node_id": 1,
            "node_count": 40,
            "models": ["Qwen/Qwen3-0.6B"],
        },
        "funnel": {
            "checked": 2_411_520,
            "valid": 239_004,
            "stored": 238_870,
            "delivered": 238_111,
            **dict.fromkeys(("dead", "expired", "withdrawn", "purged"), 0),
        },
        "rates": {
            "checked_per_second_1m": 849.2,
            "checked_per_second_15m": 846.8,
            "valid_per_second_1m": 84.3,
            "valid_per_second_15m": 84.0,
        },
        "validations": dict.fromkeys(("honest", "fraud", "undecidable", "failed", "not_paired"), 0),
        "chain": {
            "chain_id": "gonka-mainnet",
            "height": 4_100_047,
            "hash": BLOCK_HASH[::-1],
            "block_time": datetime.now(UTC).isoformat(),
            "epoch": {
                "number": 7,
                "phase": "confirmation announced",
                "until": 4_100_009,
                "awaits": "the round's block hash, and generation",
                "due": None,
                "accepted_through": 4_100_043,
                "refused": None,
            },
            "problem": None,
        },
        "worker": {
            "ready": True,
            "pid": 4000,
            "stage": None,
            "restarts": 0,
            "last_error": None,
            "batch_size": 256,
            "refused_batches": 0,
            "non_finite_nonces": 0,
            "last_refusal": None,
        },
        "workers": [worker(0, 424.9), worker(1, 424.3)],
        "machines": [],
        "receivers": [receiver("main")],
        "problems": [],
        "alarms": [],
        "version": "0.9.0",
        "uptime_seconds": 190_000.0,
    }
    return checked(body)


def troubled() -> dict[str, Any]:
    """What a daemon says that fails in many ways."""
    body = sample()
    error = "CUDA error: an illegal memory access was encountered"
    body["workers"][1] = worker(1, 0.0, ready=False, restarts=3, last_error=error)
    body["funnel"] |= {"dead": 120, "expired": 40}
    body["round"] |= {"valid": 4_420, "observed_valid_rate": 4_420 / 52_224}
    body["chain"]["problem"] = "the newest block is 14 min old; is the node in sync?"
    refused = "HTTP 503 Service Unavailable"
    body["receivers"] += [
        receiver(
            "backup",
            pending_batches=17,
            dead_batches=2,
            failures_in_a_row=9,
            last_error=refused,
            next_attempt_seconds=41.7,
        ),
        receiver("old", url=None, delivered_batches=9, pending_batches=3),
    ]
    body["problems"] = [{"part": "chain", "reason": body["chain"]["problem"]}]
    body["alarms"] = [
        {"part": "worker 1 (cuda:1)", "reason": f"failed 3 times in a row; last error: {error}"},
        {"part": "receiver backup", "reason": "refuses our signature (HTTP 401); compare the secrets of both sides"},
    ]
    return checked(body)


def checked(body: dict[str, Any]) -> dict[str, Any]:
    """Hold what is made up to what the API promises."""
    Status.model_validate(body)
    return body


class Watched:
    """The server. `body` is its status, and `events` what it tells."""

    def __init__(self, body: dict[str, Any], token: str | None = None) -> None:
        self.body = body
        self.events = Events(SYSTEM)
        self.token = token
        self.url = ""

    def block(self, height: int) -> None:
        self.body["chain"]["height"] = height
        self.events.publish("block", height=height, hash=f"{height:064X}", chain_id="gonka-mainnet")

    def happenings(self) -> None:
        """Publish an event of each kind."""
        where = {"height": 4_100_040, "block_hash": BLOCK_HASH}
        self.events.publish("worker", what="ready", worker=0)
        self.events.publish("state", state="GENERATING")
        self.block(4_100_040)
        self.events.publish("round", **where, id="4c1f", by="chain")
        self.events.publish("batch", id="b1", kind="generated", nonces=198, height=4_100_040)
        self.events.publish("delivery", receiver="main", id="b1", outcome="delivered")
        self.events.publish("delivery", receiver="backup", id="b1", outcome="retry")
        self.events.publish("delivery", receiver="backup", id="b1", outcome="set aside")
        self.events.publish("worker", what="restarting", worker=1, cause="crash", reason="killed by SIGKILL")
        self.events.publish("validation", id="v1", state="honest")
        self.events.publish("chain", problem="the newest block is 14 min old")
        self.events.publish("chain", problem=None)
        self.events.publish("round", id=None)
        self.block(4_100_047)

    @contextlib.asynccontextmanager
    async def served(self, patch: pytest.MonkeyPatch, port: int = 0) -> AsyncIterator[Watched]:
        patch.setattr(status, "view", lambda _parts: Status.model_validate(self.body))
        settings = SimpleNamespace(admin=AdminSettings())
        parts: Any = SimpleNamespace(events=self.events, log=CapturingLogger(), settings=settings)
        app = AdminApi(parts, lambda: None).application(self.token)
        async with listening(app, "127.0.0.1", port, shutdown_timeout=5) as self.url:
            yield self
