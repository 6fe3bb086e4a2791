"""Logging: readable on a terminal, JSON with the journal's priorities otherwise."""

from __future__ import annotations

import atexit
import io
import json
import logging
import sys
from typing import TYPE_CHECKING, Literal, TextIO, cast

import orjson
import structlog

from pocd.observe.journal import PRIORITIES, goes_to_journal, marked
from pocd.observe.lines import LineWriter, writer_to
from pocd.observe.mask import clean, escape_json, mask_credentials

if TYPE_CHECKING:
    from structlog.typing import EventDict, ExcInfo, FilteringBoundLogger, Processor, WrappedLogger

FLUSH_SECONDS = 2.0  # at the end of the process, for the last lines

_LEVEL = logging.getLogger("pocd")  # its level is the one that lines must have, so that it can be changed


def _drop_unimportant(_logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    if not _LEVEL.isEnabledFor(logging.getLevelNamesMapping()[method.upper()]):
        raise structlog.DropEvent
    return event


def _add_priority(_logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    event["priority"] = PRIORITIES[method]
    return event


class _JournalPrefix:
    """Writes `<N>` before the line, by which the journal tells a line's priority (sd-daemon(3))."""

    def __call__(self, _logger: WrappedLogger, method: str, line: EventDict | str) -> str:
        assert isinstance(line, str), "the renderer comes first"
        return marked(line, method)


def _render_json(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    try:
        return escape_json(orjson.dumps(event, default=str).decode())
    except orjson.JSONEncodeError:  # text that is not Unicode, an integer beyond 64 bits: rather slow than lost
        return json.dumps(event, default=str)


def _clean_values(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Replace what a terminal obeys in every text that others may have written; other values are shown as Python's."""
    return {key: clean(value) if isinstance(value, str) else value for key, value in event.items()}


def _plain_traceback(sink: TextIO, failure: ExcInfo) -> None:
    """Write a traceback without what a terminal obeys in the exception's text."""
    text = io.StringIO()
    structlog.dev.plain_traceback(text, failure)
    sink.write(clean(text.getvalue(), keep="\n"))


def _mask_credentials(_logger: WrappedLogger, _method: str, line: EventDict | str) -> str:
    """Hide user and password of URLs anywhere in the line, such as in an exception's text."""
    assert isinstance(line, str), "the renderer comes first"
    return mask_credentials(line)


class _Lines:
    """The stream that structlog writes to: each line goes to the writer's queue."""

    def __init__(self, writer: LineWriter, encoding: str) -> None:
        self._writer = writer
        self._encoding = encoding

    def write(self, text: str) -> int:
        """Queue a line."""
        self._writer.put(text.encode(self._encoding, "backslashreplace"))
        return len(text)

    def flush(self) -> None:
        """Do nothing: the writer's thread writes each line as it comes."""


_writers: list[LineWriter] = []  # of this process, whose last lines are written at its end


def _writer_to(stream: TextIO) -> _Lines:
    """Return what writes to standard error."""
    writer = writer_to(stream)
    _writers[:] = [writer]
    return _Lines(writer, stream.encoding or "utf-8")


def flush(limit: float = FLUSH_SECONDS) -> None:
    """Wait until the lines logged so far are written, but `limit` seconds at most: their reader may have stalled."""
    for writer in _writers:
        writer.flush(limit)


class _LibraryHandler(logging.Handler):
    """Passes log lines of libraries (aiohttp, asyncio) on to our own log, in its form."""

    def __init__(self, log: FilteringBoundLogger) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        level = min(record.levelno // 10 * 10, logging.CRITICAL)  # libraries may have levels of their own between
        self._log.log(level, record.getMessage(), action="library", logger=record.name, exc_info=record.exc_info)


def configure(level: str, style: Literal["auto", "console", "json"]) -> FilteringBoundLogger:
    """Set logging up for the process and return its logger; lines go to standard error.

    Exceptions are written without the values of local variables, which may be secret.
    """
    console = sys.stderr.isatty() if style == "auto" else style == "console"
    shared: list[Processor] = [
        _drop_unimportant,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=not console),
        structlog.processors.StackInfoRenderer(),
    ]
    renderers: list[Processor]
    if console:
        renderers = [
            _clean_values,
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), pad_event_to=32, exception_formatter=_plain_traceback
            ),
            _mask_credentials,
        ]
    else:
        tracebacks = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        renderers = [structlog.processors.ExceptionRenderer(tracebacks), _add_priority, _render_json, _mask_credentials]
        if goes_to_journal(2):
            renderers.append(_JournalPrefix())
    structlog.configure(
        processors=[*shared, *renderers],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),  # all of them; the level may change
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", _writer_to(sys.stderr))),
        cache_logger_on_first_use=True,
    )
    log: FilteringBoundLogger = structlog.get_logger()
    logging.basicConfig(handlers=[_LibraryHandler(log)])
    set_level(level)
    atexit.register(flush)
    return log


def set_level(level: str) -> None:
    """Set the least level of lines from now on; of libraries, at least warnings."""
    numeric = logging.getLevelNamesMapping()[level.upper()]
    _LEVEL.setLevel(numeric)
    logging.getLogger().setLevel(max(numeric, logging.WARNING))
