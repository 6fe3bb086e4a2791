"""Which devices each worker gets, and how cards are counted."""

from __future__ import annotations

import pytest

from pocd.config.settings import ChainSettings, NodeSettings, Settings
from pocd.daemon.compose import make_loads
from pocd.pool.cards import NoDriverError, count
from pocd.pool.placement import NoDeviceError, place


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
    assert load.devices == ("cuda:0",)


def test_auto_is_every_card_and_those_left_over_are_not_used() -> None:
    assert place("auto", 1, eight) == [(f"cuda:{n}",) for n in range(8)]
    assert place("auto", 3, eight) == [("cuda:0", "cuda:1", "cuda:2"), ("cuda:3", "cuda:4", "cuda:5")]


@pytest.mark.parametrize(("cards", "parallel"), [(0, 1), (1, 2)])
def test_auto_with_too_few_cards_is_an_error_and_never_the_cpu(cards: int, parallel: int) -> None:
    with pytest.raises(NoDeviceError, match=rf"this machine has {cards} of the {parallel} .* set model.device = 'cpu'"):
        place("auto", parallel, lambda: cards)


@pytest.mark.parametrize(
    ("visible", "cards"),
    [("", 0), ("-1", 0), ("0", 1), ("2,0", 2), ("GPU-f0, GPU-0d", 2), ("0,1,-1,2", 2), ("1,,2", 1)],
)
def test_cuda_visible_devices_says_which_cards_there_are(visible: str, cards: int) -> None:
    assert count(visible) == cards


def test_without_a_driver_cards_cannot_be_counted() -> None:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        with pytest.raises(NoDriverError, match="the driver cannot be asked how many GPUs there are: "):
            count(None)
    else:
        assert count(None) == pynvml.nvmlDeviceGetCount()
