"""The state machine behind the admin API: who decides which round is mined (docs/api.md, "Whose rounds").

A table and two pure functions; `control.py` acts on them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, get_args

DaemonState = Literal["IDLE", "LOADING", "GENERATING", "VALIDATING", "STOPPED"]
STATES: tuple[DaemonState, ...] = get_args(DaemonState)


class Mode(StrEnum):
    """Mode of mining, as decided last; kept across restarts."""

    FOLLOWING = "FOLLOWING"
    """The chain decides: its rounds are mined as they come."""
    READY = "READY"
    """A round was requested, and waits for a phase call."""
    GENERATING = "GENERATING"
    """The requested round is mined, whatever the chain does."""
    VALIDATING = "VALIDATING"
    """Nothing is mined; the device is free for validations under the terms of the requested round."""
    STOPPED = "STOPPED"
    """Nothing is mined."""


class Call(StrEnum):
    """A call of the API that decides what is mined; the value is its path below /api/v1/pow."""

    INIT = "init"
    INIT_GENERATE = "init/generate"
    INIT_VALIDATE = "init/validate"
    PHASE_GENERATE = "phase/generate"
    PHASE_VALIDATE = "phase/validate"
    STOP = "stop"
    RESUME = "resume"


_EVERYWHERE = {
    Call.INIT: Mode.READY,
    Call.INIT_GENERATE: Mode.GENERATING,
    Call.INIT_VALIDATE: Mode.VALIDATING,
    Call.STOP: Mode.STOPPED,
    Call.RESUME: Mode.FOLLOWING,
}
_WITH_A_ROUND = {Call.PHASE_GENERATE: Mode.GENERATING, Call.PHASE_VALIDATE: Mode.VALIDATING}

TABLE: dict[tuple[Mode, Call], Mode] = {
    **{(mode, call): after for mode in Mode for call, after in _EVERYWHERE.items()},
    **{
        (mode, call): after
        for mode in (Mode.READY, Mode.GENERATING, Mode.VALIDATING)
        for call, after in _WITH_A_ROUND.items()
    },
}
"""The mode after each call. A call whose pair is missing is refused: no round was requested."""


def mode_after(mode: Mode, call: Call) -> Mode | None:
    """Return the mode after `call`, or None where it is refused. The same call twice is the same as once."""
    return TABLE.get((mode, call))


def state_of(mode: Mode, *, ready: bool, mining: bool) -> DaemonState:
    """Return what `/status` shows (docs/protocol.md section 7).

    Args:
        mode: Mode of mining.
        ready: Whether a worker has a model ready.
        mining: Whether the miner has a round to work on and is not held.
    """
    if mode is Mode.STOPPED:
        return "STOPPED"
    if not ready:
        return "LOADING"
    if mode is Mode.VALIDATING:
        return "VALIDATING"
    return "GENERATING" if mining else "IDLE"
