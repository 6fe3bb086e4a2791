"""Unix sockets to listen on, also in place of a socket that a dead server left behind, or that somebody removed."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LOOK_SECONDS = 2.0  # after which a socket that was removed is put back


class UnixListener:
    """A server at a Unix socket, which is put back when somebody removes it from its path.

    Args:
        path: Path of the socket.
        protocols: Makes the protocol of each connection.
        backlog: Connections that may wait to be accepted.
        told: Gets a text for the log, when the socket was put back or cannot be.
    """

    def __init__(
        self, path: Path, protocols: Callable[[], asyncio.Protocol], *, backlog: int, told: Callable[[str], None]
    ) -> None:
        self._path = path
        self._protocols = protocols
        self._backlog = backlog
        self._told = told
        self._opened = contextlib.ExitStack()

    async def open(self) -> None:
        """Begin to listen.

        Raises:
            OSError: Another program listens there, or the path cannot be used.
        """
        with contextlib.ExitStack() as stack:
            bound = stack.enter_context(unix_socket(self._path))
            loop = asyncio.get_running_loop()
            server = await loop.create_unix_server(self._protocols, sock=bound, backlog=self._backlog)
            stack.callback(server.close)
            self._made = self._path.lstat()
            self._opened = stack.pop_all()

    def close(self) -> None:
        """Listen no more; connections that are open stay."""
        self._opened.close()

    async def watch(self) -> None:
        """Put the socket back whenever it is missing, until cancelled."""
        said = None
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            problem = await self._look()
            if problem and problem != said:
                self._told(problem)
            said = problem

    async def _look(self) -> str | None:
        """Put the socket back if it is missing; returns why clients do not find it, None where they do."""
        try:
            found = self._path.lstat()
        except OSError:
            self.close()
        else:
            other = f"something else is at {self._path}, so clients do not find this server: remove it"
            return None if os.path.samestat(found, self._made) else other
        try:
            await self.open()
        except OSError as error:
            return f"the socket {self._path} was removed and cannot be put back: {error.strerror or error}"
        self._told(f"the socket {self._path} was removed by somebody, and is there again")
        return None


@contextlib.contextmanager
def unix_socket(path: Path) -> Iterator[socket.socket]:
    """Give a socket bound at `path`, for its owner and group (mode 0660), which is removed at the end.

    Raises:
        OSError: Another program listens there, or the path cannot be used.
    """
    if left_behind(path):
        path.unlink()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))
        path.chmod(0o660)  # before anybody can connect, which needs listen()
        made = path.lstat()
        try:
            yield bound
        finally:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(path.lstat(), made):  # else it is another one's by now
                    path.unlink()


def left_behind(path: Path) -> bool:
    """Tell whether a socket is at `path` on which nobody listens any more; False where there is nothing.

    Raises:
        OSError: Another program listens there, or something else is there.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(errno.EEXIST, "something else than a socket is there", str(path))
    with socket.socket(socket.AF_UNIX) as trial:
        trial.setblocking(False)
        answer = trial.connect_ex(str(path))
    if answer in {0, errno.EAGAIN}:  # EAGAIN: more wait there than its listener lets
        raise OSError(errno.EADDRINUSE, "another program listens there", str(path))
    if answer != errno.ECONNREFUSED:
        raise OSError(answer, f"a socket is there that cannot be asked: {os.strerror(answer)}", str(path))
    return True
