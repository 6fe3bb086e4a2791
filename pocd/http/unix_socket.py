"""Unix sockets to listen on, also in place of a socket that a dead server left behind."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


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
