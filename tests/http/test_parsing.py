"""Bodies and queries, from raw requests on a real socket to models or refusals."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from typing import TYPE_CHECKING, Annotated, Any

import aiohttp
import orjson
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from pocd.admin.operations import Operation, limit_bodies, routes
from pocd.http.parsing import MOST_NAMES, Input, parse_body, parse_query
from pocd.http.server import LARGE_BODY, RefusalError, errors_as_json, json_answer, listening
from tests.support.waiting import soon

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MOST = 50_000  # values of a large body


class Wish(Input):
    height: int = Field(default=1, ge=0)
    target: float = 1.4
    claims: tuple[Annotated[float, Field(allow_inf_nan=True)], ...] = ()
    names: tuple[Annotated[str, Field(min_length=1)], ...] | None = None


class Question(Input):
    wait: bool = True
    limit: int = Field(default=100, ge=1, le=1000)


async def _body(request: web.Request) -> web.Response:
    return json_answer((await parse_body(request, Wish)).model_dump())


async def _query(request: web.Request) -> web.Response:
    return json_answer(parse_query(request, Question).model_dump())


@contextlib.asynccontextmanager
async def served() -> AsyncIterator[str]:
    table = [
        Operation("POST", "/body", _body, "test", body=Wish, largest_body=1000),
        Operation("POST", "/large", _body, "test", body=Wish, largest_body=100_000),
        Operation("GET", "/query", _query, "test", query=Question),
    ]
    app = web.Application(middlewares=[errors_as_json, limit_bodies(table)])
    app.add_routes(routes(table))
    async with listening(app, "127.0.0.1", 0, shutdown_timeout=1) as url:
        yield url


async def ask(method: str, url: str, data: bytes | None = None, **headers: str) -> tuple[int, Any]:
    async with (
        aiohttp.ClientSession() as session,
        session.request(
            method, url, data=data, headers={key.replace("_", "-"): headers[key] for key in headers}
        ) as got,
    ):
        return got.status, orjson.loads(await got.read())


BODIES: list[tuple[bytes, int, Any]] = [
    (b"", 200, {"height": 1}),
    (b"{}", 200, {"target": 1.4}),
    (b'{"target": 1}', 200, {"target": 1.0}),
    (b'{"names": ["a"]}', 200, {"names": ["a"]}),
    (b'{"claims": [NaN, Infinity, 1]}', 200, {"claims": [None, None, 1.0]}),  # as orjson writes them
    (b'{"target": NaN}', 400, ("invalid_request", "target", "finite")),
    (b'{"height": "7"}', 400, ("invalid_request", "height", "integer")),
    (b'{"height": 7.0}', 400, ("invalid_request", "height", "integer")),
    (b'{"height": true}', 400, ("invalid_request", "height", "integer")),
    (b'{"height": -1}', 400, ("invalid_request", "height", "greater than or equal to 0")),
    (b'{"target": "1.4"}', 400, ("invalid_request", "target", "number")),
    (b'{"names": "a"}', 400, ("invalid_request", "names", "array")),
    (b'{"names": ["a", ""]}', 400, ("invalid_request", "names", "names.1")),
    (b'{"colour": 1}', 400, ("invalid_request", "colour", "known are height, target, claims, names")),
    (b"[]", 400, ("invalid_request", None, "JSON object")),
    (b"null", 400, ("invalid_request", None, "JSON object")),
    (b"{", 400, ("malformed_json", None, "EOF")),
    (b"\xff", 400, ("malformed_json", None, "JSON")),
    (b'{"names": ["\\ud800"]}', 400, ("malformed_json", None, "JSON")),
    (b"[" * 900, 400, ("malformed_json", None, "JSON")),
]


async def test_bodies_are_taken_or_refused_by_field() -> None:
    async with served() as url:
        for body, status, expected in BODIES:
            code, answer = await ask("POST", f"{url}/body", body)
            assert code == status, (body, answer)
            if isinstance(expected, dict):
                assert answer.items() >= expected.items()
            else:
                told = answer["error"]
                assert (told["code"], told["field"], expected[2] in told["message"]) == (*expected[:2], True), answer


async def test_each_operation_has_its_own_largest_body() -> None:
    body = orjson.dumps({"names": ["x" * 5000]})
    async with served() as url:
        code, answer = await ask("POST", f"{url}/body", body)
        assert (code, answer["error"]["code"]) == (413, "request_entity_too_large")
        code, answer = await ask("POST", f"{url}/large", body)
        assert (code, len(answer["names"][0])) == (200, 5000)


@pytest.mark.parametrize(
    ("query", "status", "expected"),
    [
        ("", 200, {"wait": True, "limit": 100}),
        ("?wait=false&limit=7", 200, {"wait": False, "limit": 7}),
        ("?limit=0", 400, ("limit", "greater than or equal to 1")),
        ("?limit=seven", 400, ("limit", "integer")),
        ("?limit=" + "9" * 5000, 400, ("limit", "integer")),
        ("?limit=7&limit=8", 400, ("limit", "once")),
        ("?colour=red", 400, ("colour", "known are wait, limit")),
        ("?wait=%FF", 400, ("wait", "boolean")),
    ],
)
async def test_queries_are_taken_or_refused_by_field(query: str, status: int, expected: Any) -> None:  # noqa: ANN401 - either form
    async with served() as url:
        code, answer = await ask("GET", f"{url}/query{query}")
    assert code == status
    if status == 200:
        assert answer == expected
    else:
        assert (answer["error"]["field"], expected[1] in answer["error"]["message"]) == (expected[0], True)


class _Raw:
    """The one thing that `parse_body` asks of a request."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    async def read(self) -> bytes:
        return self._raw


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from(["height", "target", "claims", "names", "x"]), inner)
    ),
)


@given(st.binary() | JSON.map(lambda value: repr(value).replace("'", '"').encode(errors="surrogatepass")))
async def test_no_body_does_anything_but_parse_or_be_refused(raw: bytes) -> None:
    with contextlib.suppress(RefusalError):
        assert isinstance(await parse_body(_Raw(raw), Wish), Wish)  # type: ignore[arg-type] # all that is used of it


def of(values: int, value: bytes = b"1.5") -> bytes:
    """A body larger than what is parsed at once, of so many values."""
    return b'{"claims":[' + b",".join([value] * values) + b"]}" + b" " * LARGE_BODY


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(of(MOST + 2), id="values"),
        pytest.param(b"[" * (MOST_NAMES + 1) + b" " * LARGE_BODY, id="lists"),
        pytest.param(of(MOST_NAMES + 1, b'{"":0}'), id="fields"),
    ],
)
async def test_a_large_body_that_nobody_can_mean_is_not_unpacked(body: bytes) -> None:
    with pytest.raises(RefusalError) as refused:
        await parse_body(_Raw(body), Wish, most_values=MOST)  # type: ignore[arg-type] # all that is used of it
    assert (refused.value.status, refused.value.code) == (400, "too_many_values")


async def test_large_bodies_are_parsed_one_at_a_time_and_the_loop_gets_a_turn_between_any_two() -> None:
    happened: list[str] = []

    async def parse() -> None:
        await parse_body(_Raw(of(MOST + 1)), Wish, most_values=MOST)  # type: ignore[arg-type] # as above
        happened.append("parsed")

    async def look() -> None:
        while happened.count("parsed") < 20:
            happened.append("turn")
            await asyncio.sleep(0)

    await soon(asyncio.gather(look(), *(parse() for _ in range(20))))
    at = [number for number, what in enumerate(happened) if what == "parsed"]
    assert all("turn" in happened[one:other] for one, other in itertools.pairwise(at))
