"""Configuration: a TOML file, and the environment above it (POCD_SECTION__KEY).

`config/pocd.toml` shows every key; a test holds the two equal.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from pocd.config.errors import ENV_PREFIX, describe
from pocd.config.listeners import AdminSettings, OrchestratorSettings
from pocd.config.ray import RaySettings, check_model
from pocd.config.roles import Role, role_of, why_missing
from pocd.config.types import (
    SECTION,
    BatchSize,
    Device,
    HttpUrl,
    PublicKey,
    ReceiverName,
    SchemeName,
    SecretFile,
)
from pocd.protocol.names import ChainKind, Compile, Dtype, OnRounding
from pocd.protocol.numbers import MOST_NODES, Count, Index
from pocd.protocol.proof import FRAUD_THRESHOLD, MISMATCH, MOST_NONCES
from pocd.protocol.schemes import SCHEMES
from pocd.protocol.verdicts import ALLOWANCE, LARGEST_ALLOWANCE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic.fields import FieldInfo

DEFAULT_PATH = Path("/etc/pocd/pocd.toml")
R_TARGET = 1.4042  # by which about one nonce in ten is valid with "poc2"


class ConfigError(Exception):
    """The configuration cannot be used; the message names the key and what is allowed."""


class _Section(BaseModel):
    model_config = SECTION


S = TypeVar("S", bound=BaseModel)


class NodeSettings(_Section):
    """The miner's key, and this node's share of the nonces: node_id + node_count · x."""

    public_key: PublicKey | None = None
    node_id: Index = 0
    node_count: int = Field(default=1, ge=1, le=MOST_NODES)

    @model_validator(mode="after")
    def _id_below_count(self) -> Self:
        if self.node_id >= self.node_count:
            raise ValueError(f"node_id {self.node_id} must be below node_count {self.node_count}")
        return self


class ChainSettings(_Section):
    """The chain that block hashes come from."""

    kind: ChainKind = "cometbft"
    urls: list[HttpUrl] = []
    id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    poll_interval: float = Field(default=2.0, gt=0, le=3600)
    confirmations: Annotated[int, Field(ge=0, le=10_000)] | None = None
    replaced_blocks: Literal["withdraw", "deliver"] | None = None
    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    @model_validator(mode="after")
    def _keys_fit_the_kind(self) -> Self:
        for name in ("confirmations", "replaced_blocks"):
            if self.kind != "evm" and getattr(self, name) is not None:
                raise ValueError(f'{name} can be set for kind "evm" only: other chains do not reorganise')
        if self.kind != "gonka" and self.model is not None:
            raise ValueError('model can be set for kind "gonka" only: it is the name of the model on that chain')
        return self


class RoundSettings(_Section):
    """Start and duration of rounds, and the conditions of a valid nonce.

    A configuration that names no scheme was written when "poc2" was the only one; a new one, made of
    `config/pocd.toml`, names "poc4".
    """

    every: Count = 60
    offset: Index = 0
    duration: Count = 60
    scheme: SchemeName = "poc2"
    r_target: Annotated[float, Field(gt=0, le=2)] | None = None
    seq_len: Count = 256

    @property
    def target(self) -> float | None:
        """The r_target that holds: None with a scheme of vectors, by which every nonce counts."""
        if SCHEMES[self.scheme].output == "vector":
            return None
        return R_TARGET if self.r_target is None else self.r_target

    @model_validator(mode="after")
    def _rounds_fit(self) -> Self:
        if self.offset >= self.every:
            raise ValueError(f"offset {self.offset} must be below every {self.every}")
        if self.duration > self.every:
            raise ValueError(f"duration {self.duration} must be at most every {self.every}")
        if self.r_target is not None and SCHEMES[self.scheme].output == "vector":
            raise ValueError(
                f"r_target {self.r_target} has no meaning with scheme {self.scheme!r}, by which every nonce counts: "
                "remove it, or take a scheme of distances"
            )
        if self.seq_len < (least := SCHEMES[self.scheme].least_seq_len):
            raise ValueError(f"seq_len {self.seq_len} is too short for scheme {self.scheme!r}: {least} or more")
        return self


class ModelSettings(_Section):
    """The model, its precision and its devices."""

    name: str = Field(default="Qwen/Qwen3-0.6B", min_length=1)
    revision: Annotated[str, Field(min_length=1)] | None = None
    dtype: Dtype = "bfloat16"
    device: Device = "cuda"
    parallel: int = Field(default=1, ge=1, le=64)

    @model_validator(mode="after")
    def _devices_for_each_worker(self) -> Self:
        if isinstance(self.device, list) and len(self.device) % self.parallel:
            raise ValueError(
                f"device lists {len(self.device)} devices, which must be a multiple of parallel, {self.parallel}"
            )
        if isinstance(self.device, str) and self.device.startswith("cuda:") and self.parallel > 1:
            raise ValueError(f"parallel is {self.parallel}: list as many devices in device, or set it to 'cuda'")
        return self


class WorkerSettings(_Section):
    """Where workers run, their batches and compilation, and what follows where rounding decides too much."""

    engine: Literal["local", "ray"] = "local"
    batch_size: BatchSize = "auto"
    batch_timeout: float = Field(default=300.0, gt=0)
    compile: Compile = "auto"
    conditioning: OnRounding = "warn"
    cache: Path | None = None


class ReceiverSettings(_Section):
    """One receiver of proofs."""

    name: ReceiverName
    url: HttpUrl
    secret_file: SecretFile | None = None


class DeliverySettings(_Section):
    """The receivers of proofs, and when a batch is closed."""

    receivers: list[ReceiverSettings] = []
    batch_nonces: int = Field(default=1000, ge=1, le=100_000)
    batch_seconds: float = Field(default=5.0, gt=0)
    expire_after: float = Field(default=604_800.0, gt=0)
    keep_delivered: float = Field(default=86_400.0, ge=0)

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [receiver.name for receiver in self.receivers]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"receivers must have different names; repeated: {', '.join(repeated)}")
        return self


class ValidationSettings(_Section):
    """Terms of judging other miners' batches, and limits of validation."""

    fraud_threshold: float = Field(default=FRAUD_THRESHOLD, gt=0, lt=1)
    mismatch: float = Field(default=MISMATCH, gt=0, lt=1)
    tolerance: Annotated[float, Field(ge=0, le=2)] | None = None
    allowance: float = Field(default=ALLOWANCE, ge=1, le=LARGEST_ALLOWANCE)
    max_nonces: int = Field(default=10_000, ge=1, le=MOST_NONCES)
    max_queued: int = Field(default=16, ge=1, le=1000)


