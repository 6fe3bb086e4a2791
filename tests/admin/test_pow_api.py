"""The API that orchestrators speak, against a real daemon: a client of the earlier API, and what that one got wrong."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import os
import signal
import sqlite3
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
import pytest
import pytest_asyncio

from pocd.admin.client import call
from pocd.lab import command
from pocd.store.outbox import Outbox
from pocd.validation.claim import LARGEST_CLAIM
from tests.support.delivering import Request, Server, serving
from tests.support.forking import at_work
from tests.support.processes import Chain, Daemon, config
from tests.support.processes import running as daemon_running
from tests.support.waiting import PATIENCE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

MODEL = "bundled:tiny-llama"
POW = "/api/v1/pow"

pytestmark = pytest.mark.asyncio(loop_scope="module")


def computed(
    block_hash: str, public_key: str, nonces: list[int], *, seq_len: int = 16, scheme: str = "poc2"
) -> list[float]:
    """Distances by the command line's way, without a daemon."""
    request = command.ComputeRequest(
        model=MODEL,
        scheme=scheme,
        block_hash=block_hash,
        public_key=public_key,
        seq_len=seq_len,
        dtype="float32",
        device="cpu",
        batch_size=8,
    )
    return [distance for _, distance in command.distances(request, nonces)]


@dataclass
class Api:
    """A daemon, its chain, a receiver of the configuration and one for callbacks, and a client."""

    daemon: Daemon
    chain: Chain
    configured: Server
    server: Server
    session: aiohttp.ClientSession

    @property
    def callback(self) -> str:
        return f"{self.server.url}/callback"

    async def post(self, path: str, body: Any = None, **query: str) -> tuple[int, Any]:  # noqa: ANN401 - JSON
        """POST, and return the status and the answer. Bytes go as they are."""
        data = None if body is None else io.BytesIO(body if isinstance(body, bytes) else orjson.dumps(body))
        async with self.session.post(f"{self.daemon.url}{POW}{path}", data=data, params=query) as response:
            return response.status, await response.json()

    async def done(self, path: str, body: Any = None, **query: str) -> dict[str, Any]:  # noqa: ANN401 - JSON
        status, answer = await self.post(path, body, **query)
        if status == 202:  # a verdict that took longer than a call waits
            return await self.verdict(answer["id"])
        assert status == 200, answer
        assert isinstance(answer, dict)
        return answer

    async def delivered(self, server: Server, kind: str, block_hash: str) -> dict[str, Any]:
        """Wait for a batch of a round at a receiver."""
        async with asyncio.timeout(PATIENCE):
            while True:
                request: Request = await server.requests.get()
                body: dict[str, Any] = orjson.loads(request.body)
                if request.path.endswith(f"/{kind}") and body["block_hash"] == block_hash:
                    return body

    async def verdict(self, name: str) -> dict[str, Any]:
        """Poll a validation until it is done."""
        async with asyncio.timeout(PATIENCE):
            while True:
                async with self.session.get(f"{self.daemon.url}{POW}/validate/{name}") as response:
                    answer: dict[str, Any] = await response.json()
                    if response.status != 202:
                        assert response.status == 200, answer
                        return answer
                await asyncio.sleep(0.05)

    async def found(self, least: int) -> dict[str, Any]:
        return await self.daemon.until(lambda body: body["total_valid"] >= least)


@contextlib.asynccontextmanager
async def serving_api(folder: Path, **changes: Any) -> AsyncIterator[Api]:  # noqa: ANN401 - of the configuration
    async with (
        Chain().served() as chain,
        serving() as configured,
        serving() as server,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE)) as session,
    ):
        changes = {"admin__callback_origins": [server.url]} | changes
        path = config(folder, chain.url, {"main": configured.url}, **changes)
        async with daemon_running(path) as daemon:
            api = Api(daemon, chain, configured, server, session)
            await api.daemon.until(lambda body: body["worker"]["ready"])
            yield api


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Api]:
    async with serving_api(tmp_path_factory.mktemp("pow")) as api:
        yield api


@pytest_asyncio.fixture(loop_scope="module")
async def api(shared: Api) -> AsyncIterator[Api]:
    """The daemon, as it follows the chain."""
    shared.server.answers.clear()
    await shared.done("/resume")
    yield shared
    await shared.done("/resume")


