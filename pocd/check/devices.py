"""Checks of torch, the driver, the GPUs and their memory: first the queries, then pure judgements."""

from __future__ import annotations

import contextlib
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pynvml

from pocd.check.finding import Finding, green, red, yellow
from pocd.pool import cards
from pocd.pool.cards import NoDriverError
from pocd.pool.placement import NoDeviceError, place

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pocd.check.probe import Probe
    from pocd.compute.toolchain import Lack
    from pocd.config.settings import ModelSettings
    from pocd.pool.cards import CardReading
    from pocd.protocol.names import Compile

GIB = 2**30
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
ROOM = 1.2  # of the weights' size: what a model needs at least, with small batches


MEMINFO = Path("/proc/meminfo")
CONTAINER = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of a host in bytes: all of it, and what can be had without swapping."""

    total: int
    available: int


@dataclass(frozen=True, slots=True)
class Driver:
    """NVIDIA's driver: its version, and the number of cards that CUDA sees."""

    version: str
    cards: int


def needs_cuda(model: ModelSettings) -> bool:
    """Tell whether any configured device is a GPU."""
    return model.device != "cpu" and model.device != ["cpu"] * len(model.device)


def ask_driver(visible: str | None) -> Driver:
    """Ask the driver; it may hang.

    Args:
        visible: Value of CUDA_VISIBLE_DEVICES; None where it is not set.

    Raises:
        NoDriverError: The driver is missing or does not answer.
    """
    try:
        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError as error:
        raise NoDriverError(f"NVIDIA's driver cannot be asked: {error}") from error
    return Driver(str(version), len(cards.list_cards(visible)))


def check_torch(probe: Probe, model: ModelSettings) -> Finding:
    """Check that torch can be imported and was built for the configured devices."""
    python = f"Python {platform.python_version()}"
    if probe.torch is None and probe.late:
        return red(
            "torch",
            f"{python} in {sys.prefix}; importing torch: {probe.problem}",
            "check again; if it stays, find out what keeps the disk or the processors busy",
        )
    if probe.torch is None:
        return red(
            "torch",
            f"{python} in {sys.prefix}; torch cannot be imported: {probe.problem}",
            f"install pocd again in this environment: {sys.executable} -m pip install --force-reinstall pocd",
        )
    if not needs_cuda(model):
        return green("torch", f"{python}, torch {probe.torch}")
    if probe.cuda_build is None:
        return red(
            "torch",
            f"torch {probe.torch} was built without CUDA, and model.device is {model.device!r}",
            "install a CUDA build of torch (pytorch.org says how), or set model.device = 'cpu'",
        )
    return green("torch", f"{python}, torch {probe.torch} for CUDA {probe.cuda_build}")


def check_compiler(lack: Lack | None, model: ModelSettings, mode: Compile) -> Finding | None:
    """Judge what torch's compiler lacks; None where nothing is to be compiled.

    Args:
        lack: What the compiler lacks for the configured devices; None where nothing is missing.
        model: Settings of the model and its devices.
        mode: When the model is to be compiled.
    """
    if mode == "never" or model.parallel > 1 or (mode == "auto" and not needs_cuda(model)):
        return None
    if lack is None:
        return green("compiler", "what torch's compiler needs is there")
    if mode == "always":
        return red("compiler", f"{lack.text}, and worker.compile is 'always'", lack.remedy)
    return yellow("compiler", f"{lack.text}, so batches run eagerly, which is slower", lack.remedy)


def check_driver(driver: Driver | NoDriverError, model: ModelSettings) -> Finding:
    """Check that the driver has the configured cards."""
    if not needs_cuda(model):
        return green("driver", f"not needed: model.device is {model.device!r}")
    if isinstance(driver, NoDriverError):
        return red("driver", str(driver), "install NVIDIA's driver, until nvidia-smi lists the cards of this host")
    try:
        devices = [device for worker in place(model.device, model.parallel, lambda: driver.cards) for device in worker]
    except NoDeviceError as error:
        return red("driver", f"driver {driver.version}: {error}", "check nvidia-smi and CUDA_VISIBLE_DEVICES")
    missing = sorted({device for device in devices if _number(device) >= driver.cards})
    if missing:
        return red(
            "driver",
            f"driver {driver.version} has {driver.cards} cards for us, and model.device needs {', '.join(missing)}",
            "check nvidia-smi and CUDA_VISIBLE_DEVICES, or change model.device",
        )
    return green("driver", f"driver {driver.version}, {driver.cards} cards, of which {len(devices)} are used")


