"""`pocd validate`: its exit statuses, its report, and the two ways of asking."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from aiohttp import web

from pocd.cli import main as cli
from pocd.cli import validate as cli_validate
from pocd.cli.report import verdict_as_text
from pocd.http.server import RefusalError, errors_as_json, json_answer, listening
from pocd.lab import command
from pocd.lab.command import ComputeRequest
from pocd.process import EXIT_CONFIG, EXIT_CRASH, EXIT_FRAUD, EXIT_NO_DEVICE, EXIT_OK, EXIT_UNUSABLE
from pocd.validation.claim import LARGEST_CLAIM
from tests.support.family_models import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

POCD = (sys.executable, "-W", "error", "-m", "pocd")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.upper().startswith("POCD_")} | {
    "CUDA_VISIBLE_DEVICES": "",
    "FORKED": "yes",
}
MODEL = "bundled:tiny-llama"
R = 1.417
HERE = (f"--model={MODEL}", "--seq-len=8", f"--r-target={R}")
ROOT = Path(__file__).resolve().parent.parent.parent

Ended = tuple[int, str, str]  # exit status, standard output, standard error


@pytest.fixture(scope="module")
def distances() -> dict[int, float]:
    request = ComputeRequest(MODEL, "poc2", "9F2E", "02ab", 8, "float32", "cpu", 32)
    return dict(command.distances(request, range(100)))


@pytest.fixture
def honest(distances: dict[int, float]) -> dict[str, Any]:
    valid = {nonce: distance for nonce, distance in distances.items() if distance < R - 1e-4}
    assert len(valid) > 20
    return {
        "public_key": "02ab",
        "block_hash": "9F2E",
        "block_height": 7,
        "nonces": list(valid),
        "dist": list(valid.values()),
        "node_id": 0,
    }


@pytest.fixture
def forged(honest: dict[str, Any], distances: dict[int, float]) -> dict[str, Any]:
    """Five forged nonces, a repeat and a claim that is no number."""
    bad = [nonce for nonce, distance in distances.items() if distance > R + 1e-4][:5]
    nonces = [*honest["nonces"], *bad, honest["nonces"][0]]
    return honest | {"nonces": nonces, "dist": [*honest["dist"], *[1.41] * 5, float("nan")]}


def process(*arguments: str | Path, given: str | None = None) -> Ended:
    ended = subprocess.run(
        [*POCD, "validate", *map(str, arguments)],
        input=given,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
        check=False,
    )
    return ended.returncode, ended.stdout, ended.stderr


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """The same without a process of its own, which would import torch once more."""

    def run(*arguments: str | Path, given: bytes = b"") -> Ended:
        monkeypatch.setattr(sys, "argv", ["pocd", "validate", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(given)))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return run


def refusal(ended: Ended, status: int) -> str:
    """The one line by which the command says why it did not judge."""
    code, out, err = ended
    assert (code, out) == (status, ""), err
    (line,) = err.splitlines()
    return line.removeprefix("pocd: ")


# Exit statuses.


def test_an_honest_batch_from_standard_input_ends_with_0(here: Callable[..., Ended], honest: dict[str, Any]) -> None:
    code, out, err = here("-", *HERE, "--batch-size=8", "--json", given=json.dumps(honest).encode())
    assert (code, err) == (EXIT_OK, "")
    body = orjson.loads(out)
    assert body["fraud_detected"] is False
    assert (body["nonces"], body["received_dist"]) == (honest["nonces"], honest["dist"])
    assert body["dist"] == pytest.approx(honest["dist"], abs=1e-5)  # in another batch
    assert (body["n"], body["n_invalid"], body["suspicions"]) == (len(honest["nonces"]), 0, [])
    assert (body["model"], body["dtype"], body["seq_len"], body["r_target"]) == (MODEL, "float32", 8, R)
    assert (body["tolerance"], body["mismatch"], body["fraud_threshold"]) == (1e-5, 5e-4, 0.01)


def test_a_forged_batch_ends_a_real_process_with_3(forged: dict[str, Any]) -> None:
    code, out, err = process("-", *HERE, given=json.dumps(forged))
    assert (code, err) == (EXIT_FRAUD, "")
    assert out.splitlines()[-1].startswith("verdict    FRAUD: ")


def test_no_file_ends_with_2() -> None:
    assert refusal(process("missing.json"), EXIT_UNUSABLE) == "missing.json cannot be read: No such file or directory"


# What is said.


def test_the_report_on_a_file(here: Callable[..., Ended], forged: dict[str, Any], tmp_path: Path) -> None:
    count = len(forged["nonces"]) - 1
    path = tmp_path / "batch.json"
    path.write_text(json.dumps(forged))
    code, out, _ = here(path, *HERE)
    assert code == EXIT_FRAUD
    lines = out.splitlines()
    chance = lines[-1].split()[2]
    assert 1e-20 < float(chance) < 1e-8
    assert lines == [
        "block      7 9F2E",
        "miner      02ab, node 0 of 1",
        f"held to    r_target {R}, scheme poc2, float32, 8 positions",
        f"weights    {lines[3].split()[1]} of {MODEL}",
        f"recomputed {count} nonces, all distinct ones; invalid: 6",
        f"difference {lines[5].split()[1]} at most from claimed to recomputed; tolerance 1e-05",
        "suspicious what no honest miner claims (no finite numbers, or not from 0 to below r_target): 1 nonces",
        "suspicious repeated nonces: 1 entries; each nonce counts once",
        "suspicious claims further than the tolerance from what was recomputed: 5 nonces",
        f"chance     {chance} that an honest miner has so many bad nonces, or more, at 0.0005 each",
        f"verdict    FRAUD: {chance} < 0.01",
    ]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    FAMILIES["qwen3 moe"].build().save_pretrained(folder)
    return folder


def test_a_mixtures_report_says_what_its_routers_leave_of_the_verdict(
    here: Callable[..., Ended], mixture: Path
) -> None:
    """In float32 few choices turn. In bfloat16 so many do that nothing is told, but by what nobody can claim."""
    options = (f"--model={mixture}", "--seq-len=8", f"--r-target={R}", "--batch-size=8")
    request = ComputeRequest(str(mixture), "poc2", "9F2E", "02ab", 8, "float32", "cpu", 8)
    valid = {nonce: each for nonce, each in command.distances(request, range(80)) if each < R}
    batch = {"public_key": "02ab", "block_hash": "9F2E", "block_height": 7}
    honest = json.dumps(batch | {"nonces": list(valid), "dist": list(valid.values())}).encode()
    n = len(valid)

    code, out, _ = here("-", *options, "--json", given=honest)
    body = orjson.loads(out)
    assert (code, body["verdict"]) == (EXIT_OK, "honest")
    found = body["mixture"]
    assert found["decidable"]
    assert len(found["turned"]) == n
    assert sum(chance > found["near_above"] for chance in found["turned"]) == found["near"]
    _, out, _ = here("-", *options, given=honest)
    assert f"routers    {found['near']} of {n} nonces are near another choice of experts; of these invalid: 0; a" in out
    assert "bad nonces, or more, at 0.0005 each that is not near, and at " in out
    assert out.splitlines()[-1] == "verdict    honest: 1 ≥ 0.01"

    forged = json.dumps(batch | {"nonces": list(range(80)), "dist": [1.0] * 80}).encode()
    assert here("-", *options, given=forged)[0] == EXIT_FRAUD
    half = (options[0], "--seq-len=64", *options[2:], "--dtype=bfloat16")  # whatever it was made with
    for given in (honest, forged):
        code, out, _ = here("-", *half, given=given)
        assert code == EXIT_UNUSABLE
        assert "1 that an honest miner has so many impossible claims, or more, at 0.0005 each; nothing else" in out
        *_, last = out.splitlines()
        assert (
            last == "verdict    UNDECIDABLE: a router's choice may turn in too many nonces, or the nonces are too few"
        )
    impossible = json.dumps(batch | {"nonces": list(range(80)), "dist": [1.9] * 80}).encode()
    code, out, _ = here("-", *half, given=impossible)
    assert (code, out.splitlines()[-1].startswith("verdict    FRAUD: ")) == (EXIT_FRAUD, True)


def test_a_sample(here: Callable[..., Ended], honest: dict[str, Any]) -> None:
    raw = json.dumps(honest).encode()
    code, out, _ = here("-", *HERE, "--sample=5", "--seed=abc", given=raw)
    assert code == EXIT_OK
    assert f"recomputed 5 nonces, drawn by 'abc' from {len(honest['nonces'])}; invalid: 0\n" in out
    assert out.endswith("verdict    honest: 1 ≥ 0.01\n")
    body = orjson.loads(here("-", *HERE, "--sample=5", "--seed=abc", "--json", given=raw)[1])
    assert (body["sample"], body["seed"], len(body["nonces"])) == (5, "abc", 5)


def test_the_options_are_what_it_is_held_to(here: Callable[..., Ended], forged: dict[str, Any]) -> None:
    options = ("--fraud-threshold=0", "--tolerance=0.5", "--node-count=3", "--dtype=float16", "--json")
    code, out, _ = here("-", *HERE, *options, given=json.dumps(forged).encode())
    body = orjson.loads(out)
    assert (code, body["fraud_detected"]) == (EXIT_OK, False)
    assert (body["tolerance"], body["fraud_threshold"], body["dtype"]) == (0.5, 0.0, "float16")
    assert (body["node_count"], body["n_invalid"], body["shifted"]) == (3, 1, 0)


def test_what_a_stranger_wrote_does_not_steer_a_terminal(here: Callable[..., Ended], honest: dict[str, Any]) -> None:
    body = orjson.loads(here("-", *HERE, "--json", given=json.dumps(honest).encode())[1])
    body |= {"public_key": "\x1b[2J\n" + "k" * 100, "model": "\x9b", "suspicions": ["a word of tomorrow"]}
    text = verdict_as_text(body)
    assert all(each.isprintable() for each in text.splitlines())
    assert f"\nminer      �[2J�{'k' * 59}…, node 0 of 1\n" in text
    assert "\nsuspicious a word of tomorrow\n" in text


# What cannot be judged.


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (
            b"",
            "standard input cannot be used: Invalid JSON: EOF while parsing a value at line 1 column 0; wanted is one",
        ),
        (b"[]", "standard input cannot be used: it has to be one JSON object; wanted is one batch: a JSON object with"),
        (
            b"{}\n{}",
            "standard input cannot be used: Invalid JSON: trailing characters at line 2 column 1; wanted is one",
        ),
        (b"{}", "standard input cannot be used: public_key: Field required; wanted is one batch"),
        (b" " * (LARGEST_CLAIM + 1), "standard input is larger than 8 MiB; wanted is one batch"),
    ],
)
def test_what_is_no_batch_ends_with_2(here: Callable[..., Ended], given: bytes, reason: str) -> None:
    assert refusal(here("-", given=given), EXIT_UNUSABLE).startswith(reason)


def test_a_dist_list_of_another_length_ends_with_2(here: Callable[..., Ended], honest: dict[str, Any]) -> None:
    given = json.dumps(honest | {"dist": honest["dist"][1:]}).encode()
    assert ": dist: " in refusal(here("-", *HERE, given=given), EXIT_UNUSABLE)


def test_a_folder_ends_with_2(here: Callable[..., Ended], tmp_path: Path) -> None:
    assert refusal(here(tmp_path), EXIT_UNUSABLE) == f"{tmp_path} cannot be read: Is a directory"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"seq_len": 256}, "seq_len: the batch says 256, but it is held to 8; nothing was judged"),
        ({"r_target": 1.4042}, f"r_target: the batch says 1.4042, but it is held to {R}; nothing was judged"),
        ({"params": {"seq_len": 256}}, "params.seq_len: the batch says 256, but it is held to 8; nothing was judged"),
        ({"params": {"dim": 9}}, "params: 'dim': this daemon does not know them, and they may decide a result; "),
        ({"revision": "main"}, "revision: the batch says 'main', but it is held to none; nothing was judged"),
        ({"k_dim": 12}, "k_dim: the batch says 12, but it is held to none; nothing was judged"),
        ({"model_fingerprint": "beef"}, "model_fingerprint: the batch says 'beef', but it is held to '"),
    ],
)
def test_a_batch_of_another_making_ends_with_2(
    here: Callable[..., Ended], honest: dict[str, Any], said: dict[str, Any], reason: str
) -> None:
    given = json.dumps(honest | said).encode()
    assert refusal(here("-", *HERE, given=given), EXIT_UNUSABLE).startswith(reason)


@pytest.mark.parametrize(
    ("options", "status", "reason"),
    [
        (["--sample=5"], EXIT_UNUSABLE, "--sample and --seed need each other"),
        (["--seed=a"], EXIT_UNUSABLE, "--sample and --seed need each other"),
        (["--sample=5", "--seed="], EXIT_UNUSABLE, "--seed must be a text of printable characters"),
        (["--sample=5", "--seed=\udcff"], EXIT_UNUSABLE, "--seed must be a text of printable characters"),
        (["--seq-len=8"], EXIT_UNUSABLE, "--seq-len has no effect without --model"),
        ([*HERE, "--url=http://127.0.0.1:1"], EXIT_UNUSABLE, "--url has no effect beside --model"),
        ([*HERE, "--r-target=nan"], EXIT_UNUSABLE, "Invalid value for '--r-target'"),
        ([*HERE, "--tolerance=nan"], EXIT_UNUSABLE, "Invalid value for '--tolerance'"),
        ([*HERE, "--dtype=int8"], EXIT_CONFIG, "dtype 'int8' is unknown"),
        ([*HERE, "--scheme=poc4"], EXIT_UNUSABLE, "dist: the batch is of distances, but scheme 'poc4' has vectors"),
        ([*HERE, "--model=bundled:huge"], EXIT_CONFIG, "model 'bundled:huge' is not bundled"),
        ([*HERE, "--device=cuda:99"], EXIT_NO_DEVICE, "device 'cuda:99' "),
        (["--config=missing.toml", "--token-file=missing"], EXIT_CONFIG, "admin.token_file missing cannot be read"),
    ],
)
def test_what_is_asked_wrongly(
    here: Callable[..., Ended], honest: dict[str, Any], options: list[str], status: int, reason: str
) -> None:
    assert reason in refusal(here("-", *options, given=json.dumps(honest).encode()), status)


# The daemon's way: a server that answers as it does, on a real socket.

VERDICT_FIELDS: dict[str, Any] = {
    "block_height": 7,
    "block_hash": "9F2E",
    "public_key": "02ab",
    "node_id": 0,
    "node_count": 1,
    "r_target": R,
    "scheme": "poc2",
    "dtype": "float32",
    "seq_len": 8,
    "model_fingerprint": "f00d",
    "model": "tiny",
    "n": 1,
    "n_batch": 1,
    "n_invalid": 0,
    "sample": None,
    "seed": None,
    "largest_difference": None,
    "tolerance": 1e-5,
    "probability_honest": 1.0,
    "mismatch": 5e-4,
    "fraud_threshold": 0.01,
    "differences": None,
    "verdict": "honest",
    "fraud_detected": False,
    "suspicions": [],
}


async def asked(
    answer: Callable[[web.Request], Awaitable[web.Response]], here: Callable[..., Ended], *options: str, given: bytes
) -> Ended:
    app = web.Application(middlewares=[errors_as_json], client_max_size=2 * LARGEST_CLAIM)
    app.add_routes([web.post("/api/v1/pow/validate", answer), web.get("/api/v1/pow/validate/{id}", answer)])
    async with listening(app, "127.0.0.1", 0, shutdown_timeout=1) as url:
        return await asyncio.to_thread(here, "-", f"--url={url}", *options, given=given)


async def test_the_daemon_is_given_the_very_bytes(here: Callable[..., Ended], forged: dict[str, Any]) -> None:
    seen = []

    async def answer(request: web.Request) -> web.Response:
        seen.append((await request.read(), dict(request.query)))
        return json_answer(VERDICT_FIELDS)

    given = json.dumps(forged, indent=2).encode()
    code, out, err = await asked(answer, here, "--sample=5", "--seed=a&b=ü", given=given)
    assert (code, err, out.splitlines()[-1]) == (EXIT_OK, "", "verdict    honest: 1 ≥ 0.01")
    assert b"NaN" in given
    assert seen == [(given, {"sample": "5", "seed": "a&b=ü"})]


async def test_a_verdict_that_takes_long_is_waited_for(
    here: Callable[..., Ended], honest: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_validate, "POLL_SECONDS", 0.01)
    seen = []

    async def answer(request: web.Request) -> web.Response:
        seen.append((request.method, request.match_info.get("id")))
        if len(seen) < 4:
            return json_answer({"id": "a 1", "state": "pending"}, 202)
        return json_answer(VERDICT_FIELDS | {"fraud_detected": True, "verdict": "fraud"})

    code, out, _ = await asked(answer, here, "--json", given=json.dumps(honest).encode())
    assert (code, orjson.loads(out)["fraud_detected"]) == (EXIT_FRAUD, True)
    assert seen == [("POST", None), *[("GET", "a 1")] * 3]


async def test_it_is_not_waited_for_without_end(
    here: Callable[..., Ended], honest: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_validate, "POLL_SECONDS", 0.01)

    async def answer(_request: web.Request) -> web.Response:
        return json_answer({"id": "a1", "state": "pending"}, 202)

    ended = await asked(answer, here, "--timeout=1", given=json.dumps(honest).encode())
    reason = refusal(ended, EXIT_CRASH)
    assert reason == "no verdict within 1 s; the daemon goes on: GET /api/v1/pow/validate/a1"


@pytest.mark.parametrize(
    ("http_status", "status"),
    [
        (400, EXIT_UNUSABLE),
        (409, EXIT_UNUSABLE),
        (413, EXIT_UNUSABLE),
        (401, EXIT_CRASH),
        (404, EXIT_CRASH),
        (429, EXIT_CRASH),
        (503, EXIT_CRASH),
    ],
)
async def test_what_the_daemon_refuses(
    here: Callable[..., Ended], honest: dict[str, Any], http_status: int, status: int
) -> None:
    async def answer(_request: web.Request) -> web.Response:
        raise RefusalError(http_status, "word", "the reason", "dtype")

    ended = await asked(answer, here, given=json.dumps(honest).encode())
    assert refusal(ended, status).endswith(" refused: the reason")
