"""The OpenAPI 3.1 document, made from the table of operations and the very models that parse the requests."""

from __future__ import annotations

import inspect
import re
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from pydantic.json_schema import models_json_schema

from pocd import __version__
from pocd.admin.operations import Error, Media, Operation, all_answers

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from pydantic import BaseModel

    from pocd.admin.operations import Answer

COMPONENTS = "#/components/schemas/"
TITLE = "pocd's admin API"
ABOUT = (
    "Look at a Proof-of-Compute daemon and drive it. Every error has one form: "
    '`{"error": {"code", "message", "field"}}`; nothing was changed then, but after `store_busy`, '
    "when what was begun may be done yet. "
    "Every call refuses malformed HTTP and bodies that do not arrive (400, 408, 413)."
)


def document(operations: Sequence[Operation], secured: Collection[str]) -> dict[str, Any]:
    """Return the OpenAPI document.

    Args:
        operations: The operations to describe.
        secured: HTTP methods whose calls need the token; none where no token is configured.
    """
    names, definitions = models_json_schema(
        [(model, "validation") for model in _models(operations)], ref_template=COMPONENTS + "{model}"
    )
    schemas: dict[Any, Any] = {model: schema for (model, _), schema in names.items()}
    paths: dict[str, dict[str, Any]] = {}
    for each in operations:
        paths.setdefault(each.path, {})[each.method.lower()] = _operation(each, schemas, secured)
    components: dict[str, Any] = {"schemas": definitions.get("$defs", {})}
    if secured:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": TITLE, "version": __version__, "description": ABOUT},
        "servers": [{"url": "/"}],
        "tags": [{"name": tag} for tag in dict.fromkeys(each.tag for each in operations)],
        "paths": paths,
        "components": components,
    }


def _models(operations: Iterable[Operation]) -> list[type[BaseModel]]:
    """Return all models that are named in bodies or answers, each once."""
    found: list[type[BaseModel]] = [Error]
    for each in operations:
        found += [each.body] if each.body else []
        found += [answer for answer in each.answers.values() if isinstance(answer, type)]
    return list(dict.fromkeys(found))


def _operation(operation: Operation, schemas: dict[Any, Any], secured: Collection[str]) -> dict[str, Any]:
    summary, _, description = (inspect.getdoc(operation.handler) or "").partition("\n\n")
    name = getattr(operation.handler, "__name__", "call")
    made: dict[str, Any] = {
        "operationId": f"{operation.tag}-{name}",
        "tags": [operation.tag],
        "summary": " ".join(summary.split()),
        "description": description.strip(),
        "parameters": [*_path_parameters(operation.path), *_query_parameters(operation.query)],
        "responses": {
            str(status): _response(status, answer, schemas)
            for status, answer in all_answers(operation, secured).items()
        },
    }
    if operation.body:
        content = {"application/json": {"schema": schemas[operation.body]}}
        made["requestBody"] = {"required": not _takes_nothing(operation.body), "content": content}
    if operation.is_secured(secured):
        made["security"] = [{"token": []}]
    return {key: value for key, value in made.items() if value}


def _takes_nothing(model: type[BaseModel]) -> bool:
    """Tell whether an empty body, which counts as {}, is valid for the model."""
    try:
        model.model_validate({})
    except ValidationError:
        return False
    return True


def _response(status: int, answer: Answer, schemas: dict[Any, Any]) -> dict[str, Any]:
    if isinstance(answer, Media):
        return {"description": answer.meaning, "content": {answer.type: {"schema": {"type": "string"}}}}
    model = Error if isinstance(answer, str) else answer
    text = answer if isinstance(answer, str) else inspect.getdoc(answer) or HTTPStatus(status).phrase
    return {"description": text, "content": {"application/json": {"schema": schemas[model]}}}


def _path_parameters(path: str) -> list[dict[str, Any]]:
    schema = {"type": "string", "minLength": 1}
    return [{"name": name, "in": "path", "required": True, "schema": schema} for name in re.findall(r"\{(\w+)\}", path)]


def _query_parameters(model: type[BaseModel] | None) -> list[dict[str, Any]]:
    if model is None:
        return []
    schema = model.model_json_schema()
    required = schema.get("required", [])
    return [
        {"name": name, "in": "query", "required": name in required, **_in_query(field)}
        for name, field in schema["properties"].items()
    ]


def _in_query(field: dict[str, Any]) -> dict[str, Any]:
    """Return a parameter's schema and meaning. A query has no null: what is not given is left out."""
    schema = {key: value for key, value in field.items() if key not in {"title", "description"}}
    choices = [choice for choice in schema.pop("anyOf", []) if choice != {"type": "null"}]
    if choices:
        schema = {**{key: value for key, value in schema.items() if value is not None}, **_one_of(choices)}
    return {"schema": schema} | ({"description": field["description"]} if "description" in field else {})


def _one_of(choices: list[dict[str, Any]]) -> dict[str, Any]:
    return choices[0] if len(choices) == 1 else {"anyOf": choices}