def init_body(api: Api, block_hash: str, **changes: Any) -> dict[str, Any]:  # noqa: ANN401 - of the body
    """What a vLLM-based node's client sends."""
    known: dict[str, Any] = {
        "block_hash": block_hash,
        "block_height": 100,
        "public_key": "02ab",
        "r_target": 1.414,
        "fraud_threshold": 0.01,
        "node_id": 0,
        "node_count": 1,
        "batch_size": 32,
        "seq_len": 16,
        "callback_url": api.callback,
    }
    return known | changes


# A client of the earlier API, unchanged


async def test_a_client_of_the_earlier_api_drives_it_with_its_own_bodies(api: Api) -> None:
    """The bodies are those of the Go orchestrator (`url`) and of its Python test client."""
    body = {
        "block_hash": "C0FFEE",
        "block_height": 4_100_000,
        "public_key": "gonka1abc",
        "batch_size": 100,
        "r_target": 1.41,
        "fraud_threshold": 0.01,
        "node_id": 1,
        "node_count": 2,
        "url": api.callback,
    }
    answer = await api.done("/init/generate", body)
    assert answer["status"] == "OK"
    assert answer["ignored"] == ["batch_size"]
    assert answer["pow_status"]["is_model_initialized"] is True
    status = await api.found(4)
    assert status["state"] == status["status"] == "GENERATING"
    assert (status["r_target"], status["round"]["block_height"]) == (1.41, 4_100_000)
    assert len(status["valid_nonces"]) == len(status["valid_distances"]) > 0
    assert status["total_checked"] >= status["total_valid"] >= 4
    assert status["elapsed_seconds"] > 0
    assert status["rate_per_second"] > 0

    batch = await api.delivered(api.server, "generated", "C0FFEE")
    assert {name: batch[name] for name in ("public_key", "block_height", "node_id", "r_target")} == {
        "public_key": "gonka1abc",
        "block_height": 4_100_000,
        "node_id": 1,
        "r_target": 1.41,
    }
    assert all(nonce % 2 == 1 for nonce in batch["nonces"])
    assert batch["dist"] == pytest.approx(computed("C0FFEE", "gonka1abc", batch["nonces"]), abs=1e-5)
    # Every receiver of the configuration gets it too.
    assert (await api.delivered(api.configured, "generated", "C0FFEE"))["batch_id"]

    assert (await api.done("/phase/validate"))["state"] == "VALIDATING"
    fields = ("public_key", "block_hash", "block_height", "nonces", "dist", "node_id")
    verdict = await api.done("/validate", {name: batch[name] for name in fields})
    assert verdict["nonces"] == batch["nonces"]
    assert (verdict["n_invalid"], verdict["fraud_detected"], verdict["probability_honest"]) == (0, False, 1.0)
    assert (verdict["received_dist"], verdict["r_target"]) == (batch["dist"], 1.41)
    assert await api.delivered(api.server, "validated", "C0FFEE") == verdict
    assert await api.delivered(api.configured, "validated", "C0FFEE") == verdict

    assert (await api.done("/phase/generate"))["state"] == "GENERATING"
    assert (await api.done("/stop"))["pow_status"]["state"] == "STOPPED"
    assert (await api.done("/stop"))["status"] == "OK"
    assert (await api.daemon.status())["total_valid"] >= 4  # what was done is still told


async def test_the_chains_rounds_come_back_with_resume(api: Api) -> None:
    height = (await api.daemon.until(lambda body: body["round"]))["round"]["block_height"]
    await api.done("/init/generate", init_body(api, "ours"))
    api.chain.height += 1
    await api.daemon.until(lambda body: body["chain"]["height"] == api.chain.height)
    status = await api.daemon.status()
    assert (status["round"]["block_hash"], status["control"]["mode"]) == ("ours", "GENERATING")
    answer = await api.done("/resume")
    assert api.chain.height == height + 1
    await api.daemon.until(lambda body: body["round"] and body["round"]["block_height"] == api.chain.height)
    assert answer["pow_status"]["control"] == {"mode": "FOLLOWING", "asked": None}


# Each known defect of earlier implementations (docs/protocol.md section 7)


async def test_init_then_phase_generate_refused(api: Api) -> None:
    assert (await api.done("/init", init_body(api, "init first")))["state"] == "IDLE"
    assert (await api.done("/phase/generate"))["state"] == "GENERATING"
    await api.found(1)


