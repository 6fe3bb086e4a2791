"""The configuration in effect, as TOML."""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson

from pocd.observe.mask import mask_url

if TYPE_CHECKING:
    from pocd.config.settings import Settings


def to_toml(settings: Settings) -> str:
    """Return the configuration as TOML, credentials in URLs masked; unset keys are comments."""
    lines: list[str] = []
    for section, values in settings.model_dump(mode="json").items():
        lines.append(f"[{section}]")
        lines += [_toml_line(key, value) for key, value in values.items()]
        lines.append("")
    return "\n".join(lines)


def _toml_line(key: str, value: object) -> str:
    return f"# {key} is not set" if value is None else f"{key} = {_toml_value(value)}"


def _toml_value(value: object) -> str:
    if isinstance(value, dict):
        pairs = (f"{key} = {_toml_value(item)}" for key, item in value.items() if item is not None)
        return f"{{ {', '.join(pairs)} }}"
    if isinstance(value, list):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    # JSON's strings, numbers and booleans are TOML's.
    text = orjson.dumps(mask_url(value) if isinstance(value, str) and "://" in value else value).decode()
    return text.replace("\x7f", "\\u007f")  # the one character that only TOML wants escaped
