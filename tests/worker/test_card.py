"""The card that a worker takes, and the name by which the daemon finds its sensors."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from pocd.config.settings import Settings
from pocd.daemon.compose import make_loads
from pocd.protocol.errors import DeviceError
from pocd.worker import process as program
from pocd.worker.messages import CardIdentity, Load

GIVEN = {"node": {"public_key": "key"}, "chain": {"urls": ["http://127.0.0.1:1"]}, "model": {"device": "cuda:3"}}
SLICE = "MIG-7a4fae20-5f5c-5b0e-8d4d-4c2f4f0f2a11"
SECOND = "MIG-c7384736-a75d-5afc-978f-d2f1294409fd"


@pytest.fixture
def load() -> Load:
    (found,) = make_loads(Settings.model_validate(GIVEN))
    return found


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Stand in for CUDA, which cannot be had without a card; returns the devices that were made the process's own."""
    devices: list[torch.device] = []
    card = SimpleNamespace(name="NVIDIA H200", uuid="8e0d54b2-0000-0000-0000-000000000003")
    monkeypatch.setattr(program, "pick_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    return devices


@pytest.mark.parametrize(
    ("cards", "rank", "uuid"),
    [
        (("3",), 0, "GPU-8e0d54b2-0000-0000-0000-000000000003"),
        (("GPU-8e0d54b2",), 0, "GPU-8e0d54b2-0000-0000-0000-000000000003"),
        ((SLICE,), 0, SLICE),
        ((SLICE, SECOND), 1, SECOND),
        ((), 0, "GPU-8e0d54b2-0000-0000-0000-000000000003"),
    ],
)
def test_a_slice_is_known_by_its_own_name_and_a_card_by_what_cuda_says(
    load: Load, taken: list[torch.device], cards: tuple[str, ...], rank: int, uuid: str
) -> None:
    """CUDA tells the uuid of the card that a slice (MIG) is part of, and the driver's sensors want the slice's."""
    asked = dataclasses.replace(load, cards=cards, rank=rank)
    assert program.take_card(asked) == CardIdentity("NVIDIA H200", uuid)
    assert taken == [torch.device(asked.own_device)]


def test_a_card_that_is_missing_is_named_as_it_is_configured(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(name: str) -> torch.device:
        raise DeviceError(f"device {name!r} does not exist")

    monkeypatch.setattr(program, "pick_device", lacks)
    with pytest.raises(DeviceError, match=r"^device 'cuda:3' is not there \(CUDA_VISIBLE_DEVICES=3\): .*'cuda:0'"):
        program.take_card(load)