async def test_generating_or_validating_after_stop_with_the_layer_transforms_silently_gone(api: Api) -> None:
    await api.done("/init/generate", init_body(api, "stopped"))
    await api.found(4)
    await api.done("/stop")
    nonces = [3, 1, 4, 159]
    expected = computed("stopped", "02ab", nonces)
    claim = {"public_key": "02ab", "block_hash": "stopped", "block_height": 100, "nonces": nonces, "dist": [1.0] * 4}
    verdict = await api.done("/validate", claim)
    assert verdict["dist"] == pytest.approx(expected, abs=1e-5)
    assert (await api.post("/phase/generate"))[0] == 409
    await api.done("/init/generate", init_body(api, "stopped"))
    status = await api.found(4)
    assert status["valid_distances"] == pytest.approx(computed("stopped", "02ab", status["valid_nonces"]), abs=1e-5)


async def test_a_dist_list_of_another_length_skipping_the_fraud_check(api: Api) -> None:
    claim = {"public_key": "k", "block_hash": "b", "block_height": 1, "nonces": [1, 2, 3], "dist": [1.0, 1.0]}
    status, answer = await api.post("/validate", claim)
    assert (status, answer["error"]["field"]) == (400, "dist")


@pytest.mark.parametrize("literal", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"null"])
async def test_nan_or_infinity_passing_as_valid(api: Api, literal: bytes) -> None:
    claim = b'{"public_key": "k", "block_hash": "b", "block_height": 1, "nonces": [1, 2], "dist": [1.0, %b]}' % literal
    verdict = await api.done("/validate", claim)
    assert (verdict["received_dist"][1], verdict["valid"][1], verdict["non_finite"]) == (None, False, 1)
    assert verdict["n_invalid"] >= 1


async def test_body_block_hash_and_block_height_ignored_when_validating(api: Api) -> None:
    """What is recomputed is the body's block, whatever round is in hand."""
    await api.done("/init/validate", init_body(api, "in hand"))
    for block_hash, key in (("elsewhere", "02ab"), ("in hand", "02ab"), ("in hand", "02cd")):
        claim = {"public_key": key, "block_hash": block_hash, "block_height": 7, "nonces": [5, 6], "dist": [1.0, 1.0]}
        verdict = await api.done("/validate", claim)
        assert (verdict["block_hash"], verdict["block_height"]) == (block_hash, 7)
        assert verdict["dist"] == pytest.approx(computed(block_hash, key, [5, 6]), abs=1e-5)


async def test_a_callbacks_http_status_ignored(api: Api) -> None:
    """A batch that the callback answered with 500 comes again, with the same bytes and id, until it is taken."""
    while not api.server.requests.empty():
        api.server.requests.get_nowait()
    api.server.then(500, 503)
    await api.done("/init/generate", init_body(api, "again"))
    requests: list[Request] = []
    async with asyncio.timeout(PATIENCE):
        while len(requests) < 3:
            requests.append(await api.server.requests.get())
    assert len({(request.id, request.body) for request in requests}) == 1


async def test_re_init_while_generating_answering_500(api: Api) -> None:
    for block_hash in ("first", "second", "second", "first"):
        answer = await api.done("/init/generate", init_body(api, block_hash))
        assert answer["pow_status"]["round"]["block_hash"] == block_hash
    checked = (await api.found(1))["total_checked"]
    # The same body once more changes nothing, and begins nothing anew.
    assert (await api.done("/init/generate", init_body(api, "first")))["pow_status"]["total_checked"] >= checked


async def test_two_init_calls_racing(api: Api) -> None:
    hashes = [f"race {number}" for number in range(8)]
    answers = await asyncio.gather(*(api.done("/init/generate", init_body(api, each)) for each in hashes))
    assert [answer["pow_status"]["round"]["block_hash"] for answer in answers] == hashes
    status = await api.found(1)
    last = status["round"]["block_hash"]
    assert status["valid_distances"] == pytest.approx(computed(last, "02ab", status["valid_nonces"]), abs=1e-5)


