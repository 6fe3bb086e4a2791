"""One node of the live network, whose rounds come by epoch: pure parsing first, then a thin shell that fetches.

A host serves the chain's REST below /chain-api and its CometBFT's RPC below /chain-rpc (docs/live.md). Blocks and their
hashes are the RPC's; one call of the REST, `epoch_info`, tells all that rounds follow from.
"""

from __future__ import annotations

import re
from decimal import Decimal
from enum import StrEnum
from typing import TYPE_CHECKING, TypeVar

from pocd.chain.cometbft import CometBFT
from pocd.chain.rpc import RpcAnswer, read_message
from pocd.chain.source import GREATEST_HEIGHT
from pocd.observe.mask import mask_url
from pocd.protocol.epochs import Confirmation, EpochInfo, LiveScheme, Recipe, StatTest, Windows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pocd.chain.rpc import Rpc
    from pocd.chain.source import Block, Head

EPOCH_INFO = "chain-api/productscience/inference/inference/epoch_info"
RPC = "chain-rpc/"
MOST_MODELS = 1024  # far above what the network has; a list of more is a lie

FALLBACK = StatTest(Decimal("0.4"), Decimal("0.1"), Decimal("0.05"))
"""Terms of the verdict on vectors where the chain names no threshold: those of the network's own programs."""

_INTEGER = re.compile("[0-9]{1,19}")
_SIGNED = re.compile("-?[0-9]{1,19}")
_SEED = re.compile("[0-9a-fA-F]{64}")
_MOST_EXPONENT = 64

E = TypeVar("E", bound=StrEnum)


class EventPhase(StrEnum):
    """Phase of a confirmation round, by the chain's name for it."""

    INACTIVE = "CONFIRMATION_POC_INACTIVE"
    GRACE_PERIOD = "CONFIRMATION_POC_GRACE_PERIOD"
    GENERATION = "CONFIRMATION_POC_GENERATION"
    VALIDATION = "CONFIRMATION_POC_VALIDATION"
    COMPLETED = "CONFIRMATION_POC_COMPLETED"


def parse_epoch_info(body: bytes, where: str, secrets: Sequence[str] = ()) -> EpochInfo:
    """Read the answer to `epoch_info`.

    Args:
        body: The answer's bytes, whatever they are.
        where: The request, as error messages name it.
        secrets: Credentials of the node's address, which messages do not show.

    Raises:
        ChainError: An answer that makes no sense, or asks for what pocd does not know.
    """
    answer = RpcAnswer(where, body, read_message(body, where, lambda _text, _code: False, secrets), secrets)
    poc = "params.poc_params"
    for name in ("poc_v2_enabled", "confirmation_poc_v2_enabled"):
        if not _flag(answer, f"{poc}.{name}", otherwise=True):
            raise answer.wrong(f"{poc}.{name}", "true: pocd knows no other protocol")
    return EpochInfo(
        height=_integer(answer, "block_height"),
        epoch=_integer(answer, "latest_epoch.index"),
        start=_integer(answer, "latest_epoch.poc_start_block_height"),
        windows=_windows(answer),
        confirmation=_confirmation(answer),
        recipes=_recipes(answer, f"{poc}.models"),
        scheme=_named(answer, f"{poc}.poc_scheme", LiveScheme, otherwise=LiveScheme.PREFILL),
        confirmation_scheme=_named(answer, f"{poc}.confirmation_poc_scheme", LiveScheme, otherwise=LiveScheme.PREFILL),
        confirmation_scheme_rounds=_integer(answer, f"{poc}.confirmation_scheme_events", otherwise=0),
        stronger_rng=_flag(answer, f"{poc}.poc_stronger_rng_enabled", otherwise=False),
    )


def _windows(answer: RpcAnswer) -> Windows:
    epoch = "params.epoch_params"
    if _integer(answer, f"{epoch}.epoch_multiplier", otherwise=1) != 1:
        raise answer.wrong(f"{epoch}.epoch_multiplier", "1: pocd knows no other")
    windows = Windows(
        epoch=_integer(answer, f"{epoch}.epoch_length"),
        generation=_integer(answer, f"{epoch}.poc_stage_duration"),
        exchange=_integer(answer, f"{epoch}.poc_exchange_duration"),
        delay=_integer(answer, f"{epoch}.poc_validation_delay"),
        validation=_integer(answer, f"{epoch}.poc_validation_duration"),
        new_validators=_integer(answer, f"{epoch}.set_new_validators_delay"),
    )
    if windows.generation < 1:
        raise answer.wrong(f"{epoch}.poc_stage_duration", "at least 1")
    used = windows.generation + max(windows.exchange, windows.delay) + windows.validation + windows.new_validators
    if used > windows.epoch:
        raise answer.wrong(f"{epoch}.epoch_length", f"at least {used}, which its parts take together")
    return windows


def _confirmation(answer: RpcAnswer) -> Confirmation | None:
    """Return the confirmation round that is under way."""
    if not _flag(answer, "is_confirmation_poc_active", otherwise=False):
        return None
    event = "active_confirmation_poc_event"
    phase = _named(answer, f"{event}.phase", EventPhase)
    if phase in {EventPhase.INACTIVE, EventPhase.COMPLETED}:
        return None
    found = Confirmation(
        sequence=_integer(answer, f"{event}.event_sequence"),
        trigger=_integer(answer, f"{event}.trigger_height"),
        start=_integer(answer, f"{event}.generation_start_height"),
        seed=_seed(answer, f"{event}.poc_seed_block_hash"),
    )
    if found.start < found.trigger:
        raise answer.wrong(f"{event}.generation_start_height", f"at least trigger_height, {found.trigger}")
    return found


