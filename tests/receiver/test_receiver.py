"""The reference receiver over real sockets and a real SQLite file."""

import asyncio
import gzip
import hashlib
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from pocd.http.server import DEFAULT_BOUNDS, Bounds, listening
from pocd.http.webhooks import WebhookKeys, unsigned_headers
from pocd.protocol.bodies import MOST_VALUES
from pocd.protocol.proof import ProofBatch, Proofs, Round
from pocd.receiver import store as receiver_store
from pocd.receiver.app import MAX_BODY_BYTES, application, serve
from pocd.receiver.store import Arrival, ReceiverStoreBusyError, ReceiverStoreError, Store
from pocd.validation.claim import Claim, parse_json
from pocd.validation.verdict import Recomputed, Terms, judge
from tests.support.stored import VECTORS, proofs_of
from tests.support.waiting import PATIENCE, soon

NOW = 1_700_000_000
AT = "2023-11-14T22:13:20.000+00:00"
KEYS = WebhookKeys.parse("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
ROUND = Round("ABC", 7, "miner", 1.4, "poc2", "tiny", 16)
GENERATED = {
    "public_key": "miner",
    "block_hash": "ABC",
    "block_height": 7,
    "nonces": [3, 5],
    "dist": [1.25, 1],
    "node_id": 0,
    "something_else": None,
}
VALIDATED = GENERATED | {
    "received_dist": [1.25, None],
    "r_target": 1.4,
    "fraud_threshold": 0.01,
    "n_invalid": 1,
    "probability_honest": 0.001,
    "fraud_detected": True,
}


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: Any


@dataclass(frozen=True, slots=True)
class Client:
    """Speaks to a running receiver."""

    session: aiohttp.ClientSession
    store: Store
    port: int

    async def call(
        self, method: str, path: str, data: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Answer:
        # A stream, because aiohttp warns of big bodies as bytes.
        stream = None if data is None else BytesIO(data)
        async with self.session.request(method, path, data=stream, headers=headers) as response:
            return Answer(response.status, orjson.loads(await response.read()))

    async def get(self, path: str) -> Any:  # noqa: ANN401 - JSON
        answer = await self.call("GET", path)
        assert answer.status == 200, answer
        return answer.body

    async def post(self, body: object, message_id: str | None = None, kind: str = "generated") -> Answer:
        data = body if isinstance(body, bytes) else orjson.dumps(body)
        headers = None if message_id is None else unsigned_headers(message_id, NOW)
        return await self.call("POST", f"/{kind}", data, headers)

    async def totals(self) -> dict[str, int]:
        """Return the counts of /stats that are not zero."""
        return {name: count for name, count in (await self.get("/stats")).items() if name != "rounds" and count}


@asynccontextmanager
async def receiver(
    path: Path, keys: WebhookKeys | None = None, bounds: Bounds = DEFAULT_BOUNDS
) -> AsyncIterator[Client]:
    store = await Store.open(path)
    app = application(store, keys, clock=lambda: NOW)
    try:
        timeout = aiohttp.ClientTimeout(total=PATIENCE)
        async with listening(app, "127.0.0.1", 0, shutdown_timeout=PATIENCE, bounds=bounds) as url:
            async with aiohttp.ClientSession(url, timeout=timeout) as session:
                yield Client(session, store, int(url.rpartition(":")[2]))
    finally:
        await store.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "received.sqlite"


@pytest.fixture
async def client(path: Path) -> AsyncIterator[Client]:
    async with receiver(path) as running:
        yield running


def rows(path: Path) -> int:
    """Count the batches that another process would see."""
    with closing(sqlite3.connect(path)) as other:
        (count,) = other.execute("SELECT count(*) FROM batches").fetchone()
        return int(count)


async def test_a_batch_is_stored(client: Client) -> None:
    assert await client.post(GENERATED, "a") == Answer(200, {"status": "stored", "id": "a"})
    assert await client.post(VALIDATED, "b", "validated") == Answer(200, {"status": "stored", "id": "b"})
    first, second = (await client.get("/batches"))["batches"]
    assert first == {
        "seq": 1,
        "id": "a",
        "kind": "generated",
        "received_at": AT,
        "attempts": 1,
        "batch": GENERATED,
    }
    assert (second["kind"], second["batch"]) == ("validated", VALIDATED)
    assert await client.get("/stats") == {
        "batches": 1,
        "nonces": 2,
        "distinct_nonces": 2,
        "duplicates": 0,
        "conflicts": 0,
        "rejected": 0,
        "validated_batches": 1,
        "rounds": [
            {
                "block_hash": "ABC",
                "block_height": 7,
                "public_key": "miner",
                "nonces": 2,
                "batches": 1,
                "first_at": AT,
                "last_at": AT,
            }
        ],
    }
    assert await client.get("/health") == {"status": "ok"}


async def test_a_verdict_is_taken_as_pocd_sends_it(client: Client) -> None:
    """Also one on claims that were no numbers."""
    body = GENERATED | {"nonces": [3, 5, 5], "dist": [1.25, None, 3]}
    claim = parse_json(Claim, orjson.dumps(body))
    terms = Terms(1.4, 0.01, 5e-4, 1e-5, "poc2", "tiny", "f00d", "float32", 16, 1)
    batch = judge(claim, terms, Recomputed({3: (1.25,), 5: (1.5,)}), sample=2, seed="s")
    assert await client.post(batch.to_json(), kind="validated") == Answer(200, {"status": "stored", "id": batch.id})
    (item,) = (await client.get("/batches"))["batches"]
    assert (item["kind"], item["batch"]) == ("validated", orjson.loads(batch.to_json()))


async def test_the_bytes_come_back_as_they_came(client: Client) -> None:
    body = orjson.dumps(GENERATED | {"dist": [1.0, 2]}).replace(b"1.0", b"1.000e0 ")
    await client.post(body, "a")
    async with client.session.get("/batches") as response:
        assert body in await response.read()


async def test_a_repeat_is_stored_once(client: Client) -> None:
    await client.post(GENERATED, "a")
    for _ in range(2):
        assert await client.post(GENERATED, "a") == Answer(200, {"status": "duplicate", "id": "a"})
    assert await client.totals() == {"batches": 1, "nonces": 2, "distinct_nonces": 2, "duplicates": 2}
    (item,) = (await client.get("/batches"))["batches"]
    assert item["attempts"] == 3


async def test_of_simultaneous_attempts_one_is_stored(client: Client) -> None:
    answers = await asyncio.gather(*(client.post(GENERATED, "a") for _ in range(20)))
    assert sorted(answer.body["status"] for answer in answers) == ["duplicate"] * 19 + ["stored"]
    assert (await client.totals())["duplicates"] == 19


async def test_another_body_under_the_same_id_is_a_conflict(client: Client) -> None:
    await client.post(VALIDATED, "a")
    for body, kind in ((GENERATED, "generated"), (VALIDATED, "validated")):
        answer = await client.post(body, "a", kind)
        assert (answer.status, answer.body["error"]["code"]) == (409, "conflict")
    assert await client.totals() == {"batches": 1, "nonces": 2, "distinct_nonces": 2, "conflicts": 2}
    (item,) = (await client.get("/batches"))["batches"]
    assert (item["batch"], item["attempts"]) == (VALIDATED, 1)


async def test_the_id_is_the_header_or_the_batch_id_or_a_hash(client: Client) -> None:
    batch = ProofBatch(ROUND, 0, "f00d", "float32", Proofs.of_distances([(3, 1.25)]))
    assert (await client.post(batch.to_json(), "header")).body["id"] == "header"
    assert (await client.post(batch.to_json())).body["id"] == batch.id
    nameless = orjson.dumps(GENERATED)
    assert (await client.post(nameless)).body["id"] == hashlib.sha256(nameless).hexdigest()
    assert (await client.post(nameless)).body["status"] == "duplicate"


async def test_a_batch_of_vectors_is_stored_and_its_nonces_counted(client: Client) -> None:
    batch = ProofBatch(VECTORS, 0, "f00d", "float16", proofs_of(VECTORS, range(0, 40_000, 2)))
    again = ProofBatch(VECTORS, 0, "f00d", "float16", proofs_of(VECTORS, range(39_998, 40_010)))
    assert (await client.post(batch.to_json())).body == {"status": "stored", "id": batch.id}
    assert (await client.post(batch.to_json())).body == {"status": "duplicate", "id": batch.id}
    assert (await client.post(again.to_json())).status == 200
    validated = VALIDATED | {"vectors": ["AAAA"] * 2, "received_vectors": ["AAAA", None]}
    validated = {name: value for name, value in validated.items() if name not in {"dist", "received_dist", "r_target"}}
    assert (await client.post(validated, kind="validated")).status == 200
    counts = {"batches": 2, "nonces": 20_012, "distinct_nonces": 20_011, "duplicates": 1, "validated_batches": 1}
    assert await client.totals() == counts
    assert (await client.get("/batches"))["batches"][0]["batch"] == orjson.loads(batch.to_json())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"encoding": {"dtype": "f32", "k_dim": 12, "endian": "le"}}, "encoding"),
        ({"encoding": None}, "encoding"),
        ({"artifacts": []}, "artifacts"),
        ({"artifacts": [{"nonce": 1, "vector_b64": "AAAA"}]}, "artifacts"),
        ({"artifacts": [{"nonce": 1, "vector_b64": "?"}]}, "artifacts"),
        ({"artifacts": [{"nonce": 1, "vector_b64": "AH4A" + "A" * 28}]}, "artifacts"),
        ({"artifacts": [{"nonce": -1, "vector_b64": "A" * 32}]}, "artifacts"),
        ({"artifacts": [{"nonce": 1}]}, "artifacts"),
    ],
    ids=["encoding", "no encoding", "empty", "short", "no base64", "NaN", "nonce", "no vector"],
)
async def test_what_is_no_batch_of_vectors_is_refused(client: Client, change: dict[str, object], field: str) -> None:
    body = orjson.loads(ProofBatch(VECTORS, 0, "f00d", "float16", proofs_of(VECTORS, [1])).to_json())
    answer = await client.post(body | change)
    assert (answer.status, answer.body["error"]["field"]) == (400, field)
    assert await client.totals() == {"rejected": 1}