async def test_unbounded_queues(tmp_path: Path) -> None:
    """Validations that nobody computes yet are queued up to the limit; the next is told when to come again."""
    async with serving_api(tmp_path, validation__max_queued=2, validation__max_nonces=4) as api:
        worker = at_work((await api.daemon.status())["worker"]["pid"])
        os.kill(worker, signal.SIGSTOP)
        claims = [claim_of("queued", [number], [1.0]) for number in range(3)]
        states = [await api.post("/validate", claim, wait="false") for claim in claims]
        assert [status for status, _ in states] == [202, 202, 429]
        assert states[2][1]["error"]["code"] == "queue_full"
        async with api.session.post(f"{api.daemon.url}{POW}/validate", data=orjson.dumps(claims[2])) as response:
            assert int(response.headers["Retry-After"]) > 0
        # The same question again is no further one.
        assert await api.post("/validate", claims[0], wait="false") == states[0]
        assert states[0][1] == {"id": states[0][1]["id"], "state": "pending"}
        with contextlib.suppress(ProcessLookupError):  # replaced, where that took longer than its silence may
            os.kill(worker, signal.SIGCONT)
        for _, answer in states[:2]:
            verdict = await api.verdict(answer["id"])
            assert verdict["dist"] == pytest.approx(computed("queued", "02ab", verdict["nonces"]), abs=1e-5)
        await api.done("/validate", claims[2])

        status, answer = await api.post("/validate", claim_of("queued", [1, 2, 3, 4, 5], [1.0] * 5))
        assert (status, answer["error"]["field"]) == (400, "nonces")
        status, answer = await api.post("/validate", b" " * (LARGEST_CLAIM + 1))
        assert (status, answer["error"]["code"]) == (413, "request_entity_too_large")
        status, answer = await api.post("/init", b" " * (64 * 1024 + 1))
        assert (status, answer["error"]["code"]) == (413, "request_entity_too_large")
        await of_what_is_refused_nothing_is_in_the_store(api, tmp_path / "outbox.db")


# Validation


def claim_of(block_hash: str, nonces: list[int], dist: list[float], **more: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    return {
        "public_key": "02ab",
        "block_hash": block_hash,
        "block_height": 1,
        "nonces": nonces,
        "dist": dist,
        "node_id": 0,
        **more,
    }


async def test_a_sample_is_drawn_by_the_callers_seed_and_by_nothing_else(api: Api) -> None:
    nonces = list(range(60))
    claim = claim_of("sampled", nonces, computed("sampled", "02ab", nonces))
    drawn = sorted(nonces, key=lambda nonce: hashlib.sha256(f"mine_sample_{nonce}".encode()).digest())[:5]
    verdict = await api.done("/validate", claim, sample="5", seed="mine")
    assert sorted(verdict["nonces"]) == sorted(drawn)
    assert (verdict["n"], verdict["n_batch"], verdict["seed"]) == (5, 60, "mine")
    for query in ({"sample": "5"}, {"seed": "mine"}):
        status, answer = await api.post("/validate", claim, **query)
        assert (status, answer["error"]["field"]) == (400, "seed" if "sample" in query else "sample")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scheme", "trained"),
        ("model_fingerprint", "0" * 32),
        ("model", "another/model"),
        ("dtype", "bfloat16"),
        ("seq_len", 1),
        ("r_target", 2.0),
    ],
)
async def test_a_batch_that_was_made_otherwise_is_refused_and_not_called_fraud(
    api: Api, field: str, value: object
) -> None:
    status, answer = await api.post("/validate", claim_of("other", [1], [1.0], **{field: value}))
    assert (status, answer["error"]["code"], answer["error"]["field"]) == (409, "mismatch", field)


async def test_a_batch_of_this_daemon_is_found_honest_by_it_as_it_is_sent(api: Api) -> None:
    await api.done("/init/generate", init_body(api, "as sent"))
    batch = await api.delivered(api.server, "generated", "as sent")
    verdict = await api.done("/validate", batch)
    assert (verdict["n_invalid"], verdict["fraud_detected"], verdict["suspicions"]) == (0, False, [])


async def test_a_forged_batch_is_fraud_whatever_is_mined(api: Api) -> None:
    await api.done("/init/generate", init_body(api, "mined"))
    nonces = list(range(40))
    verdict = await api.done("/validate", claim_of("forged", nonces, [1.3] * 40))
    truth = computed("forged", "02ab", nonces)
    assert verdict["dist"] == pytest.approx(truth, abs=1e-5)
    assert verdict["n_invalid"] == sum(distance >= 1.414 + verdict["tolerance"] for distance in verdict["dist"])
    assert verdict["fraud_detected"]
    assert (await api.daemon.status())["state"] == "GENERATING"


