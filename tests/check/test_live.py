"""What `pocd check` says of a daemon of the live network: its role, the phase, and what the chain asks of its model."""

from __future__ import annotations

import time
from dataclasses import replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest

from pocd.check import live
from pocd.config.settings import load
from pocd.dev.chain import DevChain
from pocd.dev.epochs import EpochChain, application
from pocd.http.server import listening
from pocd.protocol.epochs import LiveScheme, Recipe, StatTest
from tests.check.test_check import levels, look
from tests.support.processes import config, free_port

if TYPE_CHECKING:
    from pathlib import Path

    from pocd.config.settings import Settings
    from pocd.protocol.epochs import EpochInfo

FIRST = 1000
MODEL = "MiniMaxAI/MiniMax-M2.7"
TEST = StatTest(Decimal("0.75"), Decimal("0.1"), Decimal("0.05"))
ENGINE = {"chain__urls": None, "orchestrator__port": 8080, "orchestrator__aliases": [MODEL]}
OF_GONKA = {"chain__kind": "gonka", "round__every": None, "round__duration": None, "round__r_target": None}


def settings(folder: Path, **changes: Any) -> Settings:  # noqa: ANN401 - any setting
    scheme = {"round__scheme": "artifacts", "round__r_target": None}
    return load(config(folder, "http://127.0.0.1:9", {}, **scheme | changes))


def said(*recipes: Recipe, **changes: Any) -> EpochInfo:  # noqa: ANN401 - any field
    chain = EpochChain(DevChain("seed", block_seconds=1.0, genesis=0.0, first_height=FIRST), MODEL, 16)
    return replace(chain.info(FIRST + 3), recipes=recipes or (Recipe(MODEL, LiveScheme.PREFILL, 16, TEST),), **changes)


def test_what_a_daemon_is_and_by_which_names_its_model_is_asked_for(tmp_path: Path) -> None:
    assert live.check_role(settings(tmp_path)) == [], "on other chains there is one role"
    (miner,) = live.check_role(settings(tmp_path, **OF_GONKA, chain__model=MODEL))
    told = f"miner of the live network's rounds, as they are due, for model {MODEL}"
    assert (miner.level, miner.text) == ("green", told)
    own = {"admin__callback_origins": ["http://api:9100"], "orchestrator__prefix": "/v3.0.8"}
    (engine,) = live.check_role(settings(tmp_path, **ENGINE, **own))
    where = "proof engine for an orchestrator, on 127.0.0.1 port 8080, also below /v3.0.8"
    assert (engine.level, engine.text) == ("green", f"{where}, for model bundled:tiny-llama or {MODEL}")
    _, origins, scheme = live.check_role(settings(tmp_path, **ENGINE, round__scheme="poc4"))
    assert (origins.level, "admin.callback_origins is empty" in origins.text) == ("red", True)
    assert (scheme.level, "round.scheme is 'poc4', but" in scheme.text) == ("yellow", True)


@pytest.mark.parametrize(
    ("info", "longest", "level", "text"),
    [
        pytest.param(said(), 4096, "green", f"{MODEL}: POC_SCHEME_PREFILL, seq_len 16, inputs by 32 bits", id="fits"),
        pytest.param(
            said(Recipe(MODEL, LiveScheme.PREFILL, 1024, TEST)),
            4096,
            "yellow",
            f"the chain asks for seq_len 1024 of {MODEL}, but round.seq_len is 16",
            id="another length",
        ),
        pytest.param(
            said(Recipe(MODEL, LiveScheme.PREFILL, 1024, TEST)),
            512,
            "red",
            f"the chain asks for seq_len 1024 of {MODEL}, but bundled:tiny-llama allows 512",
            id="too long",
        ),
        pytest.param(
            said(Recipe("other/model", LiveScheme.PREFILL, 16, TEST)),
            None,
            "red",
            "of model 'bundled:tiny-llama' or 'MiniMaxAI/MiniMax-M2.7'; it has models other/model",
            id="another model",
        ),
        pytest.param(said(scheme=LiveScheme.DECODE), None, "red", "the chain asks for POC_SCHEME_DECODE", id="scheme"),
        pytest.param(
            said(confirmation_scheme=LiveScheme.DECODE, confirmation_scheme_rounds=2),
            None,
            "yellow",
            "the first 2 confirmation rounds of an epoch are POC_SCHEME_DECODE",
            id="confirmation",
        ),
    ],
)
def test_what_the_chain_asks_is_held_against_the_configuration(
    tmp_path: Path, info: EpochInfo, longest: int | None, level: str, text: str
) -> None:
    epoch, *_, found = live.judge_epoch(info, settings(tmp_path, **ENGINE), longest)
    told = "epoch 1, block 1003: generate until block 1008; round 1000 is due"
    assert (epoch.level, epoch.text) == ("green", told)
    assert (found.name, found.level) == ("recipe", level)
    assert text in found.text
    assert (found.remedy is None) == (level == "green")


async def test_a_proof_engine_is_checked_as_one(tmp_path: Path) -> None:
    blocks = DevChain("seed", block_seconds=1.0, genesis=time.time(), first_height=FIRST)
    host = application(EpochChain(blocks, MODEL, 10**6), lambda: blocks.block_time(FIRST + 40) + 0.5)
    async with listening(host, "127.0.0.1", 0, shutdown_timeout=1) as url:
        own = {"node__public_key": None, "admin__callback_origins": ["http://api:9100"], "admin__port": free_port()}
        scheme = {"round__scheme": "artifacts", "orchestrator__aliases": [MODEL], "orchestrator__port": free_port()}
        path = config(tmp_path, url, {}, **own, **OF_GONKA | scheme)
        found = {finding.name: finding for finding in await look(path)}
        assert found["configuration"].level == "green", "no receiver and no scheme are missed"
        assert found["epoch"].text == "epoch 1, block 1040: inference until block 1060; no round is due"
        assert "but bundled:tiny-llama allows " in found["recipe"].text
        path.write_text(path.read_text().replace(f'urls = ["{url}"]', ""))
        names = [name for name, _ in levels(await look(path))]
    assert not {"chain", "clock", "epoch", "recipe"} & set(names)
    assert "role" in names