async def test_distinct_nonces_are_counted_by_round_and_key(client: Client) -> None:
    await client.post(GENERATED | {"nonces": [1, 1, 2], "dist": [1, 1, 1]}, "a")
    await client.post(GENERATED | {"nonces": [2, 3], "block_height": 8}, "b")
    await client.post(GENERATED | {"nonces": [1, 2], "public_key": "other"}, "c")
    await client.post(GENERATED | {"nonces": [3, 1]}, "d")
    await client.post(VALIDATED | {"nonces": [8, 9]}, "e", "validated")
    assert await client.totals() == {"batches": 4, "nonces": 9, "distinct_nonces": 5, "validated_batches": 1}
    first, second = (await client.get("/stats"))["rounds"]
    assert (first["public_key"], first["nonces"], first["batches"], first["block_height"]) == ("miner", 7, 3, 7)
    assert (second["public_key"], second["nonces"], second["batches"]) == ("other", 2, 1)


async def test_stats_list_the_newest_twenty_rounds(client: Client) -> None:
    for number in [*range(25), 0]:
        await client.post(GENERATED | {"block_hash": f"{number}"})
        await client.post(GENERATED | {"block_hash": f"{number}", "nonces": [number, 99]})
    rounds = (await client.get("/stats"))["rounds"]
    assert [int(round_["block_hash"]) for round_ in rounds] == list(range(24, 4, -1))
    await client.post(GENERATED | {"block_hash": "0", "nonces": [98, 99]})
    assert (await client.get("/stats"))["rounds"][0]["block_hash"] == "0"


