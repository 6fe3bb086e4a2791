"""NVIDIA cards as their driver reports them: how many there are, and each one's temperature, power, memory and load.

Source: the NVIDIA Management Library (NVML), by nvidia-ml-py. NVML needs no CUDA context, so the daemon can use it.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, TypeVar

import pynvml

from pocd.pool.placement import ABSENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from structlog.typing import FilteringBoundLogger

    from pocd.clock import Clock

T = TypeVar("T")

READ_SECONDS = 5.0  # between two readings of the cards
PATIENCE_SECONDS = 30.0  # for one reading


class NoDriverError(Exception):
    """There is no NVIDIA driver, or it does not answer."""


@dataclass(frozen=True, slots=True)
class CardReading:
    """What the driver reports of a card at one moment. A value that this card does not have is None.

    Attributes:
        temperature: The card's temperature, in degrees Celsius.
        power: The power that the card draws, in watts.
        memory_used: The card's memory that is in use by all processes, in bytes.
        memory_total: The card's memory, in bytes.
        utilization: The share of the last second or so in which the card computed, in [0, 1].
    """

    temperature: float | None
    power: float | None
    memory_used: int | None
    memory_total: int | None
    utilization: float | None


def list_cards(visible: str | None) -> list[str]:
    """Return the names of the cards that CUDA can be shown on this machine: numbers, or UUIDs of cards and MIG slices.

    Args:
        visible: The variable CUDA_VISIBLE_DEVICES; None where it is not set.

    Raises:
        NoDriverError: The driver cannot be asked, and the variable does not say it.
    """
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
        if visible is None:
            return [name for handle in handles if _is_allowed(handle) for name in _slices(handle) or [_uuid(handle)]]
    except pynvml.NVMLError as error:
        if visible is None:
            raise NoDriverError(f"the driver cannot be asked how many GPUs there are: {error}") from error
        return parse_visible(visible, None)
    return parse_visible(visible, len(handles))


def parse_visible(visible: str, count: int | None) -> list[str]:
    """Return the names in CUDA_VISIBLE_DEVICES that count: CUDA ignores what follows one that no card has.

    Args:
        visible: Value of the variable.
        count: How many cards there are; None where nobody knows.
    """
    names = [name.strip() for name in visible.split(",")]
    known = math.inf if count is None else count
    return list(takewhile(lambda name: name not in {"", ABSENT} and not (name.isdigit() and int(name) >= known), names))


def _uuid(handle: object) -> str:
    return str(pynvml.nvmlDeviceGetUUID(handle))


def _slices(handle: object) -> list[str]:
    """Return the UUIDs of a card's MIG slices; none where it is not cut."""
    if _supported(lambda: pynvml.nvmlDeviceGetMigMode(handle)[0]) != pynvml.NVML_DEVICE_MIG_ENABLE:
        return []
    found = []
    for number in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        with contextlib.suppress(pynvml.NVMLError_NotFound):
            found.append(_uuid(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)))
    return found


def _is_allowed(handle: object) -> bool:
    """Tell whether this process may open a card, which control groups can forbid: CUDA does not see it then."""
    try:
        os.close(os.open(f"/dev/nvidia{pynvml.nvmlDeviceGetMinorNumber(handle)}", os.O_RDWR | os.O_CLOEXEC))
    except PermissionError:
        return False
    except OSError:  # some systems have no such files
        pass
    return True


def read(uuids: Iterable[str]) -> tuple[dict[str, CardReading], str | None]:
    """Return a reading of each card, by its UUID, and why a card could not be read; None where all could."""
    readings: dict[str, CardReading] = {}
    problem = None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return {}, f"the driver cannot be asked how the cards are: {error}"
    for uuid in uuids:
        try:
            readings[uuid] = _read(_find(uuid))
        except pynvml.NVMLError as error:  # such as a card that is lost
            problem = f"the driver does not say how card {uuid} is: {error}"
    return readings, problem


def _find(uuid: str) -> object:
    """Return the handle of a card, or of a MIG slice, to which CUDA gives a card's prefix."""
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError_NotFound:
        return pynvml.nvmlDeviceGetHandleByUUID(uuid.replace("GPU-", "MIG-", 1))


def _read(handle: object) -> CardReading:
    memory = _supported(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle))
    milliwatts = _supported(lambda: pynvml.nvmlDeviceGetPowerUsage(handle))
    rates = _supported(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle))
    return CardReading(
        temperature=_supported(lambda: float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))),
        power=None if milliwatts is None else milliwatts / 1000,
        memory_used=None if memory is None else int(memory.used),
        memory_total=None if memory is None else int(memory.total),
        utilization=None if rates is None else rates.gpu / 100,
    )


def _supported(ask: Callable[[], T]) -> T | None:
    """Return what `ask` returns; None where card or driver does not support it, such as the power of a MIG slice."""
    try:
        return ask()
    except pynvml.NVMLError_NotSupported:
        return None


class Cards:
    """Keeps the latest reading of each card that a worker uses; reads in a thread, as a driver can hang."""

    def __init__(
        self,
        used: Callable[[], set[str]],
        *,
        clock: Clock,
        log: FilteringBoundLogger,
        read: Callable[[Iterable[str]], tuple[Mapping[str, CardReading], str | None]] = read,
    ) -> None:
        self._used = used
        self._clock = clock
        self._log = log
        self._read = read
        self._ended = threading.Event()
        self._readings: Mapping[str, CardReading] = {}
        self._asked_at: float | None = None  # when the driver was asked; None while no answer is awaited
        self._problem: str | None = None

    @property
    def problem(self) -> str | None:
        """Why a card that is used cannot be read now; None where all can."""
        if self._is_late():
            return f"the driver has not said for {PATIENCE_SECONDS:.0f} s how the cards are"
        return self._problem

    def reading(self, uuid: str) -> CardReading | None:
        """Return the latest reading of a card; None where there is none, or the driver has not answered for long."""
        return None if self._is_late() else self._readings.get(uuid)

    def _is_late(self) -> bool:
        asked_at = self._asked_at
        return asked_at is not None and self._clock.monotonic() - asked_at > PATIENCE_SECONDS

    def start(self) -> None:
        """Begin to read the cards that workers use every few seconds."""
        threading.Thread(target=self._run, name="cards", daemon=True).start()

    def close(self) -> None:
        """Stop reading. This does not wait for a driver that hangs."""
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(READ_SECONDS):
            if used := self._used():
                self._asked_at = self._clock.monotonic()
                self._readings, problem = self._read(used)
                self._asked_at = None
                if problem and problem != self._problem:
                    self._log.warning(problem, action="cards")
                self._problem = problem
