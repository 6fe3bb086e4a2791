"""Checks of a daemon of the live network: its role, what the chain wants now, and whether the configuration fits it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from pocd.chain.source import ChainError
from pocd.check.finding import Finding, green, red, yellow
from pocd.config.roles import Role
from pocd.protocol.epochs import LiveScheme, NotComputedError, recipe_of, stage_at
from pocd.protocol.schemes import LIVE_SCHEME

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pocd.chain.gonka import Gonka
    from pocd.config.settings import Settings
    from pocd.protocol.epochs import EpochInfo


def check_role(settings: Settings) -> list[Finding]:
    """Return what the daemon is on the live network, and what keeps that from working; nothing on other chains."""
    names = " or ".join(settings.names_of_model)
    if settings.role is Role.MINER:
        if settings.chain.kind != "gonka":
            return []
        return [green("role", f"{Role.MINER} of the live network's rounds, as they are due, for model {names}")]
    served = settings.orchestrator
    prefix = f", also below {served.prefix}" if served.prefix else ""
    told = f"{Role.ENGINE} for an orchestrator, on {served.host} port {served.port}{prefix}, for model {names}"
    found = [green("role", told)]
    if not settings.admin.callback_origins and not settings.delivery.receivers:
        remedy = "name the orchestrator's there, such as http://api:9100"
        found.append(red("role", "admin.callback_origins is empty, so every url that a round names is refused", remedy))
    if settings.round.scheme != LIVE_SCHEME:
        told = f"round.scheme is {settings.round.scheme!r}, but a {Role.ENGINE} computes {LIVE_SCHEME!r} all the same"
        found.append(yellow("role", told, f"set round.scheme = {LIVE_SCHEME!r}"))
    return found


async def check_epoch(nodes: Sequence[Gonka], settings: Settings, longest: int | None, limit: float) -> list[Finding]:
    """Return what the live network does now, and how the configuration fits its parameters.

    Args:
        nodes: Hosts of the network, of which the first that answers is believed.
        settings: The whole configuration.
        longest: Largest sequence length that the model allows; None where that is not known.
        limit: Seconds for each node to answer.
    """
    errors = []
    for node in nodes:
        try:
            async with asyncio.timeout(limit):
                return judge_epoch(await node.epoch_info(), settings, longest)
        except ChainError as error:
            errors.append(str(error))
        except TimeoutError:
            errors.append(f"{node}: no answer within {limit:g} s")
    return [red("epoch", "; ".join(errors), "name a host of the live network in chain.urls: http://HOST:8000")]


def judge_epoch(info: EpochInfo, settings: Settings, longest: int | None) -> list[Finding]:
    """Return a finding on the phase, and one on each parameter of the chain that the configuration does not fit.

    Args:
        info: What the chain says.
        settings: The whole configuration.
        longest: Largest sequence length that the model allows; None where that is not known.
    """
    stage = stage_at(info, info.height)
    until = "" if stage.until is None else f" until block {stage.until}"
    due = f"round {stage.round.height} is due" if stage.round else "no round is due"
    found = [green("epoch", f"epoch {info.epoch}, block {info.height}: {stage.phase}{until}; {due}")]
    try:
        recipe = recipe_of(info, info.scheme, *settings.names_of_model)
    except NotComputedError as error:
        key = "orchestrator.aliases" if settings.role is Role.ENGINE else "chain.model"
        remedy = f"name the model as the chain does in {key}, or run one of its models; other schemes cannot be mined"
        return [*found, red("recipe", str(error), remedy)]
    asked, own = recipe.seq_len, settings.round.seq_len
    bits = "256" if info.stronger_rng else "32"
    told = f"{recipe.model}: {recipe.scheme}, seq_len {asked}, inputs by {bits} bits of their seed"
    if longest is not None and asked > longest:
        text = f"the chain asks for seq_len {asked} of {recipe.model}, but {settings.model.name} allows {longest}"
        found.append(red("recipe", text, "correct model.name: the chain means another model"))
    elif asked != own:
        text = f"the chain asks for seq_len {asked} of {recipe.model}, but round.seq_len is {own}"
        remedy = f"set round.seq_len = {asked}: workers are tested and compiled for that length, others run slower"
        found.append(yellow("recipe", text, remedy))
    else:
        found.append(green("recipe", told))
    if info.confirmation_scheme is not LiveScheme.PREFILL and info.confirmation_scheme_rounds:
        which = f"the first {info.confirmation_scheme_rounds} confirmation rounds of an epoch"
        text = f"{which} are {info.confirmation_scheme}, which pocd does not compute"
        found.append(yellow("recipe", text, "have another proof engine for those rounds"))
    return found