async def test_everything_survives_a_restart(path: Path) -> None:
    async with receiver(path) as client:
        await client.post(GENERATED, "a")
        await client.post(GENERATED, "a")
        await client.post(VALIDATED, "a")
        await client.post(b"{", "b")
        before = await client.get("/stats"), await client.get("/batches")
    async with receiver(path) as client:
        assert (await client.get("/stats"), await client.get("/batches")) == before
        assert (await client.post(GENERATED, "a")).body["status"] == "duplicate"
        await client.post(GENERATED | {"nonces": [5, 6]}, "c")
        assert (await client.totals())["distinct_nonces"] == 3


async def test_pages(client: Client) -> None:
    for number in range(5):
        await client.post(GENERATED | {"nonces": [number, 9]}, f"g{number}")
        await client.post(VALIDATED | {"nonces": [number, 9]}, f"v{number}", "validated")

    seen, after, pages = [], 0, 0
    while after is not None:
        page = await client.get(f"/batches?limit=2&kind=validated&after={after}")
        seen += page["batches"]
        after, pages = page["next"], pages + 1
    assert [item["id"] for item in seen] == ["v0", "v1", "v2", "v3", "v4"]
    assert [item["seq"] for item in seen] == [2, 4, 6, 8, 10]
    assert pages == 3

    assert [item["id"] for item in (await client.get("/batches?after=8"))["batches"]] == ["g4", "v4"]
    assert await client.get("/batches?after=10") == {"batches": [], "next": None}
    assert (await client.get("/batches?limit=10"))["next"] is None
    assert (await client.get("/batches?limit=9"))["next"] == 9


