"""Configuration: a TOML file, and the environment above it (POCD_SECTION__KEY).

`config/pocd.toml` shows every key; a test holds the two equal.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self
from urllib.parse import urlsplit

import orjson
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from pocd.claim import MOST_NONCES
from pocd.compute.errors import ModelError
from pocd.compute.names import DEVICE_PATTERN, Dtype, resolve
from pocd.compute.schemes import SCHEMES
from pocd.delivery.netguard import origin
from pocd.observe.mask import mask_url
from pocd.proof import FRAUD_THRESHOLD, MISMATCH

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

DEFAULT_PATH = Path("/etc/pocd/pocd.toml")
ENV_PREFIX = "POCD_"
LARGEST_BATCH = 65536
CALLBACK_PREFIX = "callback-"  # of the names of receivers that came with a callback URL through the API
LONGEST_SOCKET_PATH = 107  # bytes: unix(7)
LOOPBACK_HOSTS = frozenset({"127.0.0.1", "::1", "localhost"})


class ConfigError(Exception):
    """The configuration cannot be used; the message names the key and what is allowed."""


def _check_http_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # its text would show the credentials
        good = False
    if not good or " " in url or not url.isprintable():
        raise ValueError("must be an http:// or https:// URL with a host, a port of 1 to 65535 or none, and no blanks")
    if parts.query or parts.fragment:
        raise ValueError("must have no query and no fragment: paths are appended to it")
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


def _resolve_credential(value: object) -> object:
    """Turn credential:NAME into the file that systemd's LoadCredential= made of it (systemd.exec(5))."""
    if not isinstance(value, str) or not value.startswith("credential:"):
        return value
    name, folder = value.removeprefix("credential:"), os.environ.get("CREDENTIALS_DIRECTORY")
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or name in {".", ".."}:
        raise ValueError("credential:NAME takes a name of letters, digits and . _ -")
    if not folder:
        raise ValueError(
            f"{value} is a systemd credential, and there are none here: run it by a unit with "
            f"LoadCredential={name}:FILE, or give the path of a file"
        )
    return Path(folder) / name


def _check_socket(path: Path) -> Path:
    if not path.is_absolute() or len(os.fsencode(path)) > LONGEST_SOCKET_PATH or not str(path).isprintable():
        raise ValueError(f"must be an absolute path of at most {LONGEST_SOCKET_PATH} bytes: a socket can have no other")
    return path


def _check_origin(text: str) -> str:
    normal = origin(text)
    if normal is None or re.search("[/?#]", text.partition("://")[2]):
        raise ValueError("must be http:// or https://, a host in ASCII, a port of 1 to 65535 or none, and nothing else")
    return normal


