"""The OpenAPI document, the page and the running daemon say and do the same."""

from __future__ import annotations

import asyncio
import re
import sys
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
import pytest
from pydantic import ValidationError

from pocd.admin import answers
from pocd.admin.client import call
from pocd.admin.docs import DocsApi, render
from pocd.admin.guard import OPEN_PATHS
from pocd.admin.openapi import document
from pocd.admin.operations import METHODS, Error, all_answers
from pocd.admin.requests import InitBody
from pocd.admin.server import AdminApi
from pocd.clock import SYSTEM
from pocd.config.listeners import AdminSettings
from pocd.observe.events import Events
from pocd.validation.claim import AnyClaim
from pocd.validation.conditions import Conditions
from tests.support.processes import Chain, config, running
from tests.support.waiting import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from pydantic import BaseModel

    from pocd.admin.operations import Operation

# What a route does is tested against the daemon; what it is called needs none of its parts.
PARTS: Any = SimpleNamespace(events=Events(SYSTEM), log=None, settings=SimpleNamespace(admin=AdminSettings()))


def api() -> AdminApi:
    return AdminApi(PARTS, lambda: None)


def described(secured: Collection[str] = ()) -> dict[str, Any]:
    operations = api().all_operations()
    return document([*operations, *DocsApi(operations, secured).operations()], secured)