async def test_a_page_ends_early_at_big_bodies(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver_store, "PAGE_BYTES", 250)
    for number in range(3):
        await client.post(GENERATED, f"small {number}".replace(" ", "-"))
    await client.post(GENERATED | {"x": "y" * 300}, "big")
    pages, after = [], 0
    while after is not None:
        page = await client.get(f"/batches?after={after}")
        pages.append([item["id"] for item in page["batches"]])
        after = page["next"]
    assert pages == [["small-0", "small-1"], ["small-2"], ["big"]]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("after=-1", "after"),
        ("after=x", "after"),
        ("after=9223372036854775808", "after"),
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("kind=other", "kind"),
    ],
)
async def test_a_bad_query_is_refused(client: Client, query: str, field: str) -> None:
    answer = await client.call("GET", f"/batches?{query}")
    assert (answer.status, answer.body["error"]["field"]) == (400, field)


async def test_clear_empties_and_goes_on_counting_seq(client: Client) -> None:
    await client.post(GENERATED, "a")
    await client.post(GENERATED, "a")
    answer = await client.call("DELETE", "/clear")
    assert answer.status == 200
    assert answer.body["status"] == "cleared"
    removed = {"batches": 1, "nonces": 2, "distinct_nonces": 2, "duplicates": 1}
    assert {name: count for name, count in answer.body["removed"].items() if count} == removed
    assert await client.totals() == {}
    assert (await client.get("/stats"))["rounds"] == []
    assert (await client.post(GENERATED, "a")).body["status"] == "stored"
    assert (await client.totals())["distinct_nonces"] == 2
    # Whoever pages with after=1 must see it.
    assert [item["seq"] for item in (await client.get("/batches?after=1"))["batches"]] == [2]


NOT_OBJECTS = [
    (b"", "malformed_json"),
    (b"{", "malformed_json"),
    (b'{"a":\xff}', "malformed_json"),
    (b'{"block_height": NaN}', "malformed_json"),
    (b'{"block_height": 1e999}', "malformed_json"),
    (b"[1]", "not_an_object"),
    (b"null", "not_an_object"),
    (b'"text"', "not_an_object"),
]


@pytest.mark.parametrize(("body", "code"), NOT_OBJECTS)
async def test_what_is_no_json_object_is_refused(client: Client, body: bytes, code: str) -> None:
    answer = await client.post(body)
    assert answer.status == 400
    assert (answer.body["error"]["code"], answer.body["error"]["field"]) == (code, None)
    assert await client.totals() == {"rejected": 1}


BAD_FIELDS: list[tuple[str, object, str]] = [
    ("public_key", 1, "public_key: Input should be a valid string"),
    ("block_hash", None, "block_hash: Input should be a valid string"),
    ("block_height", "7", "block_height: Input should be a valid integer"),
    ("block_height", 7.0, "block_height: Input should be a valid integer"),
    ("block_height", True, "block_height: Input should be a valid integer"),
    ("block_height", 2**63, "block_height: Input should be less than or equal to 9223372036854775807"),
    ("block_height", -1, "block_height: Input should be greater than or equal to 0"),
    ("node_id", False, "node_id: Input should be a valid integer"),
    ("node_id", -1, "node_id: Input should be greater than or equal to 0"),
    ("nonces", [], "nonces: List should have at least 1 item after validation, not 0"),
    ("nonces", 3, "nonces: Input should be a valid list"),
    ("nonces", [3, -1], "nonces[1]: Input should be greater than or equal to 0"),
    ("nonces", [3, 2**63], "nonces[1]: Input should be less than or equal to 9223372036854775807"),
    ("nonces", [True, 3], "nonces[0]: Input should be a valid integer"),
    ("nonces", [3, 5.0], "nonces[1]: Input should be a valid integer"),
    ("nonces", [3], "dist: 2 values for 1 nonces"),
    ("dist", [1.0], "dist: 1 values for 2 nonces"),
    ("dist", [1.0, None], "dist[1]: Input should be a valid number"),
    ("dist", [True, 1.0], "dist[0]: Input should be a valid number"),
    ("dist", ["1", 1.0], "dist[0]: Input should be a valid number"),
    ("dist", {"0": 1.0}, "dist: Input should be a valid list"),
    ("batch_id", "", "batch_id: String should have at least 1 character"),
]
BAD_VALIDATED_FIELDS: list[tuple[str, object, str]] = [
    ("received_dist", [1.0], "received_dist: 1 values for 2 nonces"),
    ("received_dist", [1.0, "NaN"], "received_dist[1]: Input should be a valid number"),
    ("r_target", "1.4", "r_target: Input should be a valid number"),
    ("fraud_threshold", None, "fraud_threshold: Input should be a valid number"),
    ("n_invalid", -1, "n_invalid: Input should be greater than or equal to 0"),
    ("probability_honest", 1.5, "probability_honest: Input should be less than or equal to 1"),
    ("fraud_detected", 1, "fraud_detected: Input should be a valid boolean"),
]


