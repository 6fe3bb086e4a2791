"""Which devices each worker gets, and how cards are counted."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pynvml
import pytest

from pocd.config.settings import ChainSettings, NodeSettings, Settings
from pocd.daemon.compose import make_loads
from pocd.pool import cards
from pocd.pool.cards import NoDriverError, list_cards, parse_visible
from pocd.pool.placement import NoDeviceError, name_cards, place


def eight() -> int:
    return 8


def never() -> int:
    raise AssertionError("cards are counted for 'auto' only")


@pytest.mark.parametrize(
    ("device", "parallel", "placed"),
    [
        ("cpu", 1, [("cpu",)]),
        ("cuda", 1, [("cuda:0",)]),
        ("cuda:3", 1, [("cuda:3",)]),
        (["cuda:2", "cuda:0"], 1, [("cuda:2",), ("cuda:0",)]),
        (["cpu", "cpu", "cpu"], 1, [("cpu",)] * 3),
        ("cpu", 2, [("cpu", "cpu")]),
        ("cuda", 2, [("cuda:0", "cuda:1")]),
        (["cuda:1", "cuda:3", "cuda:5", "cuda:7"], 2, [("cuda:1", "cuda:3"), ("cuda:5", "cuda:7")]),
    ],
)
def test_devices_are_placed_as_configured(
    device: str | list[str], parallel: int, placed: list[tuple[str, ...]]
) -> None:
    assert place(device, parallel, never) == placed


def test_the_default_device_is_the_first_card_by_its_number() -> None:
    """`torch.cuda.set_device` takes no device without an index."""
    node, chain = NodeSettings(public_key="key"), ChainSettings(urls=["http://127.0.0.1:1"])
    (load,) = make_loads(Settings(node=node, chain=chain))
    assert (load.devices, load.own_device) == (("cuda:0",), "cuda:0")


def test_auto_is_every_card_and_those_left_over_are_not_used() -> None:
    assert place("auto", 1, eight) == [(f"cuda:{n}",) for n in range(8)]
    assert place("auto", 3, eight) == [("cuda:0", "cuda:1", "cuda:2"), ("cuda:3", "cuda:4", "cuda:5")]


@pytest.mark.parametrize(("there", "parallel"), [(0, 1), (1, 2)])
def test_auto_with_too_few_cards_is_an_error_and_never_the_cpu(there: int, parallel: int) -> None:
    with pytest.raises(NoDeviceError, match=rf"this machine has {there} of the {parallel} .* set model.device = 'cpu'"):
        place("auto", parallel, lambda: there)


@pytest.mark.parametrize(
    ("visible", "count", "names"),
    [
        ("", None, []),
        ("-1", None, []),
        ("0", None, ["0"]),
        ("2,0", None, ["2", "0"]),
        ("2,0", 3, ["2", "0"]),
        ("0,5,1", 2, ["0"]),  # CUDA's list ends before a card that is not there
        ("GPU-f0, MIG-0d", 1, ["GPU-f0", "MIG-0d"]),
        ("0,1,-1,2", None, ["0", "1"]),
        ("1,,2", None, ["1"]),
    ],
)
def test_cuda_visible_devices_says_which_cards_there_are(visible: str, count: int | None, names: list[str]) -> None:
    assert parse_visible(visible, count) == names


@pytest.mark.parametrize(
    ("devices", "visible", "names"),
    [
        (("cpu", "cpu"), None, ()),
        (("cuda:3",), None, ("3",)),
        (("cuda",), None, ("0",)),
        (("cuda:1", "cuda:0"), ["4", "5"], ("5", "4")),
        (("cuda:1",), ["MIG-a", "MIG-b"], ("MIG-b",)),
        (("cuda:0", "cuda:2"), ["4", "5"], ("4", "-1")),  # it is not there, and the worker will say so
    ],
)
def test_the_cards_of_a_worker_have_the_names_by_which_cuda_is_shown_them(
    devices: tuple[str, ...], visible: list[str] | None, names: tuple[str, ...]
) -> None:
    assert name_cards(devices, visible) == names


def slices_enabled(handle: int) -> list[int]:
    if handle == 3:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
    return [int(handle == 1), 0]


def slice_of(handle: int, number: int) -> str:
    if number > 1:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
    return f"{handle}-{number}"


# What of NVML lists cards: 0 may not be opened, 1 is cut into two slices, 2 is whole, 3 knows no slices.
DRIVER = SimpleNamespace(
    NVML_DEVICE_MIG_ENABLE=1,
    NVMLError=pynvml.NVMLError,
    NVMLError_NotFound=pynvml.NVMLError_NotFound,
    NVMLError_NotSupported=pynvml.NVMLError_NotSupported,
    nvmlInit=lambda: None,
    nvmlDeviceGetCount=lambda: 4,
    nvmlDeviceGetHandleByIndex=lambda number: number,
    nvmlDeviceGetMinorNumber=lambda handle: handle,
    nvmlDeviceGetMigMode=slices_enabled,
    nvmlDeviceGetMaxMigDeviceCount=lambda _handle: 7,
    nvmlDeviceGetMigDeviceHandleByIndex=slice_of,
    nvmlDeviceGetUUID=lambda handle: f"MIG-{handle}" if isinstance(handle, str) else f"GPU-{handle}",
)


def test_the_cards_of_a_host_are_those_that_may_be_opened_and_each_slice_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def open_(path: str, _flags: int) -> int:
        raise PermissionError if path == "/dev/nvidia0" else FileNotFoundError

    monkeypatch.setattr(cards, "pynvml", DRIVER)
    monkeypatch.setattr(os, "open", open_)
    assert list_cards(None) == ["MIG-1-0", "MIG-1-1", "GPU-2", "GPU-3"]
    assert list_cards("3,MIG-1-1,4,0") == ["3", "MIG-1-1"]


def test_without_a_driver_cards_cannot_be_counted() -> None:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        with pytest.raises(NoDriverError, match="the driver cannot be asked how many GPUs there are: "):
            list_cards(None)
        assert list_cards("1,0") == ["1", "0"]
