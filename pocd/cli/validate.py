"""`pocd validate`: is a batch of proofs honest? Asked of the daemon, or computed here."""

from __future__ import annotations

import time
from base64 import b64decode
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import orjson
import typer

from pocd.cli import report
from pocd.cli.api import ConfigOption, TokenOption, UrlOption, call_api, echo
from pocd.cli.compute import (
    BatchSizeOption,
    DeviceOption,
    DtypeOption,
    RevisionOption,
    SchemeOption,
    SeqLenOption,
    compute_errors,
)
from pocd.cli.files import name_of, read_file
from pocd.config.settings import DEFAULT_PATH, R_TARGET
from pocd.process import EXIT_CRASH, EXIT_FRAUD, EXIT_OK, EXIT_UNUSABLE, EndedError
from pocd.protocol.names import default_tolerance
from pocd.protocol.proof import FRAUD_THRESHOLD, MISMATCH
from pocd.protocol.schemes import LIVE_SCHEME, with_stronger_rng
from pocd.protocol.verdicts import ALLOWANCE, LARGEST_ALLOWANCE
from pocd.validation.claim import LARGEST_CLAIM, AnyClaim, BodyError, Claim, VectorClaim, parse_json

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pocd.lab.command import ComputeRequest
    from pocd.protocol.live_verdict import LiveTerms
    from pocd.validation.verdict import Recomputed

EXITS = {"honest": EXIT_OK, "fraud": EXIT_FRAUD, "undecidable": EXIT_UNUSABLE}
LIVE_SCHEMES = (LIVE_SCHEME, with_stronger_rng(LIVE_SCHEME))
POLL_SECONDS = 0.5  # between two looks at a validation that takes long
OF_THE_DAEMON = ("config", "url", "token_file", "timeout")
OF_THE_ENGINE = (
    *("scheme", "seq_len", "dtype", "device", "batch_size", "revision"),
    *("r_target", "fraud_threshold", "tolerance", "allowance", "node_count"),
    *("dist_threshold", "p_mismatch", "p_value_threshold"),
)

RTargetOption = Annotated[float, typer.Option(help="A nonce is valid when its distance is below this.", min=0, max=2)]
FraudThresholdOption = Annotated[
    float | None,
    typer.Option(help="A batch is fraud when an honest miner is less probable than this. Default: 0.01.", min=0, max=1),
]
ToleranceOption = Annotated[
    float | None, typer.Option(help="Difference of distances allowed for rounding. Default: by dtype.", min=0, max=2)
]
AllowanceOption = Annotated[
    float,
    typer.Option(help="How many times the own rounding error an honest miner's may be.", min=1, max=LARGEST_ALLOWANCE),
]
NodeCountOption = Annotated[int, typer.Option(help="Nodes that share the nonces.", min=1, max=2**63 - 1)]
DistThresholdOption = Annotated[
    float | None,
    typer.Option(help="Largest L2 distance of two vectors by the live network's verdict, which is given then.", min=0),
]
PMismatchOption = Annotated[
    float, typer.Option(help="Probability of a larger distance between honest miners.", min=1e-9, max=1 - 1e-9)
]
PValueThresholdOption = Annotated[
    float | None,
    typer.Option(help="The chain's number for --fraud-threshold; what it would decide is shown too.", min=0, max=1),
]
WANTED = (
    "wanted is one batch: a JSON object with public_key, block_hash, block_height, and nonces and dist, or artifacts"
)