class StoreSettings(_Section):
    """File and size limits of the outbox."""

    path: Path = Path("/var/lib/pocd/outbox.db")
    size_limit_mib: int = Field(default=8192, ge=1, le=2**40)
    free_space_mib: int = Field(default=32, ge=0, le=2**40)


class LogSettings(_Section):
    """Level and format of the log."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"


class _Environment(EnvSettingsSource):
    """The variables POCD_SECTION__KEY, and no others that begin so.

    A list that is not JSON stays as it is, so that validation names its key and variable.
    """

    def __init__(self, settings_cls: type[BaseSettings]) -> None:
        super().__init__(settings_cls)
        self.env_vars = {name: value for name, value in self.env_vars.items() if "__" in name}

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
    )

    node: NodeSettings = NodeSettings()
    chain: ChainSettings = ChainSettings()
    round: RoundSettings = RoundSettings()
    model: ModelSettings = ModelSettings()
    worker: WorkerSettings = WorkerSettings()
    ray: RaySettings = RaySettings()
    delivery: DeliverySettings = DeliverySettings()
    admin: AdminSettings = AdminSettings()
    orchestrator: OrchestratorSettings = OrchestratorSettings()
    validation: ValidationSettings = ValidationSettings()
    store: StoreSettings = StoreSettings()
    log: LogSettings = LogSettings()

    @property
    def role(self) -> Role:
        """The role of the daemon."""
        return role_of(self.orchestrator)

    @property
    def names_of_model(self) -> list[str]:
        """Names of the model: those that an orchestrator may call it by, or the one that the chain knows it by."""
        if self.role is Role.ENGINE:
            return list(dict.fromkeys([self.model.name, *self.orchestrator.aliases]))
        return [self.chain.model or self.model.name]

    @model_validator(mode="after")
    def _role_has_what_it_needs(self) -> Self:
        if why := why_missing(self.role, self):
            raise ValueError(why)
        return self

    @model_validator(mode="after")
    def _rounds_come_by_epoch(self) -> Self:
        if self.chain.kind == "gonka":
            for name in ("every", "offset", "duration"):
                if getattr(self.round, name) != RoundSettings.model_fields[name].default:
                    raise ValueError(f'round.{name} cannot be set with chain.kind "gonka": rounds come by its epochs')
            if self.round.scheme != "artifacts":
                raise ValueError('round.scheme must be "artifacts" with chain.kind "gonka", whose rounds are of those')
        return self

    @model_validator(mode="after")
    def _model_can_run_so(self) -> Self:
        check_model(self.worker.engine, self.model.device)
        if self.model.parallel > 1 and SCHEMES[self.round.scheme].weights != "trained":
            raise ValueError(f"model.parallel must be 1 with round.scheme {self.round.scheme!r}, which draws weights")
        if self.model.parallel > 1 and self.worker.compile == "always":
            raise ValueError("worker.compile must be 'auto' or 'never' with model.parallel above 1")
        return self

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
    values = _read_toml(path)
    _refuse_unknown_environment(os.environ)
    try:
        return Settings(**values)
    except ValidationError as error:
        raise ConfigError("; ".join(describe(item, path) for item in error.errors())) from None


def load_admin(path: Path, token_file: Path | None) -> AdminSettings:
    """Read where the admin API is: all that a client of it needs, so that nothing else in the file can stop one.

    Args:
        path: File of the configuration.
        token_file: The API's token, instead of the configured one, which only the service may have.

    Raises:
        ConfigError: The file cannot be read, or its [admin] cannot be used.
    """
    return _load_section(path, "admin", AdminSettings, {} if token_file is None else {"token_file": token_file})


def load_store(path: Path) -> StoreSettings:
    """Read where the store is: all that a command needs that copies it.

    Raises:
        ConfigError: The file cannot be read, or its [store] cannot be used.
    """
    return _load_section(path, "store", StoreSettings, {})


def load_chain(path: Path) -> ChainSettings:
    """Read which chain is followed, and its nodes: all that a command needs that only looks at the chain.

    Raises:
        ConfigError: The file cannot be read, or its [chain] cannot be used.
    """
    return _load_section(path, "chain", ChainSettings, {})


def _load_section(path: Path, name: str, section: type[S], given: dict[str, Any]) -> S:
    table = _read_toml(path).get(name, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: {name}: must be a table of keys")
    try:
        return section(**table | _Environment(Settings)().get(name, {}) | given)
    except ValidationError as error:
        found = [item | {"loc": (name, *item["loc"])} for item in error.errors()]
        raise ConfigError("; ".join(describe(item, path) for item in found)) from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give --config FILE (config/pocd.toml shows every key)") from None
    except PermissionError:
        raise ConfigError(
            f"{path} cannot be read by user {os.geteuid()}: join the group pocd (usermod -aG pocd NAME, log in anew), "
            "and let it read the file (chgrp pocd, chmod 0640); or where the command asks a running daemon, give --url "
            "and --token-file"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def foreign_variables(environment: Mapping[str, str]) -> list[str]:
    """Return the variables that begin like ours but do not have the form POCD_SECTION__KEY.

    They are others': Kubernetes gives every pod POCD_PORT=tcp://… and more where a Service is called pocd.
    """
    return sorted(name for name in environment if name.upper().startswith(ENV_PREFIX) and "__" not in name)


def _refuse_unknown_environment(environment: Mapping[str, str]) -> None:
    for name in environment:
        if not name.upper().startswith(ENV_PREFIX) or "__" not in name:
            continue
        section, _, key = name.removeprefix(ENV_PREFIX).lower().partition("__")
        if name != name.upper() or section not in Settings.model_fields or not key:
            raise ConfigError(f"environment: {name} names no key; variables are called POCD_SECTION__KEY")
