"""What `pocd fleet` needs of a daemon's status, whichever release of pocd it has."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from pocd.admin.answers import Funnel, MachineStatus, NodeStatus, Problem, Rates
from pocd.admin.client import AdminError
from pocd.observe.mask import excerpt


class _Round(BaseModel):
    block_height: int


class _Control(BaseModel):
    mode: str


class _Chain(BaseModel):
    chain_id: str | None


class _Worker(BaseModel):
    ready: bool


class _Receiver(BaseModel):
    pending_batches: int


class _Needed(BaseModel):
    state: str
    version: str
    round: _Round | None
    control: _Control
    node: NodeStatus
    funnel: Funnel
    rates: Rates
    chain: _Chain
    worker: dict[str, Any]
    workers: list[_Worker]
    machines: list[MachineStatus] = []
    receivers: list[_Receiver]
    problems: list[Problem]
    alarms: list[Problem]


def check_answer(status: dict[str, Any]) -> None:
    """Check that an answer is a status that can be shown.

    Raises:
        AdminError: The answer lacks what is shown, which the message names.
    """
    try:
        _Needed.model_validate(status)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        version = status.get("version")
        what = "what answers there is no pocd"
        if version:
            what = f"it has pocd {excerpt(str(version), 20)}, whose answer cannot be shown, so upgrade it or this one"
        raise AdminError(f"{what}: {where}: {first['msg'].lower()}") from None
