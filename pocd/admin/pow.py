"""The API for miners' orchestrators: rounds, phases, validation (docs/protocol.md section 7, docs/api.md)."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from aiohttp import web

from pocd.admin import answers, status, verdict
from pocd.admin.operations import Operation, answer
from pocd.admin.requests import InitBody, ValidateQuery
from pocd.delivery.receivers import CallbackError
from pocd.http.parsing import parse_body, parse_query
from pocd.http.server import RefusalError
from pocd.mining.control import NoRoundError, RoundRequest
from pocd.mining.phases import Call
from pocd.protocol.bodies import MOST_VALUES, VECTOR_FIELD
from pocd.protocol.names import default_tolerance
from pocd.protocol.nonces import Node
from pocd.protocol.proof import Round
from pocd.protocol.schemes import SCHEMES
from pocd.store.requested import TooManySharesError
from pocd.validation.claim import LARGEST_CLAIM, AnyClaim
from pocd.validation.conditions import BY_WEIGHTS, MismatchError, named, refuse_mismatch, running
from pocd.validation.queue import QueueFullError, ValidationRequest
from pocd.validation.verdict import Terms, check

if TYPE_CHECKING:
    from pocd.admin.operations import Answer
    from pocd.admin.parts import Parts
    from pocd.store.validations import Validation

STORE_SECONDS = 30.0  # for all store work of one call; a hung disk must not keep callers
WAIT_SECONDS = 30.0  # that a call waits for a verdict, below what clients and proxies wait; then it gets an id
AGAIN = {"Retry-After": "5"}  # for callers that find a queue full, or the model loading; in seconds

TAG = "Rounds"


class PowApi:
    """The routes for rounds, phases and validation."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def operations(self) -> list[Operation]:
        """Return the operations of these routes."""
        validated: dict[int, Answer] = {200: verdict.Verdict, 202: verdict.Waiting}
        path = "/api/v1/pow"

        control = partial(Operation, "POST", tag=TAG)
        done: dict[int, Answer] = {200: answers.Done}
        begun: dict[int, Answer] = {
            **done,
            403: "The callback_url is of no configured origin (`callback_refused`), or the `Host` or the browser's "
            "`Origin` is foreign (`foreign_host`, `foreign_origin`).",
            409: "A field that decides a result differs from what this daemon runs, or `params` holds "
            "an unknown name (`mismatch`); or the round was asked for with too many shares (`too_many_shares`).",
            429: "Too many callback URLs are in use (`too_many_callbacks`).",
        }
        in_round: dict[int, Answer] = {**done, 409: "No round was requested (`no_round`): POST an init first."}
        return [
            Operation("GET", f"{path}/status", self.status, TAG, answers={200: answers.Status}),
            control(f"{path}/{Call.INIT}", self.init, body=InitBody, answers=begun),
            control(f"{path}/{Call.INIT_GENERATE}", self.init_generate, body=InitBody, answers=begun),
            control(f"{path}/{Call.INIT_VALIDATE}", self.init_validate, body=InitBody, answers=begun),
            control(f"{path}/{Call.PHASE_GENERATE}", self.phase_generate, answers=in_round),
            control(f"{path}/{Call.PHASE_VALIDATE}", self.phase_validate, answers=in_round),
            control(f"{path}/{Call.STOP}", self.stop, answers=done),
            control(f"{path}/{Call.RESUME}", self.resume, answers=done),
            Operation(
                "POST",
                f"{path}/validate",
                self.validate,
                TAG,
                query=ValidateQuery,
                body=AnyClaim,
                answers={
                    **validated,
                    409: "The batch names another scheme, model, dtype, length or target than the terms, has results "
                    "of another kind, or `params` holds an unknown name (`mismatch`).",
                    429: "Too many validations wait (`queue_full`).",
                    503: "No model is ready (`loading`), the recomputation had no result (`no_result`), or the store "
                    "cannot do it now (`store_unavailable`, `store_busy`).",
                },
                largest_body=LARGEST_CLAIM,
            ),
            Operation(
                "GET",
                f"{path}/validate/{{id}}",
                self.validation,
                TAG,
                answers={
                    **validated,
                    404: "The id is unknown, or the validation was pruned (`not_found`).",
                    503: "The recomputation had no result (`no_result`); ask again by POST.",
                },
            ),
        ]

    async def status(self, _request: web.Request) -> web.Response:
        """Return the daemon's whole status.

        The fields before `round` are those of the API that orchestrators already use, and describe the active round.
        """
        return answer(status.view(self._parts))

    async def init(self, request: web.Request) -> web.Response:
        """Take control of mining with a round of your own, and leave it ready.

        Nothing is mined until `phase/generate`. Proofs that were found before are delivered all the same.
        """
        return await self._init(request, Call.INIT)

    async def init_generate(self, request: web.Request) -> web.Response:
        """Take control of mining with a round of your own, and mine it until another call."""
        return await self._init(request, Call.INIT_GENERATE)

    async def init_validate(self, request: web.Request) -> web.Response:
        """Take control of mining with a round of your own, by whose terms batches are judged; nothing is mined."""
        return await self._init(request, Call.INIT_VALIDATE)

    async def phase_generate(self, _request: web.Request) -> web.Response:
        """Mine the round that was requested last, from where it was left."""
        return await self._call(Call.PHASE_GENERATE)

    async def phase_validate(self, _request: web.Request) -> web.Response:
        """Leave the device to validations, under the terms of the round that was requested last."""
        return await self._call(Call.PHASE_VALIDATE)

    async def stop(self, _request: web.Request) -> web.Response:
        """Stop mining until an init or `resume`, also across restarts.

        Proofs are still delivered, and batches are still validated.
        """
        return await self._call(Call.STOP)

    async def resume(self, _request: web.Request) -> web.Response:
        """Return control to the chain: its rounds are mined as they come."""
        return await self._call(Call.RESUME)

    async def _init(self, request: web.Request, call: Call) -> web.Response:
        body = await parse_body(request, InitBody)
        return await self._call(call, await self._asked(body), body.ignored)

    async def _call(
        self, call: Call, asked: RoundRequest | None = None, ignored: list[str] | None = None
    ) -> web.Response:
        try:
            async with asyncio.timeout(STORE_SECONDS):
                await self._parts.control.call(call, asked)
        except NoRoundError as error:
            raise RefusalError(
                409, "no_round", f"in mode {error} there is no round to go on with: POST /api/v1/pow/init first"
            ) from None
        except TooManySharesError as error:
            raise RefusalError(409, "too_many_shares", f"node_id: {error}", "node_id") from None
        view = status.view(self._parts)
        return answer(answers.Done(status="OK", state=view.state, ignored=ignored or [], pow_status=view))

    async def _asked(self, body: InitBody) -> RoundRequest:
        """Complete the requested round from the configuration."""
        seq_len = self._agreed_seq_len(body)
        settings = self._parts.settings
        self._check_target(body)
        node = Node(
            settings.node.node_id if body.node_id == -1 else body.node_id,
            settings.node.node_count if body.node_count == -1 else body.node_count,
        )
        if node.id >= node.count:
            raise RefusalError(
                400, "invalid_request", f"node_id: {node.id} must be below node_count {node.count}", "node_id"
            )
        round_ = Round(
            block_hash=body.block_hash,
            block_height=body.block_height,
            public_key=body.public_key,
            r_target=body.r_target,
            scheme=settings.round.scheme,
            model=settings.model.name,
            seq_len=seq_len,
        )
        callback = await self._callback(body.callback_url) if body.callback_url else (None, None)
        return RoundRequest(round_, node, body.fraud_threshold, *callback)

    def _check_target(self, body: InitBody) -> None:
        """Refuse a round of distances without a target, and one of vectors with one."""
        scheme = self._parts.settings.round.scheme
        if SCHEMES[scheme].output == "distance" and body.r_target is None:
            raise RefusalError(400, "invalid_request", "r_target: Field required", "r_target")
        if SCHEMES[scheme].output == "vector" and body.r_target is not None:
            message = (
                f"r_target: {body.r_target} is asked for, but this daemon runs none: with scheme {scheme!r} every "
                "nonce with a finite vector is valid; nothing was changed"
            )
            raise RefusalError(409, MismatchError.code, message, "r_target")

    def _agreed_seq_len(self, body: InitBody) -> int:
        """Refuse a round that this daemon does not compute, and return its sequence length."""
        settings, worker = self._parts.settings, self._parts.workers.info
        if worker is None and BY_WEIGHTS & named(body).keys():
            raise _loading("the fingerprint of the weights is not known before they are loaded")
        runs = running(
            model=settings.model.name,
            revision=settings.model.revision,
            fingerprint=worker.fingerprint if worker else None,
            scheme=settings.round.scheme,
            dtype=settings.model.dtype,
            seq_len=settings.round.seq_len,
        )
        del runs["seq_len"]  # the worker may take another one than configured
        try:
            refuse_mismatch(body, runs, "{asked} is asked for, but this daemon runs {runs}", "nothing was changed")
        except MismatchError as error:
            raise RefusalError(409, error.code, str(error), error.field) from None
        if body.seq_len is None and body.params is not None:
            return self._seq_len("params.seq_len", body.params.seq_len)
        return self._seq_len("seq_len", body.seq_len)

    def _seq_len(self, field: str, asked: int | None) -> int:
        configured, worker = self._parts.settings.round.seq_len, self._parts.workers.info
        if asked is None or asked == configured:
            return configured
        if worker is None:
            raise _loading("whether the model takes seq_len is not known before it is loaded")
        scheme = self._parts.settings.round.scheme
        if asked < (least := SCHEMES[scheme].least_seq_len):
            message = f"{field}: {asked} is too short for scheme {scheme!r}: {least} or more"
            raise RefusalError(400, "invalid_request", message, field)
        if asked > worker.longest_seq_len:
            message = f"{field}: {asked} is more than the {worker.longest_seq_len} positions of {worker.model}"
            raise RefusalError(400, "invalid_request", message, field)
        return asked

    async def _callback(self, url: str) -> tuple[str, str | None]:
        """Return the name of the receiver at `url`, and its URL, unless it is a configured one."""
        asked, receivers = self._parts.control.asked, self._parts.receivers
        async with asyncio.timeout(STORE_SECONDS):
            try:
                found = await receivers.callback(url, wanted=asked.callback if asked else None)
            except CallbackError as error:
                status_, code = (429, "too_many_callbacks") if error.full else (403, "callback_refused")
                raise RefusalError(
                    status_,
                    code,
                    f"callback_url: {error}",
                    "callback_url",
                    headers=AGAIN if error.full else None,
                ) from None
        return found.name, None if found in receivers.configured else found.url

    async def validate(self, request: web.Request) -> web.Response:
        """Judge a batch: recompute its distances and apply the terms of the requested round.

        The terms are those of the round that was requested through the API, else of the configuration. The verdict is
        answered, and POSTed to every configured receiver and to the round's callback_url, + /validated. A verdict that
        takes longer than 30 seconds, or is not waited for, is returned by `GET /api/v1/pow/validate/{id}`.
        The same call again gives the same answer, without computing it anew.
        """
        query = parse_query(request, ValidateQuery)
        if (query.sample is None) != (query.seed is None):
            missing = "sample" if query.sample is None else "seed"
            raise RefusalError(400, "invalid_request", f"{missing}: sample and seed go together", missing)
        claim = (await parse_body(request, AnyClaim, most_values=MOST_VALUES, pair=VECTOR_FIELD)).root
        terms = self._terms()
        try:
            check(claim, terms)
        except MismatchError as error:
            raise RefusalError(409, error.code, str(error), error.field) from None
        most = self._parts.settings.validation.max_nonces
        count = len(set(claim.nonces))
        count = count if query.sample is None else min(count, query.sample)
        if count > most:
            message = f"nonces: {count} are more than validation.max_nonces {most}; give ?sample={most}&seed=… or less"
            raise RefusalError(400, "invalid_request", message, "nonces")
        asked = self._parts.control.asked
        callback = (asked.callback, asked.callback_url) if asked else (None, None)
        wanted = ValidationRequest(claim, terms, query.sample, query.seed, *callback)
        async with asyncio.timeout(STORE_SECONDS):
            try:
                found = await self._parts.validator.ask(wanted)
            except QueueFullError as error:
                raise RefusalError(429, "queue_full", f"{error}; try again later", headers=AGAIN) from None
        if query.wait and found.state == "pending":
            found = await self._parts.validator.until_finished(found.id, WAIT_SECONDS) or found
        return _verdict(found)

    async def validation(self, request: web.Request) -> web.Response:
        """Return a validation: its verdict, once there is one."""
        name = request.match_info["id"]
        async with asyncio.timeout(STORE_SECONDS):
            found = await self._parts.validator.find(name)
        if found is None:
            raise RefusalError(404, "not_found", f"no validation {name} is in the store; old ones are pruned", "id")
        return _verdict(found)

    def _terms(self) -> Terms:
        """Return the terms that a batch is judged by now."""
        settings, asked, worker = self._parts.settings, self._parts.control.asked, self._parts.workers.info
        if worker is None or not self._parts.workers.ready.is_set():
            raise _loading("no model is ready to recompute distances")
        tolerance = settings.validation.tolerance
        return Terms(
            r_target=asked.round.r_target if asked else settings.round.target,
            fraud_threshold=asked.fraud_threshold if asked else settings.validation.fraud_threshold,
            mismatch=settings.validation.mismatch,
            tolerance=default_tolerance(worker.dtype, SCHEMES[settings.round.scheme], worker.hidden_size)
            if tolerance is None
            else tolerance,
            scheme=settings.round.scheme,
            model=settings.model.name,
            model_fingerprint=worker.fingerprint,
            dtype=worker.dtype,
            seq_len=asked.round.seq_len if asked else settings.round.seq_len,
            node_count=asked.node.count if asked else settings.node.node_count,
            revision=settings.model.revision,
            allowance=settings.validation.allowance,
        )


def _loading(why: str) -> RefusalError:
    return RefusalError(503, "loading", f"{why}; see /readyz, and try again later", headers=AGAIN)


def _verdict(found: Validation) -> web.Response:
    if found.state == "failed":
        raise RefusalError(503, "no_result", f"nothing was judged: {found.reason}; POST the batch again to try again")
    if found.answer is None:
        return answer(verdict.Waiting(id=found.id, state="pending"), 202)
    return web.Response(body=found.answer, content_type="application/json")