def field_of(message: str) -> str:
    return message.partition(":")[0].partition("[")[0]


@pytest.mark.parametrize(
    ("kind", "field", "value", "message"),
    [("generated", *case) for case in BAD_FIELDS]
    + [("validated", *case) for case in BAD_FIELDS + BAD_VALIDATED_FIELDS],
)
async def test_each_bad_field_is_named(client: Client, kind: str, field: str, value: object, message: str) -> None:
    body = (GENERATED if kind == "generated" else VALIDATED) | {field: value}
    answer = await client.post(body, kind=kind)
    error = {"code": "invalid_body", "message": message, "field": field_of(message)}
    assert answer == Answer(400, {"error": error})
    assert await client.totals() == {"rejected": 1}


@pytest.mark.parametrize("field", sorted(VALIDATED.keys() - {"something_else", "node_id"}))
async def test_each_missing_field_is_named(client: Client, field: str) -> None:
    kind = "generated" if field in GENERATED else "validated"
    body = {name: value for name, value in VALIDATED.items() if name != field}
    error = {"code": "invalid_body", "message": f"{field}: Field required", "field": field}
    assert await client.post(body, kind=kind) == Answer(400, {"error": error})


async def test_the_limits_of_each_number_are_stored(client: Client) -> None:
    edge = {"nonces": [0, 2**63 - 1], "block_height": 2**63 - 1, "node_id": 2**63 - 1, "dist": [0, -1e308]}
    assert (await client.post(GENERATED | edge)).status == 200
    assert (await client.get("/stats"))["rounds"][0]["block_height"] == 2**63 - 1


@pytest.mark.parametrize("message_id", ["a.b", "a b", "é", "a" * 257, ""])
async def test_a_bad_webhook_id_is_refused(client: Client, message_id: str) -> None:
    answer = await client.call("POST", "/generated", orjson.dumps(GENERATED), {"webhook-id": message_id})
    assert (answer.status, answer.body["error"]["field"]) == (400, "webhook-id")


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "identity, gzip"])
async def test_a_compressed_body_is_refused_and_never_unpacked(client: Client, coding: str) -> None:
    packed = gzip.compress(orjson.dumps(GENERATED))
    answer = await client.call("POST", "/generated", packed, {"Content-Encoding": coding})
    assert (answer.status, answer.body["error"]["code"]) == (415, "compressed_body")
    assert await client.totals() == {"rejected": 1}


async def test_a_body_of_more_values_than_a_batch_can_have_is_not_parsed(client: Client) -> None:
    start, *_, end = orjson.dumps(GENERATED | {"unknown": []}).partition(b"]}")
    values = MOST_VALUES - start.count(b",")
    for unknown in ([b"0"] * (values + 2), [b"{}"] * 100_000):
        answer = await client.post(start + b",".join(unknown) + b"]}" + end, "a")
        assert (answer.status, answer.body["error"]["code"]) == (400, "too_many_values")
    assert await client.totals() == {"rejected": 2}
    assert (await client.post(start + b",".join([b"0"] * (values + 1)) + b"]}" + end, "a")).status == 200


async def test_a_web_page_can_neither_put_in_nor_clear(client: Client) -> None:
    """Not even one whose name was made to point here, which is of our origin for its browser."""
    for origin in ("http://evil.example", f"http://127.0.0.1:{client.port}", "null"):
        for method, path in (("POST", "/generated"), ("DELETE", "/clear")):
            answer = await client.call(method, path, orjson.dumps(GENERATED), {"Origin": origin})
            assert (answer.status, answer.body["error"]["code"]) == (403, "foreign_origin")
    assert await client.totals() == {}


