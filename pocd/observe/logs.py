"""Logging: readable on a terminal, JSON with the journal's priorities otherwise."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Literal

import orjson
import structlog

if TYPE_CHECKING:
    from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

# Syslog severities (RFC 5424 section 6.2.1), as the journal uses them.
PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}


def _add_priority(_logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    event["priority"] = PRIORITIES[method]
    return event


class _JournalPrefix:
    """Writes `<N>` before the line, by which the journal tells a line's priority (sd-daemon(3))."""

    def __call__(self, _logger: WrappedLogger, method: str, line: EventDict | str) -> str:
        assert isinstance(line, str), "the renderer comes first"
        return f"<{PRIORITIES[method]}>{line}"


def _render_json(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    return orjson.dumps(event, default=str).decode()


def configure(level: str, style: Literal["auto", "console", "json"]) -> FilteringBoundLogger:
    """Set logging up for the process and return its logger; lines go to standard error."""
    console = sys.stderr.isatty() if style == "auto" else style == "console"
    shared: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=not console),
        structlog.processors.StackInfoRenderer(),
    ]
    renderers: list[Processor]
    if console:
        renderers = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=32)]
    else:
        renderers = [structlog.processors.dict_tracebacks, _add_priority, _render_json]
        if "JOURNAL_STREAM" in os.environ:
            renderers.append(_JournalPrefix())
    numeric = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[*shared, *renderers],
        wrapper_class=structlog.make_filtering_bound_logger(numeric),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    # Libraries (aiohttp, asyncio) speak through the standard library.
    logging.basicConfig(level=max(numeric, logging.WARNING), format="%(name)s: %(message)s", stream=sys.stderr)
    log: FilteringBoundLogger = structlog.get_logger()
    return log
