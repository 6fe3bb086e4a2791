"""Which devices each worker gets: a pure function of the configuration and the number of cards."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class NoDeviceError(Exception):
    """There are fewer devices than are configured."""


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
