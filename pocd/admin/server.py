"""The admin HTTP API: look at the daemon, stop and resume mining, shut it down (docs/protocol.md section 7)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from pocd.admin import guard, status
from pocd.admin.outbox import OutboxApi
from pocd.delivery.store import StoreUnavailableError
from pocd.observe import metrics
from pocd.serving import RefusalError, errors_as_json, json_answer

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp.typedefs import Handler

    from pocd.admin.status import Parts

LARGEST_BODY = 64 * 1024  # bytes


@web.middleware
async def _store_failures(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer 503 while the store cannot do what was asked; nothing was changed."""
    try:
        return await handler(request)
    except StoreUnavailableError as error:
        raise RefusalError(503, "store_unavailable", f"{error}; nothing was changed, try again later") from error
    except TimeoutError as error:
        raise RefusalError(503, "store_busy", "the store did not answer in time; try again later") from error


class AdminApi:
    """The routes, over the daemon's parts."""

    def __init__(self, parts: Parts, shut_down: Callable[[], None]) -> None:
        self._parts = parts
        self._shut_down = shut_down
        self._registry = metrics.registry(parts)

    def application(self, token: str | None) -> web.Application:
        """Return the aiohttp application, which asks for `token` where there is one."""
        middlewares = [errors_as_json, *guard.middlewares(self._parts.settings.admin, token), _store_failures]
        app = web.Application(middlewares=middlewares, client_max_size=LARGEST_BODY)
        app.add_routes(
            [
                web.get("/api/v1/pow/status", self.status),
                web.post("/api/v1/pow/stop", self.stop),
                web.post("/api/v1/pow/resume", self.resume),
                web.post("/shutdown", self.shutdown),
                web.get("/healthz", self.healthz),
                web.get("/readyz", self.readyz),
                web.get("/metrics", self.metrics),
                *OutboxApi(self._parts).routes(),
            ]
        )
        return app

    async def status(self, _request: web.Request) -> web.Response:
        """Everything that the daemon knows of itself."""
        return json_answer(status.view(self._parts))

    async def stop(self, _request: web.Request) -> web.Response:
        """Stop the round and pause mining until resumed, also across restarts."""
        await self._parts.miner.pause()
        return json_answer(status.view(self._parts))

    async def resume(self, _request: web.Request) -> web.Response:
        """Go on mining."""
        await self._parts.miner.resume()
        return json_answer(status.view(self._parts))

    async def shutdown(self, _request: web.Request) -> web.Response:
        """End the daemon in good order."""
        self._shut_down()
        return json_answer({"status": "stopping"}, 202)

    async def healthz(self, _request: web.Request) -> web.Response:
        """Answer that the process lives."""
        return json_answer({"status": "ok"})

    async def readyz(self, _request: web.Request) -> web.Response:
        """Answer whether it mines as it should, with the reasons where it does not."""
        problems = status.problems(self._parts)
        return json_answer({"ready": not problems, "problems": problems}, 503 if problems else 200)

    async def metrics(self, _request: web.Request) -> web.Response:
        """Metrics in Prometheus' text format."""
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})
