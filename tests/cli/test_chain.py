"""`pocd chain`: what it prints of a chain with epochs, and what it ends with."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import orjson
import pytest

from pocd.dev.chain import DevChain
from pocd.dev.epochs import EpochChain, application
from pocd.http.server import listening
from pocd.process import EXIT_CONFIG, EXIT_OK, EXIT_TEMPORARY
from tests.support.command_line import pocd_here

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.support.command_line import Ended

BLOCKS = DevChain("seed", block_seconds=5.0, genesis=1_700_000_000.0)


@pytest.fixture
async def url() -> AsyncIterator[str]:
    """The address of a host whose chain's newest block is its fourth."""
    served = application(EpochChain(BLOCKS, "tiny", 32), lambda: BLOCKS.block_time(4))
    async with listening(served, "127.0.0.1", 0, shutdown_timeout=1.0) as url:
        yield url


def configuration(folder: Path, kind: str, *urls: str) -> Path:
    path = folder / "pocd.toml"
    listed = ", ".join(f'"{url}"' for url in urls)
    path.write_text(f'[node]\npublic_key = "02b463"\n[chain]\nkind = "{kind}"\nurls = [{listed}]\n')
    return path


async def chain(*arguments: str | Path) -> Ended:
    return await asyncio.to_thread(pocd_here, "chain", *arguments)


async def test_the_configured_chain_is_shown_by_the_first_node_that_answers(tmp_path: Path, url: str) -> None:
    path = configuration(tmp_path, "gonka", "http://127.0.0.1:1", url)
    ended = await chain("--config", path)
    assert ended.returncode == EXIT_OK, ended
    assert ended.stdout.splitlines()[:3] == [
        f"{url}: pocd-dev, block 4, epoch 1",
        "phase    generate until block 9 (5 blocks, about 25 s)",
        "awaits   the end of generation",
    ]


async def test_as_json(url: str) -> None:
    ended = await chain("--url", url, "--json")
    found = orjson.loads(ended.stdout)
    assert (found["height"], found["epoch"], found["phase"], found["until"]) == (4, 1, "generate", 9)
    assert found["round"]["block_hash"] == BLOCKS.block_hash(1)
    assert found["round"]["models"] == [
        {
            "model": "tiny",
            "scheme": "POC_SCHEME_PREFILL",
            "seq_len": 32,
            "stat_test": {"dist_threshold": "0.4", "p_mismatch": "0.1", "p_value_threshold": "0.05"},
        }
    ]
    assert found["round"]["not_computed"] is None


async def test_what_cannot_be_asked_is_said(tmp_path: Path) -> None:
    nobody = await chain("--url", "http://127.0.0.1:1")
    assert (nobody.returncode, nobody.stdout) == (EXIT_TEMPORARY, "")
    assert "http://127.0.0.1:1/chain-rpc/status" in nobody.stderr
    other = await chain("--config", configuration(tmp_path, "cometbft", "http://127.0.0.1:1"))
    assert (other.returncode, other.stdout) == (EXIT_CONFIG, "")
    assert 'chain.kind is "cometbft": only "gonka" has epochs' in other.stderr
    nowhere = await chain("--config", configuration(tmp_path, "gonka"))
    assert (nowhere.returncode, nowhere.stdout) == (EXIT_CONFIG, "")
    assert "chain.urls is missing" in nowhere.stderr
    wrong = await chain("--url", "ftp://host")
    assert (wrong.returncode, wrong.stdout) == (EXIT_CONFIG, "")
