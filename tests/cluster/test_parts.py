"""What decides about a cluster's workers, without a cluster."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
from typing import TYPE_CHECKING

import pytest
import structlog
from pydantic import ValidationError

from pocd.check.cluster import Machine, judge, protection
from pocd.check.finding import Level
from pocd.cluster.interfaces import interface_of
from pocd.cluster.room import room_for
from pocd.cluster.versions import differences, versions
from pocd.config.model import check_engine
from pocd.config.ray import RaySettings
from pocd.config.settings import ConfigError, Settings
from pocd.daemon.compose import make_loads
from pocd.pool.causes import Cause, WorkerError, WorkerRefusedError
from pocd.pool.cluster import Cluster, bridge_environment, check_versions
from pocd.worker.frames import decode_frame, encode, find_gone
from pocd.worker.messages import Failed, Gone, Load, Placed, Room

if TYPE_CHECKING:
    from pathlib import Path

    from pocd.worker.messages import Message

PLACED = Placed("two", "10.0.0.2", 17, ("3",), versions())


@pytest.mark.parametrize(
    ("resources", "cpus", "gpus", "workers"),
    [
        ({"CPU": 8.0, "GPU": 2.0}, 1, 1, 2),
        ({"CPU": 8.0, "GPU": 2.0}, 8, 1, 1),
        ({"CPU": 8.0}, 1, 1, 0),
        ({"CPU": 8.0}, 3, 0, 2),
        ({}, 1, 0, 0),
    ],
)
def test_the_room_of_a_machine(resources: dict[str, float], cpus: int, gpus: int, workers: int) -> None:
    assert room_for({"Alive": True, "Resources": resources}, cpus=cpus, gpus=gpus) == workers
    assert room_for({"Alive": False, "Resources": resources}, cpus=cpus, gpus=gpus) == 0


def test_a_machine_with_other_versions_is_refused_by_name() -> None:
    check_versions(PLACED)
    assert differences({"pocd": "1", "torch": "2"}, {"pocd": "1", "torch": "2"}) == ""
    other = Placed("two", "10.0.0.2", 17, (), versions() | {"torch": "2.0.1"})
    ours = versions()["torch"]
    with pytest.raises(
        WorkerRefusedError, match=rf"machine two \(10.0.0.2\) has torch 2.0.1 instead of {ours}:"
    ) as refused:
        check_versions(other)
    assert refused.value.cause is Cause.CONFIGURATION


def test_the_bridge_gets_rays_own_variables_and_nothing_of_the_daemons() -> None:
    given = {
        "RAY_AUTH_MODE": "token",
        "PATH": "/bin",
        "POCD_ADMIN__TOKEN_FILE": "/etc/pocd/token",
        "CREDENTIALS_DIRECTORY": "/run/credentials/pocd.service",
        "HF_TOKEN": "hf_x",
    }
    kept = {"RAY_AUTH_MODE": "token", "PATH": "/bin"}
    own = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_event_log_reporter_enabled": "0"}
    assert bridge_environment(given) == kept | own


def test_what_a_machine_is_told_to_load_names_neither_receivers_nor_secrets(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("confidential")
    configured = Settings.model_validate(
        {
            "node": {"public_key": "k"},
            "chain": {"urls": ["http://user:confidential@127.0.0.1:1"]},
            "worker": {"engine": "ray"},
            "delivery": {
                "receivers": [{"name": "one", "url": "https://confidential.example", "secret_file": str(token)}]
            },
            "admin": {"token_file": str(token)},
        }
    )
    for load in make_loads(configured):
        sent = encode(load)
        assert b"confidential" not in sent
        assert str(token).encode() not in sent


@pytest.mark.parametrize("message", [PLACED, Gone(is_lost=True, message="why"), Room(3, 2, "", 6)])
def test_the_bridges_messages_arrive_as_they_were(message: Message) -> None:
    assert decode_frame(encode(message)) == message


@pytest.mark.parametrize("address", ["ray://10.0.0.1:10001", "10.0.0.1", "auto", "a b:1", "host:0", "host:65536"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ValidationError, match=r"must be HOST:PORT|port must be"):
        RaySettings(address=address)


@pytest.mark.parametrize("workers", [0, 65, "some", True, 1.5])
def test_a_number_of_workers_that_is_none_is_refused(workers: object) -> None:
    with pytest.raises(ValidationError, match='must be "auto", or a whole number from 1 to 64'):
        RaySettings.model_validate({"workers": workers})


def settings(**model: object) -> Settings:
    tables: dict[str, object] = {
        "node": {"public_key": "k"},
        "chain": {"urls": ["http://127.0.0.1:1"]},
        "worker": {"engine": "ray"},
    }
    return Settings.model_validate(tables | {"model": model})


def test_what_a_clusters_workers_cannot_run_is_refused_by_name() -> None:
    assert settings().ray.workers == "auto"
    assert settings(parallel=2, device="cpu").model.parallel == 2
    for device in ("cuda:1", ["cuda:0", "cuda:1"]):
        with pytest.raises(ValidationError, match=r"model.device must be"):
            settings(device=device)


def test_each_rank_of_a_clusters_worker_has_a_device_of_its_own_name_and_one_card() -> None:
    load = make_loads(settings(parallel=2))[0]
    assert (load.devices, load.cards) == (("cuda:0", "cuda:1"), ())
    second = dataclasses.replace(load, rank=1, cards=("MIG-7",))  # which is all that Ray shows its process
    assert (second.device, second.own_device, second.cards[second.own_card]) == ("cuda:1", "cuda:0", "MIG-7")
    here = dataclasses.replace(load, rank=1, cards=("0", "1"))
    assert (here.own_device, here.cards[here.own_card]) == ("cuda:1", "1")
    assert make_loads(settings(parallel=3, device="cpu"))[0].devices == ("cpu", "cpu", "cpu")


def test_the_interface_of_an_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    with pytest.raises(OSError, match=r"no network interface has the address 192.0.2.7, .* --node-ip-address"):
        interface_of("192.0.2.7")


def test_how_a_rank_ended_is_found_wherever_its_daemon_stopped_reading() -> None:
    gone = Gone(is_lost=False, message='it said {"type":"Gone"', is_killed=True)
    before = encode(Failed("fault", '{"type":"Gone"'))
    rest = before + encode(gone)
    assert [find_gone(rest[start:]) for start in range(len(before) + 5)] == [gone] * (len(before) + 5)
    assert find_gone(before) is None
    assert find_gone(b"") is None


def test_without_ray_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"worker.engine: .* -m pip install 'pocd\[ray\]'"):
        check_engine(settings())


def machine(node: str, cpus: float, gpus: float = 0, **changes: str) -> Machine:
    return Machine(node, "10.0.0.2", {"CPU": cpus, "GPU": gpus}, versions() | changes)


def test_what_a_check_says_of_a_clusters_machines() -> None:
    wanted, ours = RaySettings(workers=3, cpus=2), versions()["torch"]
    silent = Machine("three", "10.0.0.3", {"CPU": 8, "GPU": 0}, problem="no answer within 30 s")
    found = judge([machine("one", 5), machine("two", 3, torch="2.0.1"), silent], wanted, gpus=0)
    assert [(each.name, each.level) for each in found] == [
        ("cluster", Level.GREEN),
        ("machine one", Level.GREEN),
        ("machine two", Level.RED),
        ("machine three", Level.RED),
    ]
    assert "3 machines at 127.0.0.1:6379, with room for 7 workers of 2 cores" in found[0].text
    assert found[2].text == f"10.0.0.2 has torch 2.0.1 instead of {ours}"
    assert found[3].text == "10.0.0.3: no answer within 30 s"
    assert judge([machine("one", 5)], wanted, gpus=0)[0].level is Level.YELLOW, "room for 2 of 3"
    assert judge([machine("one", 5)], RaySettings(cpus=2), gpus=0)[0].level is Level.GREEN
    split = judge([machine("one", 5), machine("two", 3)], RaySettings(cpus=2), ranks=2, gpus=0)[0]
    assert (split.level, split.text.partition("with ")[2]) == (
        Level.GREEN,
        "room for 1 worker of 2 ranks, each of 2 cores",
    )
    apart = judge([machine("one", 1, 1), machine("two", 1, 1)], RaySettings(), ranks=2, gpus=1)[0]
    assert apart.level is Level.GREEN
    assert "each of a GPU and 1 core, 1 of them on several machines, which have to reach one another" in apart.text
    short = judge([machine("one", 1, 1)], RaySettings(), ranks=2, gpus=1)[0]
    assert short.level is Level.RED
    assert short.text == (
        "the machines have no room for a worker of 2 ranks, each of a GPU and 1 core (one: 1 cores, 1 GPUs); "
        "there is room for 1 ranks in all"
    )
    (none, _) = judge([machine("one", 5)], wanted, gpus=1)
    assert none.level is Level.RED
    assert none.text == "no machine has room for a worker of a GPU and 2 cores (one: 5 cores, 0 GPUs)"


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({}, "no token and no TLS: a firewall alone keeps others out"),
        ({"RAY_AUTH_MODE": "token"}, "with a token, not encrypted"),
        ({"RAY_USE_TLS": "1"}, "encrypted (TLS), without a token"),
        ({"RAY_USE_TLS": "True", "RAY_AUTH_MODE": "token"}, "encrypted (TLS), with a token"),
    ],
)
def test_a_check_says_what_keeps_others_out(variables: dict[str, str], told: str) -> None:
    assert protection(variables) == told


async def test_a_bridge_that_ends_while_a_worker_is_asked_of_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(
        RaySettings(address="127.0.0.1:1"),
        gpus=0,
        environment=os.environ,
        changed=lambda: None,
        log=structlog.get_logger(),
    )
    requests, bridge = socket.socketpair()
    cluster._requests = requests
    connect = asyncio.open_connection

    async def connect_late(**given: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        connected = await connect(**given)  # type: ignore[arg-type]  # `sock` alone
        cluster._requests = None  # as `run` does when the bridge has ended
        requests.close()
        return connected

    monkeypatch.setattr(asyncio, "open_connection", connect_late)
    load = Load("a model", "float32", ("cpu",), "poc2", 16, 8)
    with bridge, pytest.raises(WorkerError, match="the bridge to the cluster ended") as lost:
        await cluster.start(load, structlog.get_logger())
    assert lost.value.cause is Cause.CLUSTER
