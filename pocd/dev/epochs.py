"""A development chain with epochs: the blocks of `pocd.dev.chain`, served as a host of the live network serves them.

Epochs are short, and a confirmation round is announced when it is asked for. Which round is due at a height follows
from the same function that pocd follows the live network by.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from aiohttp import web

from pocd.chain.gonka import EPOCH_INFO, RPC, EventPhase
from pocd.dev.chain import application as rpc_application
from pocd.http.server import json_answer
from pocd.protocol.epochs import Confirmation, EpochInfo, LiveScheme, Phase, Windows, stage_at

if TYPE_CHECKING:
    from collections.abc import Callable

    from pocd.dev.chain import DevChain

WINDOWS = Windows(epoch=60, generation=10, exchange=0, delay=2, validation=15, new_validators=3)
GRACE = 2  # blocks from a confirmation round's announcement to its first nonce
CONFIRM = "/confirm"  # not the network's: asks for a confirmation round

_PHASES = {
    Phase.ANNOUNCED: EventPhase.GRACE_PERIOD,
    Phase.CONFIRM: EventPhase.GENERATION,
    Phase.CONFIRM_CLOSED: EventPhase.GENERATION,
    Phase.CONFIRM_VALIDATE: EventPhase.VALIDATION,
}


class NoRoomError(Exception):
    """No confirmation round can begin now; the message says why."""


@dataclass(slots=True)
class EpochChain:
    """A chain with epochs, the first of which is number 1 and begins with the first block.

    Attributes:
        chain: The blocks.
        model: The one model of the network.
        seq_len: Number of positions.
        windows: Lengths of an epoch's parts.
        stronger_rng: Whether inputs are drawn by all 256 bits of their seed.
        scheme: How nonces are computed.
        in_schemes: Whether a model's parameters are told in a list of schemes, as they are from v0.2.17 on.
        announced: The latest confirmation round that was asked for; None before the first.
    """

    chain: DevChain
    model: str
    seq_len: int
    windows: Windows = WINDOWS
    stronger_rng: bool = False
    scheme: LiveScheme = LiveScheme.PREFILL
    in_schemes: bool = False
    announced: Confirmation | None = None

    def info(self, height: int) -> EpochInfo:
        """Return what the chain says of its latest epoch when the newest block is at `height`."""
        epochs = max(0, height - self.chain.first_height) // self.windows.epoch
        event = self.announced
        if event and event.start <= height:
            # The chain's own handler of the block at which generation starts writes its hash down, in lower case.
            event = replace(event, seed=self.chain.block_hash(event.start).lower())
        said = EpochInfo(
            height=height,
            epoch=epochs + 1,
            start=self.chain.first_height + epochs * self.windows.epoch,
            windows=self.windows,
            confirmation=event,
            recipes=(),
            scheme=self.scheme,
            confirmation_scheme=self.scheme,
            confirmation_scheme_rounds=0,
            stronger_rng=self.stronger_rng,
        )
        over = stage_at(said, height).phase not in _PHASES
        return replace(said, confirmation=None) if over else said

    def confirm(self, height: int) -> Confirmation:
        """Announce a confirmation round at `height`.

        Raises:
            NoRoomError: Another round is under way, or would begin before this one is over.
        """
        info = self.info(height)
        stage = stage_at(info, height)
        if stage.phase is not Phase.INFERENCE:
            raise NoRoomError(f"at block {height} it is {stage.phase}; ask again at block {stage.until}")
        parts = self.windows
        over = height + GRACE + parts.generation - 1 + parts.exchange + parts.delay + parts.validation
        following = info.start + parts.epoch
        if over > following:
            raise NoRoomError(f"it would be over at block {over}, but the regular round begins at {following}")
        earlier = self.announced
        again = earlier is not None and earlier.trigger >= info.start
        sequence = earlier.sequence + 1 if earlier and again else 0
        self.announced = Confirmation(sequence, trigger=height, start=height + GRACE, seed=None)
        return self.announced


def application(chain: EpochChain, clock: Callable[[], float] = time.time) -> web.Application:
    """Serve `chain`: CometBFT's RPC below /chain-rpc, `epoch_info` below /chain-api, and `POST /confirm`.

    Args:
        chain: The chain to serve.
        clock: Unix time in seconds.
    """

    async def epoch_info(_: web.Request) -> web.Response:
        height = chain.chain.head_height(clock())
        if height == 0:
            return json_answer({"code": 13, "message": "no block yet", "details": []}, 500)
        return json_answer(as_json(chain, chain.info(height)))

    async def confirm(_: web.Request) -> web.Response:
        try:
            event = chain.confirm(chain.chain.head_height(clock()))
        except NoRoomError as error:
            return json_answer({"message": str(error)}, 409)
        return json_answer({"trigger_height": str(event.trigger), "generation_start_height": str(event.start)})

    app = web.Application()
    app.router.add_get(f"/{EPOCH_INFO}", epoch_info)
    app.router.add_post(CONFIRM, confirm)
    app.add_subapp(f"/{RPC}".rstrip("/"), rpc_application(chain.chain, clock))
    return app


def as_json(chain: EpochChain, info: EpochInfo) -> dict[str, Any]:
    """Return `info` in the words of the live chain's REST: whole numbers of 64 bits are strings."""
    parts, event = info.windows, info.confirmation
    recipe = {
        "seq_len": str(chain.seq_len),
        "stat_test": {
            "dist_threshold": {"value": "4", "exponent": -1},
            "p_mismatch": {"value": "1", "exponent": -1},
            "p_value_threshold": {"value": "5", "exponent": -2},
        },
    }
    schemes = [{"scheme": info.scheme, "max_tokens": "0", "dynamic_coefficient": None, **recipe}]
    model = {"seq_len": "0", "stat_test": None, "schemes": schemes} if chain.in_schemes else recipe
    return {
        "block_height": str(info.height),
        "params": {
            "epoch_params": {
                "epoch_length": str(parts.epoch),
                "poc_stage_duration": str(parts.generation),
                "poc_exchange_duration": str(parts.exchange),
                "poc_validation_delay": str(parts.delay),
                "poc_validation_duration": str(parts.validation),
                "set_new_validators_delay": str(parts.new_validators),
                "inference_validation_cutoff": str(GRACE),
            },
            "poc_params": {
                "validation_sample_size": 200,
                "poc_v2_enabled": True,
                "confirmation_poc_v2_enabled": True,
                "poc_stronger_rng_enabled": info.stronger_rng,
                **({"poc_scheme": info.scheme, "confirmation_poc_scheme": info.scheme} if chain.in_schemes else {}),
                "models": [{"model_id": chain.model, "weight_scale_factor": None, **model}],
            },
        },
        "latest_epoch": {"index": str(info.epoch), "poc_start_block_height": str(info.start)},
        "is_confirmation_poc_active": event is not None,
        "active_confirmation_poc_event": event
        and {
            "epoch_index": str(info.epoch),
            "event_sequence": str(event.sequence),
            "trigger_height": str(event.trigger),
            "generation_start_height": str(event.start),
            "phase": _PHASES[stage_at(info, info.height).phase],
            "poc_seed_block_hash": event.seed or "",
        },
    }
