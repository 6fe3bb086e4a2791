"""Ask torch in a process of its own, since this process must not import it."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from pocd.observe.mask import excerpt
from pocd.tasks import within

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from pathlib import Path

GRACE = 1.0  # seconds for a process that was killed to be gone


@dataclass(frozen=True, slots=True)
class Probe:
    """Results of the process that imports torch; None for what it did not get to.

    Attributes:
        torch: Version of torch.
        cuda_build: The CUDA version that this torch was built for; None as well for a build without CUDA.
        fingerprint: Fingerprint of the model's weights and configuration, v2- and 32 hex digits.
        parameters: Number of the model's parameters.
        longest_seq_len: Largest sequence length, in positions, that the model allows.
        model_error: Why the weights cannot be read.
        cards: The GPUs that torch sees, in its order, by the driver's names for them.
        cuda_error: Why torch sees no GPU.
        problem: How the process failed; None where it ended well.
        late: Whether the process was killed because it took too long.
    """

    torch: str | None = None
    cuda_build: str | None = None
    fingerprint: str | None = None
    parameters: int | None = None
    longest_seq_len: int | None = None
    model_error: str | None = None
    cards: tuple[str, ...] | None = None
    cuda_error: str | None = None
    problem: str | None = None
    late: bool = False


async def probe(folder: Path | None, *, cuda: bool, limit: float) -> Probe:
    """Start the process, give it `limit` seconds, and return its results so far.

    Args:
        folder: The model's folder; None where there is no model to read.
        cuda: Whether to look at GPUs.
        limit: Seconds after which the process is killed.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "pocd.check.child", str(folder or ""), "cuda" if cuda else "cpu"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        return Probe(problem=f"no process can be started: {error.strerror}")
    assert process.stdout is not None
    assert process.stderr is not None
    told: dict[str, Any] = {}
    late = False
    complaints = asyncio.create_task(process.stderr.read())
    try:
        async with asyncio.timeout(limit):
            async for line in process.stdout:
                if line.startswith(b"{"):  # the rest is what libraries have to say
                    told |= orjson.loads(line)
            code = await process.wait()
            last = (await complaints).decode("utf-8", "replace").strip().rpartition("\n")[2]
            problem = None if code == 0 else excerpt(last or f"exit status {code}", 160)
    except TimeoutError:
        late, problem = True, f"no answer within {limit:g} s"
    finally:
        await _end(process)
        complaints.cancel()
    cards = told.pop("cards", None)
    return Probe(**told, cards=None if cards is None else tuple(cards), problem=problem, late=late)


async def _end(process: Process) -> None:
    """Kill what still runs. One that hangs in the driver may outlive even this; nobody waits for it."""
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    with contextlib.suppress(TimeoutError):
        await within(GRACE, process.wait())