def validate(  # noqa: PLR0913 - one argument per option
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="One batch as JSON; - reads standard input.")],
    *,
    sample: Annotated[int | None, typer.Option(help="Recompute this many nonces only.", min=1)] = None,
    seed: Annotated[str | None, typer.Option(help="Seed of the sample; the miner must not have known it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the ValidatedBatch.")] = False,
    config: ConfigOption = DEFAULT_PATH,
    url: UrlOption = None,
    token_file: TokenOption = None,
    timeout: Annotated[float, typer.Option(help="Seconds that the daemon may take.", min=1)] = 600.0,
    model: Annotated[str | None, typer.Option(help="Compute here, with this path, hub id or bundled:NAME.")] = None,
    scheme: SchemeOption = "poc2",
    seq_len: SeqLenOption = 256,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    batch_size: BatchSizeOption = 32,
    revision: RevisionOption = None,
    r_target: RTargetOption = R_TARGET,
    fraud_threshold: FraudThresholdOption = None,
    tolerance: ToleranceOption = None,
    allowance: AllowanceOption = ALLOWANCE,
    node_count: NodeCountOption = 1,
    dist_threshold: DistThresholdOption = None,
    p_mismatch: PMismatchOption = 0.1,
    p_value_threshold: PValueThresholdOption = None,
) -> None:
    """Judge a batch of proofs: exit status 0 honest, 3 fraud, 2 unusable or undecidable.

    The daemon recomputes the results; with --model it is done here, and the batch is held to the options. With
    --dist-threshold it is held to the live network's verdict too, and is fraud where either says so.
    """
    _refuse_strays(
        context, *((OF_THE_ENGINE, "without --model") if model is None else (OF_THE_DAEMON, "beside --model"))
    )
    _check_sample(sample, seed)
    raw, claim = _read(file)
    if model is None:
        query = {} if sample is None or seed is None else {"sample": str(sample), "seed": seed}
        body = _ask(raw, query, config, url, token_file, timeout)
    else:
        from pocd.lab.command import ComputeRequest

        request = ComputeRequest(
            model, scheme, claim.block_hash, claim.public_key, seq_len, dtype, device, batch_size, revision
        )
        body = _compute(
            claim,
            request,
            sample,
            seed,
            r_target=r_target,
            fraud_threshold=fraud_threshold,
            tolerance=tolerance,
            allowance=allowance,
            node_count=node_count,
            network=_network(dist_threshold, p_mismatch, fraud_threshold, p_value_threshold, scheme),
        )
    echo(report.as_json(body) if as_json else report.verdict_as_text(body))
    found_out = (body.get("network") or {}).get("fraud_detected")
    raise typer.Exit(EXIT_FRAUD if found_out else EXITS[body["verdict"]])


@dataclass(frozen=True, slots=True)
class NetworkTerms:
    """Terms of the live network's verdict, and the threshold that decides nothing."""

    terms: LiveTerms
    p_value_threshold: float | None


def _network(
    dist_threshold: float | None,
    p_mismatch: float,
    fraud_threshold: float | None,
    p_value_threshold: float | None,
    scheme: str,
) -> NetworkTerms | None:
    """Return the terms of the live network's verdict; None where it is not asked for."""
    if dist_threshold is None:
        return None
    if scheme not in LIVE_SCHEMES:
        raise typer.BadParameter(f"--dist-threshold is of the live network's schemes: {' and '.join(LIVE_SCHEMES)}")
    from pocd.protocol.live_verdict import LiveTerms

    terms = LiveTerms(dist_threshold, p_mismatch, FRAUD_THRESHOLD if fraud_threshold is None else fraud_threshold)
    return NetworkTerms(terms, p_value_threshold)


