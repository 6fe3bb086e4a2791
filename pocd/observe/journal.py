"""The journal's view of a line: `<N>` before it is its priority (sd-daemon(3))."""

from __future__ import annotations

import os

# Syslog severities (RFC 5424 section 6.2.1), as the journal uses them.
PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}


def goes_to_journal(descriptor: int) -> bool:
    """Tell whether a descriptor is the journal's stream: JOURNAL_STREAM, "device:inode" (systemd.exec(5)).

    A program that was started by a service and writes elsewhere inherits the variable too.
    """
    stream = os.fstat(descriptor)
    return os.environ.get("JOURNAL_STREAM") == f"{stream.st_dev}:{stream.st_ino}"


def marked(text: str, level: str) -> str:
    """Return the lines of `text` with the priority of `level` before each."""
    return "\n".join(f"<{PRIORITIES[level]}>{line}" for line in text.split("\n"))
