"""Types of the configuration's values; each error message says what is allowed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from pocd.http.addresses import origin
from pocd.http.urls import unusable
from pocd.protocol.names import DEVICE_PATTERN
from pocd.protocol.schemes import SCHEMES

SECTION = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False)  # of all tables
LARGEST_BATCH = 65536
MOST_DEVICES = 64
DEVICE = re.compile(DEVICE_PATTERN)
CALLBACK_PREFIX = "callback-"  # of the names of receivers that came with a callback URL through the API
LONGEST_SOCKET_PATH = 107  # bytes: unix(7)
CREDENTIAL = "credential:"  # before the name of a credential of the systemd unit, instead of a path


def _check_http_url(url: str) -> str:
    if wrong := unusable(url):
        raise ValueError(wrong)
    return url


def _check_scheme(name: str) -> str:
    if name not in SCHEMES:
        raise ValueError(f"unknown scheme {name!r}; allowed are: {', '.join(SCHEMES)}")
    return name


def _check_public_key(key: str) -> str:
    if key != key.strip():
        raise ValueError("must not begin or end with white space")
    return key


def _check_name(name: str) -> str:
    if name.startswith(CALLBACK_PREFIX):
        raise ValueError(f"must not begin with {CALLBACK_PREFIX!r}: those are the queues of callback URLs")
    return name


def _parse_batch_size(value: object) -> int | str:
    text = str(value)  # the environment gives strings
    if text == "auto":
        return text
    if isinstance(value, bool) or not re.fullmatch("[1-9][0-9]{0,4}", text) or int(text) > LARGEST_BATCH:
        raise ValueError(f'must be "auto", or a whole number from 1 to {LARGEST_BATCH}')
    return int(text)


def _check_device(value: object) -> object:
    listed = value if isinstance(value, list) else [value]
    if value == "auto":
        return value
    if not 1 <= len(listed) <= MOST_DEVICES or not all(isinstance(x, str) and DEVICE.fullmatch(x) for x in listed):
        raise ValueError(f'must be "auto", "cpu", "cuda", "cuda:N", or a list of 1 to {MOST_DEVICES} of the last three')
    if len(listed) > 1:
        cards = [name for name in listed if name != "cpu"]
        if "cuda" in cards or len(set(cards)) < len(cards) or len(cards) not in {0, len(listed)}:
            raise ValueError('a list must name each GPU as "cuda:N", once, or be of "cpu" only')
    return value


def _check_secret_file(path: Path) -> Path:
    """Check the name of a systemd credential, credential:NAME; pocd.config.secrets finds the file when it is read."""
    name = str(path).removeprefix(CREDENTIAL)
    if name != str(path) and (not re.fullmatch(r"[A-Za-z0-9._-]+", name) or name in {".", ".."}):
        raise ValueError("credential:NAME takes a name of letters, digits and . _ -")
    return path


def _check_socket(path: Path) -> Path:
    if not path.is_absolute() or len(os.fsencode(path)) > LONGEST_SOCKET_PATH or not str(path).isprintable():
        raise ValueError(f"must be an absolute path of at most {LONGEST_SOCKET_PATH} bytes: a socket can have no other")
    return path


def _check_origin(text: str) -> str:
    normal = origin(text)
    if normal is None or re.search("[/?#]", text.partition("://")[2]):
        raise ValueError("must be http:// or https://, a host in ASCII, a port of 1 to 65535 or none, and nothing else")
    return normal


def _check_prefix(path: str) -> str:
    if not re.fullmatch(r"(/[A-Za-z0-9._-]+)*", path):
        raise ValueError('must be "", or begin with / and hold letters, digits, . _ - and no / at its end: "/v3.0.8"')
    return path


BatchSize = Annotated[int | Literal["auto"], BeforeValidator(_parse_batch_size)]
Device = Annotated[str | list[str], BeforeValidator(_check_device)]
HttpUrl = Annotated[str, AfterValidator(_check_http_url)]
SecretFile = Annotated[Path, AfterValidator(_check_secret_file)]
HostName = Annotated[str, Field(pattern="^[A-Za-z0-9._-]+$"), AfterValidator(str.lower)]
Origin = Annotated[str, AfterValidator(_check_origin)]
PublicKey = Annotated[str, Field(min_length=1), AfterValidator(_check_public_key)]
ReceiverName = Annotated[
    str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$"), AfterValidator(_check_name)
]
SchemeName = Annotated[str, AfterValidator(_check_scheme)]
SocketPath = Annotated[Path, AfterValidator(_check_socket)]
ModelName = Annotated[str, Field(min_length=1, max_length=256)]
PathPrefix = Annotated[str, AfterValidator(_check_prefix)]
Port = Annotated[int, Field(ge=0, le=65535)]