BatchSize = Annotated[int | Literal["auto"], BeforeValidator(_parse_batch_size)]
HttpUrl = Annotated[str, AfterValidator(_check_http_url)]
SecretFile = Annotated[Path, BeforeValidator(_resolve_credential)]
HostName = Annotated[str, Field(pattern="^[A-Za-z0-9._-]+$"), AfterValidator(str.lower)]
Origin = Annotated[str, AfterValidator(_check_origin)]
SocketPath = Annotated[Path, AfterValidator(_check_socket)]
Port = Annotated[int, Field(ge=0, le=65535)]
Count = Annotated[int, Field(ge=1, le=2**63 - 1)]  # TOML's integers have 64 bits
Index = Annotated[int, Field(ge=0, le=2**63 - 1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False)


class NodeSettings(_Section):
    """Who we are, and our share of the nonces: node_id + node_count · x."""

    public_key: Annotated[str, Field(min_length=1), AfterValidator(_check_public_key)]
    node_id: Index = 0
    node_count: Count = 1

    @model_validator(mode="after")
    def _id_below_count(self) -> Self:
        if self.node_id >= self.node_count:
            raise ValueError(f"node_id {self.node_id} must be below node_count {self.node_count}")
        return self


class ChainSettings(_Section):
    """Where block hashes come from."""

    kind: Literal["cometbft", "evm"] = "cometbft"
    urls: list[HttpUrl] = Field(min_length=1)
    id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    poll_interval: float = Field(default=2.0, gt=0, le=3600)
    confirmations: Annotated[int, Field(ge=0, le=10_000)] | None = None
    replaced_blocks: Literal["withdraw", "deliver"] | None = None

    @model_validator(mode="after")
    def _reorganisations_are_of_evm(self) -> Self:
        for name in ("confirmations", "replaced_blocks"):
            if self.kind != "evm" and getattr(self, name) is not None:
                raise ValueError(f'{name} can be set for kind "evm" only: other chains do not reorganise')
        return self


class RoundSettings(_Section):
    """When rounds start, how long they live, and what counts as valid."""

    every: Count = 60
    offset: Index = 0
    duration: Count = 60
    r_target: float = Field(default=1.4042, gt=0, le=2)
    scheme: Annotated[str, AfterValidator(_check_scheme)] = "poc2"
    seq_len: Count = 256

    @model_validator(mode="after")
    def _rounds_fit(self) -> Self:
        if self.offset >= self.every:
            raise ValueError(f"offset {self.offset} must be below every {self.every}")
        if self.duration > self.every:
            raise ValueError(f"duration {self.duration} must be at most every {self.every}")
        if self.seq_len < (least := SCHEMES[self.scheme].least_seq_len):
            raise ValueError(f"seq_len {self.seq_len} is too short for scheme {self.scheme!r}: {least} or more")
        return self


class ModelSettings(_Section):
    """Which model runs, how precisely, and where."""

    name: str = Field(default="Qwen/Qwen3-0.6B", min_length=1)
    revision: Annotated[str, Field(min_length=1)] | None = None
    dtype: Dtype = "bfloat16"
    device: str = Field(default="cuda", pattern=DEVICE_PATTERN)


class WorkerSettings(_Section):
    """How the GPU worker is fed."""

    batch_size: BatchSize = "auto"
    batch_timeout: float = Field(default=300.0, gt=0)


class ReceiverSettings(_Section):
    """One receiver of proofs."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$"), AfterValidator(_check_name)]
    url: HttpUrl
    secret_file: SecretFile | None = None


class DeliverySettings(_Section):
    """Where proofs go, and when a batch is closed."""

    receivers: list[ReceiverSettings] = []
    batch_nonces: int = Field(default=1000, ge=1, le=100_000)
    batch_seconds: float = Field(default=5.0, gt=0)
    expire_after: float = Field(default=604_800.0, gt=0)
    keep_delivered: float = Field(default=86_400.0, ge=0)

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [receiver.name for receiver in self.receivers]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"receivers must have different names; repeated: {', '.join(repeated)}")
        return self


class AdminSettings(_Section):
    """The admin API."""

    host: str = "127.0.0.1"
    port: Port = 8460
    socket: SocketPath | None = None
    token_file: SecretFile | None = None
    open_reads: bool = False
    allowed_hosts: list[HostName] = []
    callback_origins: list[Origin] = []

    @property
    def beyond_loopback(self) -> bool:
        """Whether other hosts can reach it."""
        return self.socket is None and self.host not in LOOPBACK_HOSTS

    @model_validator(mode="after")
    def _token_where_it_is_needed(self) -> Self:
        if self.beyond_loopback and self.token_file is None:
            raise ValueError(
                f"host {self.host!r} is not loopback: set token_file, so that not everybody can stop mining"
            )
        if self.open_reads and self.token_file is None:
            raise ValueError("open_reads needs a token_file: without one nobody is asked for a token anyway")
        return self


class ValidationSettings(_Section):
    """How batches of others are judged."""

    fraud_threshold: float = Field(default=FRAUD_THRESHOLD, gt=0, lt=1)
    mismatch: float = Field(default=MISMATCH, gt=0, lt=1)
    tolerance: Annotated[float, Field(ge=0, le=2)] | None = None
    max_nonces: int = Field(default=10_000, ge=1, le=MOST_NONCES)
    max_queued: int = Field(default=16, ge=1, le=1000)


class StoreSettings(_Section):
    """The outbox's file."""

    path: Path = Path("/var/lib/pocd/outbox.db")
    size_limit_mib: int = Field(default=8192, ge=1, le=2**40)
    free_space_mib: int = Field(default=32, ge=0, le=2**40)


class LogSettings(_Section):
    """What is logged, and how."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"


class _Environment(EnvSettingsSource):
    """Leaves a list that is not JSON as it is, so that validation names its key and variable."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:  # noqa: ANN401 - as overridden
        try:
            return super().decode_complex_value(field_name, field, value)
        except ValueError:
            return value


class Settings(BaseSettings):
    """The whole configuration. Make one with `load`."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        nested_model_default_partial_update=True,
    )

    node: NodeSettings
    chain: ChainSettings
    round: RoundSettings = RoundSettings()
    model: ModelSettings = ModelSettings()
    worker: WorkerSettings = WorkerSettings()
    delivery: DeliverySettings = DeliverySettings()
    admin: AdminSettings = AdminSettings()
    validation: ValidationSettings = ValidationSettings()
    store: StoreSettings = StoreSettings()
    log: LogSettings = LogSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the signature is pydantic-settings'
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - likewise
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - likewise
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Put the environment above what `load` read from the file."""
        return _Environment(settings_cls), init_settings


def load(path: Path) -> Settings:
    """Read the configuration from the file at `path` and from the environment.

    Raises:
        ConfigError: The file or a value is missing or wrong, or a key is unknown.
    """
    values = {"node": {}, "chain": {}} | _read_toml(path)  # so that errors name the key that is missing
    _refuse_unknown_environment(os.environ)
    try:
        return Settings(**values)
    except ValidationError as error:
        raise ConfigError("; ".join(_describe(item, path) for item in error.errors())) from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give --config FILE (config/pocd.toml shows every key)") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def _refuse_unknown_environment(environment: Mapping[str, str]) -> None:
    for name in environment:
        if not name.upper().startswith(ENV_PREFIX):
            continue
        section, _, key = name.removeprefix(ENV_PREFIX).lower().partition("__")
        if name != name.upper() or section not in Settings.model_fields or not key:
            raise ConfigError(f"environment: {name} names no key; variables are called POCD_SECTION__KEY")


def _describe(error: ErrorDetails, path: Path) -> str:
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
            return f"{source}: {keys}: {error['msg'].removeprefix('Value error, ')}"


def _source(location: tuple[int | str, ...], path: Path) -> str:
    """Name the file or the variables that the value at `location` came from, or both for a whole section."""
    name = ENV_PREFIX + "__".join(str(part).upper() for part in location)
    variables = sorted(v for v in os.environ if f"{name}__".startswith(f"{v}__") or v.startswith(f"{name}__"))
    if not variables:
        return str(path)
    environment = f"environment {', '.join(variables)}"
    return environment if len(location) > 1 else f"{path} and {environment}"


def check_model(settings: Settings) -> None:
    """Find the model where that needs no loading: bundled, or a local folder.

    Raises:
        ConfigError: It is not there.
    """
    try:
        resolve(settings.model.name, settings.model.revision)
    except ModelError as error:
        raise ConfigError(f"model.name: {error}") from None


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
