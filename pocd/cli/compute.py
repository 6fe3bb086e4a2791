"""`pocd compute`, `pocd calibrate` and `pocd audit`, and what else on the command line runs the engine."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from pocd.cli.api import echo
from pocd.process import EXIT_CONFIG, EXIT_NO_DEVICE, EndedError
from pocd.protocol.errors import ComputeError, DeviceError
from pocd.protocol.schemes import SCHEMES

if TYPE_CHECKING:
    from collections.abc import Iterator

ModelOption = Annotated[str, typer.Option(help="A local path, a hub id, or bundled:NAME.")]
SchemeOption = Annotated[str, typer.Option(help="The scheme.")]
SeqLenOption = Annotated[int, typer.Option(help="Sequence length, in positions.")]
DtypeOption = Annotated[str, typer.Option(help="float32, float16 or bfloat16.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
BatchSizeOption = Annotated[int, typer.Option(help="Nonces per forward pass.", min=1, max=65536)]
PublicKeyOption = Annotated[str, typer.Option(help="A miner's public key.")]
SeedOption = Annotated[str, typer.Option(help="Seed of the block hashes.")]
ReportOption = Annotated[bool, typer.Option("--json", help="Print one JSON object with everything.")]
RevisionOption = Annotated[str | None, typer.Option(help="Revision (branch, tag or commit) of a hub model.")]


@contextlib.contextmanager
def compute_errors() -> Iterator[None]:
    """Turn what stops a computation into its exit status: 75 for a missing device, else 78."""
    try:
        yield
    except ComputeError as error:
        raise EndedError(EXIT_NO_DEVICE if isinstance(error, DeviceError) else EXIT_CONFIG, str(error)) from error


def compute(  # noqa: PLR0913 - one argument per option
    *,
    model: ModelOption,
    block_hash: Annotated[str, typer.Option(help="The block hash, as the chain wrote it.")],
    public_key: Annotated[str, typer.Option(help="The miner's public key.")],
    nonces: Annotated[str, typer.Option(help="Ranges a:b (b left out) and numbers, separated by commas.")],
    scheme: SchemeOption = "poc2",
    seq_len: SeqLenOption = 256,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    batch_size: BatchSizeOption = 32,
    revision: RevisionOption = None,
    stronger_rng: Annotated[
        bool, typer.Option("--stronger-rng", help="Inputs from 256 bits, as the live network may ask; of artifacts.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per nonce.")] = False,
) -> None:
    """Print the distance, or the vector, of each nonce."""
    from pocd.lab import command
    from pocd.protocol.schemes import SCHEMES, with_stronger_rng
    from pocd.protocol.vectors import decode_vectors, encode_vectors

    with compute_errors():
        request = command.ComputeRequest(
            model=model,
            scheme=(scheme := with_stronger_rng(scheme) if stronger_rng else scheme),
            block_hash=block_hash,
            public_key=public_key,
            seq_len=seq_len,
            dtype=dtype,
            device=device,
            batch_size=batch_size,
            revision=revision,
        )
        if scheme in SCHEMES and SCHEMES[scheme].output == "vector":
            for nonce, vector in command.vectors(request, command.parse_nonces(nonces)):
                text = encode_vectors(vector)
                shown = "".join(f"{number:10.4f}" for number in decode_vectors(text)[0])
                echo(f'{{"nonce": {nonce}, "vector_b64": "{text}"}}' if as_json else f"{nonce}\t{shown}")
            return
        for nonce, distance in command.distances(request, command.parse_nonces(nonces)):
            echo(f'{{"nonce": {nonce}, "distance": {distance!r}}}' if as_json else f"{nonce}\t{distance:.6f}")


def calibrate(  # noqa: PLR0913 - one argument per option
    *,
    model: ModelOption,
    scheme: SchemeOption = "poc2",
    rate: Annotated[float, typer.Option(help="The share of valid nonces to aim at, above 0 and below 1.")] = 0.1,
    blocks: Annotated[int, typer.Option(help="Block hashes to try, 2 or more.")] = 5,
    nonces: Annotated[int, typer.Option(help="Nonces per block.")] = 2000,
    seq_len: SeqLenOption = 256,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    batch_size: BatchSizeOption = 32,
    public_key: PublicKeyOption = "calibration",
    seed: SeedOption = "pocd",
    revision: RevisionOption = None,
    as_json: ReportOption = False,
) -> None:
    """Find the r_target for a rate of valid nonces, and how much the rate depends on the block."""
    import orjson

    from pocd.lab import calibration, command

    plan = calibration.Plan(
        model=model,
        scheme=scheme,
        rate=rate,
        blocks=blocks,
        nonces=nonces,
        seq_len=seq_len,
        dtype=dtype,
        device=device,
        batch_size=batch_size,
        public_key=public_key,
        seed=seed,
        revision=revision,
    )
    with compute_errors(), calibration.progress(blocks * nonces) as advance:
        measurement = command.measure(plan, advance)
    report = calibration.calibrate(plan, measurement)
    echo(orjson.dumps(report).decode() if as_json else calibration.as_text(report))


def audit(  # noqa: PLR0913 - one argument per option
    *,
    model: ModelOption,
    scheme: SchemeOption = "poc2",
    rate: Annotated[float, typer.Option(help="The share of valid nonces, above 0 and below 1.")] = 0.1,
    blocks: Annotated[int, typer.Option(help="Block hashes to attack.")] = 2,
    nonces: Annotated[int, typer.Option(help="Nonces per block: half to train the cheater, half to judge.")] = 2000,
    seq_len: SeqLenOption = 256,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    batch_size: BatchSizeOption = 32,
    public_key: PublicKeyOption = "audit",
    seed: SeedOption = "pocd",
    revision: RevisionOption = None,
    claims: Annotated[
        bool,
        typer.Option(
            "--claims",
            help="Judge claims of cheap results by their differences, as vectors always are.",
        ),
    ] = False,
    as_json: ReportOption = False,
) -> None:
    """Measure what a cheater could save by shortcuts through the model."""
    import orjson

    from pocd.lab import audit as judging
    from pocd.lab import calibration, command, residual

    plan = calibration.Plan(
        model=model,
        scheme=scheme,
        rate=rate,
        blocks=blocks,
        nonces=nonces,
        seq_len=seq_len,
        dtype=dtype,
        device=device,
        batch_size=batch_size,
        public_key=public_key,
        seed=seed,
        revision=revision,
    )
    if claims or (scheme in SCHEMES and SCHEMES[scheme].output == "vector"):
        with compute_errors(), calibration.progress(blocks * nonces) as advance:
            measured = command.measure_claims(plan, advance)
        judged = residual.judge_residuals(plan, measured)
        echo(orjson.dumps(judged).decode() if as_json else residual.as_text(judged))
        return
    with compute_errors(), calibration.progress(blocks * nonces) as advance:
        found = command.attack(plan, advance)
    report = judging.audit(plan, found)
    echo(orjson.dumps(report).decode() if as_json else judging.as_text(report))
