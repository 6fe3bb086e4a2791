"""The development chain with epochs, followed block by block by what follows the live network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import aiohttp
import pytest
from aiohttp.test_utils import TestServer

from pocd.chain.gonka import Gonka
from pocd.chain.rpc import Rpc
from pocd.chain.source import ChainError
from pocd.cli.chain import as_text, look
from pocd.dev.chain import DevChain
from pocd.dev.epochs import CONFIRM, WINDOWS, EpochChain, application
from pocd.protocol.epochs import LiveScheme, Phase, stage_at

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

FIRST = 1000
BLOCKS = DevChain("seed", block_seconds=5.0, genesis=1_700_000_000.0, first_height=FIRST)


class Bench:
    """A host that serves a chain with epochs, at the height that the test sets, and a client of it."""

    def __init__(self, chain: EpochChain) -> None:
        self.chain = chain
        self.height = FIRST
        self.server = TestServer(application(chain, lambda: BLOCKS.block_time(self.height) + 1))

    async def confirm(self) -> tuple[int, dict[str, str]]:
        async with aiohttp.ClientSession() as session, session.post(self.server.make_url(CONFIRM)) as answer:
            return answer.status, await answer.json()


@pytest.fixture(params=[False, True], ids=["flat", "schemes"])
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    bench = Bench(EpochChain(BLOCKS, "tiny", 32, in_schemes=request.param))
    async with bench.server:
        yield bench


@pytest.fixture
async def node(bench: Bench) -> AsyncIterator[Gonka]:
    async with aiohttp.ClientSession() as session:
        yield Gonka(Rpc(session, str(bench.server.make_url("/")), attempts=1))


async def test_two_epochs_with_a_confirmation_round_each_followed_by_their_answers(bench: Bench, node: Gonka) -> None:
    seen: list[tuple[int, Phase]] = []
    seeds: dict[int, str] = {}
    for height in range(FIRST, FIRST + 2 * WINDOWS.epoch):
        bench.height = height
        if (height - FIRST) % WINDOWS.epoch == 31:
            status, event = await bench.confirm()
            assert (status, event["trigger_height"]) == (200, str(height))
        info = await node.epoch_info()
        assert (await node.head()).block.height == info.height == height
        stage = stage_at(info, height)
        if not seen or seen[-1][1] is not stage.phase:
            seen.append((height - FIRST, stage.phase))
        if stage.round:
            seeds.setdefault(stage.round.height, stage.round.seed or (await node.block(stage.round.height)).hash)
    one = [
        (0, Phase.GENERATE),
        (8, Phase.GENERATE_WIND_DOWN),
        (12, Phase.VALIDATE),
        (24, Phase.VALIDATE_WIND_DOWN),
        (27, Phase.INFERENCE),
        (31, Phase.ANNOUNCED),
        (33, Phase.CONFIRM),
        (43, Phase.CONFIRM_CLOSED),
        (44, Phase.CONFIRM_VALIDATE),
        (59, Phase.INFERENCE),
    ]
    assert seen == one + [(offset + 60, phase) for offset, phase in one]
    # A regular round's hash is written in upper case, a confirmation round's in lower case, of another block.
    assert seeds == {
        FIRST: BLOCKS.block_hash(FIRST),
        FIRST + 31: BLOCKS.block_hash(FIRST + 33).lower(),
        FIRST + 60: BLOCKS.block_hash(FIRST + 60),
        FIRST + 91: BLOCKS.block_hash(FIRST + 93).lower(),
    }


async def test_a_confirmation_round_is_announced_only_where_it_fits(bench: Bench) -> None:
    for offset, said in ((3, "generate; ask again at block 1008"), (50, "but the regular round begins at 1060")):
        bench.height = FIRST + offset
        status, answer = await bench.confirm()
        assert status == 409
        assert said in answer["message"]
    bench.height = FIRST + 27
    assert (await bench.confirm())[0] == 200
    status, answer = await bench.confirm()
    assert status == 409
    assert "confirmation announced" in answer["message"]


async def test_confirmation_rounds_are_counted_within_their_epoch(bench: Bench) -> None:
    sequences = []
    for offset in (28, 28 + WINDOWS.epoch):
        bench.height = FIRST + offset
        await bench.confirm()
        info = bench.chain.info(bench.height)
        assert info.confirmation is not None
        sequences.append(info.confirmation.sequence)
    assert sequences == [0, 0]


async def test_what_people_are_told(bench: Bench, node: Gonka) -> None:
    bench.height = FIRST + WINDOWS.epoch + 3
    text = as_text(await look(node))
    first, *lines = text.splitlines()
    assert first.endswith(": pocd-dev, block 1063, epoch 2")
    assert lines == [
        "phase    generate until block 1068 (5 blocks, about 25 s)",
        "awaits   the end of generation",
        "round    1060, artifacts accepted through block 1070",
        f"seed     {BLOCKS.block_hash(1060)}",
        "model    tiny: POC_SCHEME_PREFILL, seq_len 32, distance 0.4, p 0.1, p-value 0.05",
        "inputs   by 32 bits of their seed",
    ]


async def test_decode_is_refused_by_name(bench: Bench, node: Gonka) -> None:
    bench.chain.scheme, bench.chain.in_schemes = LiveScheme.DECODE, True
    assert "refused  the chain asks for POC_SCHEME_DECODE, which pocd does not compute" in as_text(await look(node))


async def test_before_the_first_block_there_is_an_error(bench: Bench, node: Gonka) -> None:
    bench.height = FIRST - 1
    with pytest.raises(ChainError, match="HTTP 500"):
        await node.epoch_info()