async def test_what_is_asked_for_wrongly_is_refused_by_its_field_and_changes_nothing(api: Api) -> None:
    before = (await api.daemon.status())["control"]
    for changes, field in (
        ({"block_hash": ""}, "block_hash"),
        ({"block_height": -1}, "block_height"),
        ({"block_height": "100"}, "block_height"),
        ({"r_target": 0}, "r_target"),
        ({"r_target": 2.5}, "r_target"),
        ({"fraud_threshold": 1}, "fraud_threshold"),
        ({"node_id": 3, "node_count": 3}, "node_id"),
        ({"node_count": 0}, "node_count"),
        ({"node_count": -2}, "node_count"),
        ({"node_count": 1_000_001}, "node_count"),
        ({"seq_len": 0}, "seq_len"),
        ({"seq_len": 10**6}, "seq_len"),
        ({"callback_url": "http://127.0.0.1:1/other"}, "callback_url"),
        ({"callback_url": "http://169.254.169.254/latest"}, "callback_url"),
        ({"callback_url": f"{api.server.url}/?next=1"}, "callback_url"),
        ({"callback_url": api.server.url.replace("http://", "http://user@")}, "callback_url"),
        ({"callback_url": 7}, "callback_url"),
    ):
        status, answer = await api.post("/init/generate", init_body(api, "wrong") | changes)
        refused = answer["error"]["code"] == "callback_refused"
        assert (status, answer["error"]["field"]) == (403 if refused else 400, field), (changes, answer)
        assert answer["error"]["message"].startswith(f"{field}:" if not refused else field), answer
    assert (await api.post("/init", b"not JSON"))[1]["error"]["code"] == "malformed_json"
    assert (await api.daemon.status())["control"] == before


# A round for another model


def live_body(api: Api, **changes: Any) -> dict[str, Any]:  # noqa: ANN401 - of the body
    """What the orchestrator of the live network sends, and a target."""
    known = {
        "block_hash": "9B4C",
        "block_height": 6_450_112,
        "public_key": "02b463",
        "node_id": 3,
        "node_count": 8,
        "params": {"model": MODEL, "seq_len": 16},
        "url": api.callback,
        "r_target": 1.41,
    }
    return known | changes


async def decided(api: Api) -> tuple[Any, ...]:
    """What the daemon does, and what was asked of it."""
    status = await api.daemon.status()
    return status["control"], status["state"], status["round"]


@pytest.mark.parametrize("call_", ["/init", "/init/generate", "/init/validate"])
@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        (
            {"params": {"model": "MiniMaxAI/MiniMax-M2.7", "seq_len": 1024}},
            "params.model",
            f"'MiniMaxAI/MiniMax-M2.7' is asked for, but this daemon runs '{MODEL}'; nothing was changed",
        ),
        ({"model": "tiny-llama"}, "model", f"'tiny-llama' is asked for, but this daemon runs '{MODEL}'"),
        ({"params": {"model": MODEL, "k_dim": 12}}, "params.k_dim", "12 is asked for, but this daemon runs none"),
        ({"poc_stronger_rng": True}, "poc_stronger_rng", "True is asked for, but this daemon runs False"),
        ({"params": {"seq_len": 40}, "seq_len": 16}, "params.seq_len", "40 contradicts seq_len, which is 16"),
        ({"params": {"dim": 1024, "n_heads": 32}}, "params", "'dim', 'n_heads': this daemon does not know them"),
    ],
)
async def test_a_round_for_another_model_is_refused_and_changes_nothing(
    api: Api, call_: str, changes: dict[str, Any], field: str, message: str
) -> None:
    await api.done("/init/validate", init_body(api, "before"))  # so that nothing changes by itself
    before = await decided(api)
    status, answer = await api.post(call_, live_body(api, **changes))
    assert (status, answer["error"]["code"], answer["error"]["field"]) == (409, "mismatch", field)
    assert answer["error"]["message"].startswith(f"{field}: {message}")
    assert await decided(api) == before


