"""The relay over HTTP: whatever is posted below /generated or /validated, on any path, is stored and passed on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiohttp import web

from pocd.clock import SYSTEM, SteadyClock
from pocd.http.pages import refuse_pages
from pocd.http.server import RefusalError, errors_as_json, json_answer, listening
from pocd.relay.callbacks import KINDS, CallbackError
from pocd.relay.relay import FullError, Relay
from pocd.store.errors import StoreUnavailableError
from pocd.store.thread import OutboxThread
from pocd.tasks import run_forever

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from structlog.typing import FilteringBoundLogger

    from pocd.relay.callbacks import Kind

MOST_BYTES = 96 * 2**20  # of a callback: a million artifacts
SHUTDOWN_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class RelayPlan:
    """What a relay is to do.

    Attributes:
        to: Address of the orchestrator: what is posted to PATH here is posted to {to}PATH there.
        host: Address to listen on.
        port: TCP port; 0 takes a free one.
        store: SQLite file of the callbacks, made if missing.
        windows: Seconds for which a callback of each kind is of use.
    """

    to: str
    host: str
    port: int
    store: Path
    windows: Mapping[Kind, float]


def application(relay: Relay) -> web.Application:
    """Build the relay's routes."""

    async def take(request: web.Request) -> web.Response:
        path = request.raw_path.partition("?")[0]
        prefix, _, last = path.rpartition("/")
        for kind in KINDS:
            if kind == last:
                return await _take(relay, kind, prefix, await request.read())
        raise RefusalError(404, "not_found", f"only paths that end in {' or '.join(f'/{kind}' for kind in KINDS)}")

    async def status(_request: web.Request) -> web.Response:
        return json_answer(relay.status())

    app = web.Application(middlewares=[errors_as_json, refuse_pages], client_max_size=MOST_BYTES)
    app.add_routes([web.get("/status", status), web.post("/{path:.*}", take)])
    return app


async def _take(relay: Relay, kind: Kind, prefix: str, raw: bytes) -> web.Response:
    try:
        return json_answer({"stored": await relay.take(kind, prefix, raw)})
    except CallbackError as error:
        raise RefusalError(400, "invalid_callback", str(error), error.field) from None
    except FullError as error:
        raise RefusalError(429, "full", str(error)) from None
    except StoreUnavailableError as error:
        raise RefusalError(503, "store_unavailable", f"nothing was stored: {error}") from None


async def serve(plan: RelayPlan, log: FilteringBoundLogger, on_started: Callable[[str], None]) -> None:
    """Run the relay until cancelled.

    Raises:
        StoreError: The store cannot be opened.
        OSError: The address cannot be bound.
    """
    outbox = OutboxThread(
        plan.store, lambda why: log.warning("the store is waited for", action="store_wait", cause=why)
    )
    try:
        relay = Relay(plan.to, outbox, windows=plan.windows, clock=SteadyClock(SYSTEM), log=log)
        await relay.restore()
        app = application(relay)
        async with listening(app, plan.host, plan.port, shutdown_timeout=SHUTDOWN_SECONDS) as url:
            on_started(url)
            await run_forever({"deliveries": relay.run()}, log)
    finally:
        outbox.close()
