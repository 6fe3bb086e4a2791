"""The calls of the live network's orchestrators: rounds, jobs, and what they ask of a node that only proves."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

import orjson
from aiohttp import web

from pocd import __version__
from pocd.admin import guard
from pocd.admin.orchestrator.bodies import GenerateBody, RoundBody
from pocd.admin.orchestrator.errors import DetailError, errors_as_details, limit_bodies, parse
from pocd.delivery.receivers import CallbackError
from pocd.http.server import json_answer
from pocd.mining.control import RoundRequest
from pocd.mining.phases import Call, Mode
from pocd.protocol.live_jobs import LiveJob
from pocd.protocol.live_verdict import LiveTerms
from pocd.protocol.nonces import Node
from pocd.protocol.proof import Round
from pocd.protocol.schemes import LIVE_SCHEME, VECTOR_SIZE, with_stronger_rng
from pocd.validation.jobs import MOST_NONCES

if TYPE_CHECKING:
    from collections.abc import Callable

    from pocd.admin.parts import Parts
    from pocd.store.validations import Validation
    from pocd.validation.jobs import Jobs
    from pocd.worker.messages import Ready

STORE_SECONDS = 30.0  # for all store work of one call
WAIT_SECONDS = 60.0  # that a call with `wait` waits for its job; then it gets the job's id

POW = "/api/v1/inference/pow"

NOT_DONE = {
    **dict.fromkeys(
        [
            "/api/v1/inference/up",
            "/api/v1/inference/down",
            "/api/v1/models/status",
            "/api/v1/models/download",
            "/api/v1/models/list",
            "/api/v1/models/space",
        ],
        "it serves no inference and downloads no models: its model is configured (model.name)",
    ),
    **dict.fromkeys(
        ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"],
        "it serves no inference: send users' requests to an inference server",
    ),
    **dict.fromkeys(["/api/v1/train/start", "/api/v1/train/stop", "/api/v1/train/status"], "it trains no models"),
    **dict.fromkeys(
        ["/api/v1/gpu/devices", "/api/v1/gpu/driver"],
        "its devices are in the status of its admin API",
    ),
}
"""What a node of the network does beside proving, and this one does not, by path."""


class OrchestratorApi:
    """The API as an aiohttp application.

    Args:
        parts: The daemon's parts.
        jobs: Takes what is asked for by a list of nonces.
        new_id: Makes the id of a job.
    """

    def __init__(self, parts: Parts, jobs: Jobs, new_id: Callable[[], str]) -> None:
        self._parts = parts
        self._jobs = jobs
        self._new_id = new_id
        self._init = asyncio.Lock()

    def application(self, token: str | None) -> web.Application:
        """Return the aiohttp application; its calls need `token`, unless that is None."""
        settings = self._parts.settings.orchestrator
        guards = guard.middlewares(settings, token, section="orchestrator")
        app = web.Application(middlewares=[errors_as_details, *guards, limit_bodies])
        for prefix in dict.fromkeys(["", settings.prefix]):
            app.add_routes(self._routes(prefix))
        return app

    def _routes(self, prefix: str) -> list[web.RouteDef]:
        return [
            web.post(f"{prefix}{POW}/init/generate", self.init_generate),
            web.post(f"{prefix}{POW}/generate", self.generate),
            web.get(f"{prefix}{POW}/generate/{{id}}", self.job),
            web.get(f"{prefix}{POW}/status", self.status),
            web.post(f"{prefix}{POW}/stop", self.stop),
            web.post(f"{prefix}/api/v1/stop", self.stop),
            web.get(f"{prefix}/api/v1/state", self.state),
            web.get(f"{prefix}/api/v1/versions", self.versions),
            web.get(f"{prefix}/health", self.health),
            web.get(f"{prefix}/v1/models", self.models),
            *(web.route("*", f"{prefix}{path}", partial(_refuse, why=why)) for path, why in NOT_DONE.items()),
        ]

    # Rounds

    async def init_generate(self, request: web.Request) -> web.Response:
        """Mine a round until `stop`. While one is mined another one is refused, as the network's own programs do."""
        body = await parse(request, RoundBody)
        self._model_of(body)
        async with self._init:  # of two calls at the same time one is the second
            if self._is_generating():
                raise DetailError(409, "Already generating")
            receiver, url = await self._callback(body.url)
            node = Node(body.node_id, body.node_count)
            asked = RoundRequest(self._round(body), node, LiveTerms().fraud_threshold, receiver, url)
            async with asyncio.timeout(STORE_SECONDS):
                await self._parts.control.call(Call.INIT_GENERATE, asked)
        port = _port(request)
        done = {"status": "OK", "backends": 1, "n_groups": 1, "results": [{"port": port, "status": "OK"}]}
        return json_answer(done | {"errors": None})

    async def stop(self, request: web.Request) -> web.Response:
        """Stop mining, and cancel the jobs that wait. What was found is still sent, until it is late."""
        async with asyncio.timeout(STORE_SECONDS):
            if self._is_generating():
                await self._parts.control.call(Call.STOP)
            await self._jobs.cancel()
        done = {"status": "OK", "results": [{"port": _port(request), "status": "stopped"}], "errors": None}
        return json_answer(done)

    async def status(self, request: web.Request) -> web.Response:
        """Tell whether a round is mined; without a worker that is ready there is no backend."""
        word = self._word()
        if word == "NO_BACKENDS":
            return json_answer({"status": word, "backends": []})
        config = stats = None
        asked, mining = self._parts.control.asked, self._parts.miner.mining
        if word == "GENERATING" and asked is not None:
            config = {
                "block_hash": asked.round.block_hash,
                "block_height": asked.round.block_height,
                "public_key": asked.round.public_key,
                "node_id": asked.node.id,
                "node_count": asked.node.count,
                "group_id": 0,
                "n_groups": 1,
                "seq_len": asked.round.seq_len,
                "k_dim": VECTOR_SIZE,
            }
            rate = self._parts.miner.checked_rate.per_second(60)
            stats = {"total_processed": mining.checked if mining else 0, "nonces_per_second": rate}
        backend = {"port": _port(request), "status": word, "config": config, "stats": stats}
        return json_answer({"status": word, "backends": [backend], "late": self._late(asked)})

    def _late(self, asked: RoundRequest | None) -> dict[str, int]:
        """Return how many artifacts were set aside since their round was over, and how many wait to be sent."""
        queue = self._parts.outbox.view.queues.get(asked.callback or "") if asked else None
        return {"set_aside": queue.expired_nonces if queue else 0, "waiting": queue.pending_nonces if queue else 0}

    def _is_generating(self) -> bool:
        return self._parts.control.mode is Mode.GENERATING

    def _word(self) -> str:
        if not self._parts.workers.ready.is_set():
            return "NO_BACKENDS"
        return "GENERATING" if self._is_generating() else "IDLE"

    # Jobs

    async def generate(self, request: web.Request) -> web.Response:
        """Compute the vectors of some nonces, or judge claimed ones, once nothing is generated."""
        body = await parse(request, GenerateBody)
        info = self._model_of(body)
        if len(set(body.nonces)) < len(body.nonces):
            raise DetailError(400, "nonces must be distinct")
        claimed = None
        if body.validation is not None:
            given = {each.nonce: each.vector_b64 for each in body.validation.artifacts}
            if given.keys() != set(body.nonces) or len(given) < len(body.validation.artifacts):
                raise DetailError(400, "validation.artifacts nonces must match nonces field")
            claimed = tuple(given[nonce] for nonce in body.nonces)
        receiver, url = await self._callback(body.url)
        terms = LiveTerms(body.stat_test.dist_threshold, body.stat_test.p_mismatch, body.stat_test.fraud_threshold)
        job = LiveJob(
            id=self._new_id(),
            round=self._round(body),
            node_id=body.node_id,
            nonces=tuple(body.nonces),
            claimed=claimed,
            terms=terms,
            p_value_threshold=body.stat_test.p_value_threshold,
            fingerprint=info.fingerprint,
            dtype=info.dtype,
            callback=receiver,
            node_count=body.node_count,
        )
        async with asyncio.timeout(STORE_SECONDS):
            if not await self._jobs.ask(job, url):
                waiting = await self._jobs.waiting()
                raise DetailError(429, f"Queue full: {waiting} nonces queued, limit is {MOST_NONCES}")
        name = f"{_port(request)}:{job.id}"
        if body.wait:
            await self._jobs.until_ended(job.id, WAIT_SECONDS)
            return await self._job(name, job.id)
        return json_answer({"status": "queued", "request_id": name, "queued_count": len(body.nonces)})

    async def job(self, request: web.Request) -> web.Response:
        """Return a job: its result, once there is one."""
        name = request.match_info["id"]
        _, colon, own = name.partition(":")
        if not colon:
            raise DetailError(400, f"Invalid request_id {name!r}: it is PORT:ID, as the answer of generate gives it")
        return await self._job(name, own)

    async def _job(self, name: str, own: str) -> web.Response:
        async with asyncio.timeout(STORE_SECONDS):
            found = await self._jobs.find(own)
        if found is None:
            raise DetailError(404, f"Request {name} not found")
        word = "running" if found.state == "queued" and self._jobs.current == own else found.state
        result = orjson.loads(found.answer) if found.answer else {}
        if result.get("validation"):
            async with asyncio.timeout(STORE_SECONDS):
                result["by_differences"] = _by_differences(await self._parts.validator.find(result["validation"]))
        return json_answer({"status": word, "request_id": name} | result)

    # The node

    async def state(self, _request: web.Request) -> web.Response:
        """Return the state of a node that only proves."""
        word = self._word()
        validates = word == "IDLE" and self._jobs.judges
        return json_answer(
            {
                "version": __version__,
                "state": "STOPPED" if word == "NO_BACKENDS" else "POW",
                "poc_status": "VALIDATING" if validates else word,
                "inference_healthy": False,
                "loaded_model": self._parts.settings.model.name if self._parts.workers.ready.is_set() else None,
                "poc_validation_inference": False,
            }
        )

    async def versions(self, _request: web.Request) -> web.Response:
        """Return the version of this program; no inference is served while it validates, or at any time."""
        return json_answer({"version": __version__, "pocd_version": __version__, "poc_validation_inference": False})

    async def health(self, _request: web.Request) -> web.Response:
        """Tell whether a worker is ready to prove (200), or none is (503)."""
        if not self._parts.workers.ready.is_set():
            raise DetailError(503, "no worker is ready")
        return json_answer({"status": "healthy"})

    async def models(self, _request: web.Request) -> web.Response:
        """List the names of the model."""
        entries = [{"id": name, "object": "model", "owned_by": "pocd"} for name in self._parts.settings.names_of_model]
        return json_answer({"object": "list", "data": entries})

    # What several calls need

    def _model_of(self, body: RoundBody) -> Ready:
        """Return what the worker runs; refuse what is asked of another model, and everything while no worker is ready.

        Raises:
            DetailError: 409 for another model, length or size of vectors; 503.
        """
        info, names, params = self._parts.workers.info, self._parts.settings.names_of_model, body.params
        is_ours = params.model in names and params.k_dim == VECTOR_SIZE
        if is_ours and (info is None or not self._parts.workers.ready.is_set()):
            raise DetailError(503, "Engine not available", {"Retry-After": "5"})
        longest = info.longest_seq_len if info else None
        if not is_ours or info is None or params.seq_len > info.longest_seq_len:
            requested = {"model": params.model, "seq_len": params.seq_len, "k_dim": params.k_dim}
            deployed = {"model": names[0], "names": names, "longest_seq_len": longest, "k_dim": VECTOR_SIZE}
            raise DetailError(409, {"error": "params mismatch", "requested": requested, "deployed": deployed})
        return info

    def _round(self, body: RoundBody) -> Round:
        return Round(
            block_hash=body.block_hash,
            block_height=body.block_height,
            public_key=body.public_key,
            r_target=None,
            scheme=with_stronger_rng(LIVE_SCHEME) if body.poc_stronger_rng else LIVE_SCHEME,
            model=self._parts.settings.model.name,
            seq_len=body.params.seq_len,
        )

    async def _callback(self, url: str | None) -> tuple[str | None, str | None]:
        """Return the name of the receiver at `url`, and its URL, unless it is a configured one."""
        if url is None:
            return None, None
        asked, receivers = self._parts.control.asked, self._parts.receivers
        async with asyncio.timeout(STORE_SECONDS):
            try:
                found = await receivers.callback(url, wanted=asked.callback if asked else None)
            except CallbackError as error:
                raise DetailError(429 if error.full else 403, f"url: {error}") from None
        return found.name, None if found in receivers.configured else url


def _by_differences(found: Validation | None) -> dict[str, object]:
    """Return the verdict by differences in short; the whole is answered by the admin API."""
    if found is None:
        return {"state": "pruned"}
    if found.answer is None:
        return {"state": found.state, "reason": found.reason}
    verdict = orjson.loads(found.answer)
    told = ("probability_honest", "probability_blank", "malformed")
    return {"state": found.state, "verdict": verdict["verdict"]} | {name: verdict["differences"][name] for name in told}


def _port(request: web.Request) -> int:
    """Return the port that was called: an orchestrator names a backend by it."""
    assert request.transport is not None, "the caller is there, or it has been answered"
    port: int = request.transport.get_extra_info("sockname")[1]
    return port


async def _refuse(request: web.Request, *, why: str) -> web.Response:
    raise DetailError(501, f"{request.path}: this node only proves; {why}")