async def test_a_body_of_16_mib_and_no_more(client: Client) -> None:
    start = orjson.dumps(GENERATED)
    full = start + b" " * (MAX_BODY_BYTES - len(start))
    answer = await client.post(full + b" ", "a")
    assert (answer.status, answer.body["error"]["code"]) == (413, "request_entity_too_large")
    assert await client.totals() == {"rejected": 1}
    assert (await client.post(full, "a")).body == {"status": "stored", "id": "a"}


HALF_A_POST = b"POST /generated HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"


async def test_a_sender_that_stalls_is_refused(path: Path) -> None:
    async with receiver(path, bounds=Bounds(body=0.01)) as client:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        writer.write(HALF_A_POST)
        assert b" 408 " in await soon(reader.readline())
        writer.close()
        await writer.wait_closed()
        assert await client.totals() == {"rejected": 1}


async def test_a_sender_that_dies_is_refused(
    client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    counted = asyncio.Event()

    async def count_rejected() -> None:
        counted.set()

    monkeypatch.setattr(client.store, "count_rejected", count_rejected)
    _, writer = await asyncio.open_connection("127.0.0.1", client.port)
    writer.write(HALF_A_POST)
    writer.close()
    await writer.wait_closed()
    await soon(counted.wait())
    assert not caplog.records


@pytest.mark.parametrize(("method", "route", "status"), [("GET", "/nowhere", 404), ("GET", "/generated", 405)])
async def test_other_errors_are_json_too(client: Client, method: str, route: str, status: int) -> None:
    answer = await client.call(method, route)
    assert answer.status == status
    assert set(answer.body["error"]) == {"code", "message", "field"}


async def test_a_signature_is_required(path: Path) -> None:
    body = orjson.dumps(GENERATED)
    good = KEYS.headers("a", NOW, body)
    stranger = WebhookKeys.parse("c3RyYW5nZXIgd2l0aCBhIGtleQ==")
    bad = {
        "webhook-signature is missing": unsigned_headers("a", NOW),
        "webhook-id is missing": {},
        "no signature matches": stranger.headers("a", NOW, body),
        "webhook-timestamp is more than 300 s": KEYS.headers("a", NOW - 301, body),
    }
    async with receiver(path, KEYS) as client:
        for reason, headers in bad.items():
            answer = await client.call("POST", "/generated", body, headers)
            assert (answer.status, answer.body["error"]["code"]) == (401, "bad_signature")
            assert reason in answer.body["error"]["message"]
        assert (await client.call("POST", "/generated", body + b" ", good)).status == 401
        assert await client.totals() == {"rejected": 5}
        assert (await client.call("POST", "/generated", body, good)).body == {"status": "stored", "id": "a"}
        later = KEYS.headers("a", NOW + 60, body)
        assert (await client.call("POST", "/generated", body, later)).body == {"status": "duplicate", "id": "a"}


async def test_clear_has_to_be_signed_too(path: Path) -> None:
    async with receiver(path, KEYS) as client:
        assert (await client.call("DELETE", "/clear")).status == 401
        assert (await client.call("DELETE", "/clear", headers=KEYS.headers("clear", NOW, b""))).status == 200


async def test_the_answer_comes_after_the_commit(client: Client, path: Path) -> None:
    """The commit is held up: until it happens there must be no answer, and right after it the batch is there."""
    reached, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def hold_up_commit(statement: str) -> None:
        if statement == "COMMIT":
            loop.call_soon_threadsafe(reached.set)
            go_on.wait(PATIENCE)

    await client.store._run(lambda database: database._db.set_trace_callback(hold_up_commit))
    post = asyncio.create_task(client.post(GENERATED, "a"))
    try:
        await soon(reached.wait())
        # A whole exchange with the server: an answer that does not wait would have come by now.
        assert (await client.call("GET", "/nowhere")).status == 404
        assert not post.done()
        assert rows(path) == 0
    finally:
        go_on.set()
    assert (await post).status == 200
    assert rows(path) == 1


async def test_what_cannot_be_stored_is_not_acknowledged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver_store, "BUSY_TIMEOUT_S", 0)
    async with receiver(path) as client:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            answer = await client.post(GENERATED, "a")
            assert (answer.status, answer.body["error"]["code"]) == (503, "store_failed")
        assert (await client.post(GENERATED, "a")).body["status"] == "stored"


