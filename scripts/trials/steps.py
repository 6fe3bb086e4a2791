"""Steps of a trial, each in a process of its own, so that one which fails, hangs or spoils its GPU stops no other."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Facts = dict[str, Any]

FORK = multiprocessing.get_context("fork")  # what is imported before need not be imported by each step


class Steps:
    """Runs steps while there is time for them, each in a process of its own, and writes down what they find.

    No step is run by this process itself: a GPU that it had used could not be used by those that it forks.

    Args:
        folder: The folder for facts.json and for what the steps say.
        seconds: Time for all steps.
        clock: Returns the time in seconds.

    Attributes:
        facts: What was found, by the name of the step.
    """

    def __init__(self, folder: Path, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._clock = clock
        self._began = clock()
        self._seconds = seconds
        self.facts: Facts = {}

    def run(self, name: str, step: Callable[[], Facts], *, least: float) -> None:
        """Run a step if `least` seconds are left for it; its error is a finding too."""
        began = self._clock()
        left = self._seconds - (began - self._began)
        if left < least:
            found: Facts = {"skipped": f"{left:.0f} s were left, and it takes {least:.0f}"}
        else:
            found = self._apart(name, step, left)
        self.facts[name] = found | {"seconds": round(self._clock() - began, 1)}
        (self._folder / "facts.json").write_text(json.dumps(self.facts, indent=1, default=str))
        print(f"{name}: {json.dumps(self.facts[name], default=str)}", flush=True)

    def _apart(self, name: str, step: Callable[[], Facts], limit: float) -> Facts:
        ours, theirs = FORK.Pipe(duplex=False)
        life, held = os.pipe()  # `held` is in no process but this one, so `life` ends with it, however that is
        process = FORK.Process(target=_child, args=(step, theirs, self._folder / f"{name}.txt", life, held))
        process.start()
        assert process.pid is not None, "it has begun"
        theirs.close()
        os.close(life)
        try:
            found: Facts = ours.recv() if ours.poll(limit) else {"error": f"it was not done after {limit:.0f} s"}
        except EOFError:
            process.join()
            found = {"error": f"its process ended with status {process.exitcode}"}
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with what it has started
        process.kill()  # where it has no group of its own yet
        process.join()
        os.close(held)
        return found


def _end_with(life: int) -> None:
    """End this process's group once nobody holds the other end of a pipe: the process that began it is gone."""
    os.read(life, 1)
    os.killpg(0, signal.SIGKILL)


def _child(step: Callable[[], Facts], result: Any, said: Path, life: int, held: int) -> None:  # noqa: ANN401 - multiprocessing names no type of its ends
    os.setsid()
    os.close(held)
    threading.Thread(target=_end_with, args=(life,), daemon=True).start()
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w")
    try:
        found = step()
    except Exception as error:  # noqa: BLE001 - whatever a step meets, the next one is to run
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.flush()
    result.send(found)
    result.close()
    os._exit(0)  # a GPU in a bad state may keep the interpreter from ending