async def of_what_is_refused_nothing_is_in_the_store(api: Api, path: Path) -> None:
    refused: dict[str, Any] = {"block_hash": "refused", "params": {"model": "another/model"}}
    await api.done("/init/validate", init_body(api, "before"))
    for call_ in ("/init", "/init/generate", "/init/validate"):
        assert (await api.post(call_, live_body(api, **refused)))[0] == 409
    assert (await api.post("/validate", claim_of(nonces=[1], dist=[1.0], **refused)))[0] == 409
    await api.daemon.end()
    with contextlib.closing(sqlite3.connect(path)) as store:
        rounds = [orjson.loads(text)["block_hash"] for (text,) in store.execute("SELECT round FROM rounds")]
        control = store.execute("SELECT value FROM meta WHERE key = 'control'").fetchone()
        validated = [bytes(request) for (request,) in store.execute("SELECT request FROM validations")]
    assert "before" in rounds
    assert "refused" not in rounds
    assert (orjson.loads(control[0])["mode"], orjson.loads(control[0])["asked"]["round"]["block_hash"]) == (
        "VALIDATING",
        "before",
    )
    assert all(b'"queued"' in request for request in validated)
    assert len(validated) == 3


async def test_a_round_that_names_what_the_daemon_runs_is_mined(api: Api) -> None:
    fingerprint = (await api.daemon.status())["worker"]["fingerprint"]
    named = {"model": MODEL, "model_fingerprint": fingerprint, "dtype": "float32", "scheme": "poc2", "k_dim": None}
    body = live_body(api, params=named | {"seq_len": 40, "batch_size": 8}, poc_stronger_rng=False, **named)
    answer = await api.done("/init/generate", body)
    assert answer["ignored"] == ["params.batch_size"]
    assert answer["pow_status"]["round"]["seq_len"] == 40
    status = await api.found(2)
    expected = computed("9B4C", "02b463", status["valid_nonces"], seq_len=40)
    assert status["valid_distances"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"params": 7}, "params"),
        ({"params": []}, "params"),
        ({"params": {"model": 7}}, "params.model"),
        ({"params": {"seq_len": "16"}}, "params.seq_len"),
        ({"params": {"seq_len": 0}}, "params.seq_len"),
        ({"params": {"seq_len": 10**6}}, "params.seq_len"),
        ({"params": {"k_dim": 1.5}}, "params.k_dim"),
        ({"model": ["a"]}, "model"),
        ({"poc_stronger_rng": "no"}, "poc_stronger_rng"),
    ],
)
async def test_what_names_a_round_wrongly_is_refused(api: Api, changes: dict[str, Any], field: str) -> None:
    before = (await api.daemon.status())["control"]
    status, answer = await api.post("/init", live_body(api, **changes))
    assert (status, answer["error"]["code"]) == (400, "invalid_request")
    assert answer["error"]["message"].startswith(f"{field}: ")
    assert (await api.daemon.status())["control"] == before


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ({"params": {"model": "another/model"}}, "params.model"),
        ({"params": {"seq_len": 1}}, "params.seq_len"),
        ({"params": {"n_layers": 3}}, "params"),
        ({"revision": "main"}, "revision"),
        ({"k_dim": 12}, "k_dim"),
    ],
)
async def test_a_batch_that_names_another_making_in_any_place_is_not_judged(
    api: Api, said: dict[str, Any], field: str
) -> None:
    await api.done("/init/validate", init_body(api, "before"))  # so that nothing changes by itself
    before = await decided(api)
    claim = claim_of("elsewhere made", [1], [1.0], **said)
    status, answer = await api.post("/validate", claim, wait="false")
    assert (status, answer["error"]["code"], answer["error"]["field"]) == (409, "mismatch", field)
    assert await decided(api) == before


async def test_a_batch_that_names_in_params_what_the_daemon_runs_is_judged(api: Api) -> None:
    claim = claim_of("made here", [1, 2], [1.0, 1.0], params={"model": MODEL, "seq_len": 16})
    verdict = await api.done("/validate", claim)
    assert verdict["dist"] == pytest.approx(computed("made here", "02ab", [1, 2]), abs=1e-5)


async def test_what_is_left_out_or_minus_one_is_as_configured(api: Api) -> None:
    body = {"block_hash": "short", "block_height": 1, "public_key": "02ab", "r_target": 1.41}
    for changes in ({}, {"node_id": -1, "node_count": -1}):
        round_ = (await api.done("/init", body | changes))["pow_status"]["round"]
        assert (round_["node_id"], round_["node_count"], round_["seq_len"]) == (1, 3, 16)


