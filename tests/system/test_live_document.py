"""The configurations of docs/live.md run as they stand: only addresses, files and the model are others."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import orjson

from pocd.dev.processes import started
from tests.support.delivering import serving
from tests.support.orchestrating import POW, ask, generate_body, init_body, receiving_callbacks
from tests.support.processes import Daemon, free_port, running
from tests.support.waiting import until

DOCUMENT = (Path(__file__).parents[2] / "docs" / "live.md").read_text()
CONFIGURATIONS = re.findall(r"```toml\n(.*?)```", DOCUMENT, re.DOTALL)
MODEL = "MiniMaxAI/MiniMax-M2.7"


def configured(folder: Path, **settings: Any) -> dict[str, str]:  # noqa: ANN401 - any setting
    """Environment variables that put this machine's addresses, files and model above a configuration."""
    own = {
        "model__name": "bundled:tiny-qwen3",
        "model__dtype": "float32",
        "model__device": "cpu",
        "round__seq_len": 32,
        "worker__batch_size": 8,
        "store__path": str(folder / "outbox.db"),
        "store__free_space_mib": 0,
        "admin__port": free_port(),
        "delivery__batch_seconds": 0.2,
        "log__format": "json",
    }
    values = {
        name: value if isinstance(value, str) else orjson.dumps(value).decode()
        for name, value in (own | settings).items()
    }
    return {f"POCD_{name.upper()}": value for name, value in values.items()}


def section(title: str) -> str:
    """The one configuration below a heading."""
    (_, _, rest) = DOCUMENT.partition(f"\n## {title}\n")
    (found,) = re.findall(r"```toml\n(.*?)```", rest.partition("\n## ")[0], re.DOTALL)
    assert isinstance(found, str)
    return found


async def ready(daemon: Daemon) -> None:
    await daemon.until(lambda body: body["is_model_initialized"])


def test_there_are_no_others() -> None:
    titles = ["Rounds by epoch", "A node's proof engine", "Independent validator"]
    assert [section(title) for title in titles] == CONFIGURATIONS


async def test_the_proof_engine(tmp_path: Path) -> None:
    path, port = tmp_path / "pocd.toml", free_port()
    path.write_text(section("A node's proof engine"))
    async with receiving_callbacks() as callbacks:
        own = {"orchestrator__host": "127.0.0.1", "orchestrator__port": port, "orchestrator__aliases": [MODEL]}
        own["admin__callback_origins"] = [callbacks.url]
        async with running(path, **configured(tmp_path, **own)) as daemon:
            await ready(daemon)
            url = f"http://127.0.0.1:{port}"
            body = init_body(callbacks.url, node_count=1, params={"model": MODEL, "seq_len": 32})
            code, said = await ask(url, "POST", f"/v3.0.8{POW}/init/generate", body, Host=f"mlnode:{port}")
            assert code == 200, said
            await until(lambda: callbacks.artifacts)
            assert await daemon.end() == 0


async def test_the_miner_of_epochs(tmp_path: Path) -> None:
    path = tmp_path / "pocd.toml"
    path.write_text(section("Rounds by epoch"))
    chain = ("devchain", "--kind", "gonka", "--block-seconds", "60", "--port", "0", "--model", MODEL)
    async with started(tmp_path, *chain) as host, serving() as receiver:
        own = {"chain__urls": [host.url], "delivery__receivers": [{"name": "main", "url": receiver.url}]}
        async with running(path, **configured(tmp_path, **own)) as daemon:
            told = await daemon.until(lambda body: body["funnel"]["delivered"])
            assert (told["node"]["role"], told["node"]["models"]) == ("miner", [MODEL])
            assert told["round"] is None or told["round"]["seq_len"] == 32
            assert await daemon.end() == 0


async def test_the_validator(tmp_path: Path) -> None:
    path, port = tmp_path / "pocd.toml", free_port()
    path.write_text(section("Independent validator"))
    async with running(path, **configured(tmp_path, orchestrator__port=port)) as daemon:
        await ready(daemon)
        params = {"model": "bundled:tiny-qwen3", "seq_len": 32}
        known = {"nonce": 0, "vector_b64": "zLE+LOqw86RaJ9S4BTThM8Ssorhis5Iz"}  # as the document has it
        body = generate_body(
            [0],
            wait=True,
            params=params,
            block_hash="TEST_BLOCK",
            public_key="test_pub_keys",
            validation={"artifacts": [known]},
            stat_test={"dist_threshold": 0.75, "p_mismatch": 0.1},
        )
        code, said = await ask(f"http://127.0.0.1:{port}", "POST", f"{POW}/generate", body)
        assert (code, said["status"], said["n_mismatch"]) == (200, "completed", 0)
        assert (await daemon.status())["round"] is None
        assert await daemon.end() == 0


async def test_the_relay(tmp_path: Path) -> None:
    (line,) = re.findall(r"^\$ (pocd relay .*)$", DOCUMENT, re.MULTILINE)
    _, command, *options = shlex.split(line)
    async with receiving_callbacks() as callbacks:
        given = [callbacks.url if each == "http://api:9100" else each for each in options]
        assert given != options
        async with started(tmp_path, command, *given, "--port", "0", "--store", str(tmp_path / "relay.db")) as relay:
            body = {"request_id": "2f0c", "public_key": "02b4", "block_hash": "9B4C", "block_height": 7, "node_id": 1}
            place = init_body("")["url"]
            assert (await ask(relay.url, "POST", f"{place}/validated", body))[0] == 200
            await until(lambda: callbacks.has_judged("2f0c"))
