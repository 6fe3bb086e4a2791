"""NVIDIA's cards as the driver sees them: how many there are, and how each is.

Source: the NVIDIA Management Library (NVML), by nvidia-ml-py. It needs no CUDA context, so the daemon can ask it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import pynvml

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from structlog.typing import FilteringBoundLogger

T = TypeVar("T")

READ_SECONDS = 5.0  # between two readings
PATIENCE_SECONDS = 30.0  # for one


class NoDriverError(Exception):
    """There is no driver to ask, or it does not answer."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How a card is. What it does not tell is None.

    Attributes:
        temperature: In degrees Celsius.
        power: In watts.
        memory_used: In bytes, by all processes.
        memory_total: In bytes.
        utilization: The share of the last second or so in which it computed, in [0, 1].
    """

    temperature: float | None
    power: float | None
    memory_used: int | None
    memory_total: int | None
    utilization: float | None


def count(visible: str | None) -> int:
    """Return how many cards CUDA sees on this machine.

    Args:
        visible: CUDA_VISIBLE_DEVICES: indices or UUIDs, up to the first that is none; None where it is not set.

    Raises:
        NoDriverError: The driver cannot be asked.
    """
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        return next((number for number, name in enumerate(names) if name in {"", "-1"}), len(names))
    try:
        pynvml.nvmlInit()
        found: int = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError as error:
        raise NoDriverError(f"the driver cannot be asked how many GPUs there are: {error}") from error
    return found


def read(uuids: Iterable[str]) -> tuple[dict[str, Reading], str | None]:
    """Read the cards with these identities; returns what they tell, and why one of them tells nothing."""
    readings: dict[str, Reading] = {}
    problem = None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return {}, f"the driver cannot be asked how the cards are: {error}"
    for uuid in uuids:
        try:
            readings[uuid] = _read(pynvml.nvmlDeviceGetHandleByUUID(uuid))
        except pynvml.NVMLError as error:  # such as a card that is lost
            problem = f"the driver does not say how card {uuid} is: {error}"
    return readings, problem


def _read(handle: object) -> Reading:
    memory = _told(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle))
    milliwatts = _told(lambda: pynvml.nvmlDeviceGetPowerUsage(handle))
    rates = _told(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle))
    return Reading(
        temperature=_told(lambda: float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))),
        power=None if milliwatts is None else milliwatts / 1000,
        memory_used=None if memory is None else int(memory.used),
        memory_total=None if memory is None else int(memory.total),
        utilization=None if rates is None else rates.gpu / 100,
    )


def _told(ask: Callable[[], T]) -> T | None:
    """Return an answer, or None where this card, or this driver, has none (a MIG slice has no power of its own)."""
    try:
        return ask()
    except pynvml.NVMLError_NotSupported:
        return None


class Cards:
    """The latest reading of each card that a worker uses, made in a thread: a driver that lost a card can hang."""

    def __init__(
        self,
        used: Callable[[], set[str]],
        *,
        clock: Callable[[], float],
        log: FilteringBoundLogger,
        read: Callable[[Iterable[str]], tuple[Mapping[str, Reading], str | None]] = read,
    ) -> None:
        self._used = used
        self._clock = clock
        self._log = log
        self._read = read
        self._ended = threading.Event()
        self._readings: Mapping[str, Reading] = {}
        self._asked_at: float | None = None  # since when the driver owes an answer
        self._problem: str | None = None

    @property
    def problem(self) -> str | None:
        """Why a card that is used cannot be read now; None where all can."""
        if self._is_late():
            return f"the driver has not said for {PATIENCE_SECONDS:.0f} s how the cards are"
        return self._problem

    def reading(self, uuid: str) -> Reading | None:
        """Return how a card was a few seconds ago; None where that is not known."""
        return None if self._is_late() else self._readings.get(uuid)

    def _is_late(self) -> bool:
        asked_at = self._asked_at
        return asked_at is not None and self._clock() - asked_at > PATIENCE_SECONDS

    def start(self) -> None:
        """Begin to read them every few seconds, as soon as a worker uses any."""
        threading.Thread(target=self._run, name="cards", daemon=True).start()

    def close(self) -> None:
        """Read no more. A driver that hangs keeps nobody from going on."""
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(READ_SECONDS):
            if used := self._used():
                self._asked_at = self._clock()
                self._readings, problem = self._read(used)
                self._asked_at = None
                if problem and problem != self._problem:
                    self._log.warning(problem, action="cards")
                self._problem = problem