def _refuse_strays(context: typer.Context, names: tuple[str, ...], where: str) -> None:
    """Refuse options that would have no effect."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"--{name.replace('_', '-')} has no effect {where}")


def _check_sample(sample: int | None, seed: str | None) -> None:
    if (sample is None) != (seed is None):
        raise typer.BadParameter("--sample and --seed need each other: how many nonces, and what draws them")
    if seed is not None and (not seed or not seed.isprintable()):
        raise typer.BadParameter("--seed must be a text of printable characters")


def _read(file: str) -> tuple[bytes, Claim | VectorClaim]:
    """Return the bytes of the batch, and the batch parsed."""
    raw = read_file(file, LARGEST_CLAIM, WANTED, EXIT_UNUSABLE)
    try:
        return raw, parse_json(AnyClaim, raw).root
    except BodyError as error:
        raise EndedError(EXIT_UNUSABLE, f"{name_of(file)} cannot be used: {error}; {WANTED}") from None


def _ask(
    raw: bytes, query: dict[str, str], config: Path, url: str | None, token_file: Path | None, timeout: float
) -> dict[str, Any]:
    """Let the daemon judge, and wait for it."""
    deadline = time.monotonic() + timeout
    path = "/api/v1/pow/validate"
    body = call_api("POST", path, config, url, token_file, query=query, body=raw, exit_of_refusal=EXIT_UNUSABLE)
    while "fraud_detected" not in body:  # 202: it takes long
        if time.monotonic() >= deadline:
            raise EndedError(
                EXIT_CRASH, f"no verdict within {timeout:g} s; the daemon goes on: GET {path}/{body['id']}"
            )
        time.sleep(POLL_SECONDS)
        body = call_api("GET", f"{path}/{quote(body['id'], safe='')}", config, url, token_file)
    return body


def _compute(
    claim: Claim | VectorClaim,
    request: ComputeRequest,
    sample: int | None,
    seed: str | None,
    *,
    r_target: float,
    fraud_threshold: float | None,
    tolerance: float | None,
    allowance: float,
    node_count: int,
    network: NetworkTerms | None,
) -> dict[str, Any]:
    """Recompute the results here, and judge."""
    from pocd.lab.command import chances, compared, prepared
    from pocd.validation.conditions import MismatchError
    from pocd.validation.verdict import Recomputed, Terms, check, judge, sampled

    with compute_errors(), prepared(request) as run:
        terms = Terms(
            r_target=r_target if run.scheme.output == "distance" else None,
            fraud_threshold=FRAUD_THRESHOLD if fraud_threshold is None else fraud_threshold,
            mismatch=MISMATCH,
            tolerance=default_tolerance(request.dtype, run.scheme, run.model.hidden_size)
            if tolerance is None
            else tolerance,
            scheme=request.scheme,
            model=request.model,
            model_fingerprint=run.model.fingerprint,
            dtype=request.dtype,
            seq_len=request.seq_len,
            node_count=node_count,
            revision=request.revision,
            allowance=allowance,
        )
        try:
            check(claim, terms)
        except MismatchError as error:
            raise EndedError(EXIT_UNUSABLE, str(error)) from None
        nonces = sampled(claim.nonces, sample, seed)
        if terms.has_reference:
            found = Recomputed(*compared(run, nonces, request.batch_size))
        else:
            distances = run.distances(nonces, batch_size=request.batch_size)
            found = Recomputed({nonce: (distance,) for nonce, distance in zip(nonces, distances, strict=True)})
        found = replace(found, turned=chances(run, nonces, request.batch_size))
    batch = judge(claim, terms, found, sample, seed)
    body: dict[str, Any] = orjson.loads(batch.to_json())
    if network is not None:
        body["network"] = _judge_as_network(claim, found, nonces, network)
    return body


def _judge_as_network(
    claim: Claim | VectorClaim,
    found: Recomputed,
    nonces: Sequence[int],
    network: NetworkTerms,
) -> dict[str, Any] | None:
    """Return the live network's verdict on the recomputed nonces; None where the network would give none."""
    import numpy as np

    from pocd.protocol.live_jobs import told_in_full
    from pocd.protocol.live_verdict import judge_live
    from pocd.protocol.vectors import are_finite, decode_vectors, encode_vectors

    if len(set(claim.nonces)) < len(claim.nonces):
        raise EndedError(EXIT_UNUSABLE, "a nonce comes twice, for which the live network refuses a batch as a whole")
    claims = dict(zip(claim.nonces, claim.outputs, strict=True))
    claimed = [(nonce, None if (given := claims[nonce]) is None else np.asarray(given, np.float32)) for nonce in nonces]
    texts = {
        nonce: encode_vectors(np.asarray(found.own[nonce], np.float32)) for nonce in nonces
    }  # rounded as they are sent
    own = {nonce: decode_vectors(text)[0] for nonce, text in texts.items() if all(are_finite(b64decode(text)))}
    verdict = judge_live(claimed, own, network.terms)
    return None if verdict is None else told_in_full(verdict, network.terms, network.p_value_threshold)
