"""`pocd commit`, `pocd prove` and `pocd verify`: what they print, refuse, and end with."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pocd.process import EXIT_CONFIG, EXIT_FRAUD, EXIT_OK
from tests.support.command_line import pocd_here

if TYPE_CHECKING:
    from tests.support.command_line import Ended

KNOWN = json.loads((Path(__file__).parent.parent / "data" / "live_trees.json").read_text())[1]
COMMITTED = (f"--root={KNOWN['root']}", "--count=5")
USAGE = 2


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


ARTIFACTS = [
    {"nonce": int(nonce), "vector_b64": in_base64(bytes.fromhex(vector))} for nonce, vector in KNOWN["leaves"].items()
]


def body(artifacts: list[dict[str, Any]], /, **fields: object) -> dict[str, Any]:
    """The body that a node of the live network posts."""
    return {
        "public_key": "02b463",
        "block_hash": "9B4C",
        "block_height": 6450112,
        "node_id": 3,
        "artifacts": artifacts,
        "encoding": {"dtype": "f16", "k_dim": 12, "endian": "le"},
        **fields,
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "artifacts.jsonl"
    bodies = [body(ARTIFACTS[3:]), body(ARTIFACTS[:3], node_id=4)]  # of two nodes, the later nonces first
    path.write_text("\n".join([json.dumps(each) for each in bodies] + ["\n"]))
    return path


def refusal(ended: Ended, code: int = EXIT_CONFIG) -> str:
    """The one line by which a command that failed says why."""
    assert (ended.returncode, ended.stdout) == (code, ""), ended
    (line,) = ended.stderr.splitlines()
    return line.removeprefix("pocd: ")


def said(*arguments: str | Path, code: int = EXIT_OK) -> str:
    ended = pocd_here(*arguments)
    assert (ended.returncode, ended.stderr) == (code, ""), ended
    return ended.stdout


def test_what_is_committed_is_proved(file: Path, tmp_path: Path) -> None:
    assert said("commit", file) == f"count 5\nroot  {KNOWN['root']}\n"
    proofs = tmp_path / "proofs.json"
    proofs.write_text(said("prove", file, "4", "0", "2"))
    assert said("verify", proofs, *COMMITTED) == "3 of 5 artifacts are proved\n"


def test_proofs_have_the_form_of_the_live_network(file: Path) -> None:
    (proof,) = json.loads(said("prove", file, "0"))["proofs"]
    siblings = [in_base64(bytes.fromhex(each)) for each in KNOWN["proof_of_dense_0"]]
    vector = in_base64(bytes.fromhex(KNOWN["leaves"]["0"]))
    assert proof == {"leaf_index": 0, "nonce_value": 0, "vector_bytes": vector, "proof": siblings}


@pytest.mark.parametrize("indent", [None, 1])
def test_one_body_from_standard_input(indent: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(json.dumps(body(ARTIFACTS), indent=indent).encode())))
    assert said("commit", "-") == f"count 5\nroot  {KNOWN['root']}\n"


def test_proofs_that_do_not_verify_end_with_3(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "proofs.json"
    proofs = json.loads(said("prove", file, "0", "2", "4"))["proofs"]
    proofs[1]["leaf_index"] = 3
    path.write_text(json.dumps({"proofs": [*proofs, proofs[0]], "signature": "ignored"}))
    assert said("verify", path, *COMMITTED, code=EXIT_FRAUD).splitlines() == [
        "proofs.1: nonce 2 has index 2, not 3",
        "proofs.3: nonce 0 comes twice",
        "2 of 4 proofs do not verify",
    ]
    wrong_root = said("verify", path, f"--root={'0' * 64}", "--count=5", code=EXIT_FRAUD)
    assert wrong_root.endswith("4 of 4 proofs do not verify\n")


def changed(index: int, **fields: object) -> list[dict[str, Any]]:
    return [artifact | fields if at == index else artifact for at, artifact in enumerate(ARTIFACTS)]


NOT_FINITE = in_base64(b"\x00\x7c" + bytes(22))


@pytest.mark.parametrize(
    ("bodies", "why"),
    [
        ([], "Invalid JSON: "),
        (["nothing"], "it has to be one JSON object"),
        ([body([])], "artifacts: there is none"),
        ([body(ARTIFACTS, artifacts={})], "artifacts: Input should be "),
        ([body(changed(2, nonce=-1))], "artifacts.2.nonce: Input should be greater than or equal to 0"),
        ([body(changed(2, nonce=2**31))], "artifacts.2.nonce: Input should be less than or equal to 2147483647"),
        ([body(changed(2, nonce="2"))], "artifacts.2.nonce: Input should be a valid integer"),
        ([body(changed(2, nonce=1))], "artifacts.2.nonce: 1 comes twice"),
        ([body([{"nonce": 1, "k_points_steps": [0]}])], "artifacts.0.vector_b64: Field required"),
        ([body(changed(2, vector_b64="ä"))], "artifacts.2.vector_b64: it has to be base64"),
        ([body(changed(2, vector_b64=7))], "artifacts.2.vector_b64: it has to be text in base64"),
        ([body(changed(2, vector_b64="AAAA"))], "artifacts.2.vector_b64: it has 3 bytes, not 24"),
        ([body(changed(2, vector_b64=NOT_FINITE))], "artifacts.2.vector_b64: its numbers have to be finite"),
        ([body(ARTIFACTS, encoding={"dtype": "f32", "k_dim": 12, "endian": "le"})], "encoding.dtype: Input should be "),
        ([body(ARTIFACTS, public_key="")], "public_key: String should have at least 1 character"),
        ([body(ARTIFACTS[:2]), body(ARTIFACTS[1:])], "line 2: artifacts.0.nonce: 1 comes twice"),
        ([body(ARTIFACTS[:2]), body([], block_hash="9b4c")], "line 2: block_hash: it is not that of the first body"),
        ([body(ARTIFACTS[:2]), body([], block_height=True)], "line 2: block_height: Input should be a valid integer"),
        ([body(ARTIFACTS), "nothing"], "line 2: it has to be one JSON object"),
    ],
)
def test_bodies_that_cannot_be_used(bodies: list[object], why: str, tmp_path: Path) -> None:
    path = tmp_path / "artifacts.json"
    path.write_text("\n".join(json.dumps(each) for each in bodies))
    reason = refusal(pocd_here("commit", path))
    assert reason.startswith(f"{path} cannot be used: {why}")
    assert reason.endswith("; wanted is a body of artifacts as JSON, or several, one a line: public_key, block_hash, "
                           "block_height and artifacts, each with nonce and vector_b64")  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"leaf_index": -1}, "leaf_index: Input should be greater than or equal to 0"),
        ({"leaf_index": 2**32 - 1}, "leaf_index: Input should be less than 4294967295"),
        ({"nonce_value": 1.0}, "nonce_value: Input should be a valid integer"),
        ({"vector_bytes": "AAAA"}, "vector_bytes: it has 3 bytes, not 24"),
        ({"proof": None}, "proof: Input should be a valid "),
        ({"proof": ["AAAA"]}, "proof.0: it has 3 bytes, not 36"),
        ({"proof": [in_base64(bytes(36))] * 33}, "proof: List should have at most 32 items"),
    ],
)
def test_proofs_that_cannot_be_used(fields: dict[str, object], why: str, file: Path, tmp_path: Path) -> None:
    path = tmp_path / "proofs.json"
    proof, other = json.loads(said("prove", file, "0", "2"))["proofs"]
    path.write_text(json.dumps({"proofs": [proof, other | fields]}))
    reason = refusal(pocd_here("verify", path, *COMMITTED))
    assert reason.startswith(f"{path} cannot be used: proofs.1.{why}")


def test_nothing_big_is_imported(file: Path) -> None:
    command = (sys.executable, "-X", "importtime", "-m", "pocd", "prove", str(file), "0")
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in ended.stderr.splitlines()}
    assert {"pocd", "typer"} <= imported
    assert not imported & {"aiohttp", "numpy", "scipy", "torch", "transformers", "uvloop"}


def test_no_proofs_prove_nothing(tmp_path: Path) -> None:
    path = tmp_path / "proofs.json"
    path.write_text('{"proofs": []}')
    assert "proofs: List should have at least 1 item" in refusal(pocd_here("verify", path, *COMMITTED))


def test_what_is_not_there(file: Path) -> None:
    assert refusal(pocd_here("prove", file, "0", "9")) == f"nonce 9 is not among the 5 artifacts of {file}"
    for command in (("commit",), ("prove", "0"), ("verify", *COMMITTED)):
        name, *rest = command
        assert refusal(pocd_here(name, "none", *rest)) == "none cannot be read: No such file or directory"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("prove", "artifacts.jsonl", "1", "1"), "each NONCE may be given once only"),
        (("prove", "artifacts.jsonl", "2147483648"), "Input should be less than or equal to 2147483647"),
        (("verify", "proofs.json", "--root=be5d", "--count=5"), "--root must be 64 hexadecimal digits"),
        (("verify", "proofs.json", f"--root={'0' * 64}", "--count=0"), "Input should be greater than or equal to 1"),
    ],
)
def test_mistyped_arguments(arguments: tuple[str, ...], why: str) -> None:
    assert why in refusal(pocd_here(*arguments), USAGE)