async def test_a_round_of_another_sequence_length_is_computed_as_such(api: Api) -> None:
    await api.done("/init/generate", init_body(api, "longer", seq_len=40))
    status = await api.found(3)
    expected = computed("longer", "02ab", status["valid_nonces"], seq_len=40)
    assert status["valid_distances"] == pytest.approx(expected, abs=1e-5)
    claim = claim_of("longer", status["valid_nonces"], status["valid_distances"], seq_len=40)
    assert (await api.done("/validate", claim))["n_invalid"] == 0
    assert (await api.daemon.status())["worker"]["restarts"] == 0


async def test_what_happens_is_told_as_it_happens(api: Api) -> None:
    told: dict[str, list[dict[str, Any]]] = {}

    async def listen(wanted: set[str]) -> None:
        kind = ""
        while not wanted <= set(told):
            line = (await stream.content.readline()).decode().rstrip()
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            elif line.startswith("data: "):
                told.setdefault(kind, []).append(orjson.loads(line.removeprefix("data: ")))

    async with api.session.get(f"{api.daemon.url}{POW}/events") as stream, asyncio.timeout(PATIENCE):
        round_ = (await api.done("/init/generate", init_body(api, "told")))["pow_status"]["round"]
        await listen({"round", "batch", "delivery"})
        verdict = await api.done("/validate", claim_of("told", [1, 2], [1.0, 1.0]))
        await api.done("/stop")
        await listen({"validation", "state"})
        os.kill((await api.daemon.status())["worker"]["pid"], signal.SIGKILL)
        await listen({"worker"})
        api.chain.height += 1
        await listen({"block"})
    assert told["round"][0]["id"] == round_["id"]
    assert (told["round"][0]["by"], told["round"][0]["height"]) == ("api", 100)
    batches = {event["id"]: event for event in told["batch"]}
    delivered = [event for event in told["delivery"] if event["id"] in batches]
    assert {event["outcome"] for event in delivered} == {"delivered"}
    assert {event["state"] for event in told["validation"]} == {"pending", "done"}
    assert verdict["n"] == 2
    assert told["state"][-1]["state"] == "STOPPED"
    assert told["worker"][0]["what"] == "restarting"
    assert told["worker"][0]["cause"] == "crash"
    assert "signal 9" in told["worker"][0]["reason"]
    assert told["block"][-1]["height"] == api.chain.height
    await api.daemon.until(lambda body: body["worker"]["ready"])


# Losing nothing


async def test_batches_lost_at_stop_at_a_phase_change_or_at_a_restart(tmp_path: Path) -> None:
    """With both receivers down all the while, and the daemon killed in the end: each proof arrives, once, in order."""
    async with serving_api(tmp_path, delivery__batch_seconds=60) as api:
        changes = (("/stop", None), ("/phase/validate", None), ("/init/generate", init_body(api, "other")))
        api.server.then(*[503] * 1000)
        api.configured.then(*[503] * 1000)
        for path, body in changes:
            before = (await api.done("/init/generate", init_body(api, "kept")))["pow_status"]["total_valid"]
            await api.found(before + 3)
            await api.done(path, body)
        await api.found(1)
        await api.daemon.end(signal.SIGKILL)
        urls = [api.server.url, api.configured.url]
        api.server.answers.clear()
        api.configured.answers.clear()
        again = config(tmp_path, api.chain.url, {"main": urls[1]}, admin__callback_origins=[urls[0]])
        async with daemon_running(again) as api.daemon:
            status = await api.daemon.status()
            assert status["control"]["mode"] == "GENERATING", "the round that was asked for goes on"
            assert status["control"]["asked"]["block_hash"] == "other"
            await api.done("/stop")
            for receiver in status["receivers"]:  # which have failed for a while: do not wait for them
                await call(api.daemon.url, "POST", "/api/v1/outbox/retry", body={"receiver": receiver["name"]})
            await api.daemon.until(lambda body: body["funnel"]["delivered"] == body["funnel"]["valid"])
            await api.daemon.end()
        with contextlib.closing(Outbox.open(tmp_path / "outbox.db")) as outbox:
            totals = outbox.totals
        everything, asked_for = ordered(api.configured), ordered(api.server)
    assert totals.valid == totals.delivered == sum(map(len, everything.values()))
    assert asked_for == {block_hash: everything[block_hash] for block_hash in ("kept", "other")}
    assert all(len(set(nonces)) == len(nonces) for nonces in everything.values())