async def test_nothing_is_acknowledged_that_goes_into_a_file_nobody_would_find(client: Client, path: Path) -> None:
    away = path.with_name("away")
    path.rename(away)
    answer = await client.post(GENERATED, "a")
    assert (answer.status, answer.body["error"]["code"]) == (503, "store_failed")
    away.rename(path)
    assert (await client.post(GENERATED, "a")).body["status"] == "stored"
    assert rows(path) == 1


async def test_a_failure_inside_a_transaction_leaves_nothing(client: Client, path: Path) -> None:
    run = client.store._run
    await run(lambda database: database._db.execute("ALTER TABLE totals RENAME TO hidden"))
    assert (await client.post(GENERATED, "a")).status == 503
    assert rows(path) == 0
    await run(lambda database: database._db.execute("ALTER TABLE hidden RENAME TO totals"))
    assert (await client.post(GENERATED, "a")).body["status"] == "stored"


async def test_a_busy_store_refuses_instead_of_queueing(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.store._thread, "_most_waiting", 1)
    reached, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def block() -> None:
        loop.call_soon_threadsafe(reached.set)
        go_on.wait(PATIENCE)

    blocker = asyncio.create_task(client.store._run(lambda _: block()))
    try:
        await soon(reached.wait())
        assert (await client.post(GENERATED, "a")).status == 503
    finally:
        go_on.set()
    await blocker
    assert (await client.post(GENERATED, "a")).status == 200


async def test_a_stuck_store_is_given_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = await Store.open(path)
    go_on = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(receiver_store, "CALL_TIMEOUT_S", 0.01)
        with pytest.raises(ReceiverStoreBusyError, match=f"{path}: no answer within"):
            await store._run(lambda _: go_on.wait(PATIENCE))
    go_on.set()
    await store.close()


def _not_a_database(path: Path) -> None:
    path.write_bytes(b"just some text, longer than a header. " * 100)


def _another_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE notes (text)")


def _a_folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [_not_a_database, _another_database, _a_folder])
async def test_a_store_that_cannot_be_opened_says_why(path: Path, make: Callable[[Path], None]) -> None:
    make(path)
    with pytest.raises(ReceiverStoreError, match=str(path)):
        await serve(host="127.0.0.1", port=0, path=path, keys=None, on_started=None)


async def test_work_does_not_grow_with_what_is_stored(path: Path) -> None:
    """Counted in SQLite's own steps, so that 100,000 batches answer like 100."""

    async def steps(store: Store) -> int:
        count = 0

        def step() -> None:
            nonlocal count
            count += 1

        await store._run(lambda database: database._db.set_progress_handler(step, 1))
        await store.stats()
        await store.page(0, 5, "validated")
        await store.page(30, 5, None)
        await store._run(lambda database: database._db.set_progress_handler(None, 1))
        return count

    store = await Store.open(path)
    try:
        counts = []
        for start in (0, 100):
            for number in range(start, start + 100 + start * 9):
                body = orjson.dumps(number)
                await store.add(Arrival(f"{number}", "generated", AT, body, f"{number}", 1, "miner", (1, 2, 3)))
            counts.append(await steps(store))
    finally:
        await store.close()
    assert counts[0] == counts[1] > 0


async def test_serve_runs_until_cancelled_and_keeps_everything(path: Path) -> None:
    loop = asyncio.get_running_loop()
    for expected in ("stored", "duplicate"):
        started: asyncio.Future[str] = loop.create_future()
        serving = asyncio.create_task(
            serve(host="127.0.0.1", port=0, path=path, keys=None, on_started=started.set_result)
        )
        url = await soon(started)
        headers = unsigned_headers("a", NOW)
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{url}/generated", json=GENERATED, headers=headers) as response,
        ):
            assert (await response.json())["status"] == expected
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await soon(serving)
        # Closed cleanly: SQLite removes its log when the last connection closes.
        assert [file.name for file in path.parent.iterdir()] == [path.name]


async def test_a_port_in_use_is_an_os_error(client: Client, path: Path) -> None:
    with pytest.raises(OSError, match=str(client.port)):
        await serve(host="127.0.0.1", port=client.port, path=path, keys=None, on_started=None)
