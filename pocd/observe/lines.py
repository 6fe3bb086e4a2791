"""Lines written to a stream that may stall or fail, without ever holding up who writes them."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TextIO

MOST_WAITING = 4 * 2**20  # bytes of lines that wait for their reader


class LineWriter:
    """Has a thread of its own write lines, so that a reader who stalls holds up nobody else.

    What does not fit into the queue, and what the stream refuses, is counted, and said before the next line that can be
    written again. Where no thread can be had just now, lines wait for one.

    Args:
        write: Writes a whole line, or raises OSError.
        most: Most bytes that wait.
    """

    def __init__(self, write: Callable[[bytes], None], most: int = MOST_WAITING) -> None:
        self._write = write
        self._most = most
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        self._lost = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def put(self, line: bytes) -> None:
        """Queue a line, which ends with a line end; returns at once."""
        with self._changed:
            if self._bytes + len(line) > self._most:
                self._lost += 1
                return
            self._waiting.append(line)
            self._bytes += len(line)
            self._changed.notify_all()
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="log", daemon=True)
                with contextlib.suppress(RuntimeError):  # no thread can be started: the next line tries again
                    thread.start()
                    self._thread = thread

    def flush(self, limit: float) -> None:
        """Wait until all lines are written, but `limit` seconds at most."""
        end = time.monotonic() + limit
        with self._changed:
            while self._bytes and self._thread is not None and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                line, lost = self._waiting.popleft(), self._lost
            told = f"pocd: {lost} log lines could not be written\n".encode() if lost else b""
            try:
                self._write(told + line)
            except OSError:
                written = False
            else:
                written = True
            with self._changed:
                self._lost += -lost if written else 1
                self._bytes -= len(line)
                self._changed.notify_all()


def write_whole(descriptor: int, data: bytes) -> None:
    """Write all of `data`, also where the descriptor does not block, as one that a shell shares may.

    Raises:
        OSError: The descriptor takes nothing any more.
    """
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            select.select([], [descriptor], [])


def writer_to(stream: TextIO) -> LineWriter:
    """Return what writes to a stream: by its descriptor, so that no lock of Python's is held meanwhile."""
    try:
        return LineWriter(partial(write_whole, stream.fileno()))
    except (OSError, ValueError):  # a stream in memory
        return LineWriter(partial(_write_text, stream))


def _write_text(stream: TextIO, data: bytes) -> None:
    stream.write(data.decode(stream.encoding or "utf-8"))
    stream.flush()
