"""The admin HTTP API: all its routes and middlewares, and the operations on the daemon itself (docs/api.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from pocd.admin import answers, guard, metrics, status
from pocd.admin.docs import DocsApi
from pocd.admin.events import EventsApi
from pocd.admin.operations import METHODS, Media, Operation, answer, limit_bodies, routes
from pocd.admin.outbox import OutboxApi
from pocd.admin.page import OPERATION as PAGE
from pocd.admin.pow import PowApi
from pocd.http.server import RefusalError, errors_as_json
from pocd.store.errors import StoreUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp.typedefs import Handler

    from pocd.admin.parts import Parts


BUSY = "the store did not answer in time; what it had begun may be done yet: look, and try again later"


@web.middleware
async def _store_failures(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer 503 while the store cannot do its part."""
    try:
        return await handler(request)
    except StoreUnavailableError as error:
        raise RefusalError(503, "store_unavailable", f"{error}; nothing was changed, try again later") from error
    except TimeoutError as error:
        raise RefusalError(503, "store_busy", BUSY) from error


class AdminApi:
    """The admin API as an aiohttp application."""

    def __init__(self, parts: Parts, shut_down: Callable[[], None]) -> None:
        self._parts = parts
        self._shut_down = shut_down
        self._registry = metrics.registry(parts)
        self._events = EventsApi(parts.events, parts.log)

    def application(self, token: str | None) -> web.Application:
        """Return the aiohttp application; its calls need `token`, unless that is None."""
        operations = self.all_operations()
        admin = self._parts.settings.admin
        secured = frozenset() if token is None else METHODS - guard.READS if admin.open_reads else METHODS
        operations += DocsApi(operations, secured).operations()
        guards = guard.middlewares(admin, token, open_reads=admin.open_reads)
        app = web.Application(middlewares=[errors_as_json, *guards, limit_bodies(operations), _store_failures])
        app.add_routes(routes(operations))
        app.on_shutdown.append(self._events.close)
        return app

    def all_operations(self) -> list[Operation]:
        """Return all operations but those of the documentation, which is made from them."""
        return [
            *PowApi(self._parts).operations(),
            *self._events.operations(),
            *OutboxApi(self._parts).operations(),
            *self.operations(),
        ]

    def operations(self) -> list[Operation]:
        """Return the operations on the daemon itself."""
        metrics = {200: Media(CONTENT_TYPE_LATEST, "The metrics.")}
        return [
            PAGE,
            Operation("POST", "/shutdown", self.shutdown, "daemon", answers={202: answers.Stopping}),
            Operation("GET", "/healthz", self.healthz, "daemon", answers={200: answers.Alive}),
            Operation(
                *("GET", "/readyz", self.readyz, "daemon"),
                answers={200: answers.Readiness, 503: answers.Readiness},
            ),
            Operation("GET", "/metrics", self.metrics, "daemon", answers=metrics),
        ]

    async def shutdown(self, _request: web.Request) -> web.Response:
        """End the daemon in good order."""
        self._shut_down()
        return answer(answers.Stopping(status="stopping"), 202)

    async def healthz(self, _request: web.Request) -> web.Response:
        """Answer while the process is alive."""
        return answer(answers.Alive(status="ok"))

    async def readyz(self, _request: web.Request) -> web.Response:
        """Tell whether the daemon mines as it should, and if not, why (503)."""
        problems = status.problems(self._parts)
        return answer(answers.Readiness(ready=not problems, problems=problems), 503 if problems else 200)

    async def metrics(self, _request: web.Request) -> web.Response:
        """Return metrics in Prometheus' text format."""
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})
