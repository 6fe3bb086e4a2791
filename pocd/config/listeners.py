"""The APIs that the daemon listens for: its own, and the one that the live network's orchestrators call."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, Field, model_validator

from pocd.config.types import SECTION, HostName, ModelName, Origin, PathPrefix, Port, SecretFile, SocketPath

LOOPBACK_HOSTS = frozenset({"127.0.0.1", "::1", "localhost"})


class AdminSettings(BaseModel):
    """The admin API."""

    model_config = SECTION

    host: str = "127.0.0.1"
    port: Port = 8460
    socket: SocketPath | None = None
    token_file: SecretFile | None = None
    open_reads: bool = False
    allowed_hosts: list[HostName] = []
    callback_origins: list[Origin] = []

    @property
    def beyond_loopback(self) -> bool:
        """Tell whether other hosts can reach the API."""
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


class OrchestratorSettings(BaseModel):
    """The API that the live network's orchestrators call; it is off unless a port is set."""

    model_config = SECTION

    host: str = "127.0.0.1"
    port: Port | None = None
    prefix: PathPrefix = ""
    token_file: SecretFile | None = None
    allowed_hosts: list[HostName] = []
    aliases: list[ModelName] = []
    late_seconds: float = Field(default=60.0, ge=0, le=3600)

    @property
    def is_on(self) -> bool:
        """Whether rounds come from an orchestrator, and none from the chain."""
        return self.port is not None

    @property
    def beyond_loopback(self) -> bool:
        """Tell whether other hosts can reach the API."""
        return self.host not in LOOPBACK_HOSTS