def ordered(server: Server) -> dict[str, list[int]]:
    """The nonces that a receiver got of each round, each batch once, in the order of first arrival."""
    got: dict[str, list[int]] = {}
    seen = set[str]()
    while not server.requests.empty():
        request = server.requests.get_nowait()
        if request.id not in seen:
            seen.add(request.id)
            body = orjson.loads(request.body)
            got.setdefault(body["block_hash"], []).extend(body["nonces"])
    return got


async def test_a_daemon_of_poc3_expects_and_tolerates_what_its_hidden_size_says(tmp_path: Path) -> None:
    async with serving_api(tmp_path, round__scheme="poc3", round__r_target=1.3315) as api:
        status, answer = await api.post("/init/generate", init_body(api, "short", seq_len=3))
        assert (status, answer["error"]["field"]) == (400, "seq_len")
        assert answer["error"]["message"] == "seq_len: 3 is too short for scheme 'poc3': 6 or more"
        await api.done("/init/generate", init_body(api, "hidden", r_target=1.3315))
        found = await api.found(2)
        assert found["round"]["expected_valid_rate"] == pytest.approx(0.1, abs=1e-4)
        expected = computed("hidden", "02ab", found["valid_nonces"], scheme="poc3")
        assert found["valid_distances"] == pytest.approx(expected, abs=2e-5)
        claim = claim_of("hidden", found["valid_nonces"], found["valid_distances"])
        verdict = await api.done("/validate", claim | {"scheme": "poc3"})
        assert (verdict["n_invalid"], verdict["tolerance"]) == (0, pytest.approx(1.6e-4))


async def test_a_daemon_of_poc4_mines_delivers_and_judges_vectors(tmp_path: Path) -> None:
    async with serving_api(tmp_path, round__scheme="poc4", round__r_target=None) as api:
        body = init_body(api, "vectors", params={"k_dim": 12})
        status, answer = await api.post("/init/generate", body)
        assert (status, answer["error"]["field"]) == (409, "r_target")
        assert "every nonce with a finite vector is valid; nothing was changed" in answer["error"]["message"]
        del body["r_target"]
        await api.done("/init/generate", body)
        found = await api.found(2)
        assert (found["r_target"], found["valid_distances"], found["round"]["expected_valid_rate"]) == (None, [], 1.0)
        assert found["total_valid"] == found["total_checked"]

        batch = await api.delivered(api.server, "generated", "vectors")
        await api.done("/stop")  # thousands of vectors a second would come that nobody looks at
        assert batch["encoding"] == {"dtype": "f16", "k_dim": 12, "endian": "le"}
        nonces = [artifact["nonce"] for artifact in batch["artifacts"]]
        assert nonces == list(range(len(nonces)))
        verdict = await api.done("/validate", batch)
        assert (verdict["nonces"], verdict["impossible_claims"], verdict["fraud_detected"]) == (nonces, 0, False)

        halves = len(nonces) // 2
        rotated = [nonces[halves:] + nonces[:halves], batch["artifacts"]]
        others = [artifact | {"nonce": nonce} for nonce, artifact in zip(*rotated, strict=True)]
        assert (await api.done("/validate", batch | {"artifacts": others}))["verdict"] == "fraud"
        odd = [{"nonce": 0, "vector_b64": None}, {"nonce": 1, "vector_b64": "AAAA"}, *batch["artifacts"][2:]]
        assert (await api.done("/validate", batch | {"artifacts": odd}))["impossible_claims"] == 2

        for wrong, expected, field in (
            ({"artifacts": [{"nonce": 0, "vector_b64": "?"}]}, 400, "artifacts"),
            ({"encoding": {"dtype": "f32", "k_dim": 12, "endian": "le"}}, 400, "encoding"),
            ({"k_dim": 8}, 409, "k_dim"),
        ):
            status, answer = await api.post("/validate", batch | wrong)
            assert (status, answer["error"]["field"]) == (expected, field)
        status, answer = await api.post("/validate", claim_of("vectors", [0], [1.0]))
        assert (status, answer["error"]["code"], answer["error"]["field"]) == (409, "mismatch", "dist")
