"""Documentation of the API: `/openapi.json`, and `/docs`, one page without script or outside resource."""

from __future__ import annotations

import re
import shlex
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

from pocd.admin.openapi import COMPONENTS, document
from pocd.admin.operations import Media, Operation

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
ANY_ORIGIN = "http://daemon.invalid"  # in place of the host's name by which a reader called it (RFC 6761 section 6.4)
STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: auto; padding: 1rem; }
section { border-top: 1px solid #8886; padding: .5rem 0 1rem; }
h1, h2, h3 { line-height: 1.2; }
h3 { overflow-wrap: anywhere; }
code, pre { font-family: ui-monospace, monospace; font-size: .9em; }
pre { overflow-x: auto; padding: .6rem; background: #8882; border-radius: .3rem; }
table { display: block; overflow-x: auto; border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #8883; }
td:last-child { min-width: 13rem; }
h4 { margin: .5rem 0; }
nav ul { columns: 18rem; list-style: none; padding: 0; }
a { color: LinkText; }
"""


class DocsApi:
    """The routes for the documentation, which describes all operations and these.

    What is answered is made once, when it is first asked for: that takes a tenth of a second, and anybody may ask.
    """

    def __init__(self, operations: Iterable[Operation], secured: Collection[str]) -> None:
        self._operations = [*operations, *self.operations()]
        self._secured = secured

    def operations(self) -> list[Operation]:
        """Return the operations of these routes."""
        anything = Media("application/json", "The document.")
        page = Media("text/html", "The page.")
        return [
            Operation("GET", "/openapi.json", self.openapi, "docs", answers={200: anything}),
            Operation("GET", "/docs", self.docs, "docs", answers={200: page}),
        ]

    @cached_property
    def _document(self) -> dict[str, Any]:
        return document(self._operations, self._secured)

    @cached_property
    def _json(self) -> bytes:
        return orjson.dumps(self._document, option=orjson.OPT_APPEND_NEWLINE)

    @cached_property
    def _page(self) -> str:
        """The page for any origin."""
        return render(self._document, ANY_ORIGIN)

    async def openapi(self, _request: web.Request) -> web.Response:
        """Describe this API as an OpenAPI 3.1 document."""
        return web.Response(body=self._json, content_type="application/json")

    async def docs(self, request: web.Request) -> web.Response:
        """Describe this API as a page to read."""
        page = self._page.replace(ANY_ORIGIN, f"http://{escape(request.host)}")
        return web.Response(text=page, content_type="text/html", headers={"Content-Security-Policy": POLICY})


def render(document: dict[str, Any], origin: str) -> str:
    """Return the page for an OpenAPI document, with curl lines for the server at `origin`."""
    info = document["info"]
    title = f"{info['title']} {info['version']}"
    calls = [
        (tag["name"], method.upper(), path, operation)
        for tag in document["tags"]
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if tag["name"] in operation["tags"]
    ]
    links = "".join(
        f'<li><a href="#{operation["operationId"]}"><code>{method} {escape(path)}</code></a></li>'
        for _, method, path, operation in calls
    )
    schemas = document["components"]["schemas"]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
        f"<h1>{escape(title)}</h1><p>{_text(info['description'])}</p>"
        f'<p>For programs: <a href="/openapi.json">openapi.json</a>.</p><nav><ul>{links}</ul></nav>'
        + "".join(_call(method, path, operation, schemas, origin) for _, method, path, operation in calls)
        + "<h2>Schemas</h2>"
        + "".join(_schema(name, schema) for name, schema in schemas.items())
        + "</body></html>\n"
    )


def _call(method: str, path: str, operation: dict[str, Any], schemas: dict[str, Any], origin: str) -> str:
    """Return one operation's section."""
    body = operation.get("requestBody")
    named = _resolve(body["content"]["application/json"]["schema"], schemas) if body else {}
    parameters = list(map(_row, operation.get("parameters", [])))
    answers = [
        [status, _content(answer["content"]), _text(answer["description"])]
        for status, answer in operation["responses"].items()
    ]
    return (
        f'<section id="{operation["operationId"]}"><h3><code>{method} {escape(path)}</code></h3>'
        f"<p>{_text(operation['summary'])}</p>"
        + "".join(f"<p>{_text(part)}</p>" for part in operation.get("description", "").split("\n\n") if part)
        + f"<pre>{escape(_curl(method, path, operation, named, origin))}</pre>"
        + (_table("Parameters", ["name", "type", "default", "limits", "meaning"], parameters) if parameters else "")
        + (f"<p>Body: {_text(named.get('description'))}</p>{_body(named)}" if body else "")
        + _table("Answers", ["status", "content", "meaning"], answers)
        + "</section>"
    )


def _schema(name: str, schema: dict[str, Any]) -> str:
    if "properties" not in schema:
        fields = f"<p>{_type(schema)} {_limits(schema)}</p>"
    elif set(schema.get("required", [])) < set(schema["properties"]):
        fields = _fields(schema)
    else:
        fields = _fields(schema, [])
    return f'<section id="schema-{name}"><h3>{name}</h3><p>{_text(schema.get("description"))}</p>{fields}</section>'


def _body(schema: dict[str, Any]) -> str:
    """Return the fields of a body, or the links to those that it may be."""
    return _fields(schema) if "properties" in schema else f"<p>{_type(schema)}</p>"


def _fields(schema: dict[str, Any], required: list[str] | None = None) -> str:
    required = schema.get("required", []) if required is None else required
    described = [
        {"name": name, "required": name in required, "schema": field, "description": field.get("description")}
        for name, field in schema["properties"].items()
    ]
    return _table("", ["field", "type", "default", "limits", "meaning"], list(map(_row, described)))


def _row(field: dict[str, Any]) -> list[str]:
    """Return the cells of a parameter or field."""
    schema = field["schema"]
    return [field["name"], _type(schema), _default(field), _limits(schema), _text(field.get("description"))]


def _table(title: str, heads: list[str], rows: list[list[str]]) -> str:
    """Return a table without the columns that have nothing in any row; cells are HTML."""
    kept = [index for index in range(len(heads)) if any(row[index] for row in rows)]
    head = "".join(f"<th>{heads[index]}</th>" for index in kept)
    body = "".join("<tr>" + "".join(f"<td>{row[index]}</td>" for index in kept) + "</tr>" for row in rows)
    return (f"<h4>{title}</h4>" if title else "") + f"<table><tr>{head}</tr>{body}</table>"


def _text(text: str | None) -> str:
    """Return text as HTML, with what stands in backquotes as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text or ""))


def _code(value: object) -> str:
    return f"<code>{escape(orjson.dumps(value).decode())}</code>"


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].removeprefix(COMPONENTS)
        return f'<a href="#schema-{name}">{name}</a>'
    for choice in ("anyOf", "oneOf"):
        if choice in schema:
            return " or ".join(map(_type, schema[choice]))
    if "enum" in schema or "const" in schema:
        return ", ".join(_code(value) for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return escape(schema.get("type", "anything"))


def _default(parameter: dict[str, Any]) -> str:
    if parameter.get("required"):
        return "required"
    default = parameter["schema"].get("default")
    return "" if default is None else _code(default)


LIMITS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
    "minLength": "length at least {}",
    "maxLength": "length at most {}",
    "minItems": "length at least {}",
    "maxItems": "length at most {}",
    "pattern": "matches <code>{}</code>",
}


def _limits(schema: dict[str, Any]) -> str:
    """Return the limits of a value, and of a list's items, as text."""
    parts = [text.format(escape(str(schema[key]))) for key, text in LIMITS.items() if key in schema]
    parts += filter(None, map(_limits, schema.get("anyOf", [])))
    if "items" in schema and (each := _limits(schema["items"])):
        parts.append(f"of each: {each}")
    return ", ".join(parts)


def _content(content: dict[str, Any]) -> str:
    (media, value), *_ = content.items()
    return _type(value["schema"]) if media == "application/json" and "$ref" in value["schema"] else escape(media)


def _resolve(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    resolved: dict[str, Any] = schemas[schema["$ref"].removeprefix(COMPONENTS)]
    return resolved


def _curl(method: str, path: str, operation: dict[str, Any], body: dict[str, Any], origin: str) -> str:
    """Return the call as a line for a shell; the body is its model's first example."""
    parts = ["curl"]
    if any("text/event-stream" in answer["content"] for answer in operation["responses"].values()):
        parts.append("-N")
    if operation.get("security"):
        parts.append('-H "Authorization: Bearer $TOKEN"')
    if body:
        example = orjson.dumps(body.get("examples", [{}])[0]).decode()
        parts.append(f"-H 'Content-Type: application/json' -d {shlex.quote(example)}")
    elif method != "GET":
        parts.append(f"-X {method}")
    return " ".join([*parts, origin + re.sub(r"\{(\w+)\}", lambda match: match[1].upper(), path)])
