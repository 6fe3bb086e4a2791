"""`pocd chain`: which phase of its epoch the live network is in, what it waits for, and until when (docs/live.md)."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import orjson
import typer

from pocd.chain.source import ChainError
from pocd.cli.api import ConfigOption, echo
from pocd.config.settings import DEFAULT_PATH, ConfigError, load_chain
from pocd.process import EXIT_TEMPORARY, EndedError
from pocd.protocol.epochs import NotComputedError, recipe_of, stage_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pocd.chain.gonka import Gonka
    from pocd.protocol.epochs import EpochInfo, Recipe

NodeOption = Annotated[
    str | None, typer.Option("--url", help="A host of the live network: http(s)://HOST:8000. Default: chain.urls.")
]


@dataclass(frozen=True, slots=True)
class RoundNow:
    """The round whose nonces are to be generated now, as `pocd chain --json` prints it.

    Attributes:
        height: Height that it is called by.
        block_hash: Hash that its nonces depend on, exactly as the chain writes it.
        scheme: How its nonces are computed, by the chain's name for it.
        accepted_through: The last height at which its artifacts are accepted.
        models: Parameters of each model.
        not_computed: Why pocd could not compute it, of all models; None where it could.
    """

    height: int
    block_hash: str
    scheme: str
    accepted_through: int
    models: list[Recipe]
    not_computed: str | None


@dataclass(frozen=True, slots=True)
class ChainNow:
    """What the live network is doing, as `pocd chain --json` prints it.

    Attributes:
        node: The node that was asked.
        chain_id: The network's name.
        height: The newest block's height.
        epoch: Number of the epoch.
        phase: Phase of the epoch.
        until: First height in another phase; None where that is not known.
        seconds: Seconds until then at the pace of the last blocks; None where that is not known.
        awaits: What comes then, or is missing until then.
        stronger_rng: Whether inputs are drawn by all 256 bits of their seed.
        round: The round whose nonces are to be generated now; None where none are.
    """

    node: str
    chain_id: str
    height: int
    epoch: int
    phase: str
    until: int | None
    seconds: float | None
    awaits: str
    stronger_rng: bool
    round: RoundNow | None


def chain(
    *,
    config: ConfigOption = DEFAULT_PATH,
    url: NodeOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object with all of it.")] = False,
) -> None:
    """Show which phase of its epoch the live network is in, what it waits for, and until when."""
    if url is None:
        configured = load_chain(config)
        if configured.kind != "gonka":
            raise ConfigError(f'chain.kind is "{configured.kind}": only "gonka" has epochs; or give --url')
        if not configured.urls:
            raise ConfigError(f"{config}: chain.urls is missing: name a host of the live network there, or give --url")
        urls: Sequence[str] = configured.urls
    else:
        urls = [url]
    found = asyncio.run(_ask(urls))
    echo(orjson.dumps(asdict(found), default=str).decode() if as_json else as_text(found))


async def _ask(urls: Sequence[str]) -> ChainNow:
    """Ask one node after the other until one answers.

    Raises:
        ConfigError: An address cannot be used.
        EndedError: None answers.
    """
    from pocd.chain.gonka import Gonka
    from pocd.chain.make import CHAIN_TIMEOUT
    from pocd.chain.rpc import Rpc
    from pocd.http.client import open_session

    errors = []
    for url in urls:
        async with open_session(CHAIN_TIMEOUT) as session:
            try:
                return await look(Gonka(Rpc(session, url)))
            except ValueError as error:
                raise ConfigError(str(error)) from None
            except ChainError as error:
                errors.append(str(error))
    raise EndedError(EXIT_TEMPORARY, "; ".join(errors))


async def look(node: Gonka) -> ChainNow:
    """Return what the live network is doing by one node.

    Raises:
        ChainError: The node cannot be reached, or its answer makes no sense.
    """
    from pocd.check.chain import seconds_a_block

    head = await node.head()
    info = await node.epoch_info()
    stage = stage_at(info, info.height)
    pace = await seconds_a_block(node, head, limit=5.0)
    due = stage.round
    running = None
    if due:
        block_hash = due.seed or (await node.block(due.height)).hash
        models = [recipe for recipe in info.recipes if recipe.scheme is due.scheme]
        running = RoundNow(due.height, block_hash, due.scheme, due.accepted_through, models, _why_not(info, models))
    return ChainNow(
        node=str(node),
        chain_id=head.block.chain_id,
        height=info.height,
        epoch=info.epoch,
        phase=stage.phase,
        until=stage.until,
        seconds=None if stage.until is None or not pace else (stage.until - info.height) * pace,
        awaits=stage.awaits,
        stronger_rng=info.stronger_rng,
        round=running,
    )


def _why_not(info: EpochInfo, models: Sequence[Recipe]) -> str | None:
    """Return why pocd computes nothing of a round with these models; None where it could."""
    try:
        for recipe in models:
            recipe_of(info, recipe.scheme, recipe.model)
    except NotComputedError as error:
        return str(error)
    return None if models else "the chain tells no parameters of any model"


def as_text(now: ChainNow) -> str:
    """Return the same for people."""
    lines = [f"{now.node}: {now.chain_id}, block {now.height}, epoch {now.epoch}"]
    left = ""
    if now.until is not None:
        pace = "" if now.seconds is None else f", about {_duration(now.seconds)}"
        left = f" until block {now.until} ({now.until - now.height} blocks{pace})"
    lines += [f"phase    {now.phase}{left}", f"awaits   {now.awaits}"]
    if now.round:
        lines.append(f"round    {now.round.height}, artifacts accepted through block {now.round.accepted_through}")
        lines.append(f"seed     {now.round.block_hash}")
        lines += [f"model    {recipe.model}: {_terms(recipe)}" for recipe in now.round.models]
        if now.round.not_computed:
            lines.append(f"refused  {now.round.not_computed}")
    lines.append(f"inputs   by {'256' if now.stronger_rng else '32'} bits of their seed")
    return "\n".join(lines)


def _terms(recipe: Recipe) -> str:
    test = recipe.stat_test
    terms = (
        ""
        if test is None
        else (f", distance {test.dist_threshold}, p {test.p_mismatch}, p-value {test.p_value_threshold}")
    )
    return f"{recipe.scheme}, seq_len {recipe.seq_len}{terms}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
