"""`pocd commit`, `pocd prove` and `pocd verify`: what the live network's participants commit to (docs/live.md)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import orjson
import typer

from pocd.cli.api import echo
from pocd.cli.files import name_of, read_file
from pocd.process import EXIT_CONFIG, EXIT_FRAUD, EndedError
from pocd.protocol.commitment import HASH_BYTES, LARGEST_COUNT, LARGEST_NONCE, ProofError, Tree, verify
from pocd.validation.claim import BodyError, parse_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pocd.protocol.artifacts import ArtifactsBody
    from pocd.protocol.commitment import Proof

LARGEST_FILE = 256 * 2**20  # bytes: some four million artifacts
WANTED_BODIES = (
    "wanted is a body of artifacts as JSON, or several, one a line: public_key, block_hash, block_height and "
    "artifacts, each with nonce and vector_b64"
)
WANTED_PROOFS = (
    "wanted are proofs as `pocd prove` prints them, each with leaf_index, nonce_value, vector_bytes and proof"
)
SAME = ("public_key", "block_hash", "block_height")  # in all bodies of a round; nodes may differ

FileArgument = Annotated[
    str, typer.Argument(metavar="FILE", help="Bodies of artifacts as JSON, one or one a line; - reads standard input.")
]


def commit(file: FileArgument) -> None:
    """Print the count and the root by which the live network commits to the artifacts of a file."""
    tree = _tree(file)
    echo(f"count {tree.count}\nroot  {tree.root.hex()}")


def prove(
    file: FileArgument,
    nonces: Annotated[list[int], typer.Argument(metavar="NONCE", help="Nonces to prove.", min=0, max=LARGEST_NONCE)],
) -> None:
    """Print proofs that artifacts are among those of a commitment, as JSON in the live network's form."""
    from pocd.protocol.artifacts import proof_as_json

    if len(set(nonces)) < len(nonces):
        raise typer.BadParameter("each NONCE may be given once only")
    tree = _tree(file)
    try:
        proofs = [tree.proof(nonce) for nonce in nonces]
    except KeyError as error:
        message = f"nonce {error} is not among the {tree.count} artifacts of {name_of(file)}"
        raise EndedError(EXIT_CONFIG, message) from None
    echo(orjson.dumps({"proofs": [proof_as_json(proof) for proof in proofs]}).decode())


def verify_proofs(
    file: Annotated[str, typer.Argument(metavar="PROOFS", help="Proofs as JSON; - reads standard input.")],
    *,
    root: Annotated[str, typer.Option(metavar="HEX", help="The root that was committed.")],
    count: Annotated[int, typer.Option(help="The count that was committed.", min=1, max=LARGEST_COUNT)],
) -> None:
    """Check proofs against what was committed: exit status 0 where all verify, 3 where one does not."""
    from pocd.protocol.artifacts import ProofsBody

    if not re.fullmatch(f"[0-9a-fA-F]{{{2 * HASH_BYTES}}}", root):
        raise typer.BadParameter(f"--root must be {2 * HASH_BYTES} hexadecimal digits")
    raw = read_file(file, LARGEST_FILE, WANTED_PROOFS, EXIT_CONFIG)
    try:
        proofs = [each.as_proof() for each in parse_json(ProofsBody, raw).proofs]
    except BodyError as error:
        raise EndedError(EXIT_CONFIG, f"{name_of(file)} cannot be used: {error}; {WANTED_PROOFS}") from None
    faults, seen = list[str](), set[int]()
    for position, proof in enumerate(proofs):
        fault = f"nonce {proof.nonce} comes twice" if proof.nonce in seen else _fault(proof, bytes.fromhex(root), count)
        seen.add(proof.nonce)
        if fault:
            faults.append(f"proofs.{position}: {fault}")
    if faults:
        echo("\n".join([*faults, f"{len(faults)} of {len(proofs)} proofs do not verify"]))
        raise typer.Exit(EXIT_FRAUD)
    echo(f"{len(proofs)} of {count} artifacts are proved")


def _fault(proof: Proof, root: bytes, count: int) -> str | None:
    try:
        verify(proof, root, count)
    except ProofError as error:
        return str(error)
    return None


def _tree(file: str) -> Tree:
    """Return the tree of the artifacts of all bodies in a file."""
    raw = read_file(file, LARGEST_FILE, WANTED_BODIES, EXIT_CONFIG)
    try:
        return Tree(_vectors(raw))
    except BodyError as error:
        raise EndedError(EXIT_CONFIG, f"{name_of(file)} cannot be used: {error}; {WANTED_BODIES}") from None


def _vectors(raw: bytes) -> dict[int, bytes]:
    """Return the vectors of one participant's round, by nonce."""
    first: ArtifactsBody | None = None
    vectors = dict[int, bytes]()
    for where, body in _bodies(raw):
        first = first or body
        for name in SAME:
            if getattr(body, name) != getattr(first, name):
                raise BodyError("invalid_request", f"{where}{name}: it is not that of the first body", name)
        for index, artifact in enumerate(body.artifacts):
            if artifact.nonce in vectors:
                message = f"{where}artifacts.{index}.nonce: {artifact.nonce} comes twice"
                raise BodyError("invalid_request", message, "artifacts")
            vectors[artifact.nonce] = artifact.vector
    if not vectors:
        raise BodyError("invalid_request", "artifacts: there is none", "artifacts")
    return vectors


def _bodies(raw: bytes) -> Iterator[tuple[str, ArtifactsBody]]:
    """Give each body with what names its line, where there are several."""
    from pocd.protocol.artifacts import ArtifactsBody

    lines = [(number, line) for number, line in enumerate(raw.split(b"\n"), 1) if line.strip()]
    if len(lines) < 2 or not _is_json(lines[0][1]):  # one body, perhaps on many lines
        yield "", parse_json(ArtifactsBody, raw)
        return
    for number, line in lines:
        try:
            yield f"line {number}: ", parse_json(ArtifactsBody, line)
        except BodyError as error:
            raise BodyError(error.code, f"line {number}: {error}", error.field) from None


def _is_json(line: bytes) -> bool:
    try:
        orjson.loads(line)
    except ValueError:
        return False
    return True
