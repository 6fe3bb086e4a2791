"""The daemon's parts over the live network's rounds, by HTTP: which round runs, and what status says."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import aiohttp
import structlog
from aiohttp.test_utils import TestServer

from pocd.admin import status
from pocd.admin.text import epoch_text
from pocd.config.settings import load
from pocd.daemon.compose import compose, make_chain, make_loads
from pocd.dev.chain import DevChain
from pocd.dev.epochs import EpochChain, application
from pocd.protocol.epochs import LiveScheme
from pocd.store.thread import OutboxThread
from tests.support.clocks import NOW, ManualClock
from tests.support.processes import config

if TYPE_CHECKING:
    from pathlib import Path

    from pocd.admin.answers import Status

FIRST = 1000
BLOCKS = DevChain("seed", block_seconds=5.0, genesis=NOW, first_height=FIRST)


async def test_which_round_runs_and_what_status_says_of_the_epoch(tmp_path: Path) -> None:
    chain, clock = EpochChain(BLOCKS, "tiny", 32), ManualClock()
    log = structlog.get_logger()
    async with (
        TestServer(application(chain, clock.wall)) as server,
        aiohttp.ClientSession() as session,
    ):
        url = str(server.make_url("/"))
        of_gonka = {
            "chain__kind": "gonka",
            "chain__model": "tiny",
            "round__scheme": "artifacts",
            "round__r_target": None,
        }
        settings = load(config(tmp_path, url, {}, **of_gonka, round__every=60, round__duration=60))
        with contextlib.closing(OutboxThread(settings.store.path)) as outbox:
            source = await make_chain(settings, outbox, [session], log)
            assert source is not None
            made = compose(settings, outbox, source, [], make_loads(settings), clock=clock, log=log)

            async def at(height: int) -> Status:
                clock.advance(BLOCKS.block_time(height) - clock.now)
                made.parts.chain.head = await source.head()
                assert made.scheduler is not None
                await made.scheduler.on_head(made.parts.chain.head)
                return status.view(made.parts)

            told = await at(FIRST + 3)
            assert told.round is not None
            assert (told.round.block_height, told.round.block_hash) == (FIRST, BLOCKS.block_hash(FIRST))
            assert told.round.seq_len == 32
            assert told.chain.epoch is not None
            assert (told.chain.epoch.due, told.chain.epoch.refused) == (FIRST, None)
            assert told.chain.epoch.accepted_through == FIRST + 10
            assert (
                epoch_text(told.chain.epoch.model_dump()) == "1, generate until block 1008, then the end of generation"
            )
            told = await at(FIRST + 29)
            assert told.round is None
            chain.confirm(FIRST + 29)
            told = await at(FIRST + 31)
            assert told.round is not None
            seed = BLOCKS.block_hash(FIRST + 31).lower()
            assert (told.round.block_height, told.round.block_hash) == (FIRST + 29, seed)

            chain.scheme = LiveScheme.DECODE
            chain.in_schemes = True
            told = await at(FIRST + 60)
            assert told.round is None
            (refused,) = [problem.reason for problem in told.problems if "DECODE" in problem.reason]
            assert (
                refused == "the chain asks for POC_SCHEME_DECODE, which pocd does not compute: only POC_SCHEME_PREFILL"
            )
        # After a restart the round's hash, which is not that of its block, is held against no node.
        with contextlib.closing(OutboxThread(settings.store.path)) as outbox:
            again = await make_chain(settings, outbox, [session], log)
            assert again is not None
            assert (await again.block(FIRST + 29)).hash == BLOCKS.block_hash(FIRST + 29)


async def test_a_proof_engine_tells_the_epoch_and_begins_no_round(tmp_path: Path) -> None:
    chain, clock = EpochChain(BLOCKS, "tiny", 32), ManualClock()
    clock.advance(BLOCKS.block_time(FIRST + 3) - clock.now)
    async with TestServer(application(chain, clock.wall)) as server, aiohttp.ClientSession() as session:
        engine = {"orchestrator__port": 8080, "orchestrator__aliases": ["tiny"], "node__public_key": None}
        of_gonka = {"chain__kind": "gonka", "round__scheme": "artifacts", "round__r_target": None, "round__every": 60}
        path = config(tmp_path, str(server.make_url("/")), {}, **engine, **of_gonka, round__duration=60)
        for alias, problems in (("tiny", 0), ("another", 1)):
            path.write_text(path.read_text().replace('aliases = ["tiny"]', f'aliases = ["{alias}"]'))
            settings, log = load(path), structlog.get_logger()
            with contextlib.closing(OutboxThread(settings.store.path)) as outbox:
                source = await make_chain(settings, outbox, [session], log)
                assert source is not None
                made = compose(settings, outbox, source, [], make_loads(settings), clock=clock, log=log)
                assert made.scheduler is not None
                assert made.orchestrated is not None
                assert made.parts.validator._until_free == made.orchestrated.jobs.until_idle
                await made.scheduler.on_head(await source.head())
                told = status.view(made.parts)
                assert (told.round, told.chain.epoch and told.chain.epoch.phase) == (None, "generate")
                assert made.parts.control.chain_round is None
                refused = [each.reason for each in told.problems if "no POC_SCHEME_PREFILL of model" in each.reason]
                assert len(refused) == problems