def check_cards(probe: Probe, model: ModelSettings) -> Finding | None:
    """Check that torch sees the configured cards; None where none are needed, or `check_torch` reports the problem."""
    if not needs_cuda(model) or probe.torch is None or probe.cuda_build is None:
        return None
    if probe.cards:
        return green("card", f"torch sees {len(probe.cards)}")
    return red(
        "card",
        f"torch {probe.torch} sees no GPU: {probe.cuda_error or probe.problem or 'none is visible'}",
        f"check that the driver is new enough for CUDA {probe.cuda_build} (nvidia-smi), that this user may use "
        "/dev/nvidia*, and CUDA_VISIBLE_DEVICES",
    )


def used_cards(probe: Probe, model: ModelSettings) -> tuple[str, ...]:
    """Return the driver's names of the cards that the configuration uses, in the order of their numbers."""
    seen = probe.cards or ()
    if not needs_cuda(model) or len(seen) < model.parallel:
        return ()
    devices = {device for worker in place(model.device, model.parallel, lambda: len(seen)) for device in worker}
    return tuple(seen[number] for number in sorted(map(_number, devices)) if number < len(seen))


def host_memory() -> Memory:
    """Return the memory of this host, or of the container that this process is in."""
    words = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in MEMINFO.read_text().splitlines()}
    total, available = words["MemTotal"], words["MemAvailable"]
    with contextlib.suppress(OSError, ValueError):  # there is no container, or it has no limit
        total = min(total, int(CONTAINER.read_text()))
    return Memory(total, min(total, available))


def check_host_memory(memory: Memory, probe: Probe, model: ModelSettings, *, runs: bool) -> list[Finding]:
    """Check that the weights of all workers on the CPU fit into the host's memory; nothing where there are none.

    Args:
        memory: Memory of the host.
        probe: Result of the probe; without its number of parameters nothing is judged.
        model: Settings of the model and its devices.
        runs: Whether our own daemon runs, and so holds memory itself.
    """
    if needs_cuda(model) or probe.parameters is None:
        return []
    shares = 1 if isinstance(model.device, str) else len(model.device) / model.parallel
    weights = probe.parameters * BYTES[model.dtype] * shares
    name = "memory"
    text = (
        f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available, the weights need {weights / GIB:.1f} "
        f"in {model.dtype}"
    )
    if weights * ROOM > memory.total:
        return [red(name, text, "take a smaller model or dtype, fewer devices, or a host with more memory")]
    if weights * ROOM > memory.available and not runs:
        return [yellow(name, text, "end what else uses this host's memory")]
    return [green(name, text)]


def check_memory(
    readings: Mapping[str, CardReading], used: Sequence[str], probe: Probe, model: ModelSettings, *, runs: bool
) -> list[Finding]:
    """Check that the model's weights fit into the cards' free memory.

    Args:
        readings: Sensor values of each card, by the card's UUID.
        used: UUIDs of the cards that the configuration uses.
        probe: Result of the probe; without its number of parameters only the free memory is judged.
        model: Settings of the model and its devices.
        runs: Whether our own daemon runs, and so holds memory itself.
    """
    weights = (probe.parameters or 0) * BYTES[model.dtype] / model.parallel
    return [_check_card(uuid, readings.get(uuid), weights, runs=runs) for uuid in used]


def _check_card(uuid: str, reading: CardReading | None, weights: float, *, runs: bool) -> Finding:
    name = "gpu memory"
    if reading is None or reading.memory_total is None or reading.memory_used is None:
        return yellow(name, f"the driver does not tell the memory of {uuid}", "look at nvidia-smi")
    total, free = reading.memory_total, reading.memory_total - reading.memory_used
    text = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free on {uuid}"
    if weights:
        text += f", the weights need {weights / GIB:.1f}"
    if weights * ROOM > total:
        return red(name, text, "take a smaller model or a card with more memory, or split it (model.parallel)")
    if runs:
        return green(name, f"{text}; pocd runs and holds what it needs")
    if weights * ROOM > free or free < total / 2:
        return yellow(name, text, "end what else uses this card (nvidia-smi lists it)")
    return green(name, text)


def _number(device: str) -> int:
    return int(device.partition(":")[2] or 0)
