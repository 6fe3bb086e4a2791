"""The live network's orchestrator against real daemons: rounds of two nodes, a kill, closed windows, validation."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import signal
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pocd.process import EXIT_FRAUD, EXIT_OK
from pocd.protocol.vectors import decode_vectors, encode_vectors
from tests.support.command_line import pocd_here
from tests.support.orchestrating import (
    CONFIRMATION,
    ENCODING,
    KEY,
    MODEL,
    POW,
    REGULAR,
    SEQ_LEN,
    ask,
    generate_body,
    init_body,
    receiving_callbacks,
)
from tests.support.processes import Chain, Daemon, config, free_port, running
from tests.support.waiting import PATIENCE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from tests.support.orchestrating import Callbacks


def settings(folder: Path, chain: str, callbacks: str, **changes: Any) -> Path:  # noqa: ANN401 - any setting
    folder.mkdir(exist_ok=True)
    given = {
        "round__seq_len": SEQ_LEN,
        "admin__callback_origins": [callbacks],
        "orchestrator__port": free_port(),
        "orchestrator__prefix": "/v3.0.8",
        "orchestrator__aliases": [MODEL],
        "orchestrator__late_seconds": 1.0,
    }
    return config(folder, chain, {}, **given | changes)


@contextlib.asynccontextmanager
async def proving(path: Path) -> AsyncIterator[tuple[Daemon, str]]:
    """A daemon with a worker that is ready, and the URL of its API for orchestrators."""
    async with running(path) as daemon:
        (url,) = (entry["url"] for entry in daemon.entries() if entry["action"] == "orchestrator_listening")
        await daemon.until(lambda body: body["is_model_initialized"])
        yield daemon, url


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - what other processes do sets no event here
            await asyncio.sleep(0.05)


def own_vectors(block_hash: str, nonces: list[int]) -> dict[int, str]:
    """Artifacts by the engine alone."""
    from pocd.compute.engine import block_run
    from pocd.compute.model import load_model
    from pocd.protocol.schemes import SCHEMES

    model = load_model("bundled:tiny-llama", dtype="float32", device="cpu")
    with block_run(model, SCHEMES["artifacts"], block_hash=block_hash, public_key=KEY, seq_len=SEQ_LEN) as run:
        vectors = run.values(nonces, batch_size=8)
    return {nonce: encode_vectors(vector) for nonce, vector in zip(nonces, vectors, strict=True)}


def close(one: str, other: str) -> bool:
    return bool(np.linalg.norm(decode_vectors(one) - decode_vectors(other)) < 1e-2)


def of_node(callbacks: Callbacks, block_hash: str, node: int) -> list[int]:
    return sorted(nonce for nonce in callbacks.artifacts.get(block_hash, {}) if nonce % 2 == node % 2)


async def test_an_epoch_of_two_nodes_with_a_kill_and_closed_windows(tmp_path: Path) -> None:
    async with Chain().served() as chain, receiving_callbacks() as callbacks, contextlib.AsyncExitStack() as stack:
        # Orchestrators number nodes from 1, so the last one's number is their count.
        paths = [settings(tmp_path / str(node), chain.url, callbacks.url) for node in (1, 2)]
        first, url = await stack.enter_async_context(proving(paths[0]))
        async with proving(paths[1]) as (second, other):
            status = {"port": int(url.rpartition(":")[2]), "status": "IDLE", "config": None, "stats": None}
            idle = await ask(url, "GET", f"{POW}/status")
            assert idle[1] | {"late": 0} == {"status": "IDLE", "backends": [status], "late": 0}
            for node, each in enumerate((url, other), start=1):
                code, body = await ask(each, "POST", f"{POW}/init/generate", init_body(callbacks.url, node_id=node))
                assert (code, body["status"], body["backends"], body["n_groups"]) == (200, "OK", 1, 1)
                assert (body["errors"], [result["status"] for result in body["results"]]) == (None, ["OK"])
            again = init_body(callbacks.url, block_hash=CONFIRMATION, block_height=6455000)
            assert await ask(url, "POST", f"{POW}/init/generate", again) == (409, {"detail": "Already generating"})
            _, body = await ask(url, "GET", f"/v3.0.8{POW}/status")
            assert body["status"] == body["backends"][0]["status"] == "GENERATING"
            assert body["backends"][0]["config"] == {
                "block_hash": REGULAR,
                "block_height": 6450112,
                "public_key": KEY,
                "node_id": 1,
                "node_count": 2,
                "group_id": 0,
                "n_groups": 1,
                "seq_len": SEQ_LEN,
                "k_dim": 12,
            }
            assert body["backends"][0]["stats"].keys() == {"total_processed", "nonces_per_second"}
            await until(lambda: min(len(of_node(callbacks, REGULAR, node)) for node in (1, 2)) > 40)
            assert await second.end(signal.SIGKILL) == -signal.SIGKILL
        before = len(of_node(callbacks, REGULAR, 2))
        async with proving(paths[1]) as (second, other):  # goes on by itself
            assert (await ask(other, "GET", f"{POW}/status"))[1]["status"] == "GENERATING"
            await until(lambda: len(of_node(callbacks, REGULAR, 2)) > before + 40)
            for each in (url, other):
                code, body = await ask(each, "POST", f"{POW}/stop", {})
                assert (code, body["status"], body["results"][0]["status"]) == (200, "OK", "stopped")
            await second.until(lambda body: body["funnel"]["valid"] == body["funnel"]["delivered"])
        await first.until(lambda body: body["funnel"]["valid"] == body["funnel"]["delivered"])
        assert callbacks.twice == []
        for node in (1, 2):
            nonces = of_node(callbacks, REGULAR, node)
            assert nonces == list(range(node, node + 2 * len(nonces), 2))
        some = of_node(callbacks, REGULAR, 1)[:40] + of_node(callbacks, REGULAR, 2)[-40:]
        own = own_vectors(REGULAR, some)
        assert all(close(own[nonce], callbacks.artifacts[REGULAR][nonce]) for nonce in some)

        # A confirmation round, during which nobody takes anything: what is left when it is over is set aside, counted.
        callbacks.open = False
        taken = len(callbacks.artifacts[REGULAR])
        confirmation = init_body(callbacks.url, block_hash=CONFIRMATION, block_height=6455000)
        assert (await ask(url, "POST", f"{POW}/init/generate", confirmation))[0] == 200
        await until(lambda: callbacks.refused > 1)
        callbacks.open = True
        await until(lambda: len(callbacks.artifacts.get(CONFIRMATION, ())) > 8)
        callbacks.open = False
        held = (await first.status())["funnel"]
        await first.until(lambda body: body["funnel"]["stored"] > held["stored"])
        await ask(url, "POST", f"{POW}/stop", {})
        ended = await first.until(lambda body: body["funnel"]["expired"] and not any_pending(body))
        assert ended["funnel"]["valid"] == ended["funnel"]["delivered"] + ended["funnel"]["expired"]
        assert len(callbacks.artifacts[REGULAR]) == taken
        _, body = await ask(url, "GET", f"{POW}/status")
        assert body["late"] == {"set_aside": ended["funnel"]["expired"], "waiting": 0}


def any_pending(body: dict[str, Any]) -> bool:
    funnel = body["funnel"]
    return bool(funnel["valid"] - funnel["stored"]) or any(each["pending_batches"] for each in body["receivers"])


async def test_a_node_validates_and_says_what_it_is(tmp_path: Path) -> None:
    async with receiving_callbacks() as callbacks:
        neither = {"node__public_key": None, "node__node_id": None, "node__node_count": None, "chain__urls": None}
        path = settings(tmp_path, "", callbacks.url, **neither)
        async with proving(path) as (daemon, url):
            told = await daemon.status()
            assert (told["node"]["public_key"], told["chain"]["height"], told["problems"]) == (None, None, [])
            await says_what_it_is(url)
            await refuses(url, callbacks.url)
            await computes(url)
            judged = await validates(url, callbacks)
            assert await daemon.end() == 0
    for artifacts, by_api in judged:
        by_file = validated_by_file(tmp_path / "batch.json", artifacts)
        for key in ("n_total", "n_mismatch", "mismatch_nonces", "fraud_detected", "fraud_by_p_value_threshold"):
            assert by_file["network"][key] == by_api["network"][key]
        assert {key: by_file["differences"][key] for key in ("probability_honest", "probability_blank")} == {
            key: pytest.approx(by_api[key], rel=1e-6) for key in ("probability_honest", "probability_blank")
        }
        assert (by_file["verdict"], by_file["differences"]["malformed"]) == (by_api["verdict"], by_api["malformed"])
        assert (by_file["n"], by_file["n_invalid"]) == (200, 0)


async def says_what_it_is(url: str) -> None:
    code, state = await ask(url, "GET", "/v3.0.8/api/v1/state")
    assert (code, state["state"], state["poc_status"], state["inference_healthy"]) == (200, "POW", "IDLE", False)
    assert (await ask(url, "GET", "/health"))[0] == 200
    _, listed = await ask(url, "GET", "/v1/models")
    assert [each["id"] for each in listed["data"]] == ["bundled:tiny-llama", MODEL]
    assert (await ask(url, "GET", "/api/v1/versions"))[1]["poc_validation_inference"] is False
    code, body = await ask(url, "POST", "/api/v1/inference/up", {"model": MODEL})
    assert (code, "only proves" in body["detail"]) == (501, True)
    assert (await ask(url, "GET", "/api/v1/pow/status"))[0] == 404, "the admin API is another"


async def refuses(url: str, callbacks: str) -> None:
    async def init(**changes: Any) -> tuple[int, Any]:  # noqa: ANN401 - JSON
        return await ask(url, "POST", f"{POW}/init/generate", init_body(callbacks, **changes))

    code, body = await init(params={"model": "other/model", "seq_len": SEQ_LEN})
    assert (code, body["detail"]["error"]) == (409, "params mismatch")
    assert body["detail"]["requested"] == {"model": "other/model", "seq_len": SEQ_LEN, "k_dim": 12}
    assert (await init(params={"model": MODEL, "seq_len": 10**6}))[0] == 409
    code, body = await init(params={"model": MODEL, "seq_len": SEQ_LEN, "max_tokens": 256})
    assert (code, body["detail"][0]["type"]) == (422, "extra_forbidden")
    assert body["detail"][0]["loc"] == ["body", "params", "max_tokens"]
    assert (await init(node_id=-1))[0] == (await init(node_count=0))[0] == 422
    code, body = await init(url="http://elsewhere.example/v2")
    assert (code, "admin.callback_origins" in body["detail"]) == (403, True)
    assert (await ask(url, "GET", f"{POW}/status"))[1]["status"] == "IDLE"
    assert (await ask(url, "GET", f"{POW}/generate/none"))[0] == 400
    assert (await ask(url, "GET", f"{POW}/generate/5001:none"))[0] == 404
    claimed = {"artifacts": [{"nonce": 1, "vector_b64": ""}]}
    body = generate_body([1, 2], validation=claimed)
    assert (await ask(url, "POST", f"{POW}/generate", body))[0] == 400
    assert (await ask(url, "GET", "/health", Host="elsewhere.example"))[0] == 403


async def computes(url: str) -> None:
    nonces = [3, 0, 2**31 - 1, *range(10, 20)]
    code, body = await ask(url, "POST", f"{POW}/generate", generate_body(nonces, wait=True))
    assert (code, body["status"], body["encoding"]) == (200, "completed", ENCODING)
    own = own_vectors(REGULAR, nonces)
    assert [each["nonce"] for each in body["artifacts"]] == nonces
    assert all(close(own[each["nonce"]], each["vector_b64"]) for each in body["artifacts"])
    code, other = await ask(url, "POST", f"{POW}/generate", generate_body(nonces, wait=True, poc_stronger_rng=True))
    assert code == 200
    assert not any(close(own[each["nonce"]], each["vector_b64"]) for each in other["artifacts"])


def validated_by_file(path: Path, artifacts: list[dict[str, Any]]) -> dict[str, Any]:
    """What `pocd validate` says of the body that a node posts."""
    body = {"block_hash": REGULAR, "block_height": 6450112, "public_key": KEY, "node_id": 1}
    path.write_text(json.dumps(body | {"artifacts": artifacts, "encoding": ENCODING}))
    here = ("--model=bundled:tiny-llama", "--scheme=artifacts", f"--seq-len={SEQ_LEN}", "--batch-size=8", "--json")
    terms = ("--dist-threshold=0.75", "--p-mismatch=0.1", "--p-value-threshold=0.05")
    ended = pocd_here("validate", path, *here, *terms)
    found: dict[str, Any] = json.loads(ended.stdout)
    assert ended.returncode == {"honest": EXIT_OK, "fraud": EXIT_FRAUD}[found["verdict"]], ended.stderr
    return found


async def validates(url: str, callbacks: Callbacks) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Have artifacts judged of which more and more are wrong; returns them, and the verdict by differences."""
    judged = []
    nonces = list(range(1, 401, 2))
    honest = own_vectors(REGULAR, nonces)
    terms = {"dist_threshold": 0.75, "p_mismatch": 0.1, "p_value_threshold": 0.05}
    for bad, fraud, by_other in ((0, False, False), (28, False, True), (31, True, True), (200, True, True)):
        artifacts = [
            {"nonce": nonce, "vector_b64": negated(honest[nonce]) if i < bad else honest[nonce]}
            for i, nonce in enumerate(nonces)
        ]
        asked = generate_body(
            nonces,
            node_id=1,
            url=init_body(callbacks.url)["url"],
            validation={"artifacts": artifacts},
            stat_test=terms,
        )
        code, queued = await ask(url, "POST", f"{POW}/generate", asked)
        assert (code, queued["status"], queued["queued_count"]) == (200, "queued", 200)
        name = queued["request_id"]
        own_id = name.partition(":")[2]
        await until(partial(callbacks.has_judged, own_id))
        verdict = {
            "n_total": 200,
            "n_mismatch": bad,
            "mismatch_nonces": nonces[:bad],
            "p_value": pytest.approx(callbacks.verdicts[own_id]["p_value"]),
            "fraud_detected": fraud,
        }
        of = {"block_hash": REGULAR, "block_height": 6450112, "public_key": KEY, "node_id": 1}
        assert callbacks.verdicts[own_id] == {"request_id": own_id} | of | verdict
        code, found = await ask(url, "GET", f"{POW}/generate/{name}")
        assert (code, found["status"], found["request_id"]) == (200, "completed", name)
        assert {key: found[key] for key in verdict} == verdict
        assert (found["fraud_threshold"], found["fraud_by_p_value_threshold"]) == (0.01, by_other)
        assert (found["n_excluded"], len(found["distances"])) == (0, 200)
        paired = await judged_by_differences(url, name)
        assert (paired["verdict"], paired["malformed"]) == ("fraud" if bad else "honest", 0)
        assert (paired["probability_honest"] < 1e-4) == bool(bad)
        judged.append((artifacts, paired | {"network": found}))
    return judged


async def judged_by_differences(url: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {"state": "pending"}
    async with asyncio.timeout(PATIENCE):
        while found["state"] == "pending":
            _, body = await ask(url, "GET", f"{POW}/generate/{name}")
            found = body["by_differences"]
            await asyncio.sleep(0.05)
    assert found["state"] == "done"
    return found


def negated(vector: str) -> str:
    return base64.b64encode(bytes(x ^ (0x80 * (i % 2)) for i, x in enumerate(base64.b64decode(vector)))).decode()