def _seed(answer: RpcAnswer, path: str) -> str | None:
    """Return a block hash exactly as it is written: its letters enter every nonce; None where it is not there yet."""
    if answer.maybe(path) in (None, ""):
        return None
    text = answer.text(path)
    if not _SEED.fullmatch(text):
        raise answer.wrong(path, "64 hex digits")
    return text


def _recipes(answer: RpcAnswer, path: str) -> tuple[Recipe, ...]:
    """Read the parameters of all models, in either form: in the model itself, or in a list of schemes.

    A scheme of that list that pocd does not know is left out: once it is due it is refused by name.
    """
    recipes: list[Recipe] = []
    for number in range(_length(answer, path)):
        model = f"{path}.{number}"
        name = answer.text(f"{model}.model_id")
        blocks = [f"{model}.schemes.{block}" for block in range(_length(answer, f"{model}.schemes"))]
        for block in blocks:
            named = answer.maybe(f"{block}.scheme")
            if isinstance(named, str) and named not in set(LiveScheme):
                continue
            scheme = _named(answer, f"{block}.scheme", LiveScheme, otherwise=LiveScheme.PREFILL)
            recipes.append(_recipe(answer, block, name, scheme))
        if not blocks:
            recipes.append(_recipe(answer, model, name, LiveScheme.PREFILL))
    return tuple(recipes)


def _recipe(answer: RpcAnswer, path: str, model: str, scheme: LiveScheme) -> Recipe:
    seq_len = _integer(answer, f"{path}.seq_len")
    if seq_len < 1:
        raise answer.wrong(f"{path}.seq_len", "at least 1")
    test = f"{path}.stat_test"
    if answer.maybe(f"{test}.dist_threshold") is None:
        return Recipe(model, scheme, seq_len, FALLBACK if scheme is LiveScheme.PREFILL else None)
    names = ("dist_threshold", "p_mismatch", "p_value_threshold")
    return Recipe(model, scheme, seq_len, StatTest(*(_decimal(answer, f"{test}.{name}") for name in names)))


def _length(answer: RpcAnswer, path: str) -> int:
    """Return the length of a list; 0 where it is missing or null, as Go may write an empty one."""
    value = answer.maybe(path)
    if value is None:
        return 0
    if not isinstance(value, list) or len(value) > MOST_MODELS:
        raise answer.wrong(path, f"a list of at most {MOST_MODELS}")
    return len(value)


def _integer(answer: RpcAnswer, path: str, otherwise: int | None = None) -> int:
    """Return a whole number, which the chain's JSON writes as a string where it has 64 bits."""
    value = answer.field(path) if otherwise is None else answer.maybe(path)
    if value is None and otherwise is not None:
        return otherwise
    if isinstance(value, bool) or not isinstance(value, int | str) or not _INTEGER.fullmatch(str(value)):
        raise answer.wrong(path, "a whole number")
    if int(value) > GREATEST_HEIGHT:
        raise answer.wrong(path, "below 2^63")
    return int(value)


def _decimal(answer: RpcAnswer, path: str) -> Decimal:
    """Return a number that the chain's JSON writes as value · 10^exponent."""
    value, exponent = (answer.field(f"{path}.{part}") for part in ("value", "exponent"))
    for part, number in (("value", value), ("exponent", exponent)):
        if isinstance(number, bool) or not isinstance(number, int | str) or not _SIGNED.fullmatch(str(number)):
            raise answer.wrong(f"{path}.{part}", "a whole number")
    power = int(str(exponent))
    if abs(power) > _MOST_EXPONENT:
        raise answer.wrong(f"{path}.exponent", f"from -{_MOST_EXPONENT} to {_MOST_EXPONENT}")
    return Decimal(str(value)).scaleb(power)


def _flag(answer: RpcAnswer, path: str, *, otherwise: bool) -> bool:
    value = answer.maybe(path)
    if value is None:
        return otherwise
    if not isinstance(value, bool):
        raise answer.wrong(path, "true or false")
    return value


def _named(answer: RpcAnswer, path: str, names: type[E], otherwise: E | None = None) -> E:
    value = answer.field(path) if otherwise is None else answer.maybe(path)
    if value is None and otherwise is not None:
        return otherwise
    if not isinstance(value, str) or value not in set(names):
        raise answer.wrong(path, f"one of {', '.join(names)}")
    return names(value)


class Gonka:
    """The node of the live network that `rpc` asks: a host's address, below which its chain's REST and RPC are."""

    reorganises = False

    def __init__(self, rpc: Rpc) -> None:
        self._rpc = rpc
        self._blocks = CometBFT(rpc, below=RPC)

    def __str__(self) -> str:
        """The masked address: how messages name this node."""
        return str(self._rpc)

    async def head(self) -> Head:
        """Return the newest block; see `ChainSource.head` for the errors."""
        return await self._blocks.head()

    async def block(self, height: int) -> Block:
        """Return the block at `height`, at least 1; see `ChainSource.block` for the errors."""
        return await self._blocks.block(height)

    async def epoch_info(self) -> EpochInfo:
        """Return what the chain says of its latest epoch.

        Raises:
            ChainError: The node cannot be reached, or its answer makes no sense; see `parse_epoch_info`.
        """
        url = self._rpc.url(EPOCH_INFO)
        where = mask_url(str(url))
        return parse_epoch_info(await self._rpc.get(url, where), where, self._rpc.secrets)
