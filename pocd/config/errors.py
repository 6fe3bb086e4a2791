"""What is wrong with a configuration, in words that name the key and the file or the variables."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic_core import ErrorDetails

ENV_PREFIX = "POCD_"


def describe(error: ErrorDetails, path: Path) -> str:
    """Return an error of a value in one line, with the key and where the value came from."""
    keys = ".".join(str(part) for part in error["loc"])
    source = _source(error["loc"], path)
    match error["type"]:
        case "extra_forbidden":
            return f"{source}: unknown key {keys}"
        case "missing":
            return f"{source}: {keys} is missing"
        case "model_type":
            return f"{source}: {keys}: must be a table of keys"
        case "list_type":
            return f"{source}: {keys}: must be a list (in the environment: as JSON)"
        case _:
            return ": ".join(filter(None, (source, keys, error["msg"].removeprefix("Value error, "))))


def _source(location: tuple[int | str, ...], path: Path) -> str:
    """Name the file or the variables that the value at `location` came from, or both for a whole section."""
    name = ENV_PREFIX + "__".join(str(part).upper() for part in location)
    variables = sorted(v for v in os.environ if f"{name}__".startswith(f"{v}__") or v.startswith(f"{name}__"))
    if not variables:
        return str(path)
    environment = f"environment {', '.join(variables)}"
    return environment if len(location) > 1 else f"{path} and {environment}"