def test_the_document_has_every_route_and_no_other() -> None:
    routes = {
        (route.method, route.resource.canonical)
        for route in api().application(None).router.routes()
        if route.resource and route.method != "HEAD"
    }
    paths = described()["paths"]
    assert routes == {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert ("GET", "/api/v1/pow/status") in routes


def test_every_operation_is_described() -> None:
    for path, methods in described(METHODS)["paths"].items():
        for operation in methods.values():
            assert operation["summary"], path
            assert operation["responses"], path
            assert "403" in operation["responses"], path
            assert ("401" in operation["responses"]) == ("security" in operation) == (path not in OPEN_PATHS)


def test_reads_may_be_open_while_writes_ask_for_the_token() -> None:
    paths = described({"POST"})["paths"]
    assert "security" not in paths["/api/v1/pow/status"]["get"]
    assert paths["/api/v1/pow/stop"]["post"]["security"] == [{"token": []}]


def test_without_a_token_none_is_asked_for() -> None:
    text = orjson.dumps(described()).decode()
    assert "401" not in text
    assert "security" not in text


# An init names what it did not use; a batch is what its miner made of it, and what is no number in it counts.
FROM_OTHERS = {InitBody, AnyClaim}


@pytest.mark.parametrize("operation", api().all_operations(), ids=lambda each: f"{each.method} {each.path}")
def test_what_is_parsed_knows_all_its_fields_and_gives_an_example(operation: Operation) -> None:
    for model in filter(None, (operation.query, operation.body)):
        if model not in FROM_OTHERS:
            assert model.model_config.get("extra") == "forbid", "what is not known must not be dropped silently"
            assert model.model_config.get("allow_inf_nan") is False
    if operation.body:
        for example in operation.body.model_json_schema()["examples"]:
            operation.body.model_validate_json(orjson.dumps(example), strict=True)


def test_bodies_show_everything_that_decides_a_result() -> None:
    shown = described()
    for name in ("InitBody", "Claim", "VectorClaim", "Params"):
        assert set(Conditions.model_fields) <= set(shown["components"]["schemas"][name]["properties"])
    for call_ in ("init", "init/generate", "init/validate", "validate"):
        assert "`mismatch`" in shown["paths"][f"/api/v1/pow/{call_}"]["post"]["responses"]["409"]["description"]


def test_an_operation_may_say_more_of_a_common_answer() -> None:
    (readyz,) = (each for each in api().all_operations() if each.path == "/readyz")
    assert all_answers(readyz, METHODS)[503] is answers.Readiness


class _Balance(HTMLParser):
    """Checks that tags are closed in order, and notes ids and links."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        self.ids |= {str(values["id"])} if "id" in values else set()
        self.links |= {str(values["href"])} if "href" in values else set()
        assert "src" not in values
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_from_outside() -> None:
    made = described(METHODS)
    made["info"]["description"] = "<script>alert(1)</script>"
    page = render(made, "http://127.0.0.1:8460")
    looked = _Balance()
    looked.feed(page)
    assert not looked.open
    assert "script" not in looked.tags
    assert {link for link in looked.links if not link.startswith("#")} == {"/openapi.json"}
    assert {link[1:] for link in looked.links if link.startswith("#")} <= looked.ids
    for path in made["paths"]:
        assert path.replace("{id}", "ID") in page
    assert "Authorization: Bearer $TOKEN" in page
    assert "at least 1, at most 1000" in page
    assert len(page) < 120_000


async def get(url: str, path: str, token: str, **headers: str) -> aiohttp.ClientResponse:
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}", **headers}) as session:
        response = await session.get(url + path)
        await response.read()
        return response


async def conforms(url: str, path: str, model: type[BaseModel], token: str) -> Any:  # noqa: ANN401 - a model's instance
    raw = await (await get(url, path, token)).read()
    try:
        return model.model_validate_json(raw, strict=True, extra="forbid")
    except ValidationError as error:
        raise AssertionError(f"{path} answers {raw!r}, but {error}") from None


# Only what no document can tell: /readyz answers 503 as it should, GET /api/v1/outbox/{id} takes "purge" for an id,
# and some fields have to fit each other: `node_id` and `node_count`, `sample` and `seed`, `nonces` and `dist`.
SCHEMATHESIS = """
[checks]
allow_header_conformance.enabled = false
[[operations]]
include-path = "/readyz"
checks.not_a_server_error.enabled = false
[[operations]]
include-path-regex = "^/api/v1/pow/(init|validate)"
checks.positive_data_acceptance.enabled = false
"""


async def schemathesis(folder: Path, url: str, token: str) -> str:
    """Try the daemon by its own document; everything is tried but its end and the stream, which has none."""
    settings = folder / "schemathesis.toml"
    settings.write_text(SCHEMATHESIS)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(settings), "run", f"{url}/openapi.json"),
        *("--exclude-path", "/shutdown", "--exclude-path", "/api/v1/pow/events"),
        *("--phases", "examples,coverage,fuzzing", "--generation-deterministic", "--max-examples", "20"),
        *("--header", f"Authorization: Bearer {token}", "--request-timeout", f"{PATIENCE:.0f}", "--no-color"),
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert process.returncode == 0, out.decode()
    return out.decode()


async def test_the_daemon_answers_as_its_document_says(tmp_path: Path) -> None:
    token = "correct-horse"
    (tmp_path / "token").write_text(token)
    async with Chain().served() as chain:
        path = config(tmp_path, chain.url, {"one": "http://127.0.0.1:9"}, admin__token_file=str(tmp_path / "token"))
        async with running(path) as daemon:
            loading = await conforms(daemon.url, "/api/v1/pow/status", answers.Status, token)
            assert loading.receivers
            async with asyncio.timeout(PATIENCE):
                while not (await call(daemon.url, "GET", "/api/v1/outbox", token=token))["batches"]:
                    assert daemon.process.returncode is None
                    await asyncio.sleep(0.05)
            mining = await conforms(daemon.url, "/api/v1/pow/status", answers.Status, token)
            assert isinstance(mining.worker, answers.ReadyWorkersStatus)
            assert mining.round
            page = await conforms(daemon.url, "/api/v1/outbox", answers.Page, token)
            await conforms(daemon.url, f"/api/v1/outbox/{page.batches[0].id}", answers.Shown, token)
            await conforms(daemon.url, "/api/v1/outbox/nosuch", Error, token)

            shown = await get(daemon.url, "/docs", token)
            assert shown.headers["Content-Security-Policy"] == "default-src 'none'; style-src 'unsafe-inline'"
            assert daemon.url in await shown.text()
            odd = await get(daemon.url, "/docs", token, Host="127.0.0.1:99999")
            assert (odd.status, "http://127.0.0.1:99999/" in await odd.text()) == (200, True)

            await call(daemon.url, "POST", "/api/v1/pow/stop", token=token)  # until it is told to go on, like all else
            said = await schemathesis(tmp_path, daemon.url, token)
            paths = (await (await get(daemon.url, "/openapi.json", token)).json())["paths"]
            count = sum(map(len, paths.values())) - 3  # its end, the stream, and the document, which it has read
            assert re.search(rf"Tested: {count}\n", said), said
            raised = {each["exc_type"] for entry in daemon.entries() for each in entry.get("exception", [])}
            assert raised <= {"BadHttpMessage"}, raised  # the one thing that it sends which is no HTTP
            assert await daemon.end() == 0
