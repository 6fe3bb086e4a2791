"""Which devices each worker gets: a pure function of the configuration and the number of cards."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


ABSENT = "-1"  # a name that no card has; CUDA shows neither it nor what follows


class NoDeviceError(Exception):
    """There are fewer devices than are configured."""


def name_cards(devices: Sequence[str], visible: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names by which CUDA is shown the cards of one worker, and no others; none on the CPU.

    So each worker's first card is its cuda:0: no worker holds memory of another one's card, and what is compiled for
    one card, which goes by the card's number, serves all.

    Args:
        devices: The worker's devices.
        visible: Names of all cards that this host's CUDA sees, in the order of their numbers; None for the numbers.
    """
    numbers = [int(device.partition(":")[2] or 0) for device in devices if device != "cpu"]
    if visible is None:
        return tuple(map(str, numbers))
    return tuple(visible[number] if number < len(visible) else ABSENT for number in numbers)


def place(device: str | Sequence[str], parallel: int, count_cards: Callable[[], int]) -> list[tuple[str, ...]]:
    """Return the devices of each worker, one for each of its ranks.

    Args:
        device: "auto" is every card; a list's devices are taken as they come; a lone "cpu" or "cuda" is as many as a
            worker needs, of cards the first ones. A card that is placed has its number, so that it has one name.
        parallel: Ranks per worker.
        count_cards: Returns how many cards this machine has; called for "auto" only.

    Raises:
        NoDeviceError: There are fewer cards than one worker needs.
    """
    if device == "auto":
        cards = count_cards()
        if cards < parallel:
            raise NoDeviceError(
                f"model.device is 'auto', which means every GPU, and this machine has {cards} of the {parallel} that a "
                "worker needs; check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES, or set model.device = 'cpu'"
            )
        devices = [f"cuda:{number}" for number in range(cards - cards % parallel)]
    elif device == "cuda":
        devices = [f"cuda:{number}" for number in range(parallel)]
    elif isinstance(device, str):
        devices = [device] * parallel
    else:
        devices = list(device)
    assert len(devices) % parallel == 0, "the settings have been checked"
    return [tuple(devices[first : first + parallel]) for first in range(0, len(devices), parallel)]
