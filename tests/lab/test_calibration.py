"""`pocd calibrate`: its judgement on distances whose truth is known, and the command as a real process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import pytest
import torch

from pocd.cli import compute as cli_compute
from pocd.cli import main as cli
from pocd.compute import engine, model
from pocd.lab import command
from pocd.lab.calibration import Calibration, Measurement, Plan, as_text, block_hashes, calibrate
from pocd.lab.command import ComputeRequest
from pocd.lab.statistics import head_valid_rate
from pocd.process import EXIT_CONFIG, EXIT_NO_DEVICE, EXIT_OK, EndedError
from pocd.protocol.errors import ModelError
from pocd.protocol.theory import r_target_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent.parent
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.upper().startswith("POCD_")} | {
    "CUDA_VISIBLE_DEVICES": "",
}
POCD = (sys.executable, "-W", "error", "-m", "pocd")
PLAN = Plan(
    model="bundled:tiny-llama",
    scheme="poc2",
    rate=0.1,
    blocks=5,
    nonces=1000,
    seq_len=16,
    dtype="float32",
    device="cpu",
    batch_size=16,
    public_key="key",
    seed="seed",
)
HIDDEN_SIZE, DIMENSION = 32, 256


def distances_of_uniform_states(generator: np.random.Generator, nonces: int) -> NDArray[np.float64]:
    """Of one block: a random head and target, and hidden states uniform on their sphere."""
    head = generator.standard_normal((DIMENSION, HIDDEN_SIZE))
    target = generator.standard_normal(DIMENSION)
    h = generator.standard_normal((nonces, HIDDEN_SIZE))
    cosines = h @ (head.T @ target) / np.linalg.norm(h @ np.linalg.cholesky(head.T @ head), axis=1)
    return np.asarray(np.sqrt(2 - 2 * cosines / np.linalg.norm(target)))


def report(plan: Plan, generator: np.random.Generator, shift: float = 0.0) -> Calibration:
    """The report on uniform hidden states, the last block's distances shifted."""
    distances = np.array([distances_of_uniform_states(generator, plan.nonces) for _ in range(plan.blocks)])
    distances[-1] += shift
    return calibrate(plan, Measurement("abc", HIDDEN_SIZE, DIMENSION, distances, (0.1,) * plan.blocks))


# The judgement.


def test_even_blocks_rarely_exceed_the_floor() -> None:
    """The floor's 95% quantile is exceeded by 5% of them: of 80, 1 to 10 with a probability of 98%."""
    generator = np.random.default_rng(1)
    reports = [report(replace(PLAN, seed=str(i)), generator) for i in range(80)]
    assert 1 <= sum(each.spread.exceeds_floor for each in reports) <= 10


def test_a_shifted_block_exceeds_the_floor() -> None:
    found = report(PLAN, np.random.default_rng(2), shift=-0.1)
    assert found.spread.exceeds_floor
    assert found.spread.p_value < 0.001
    assert found.spread.low > found.spread.floor_95
    assert "The spread exceeds its floor (p = 0.0001)" in " ".join(as_text(found).split())


def test_the_report_by_hand() -> None:
    generator = np.random.default_rng(3)
    distances = generator.normal(1.4, 0.01, (5, 1000))
    found = calibrate(PLAN, Measurement("abc", HIDDEN_SIZE, DIMENSION, distances, (0.1, 0.2, 0.3, 0.4, 0.5)))
    pooled, first = np.quantile(distances, 0.1), np.quantile(distances[0], 0.1)
    theory = r_target_for(0.1, DIMENSION)
    assert (found.r_target, found.expected_r_target) == (pooled, theory)
    assert found.r_target_low < pooled < found.r_target_high
    for block, row, head_rate in zip(found.blocks, distances, (0.1, 0.2, 0.3, 0.4, 0.5), strict=True):
        assert (block.mean, block.std) == pytest.approx((row.mean(), row.std(ddof=1)))
        assert block.quantile == np.quantile(row, 0.1)
        assert block.valid_rate == (row < theory).mean()
        assert block.valid_rate_first == (row < first).mean()
        assert block.valid_rate_pooled == (row < pooled).mean()
        assert block.head_rate == head_rate
    rates = [block.valid_rate_pooled for block in found.blocks]
    assert found.spread.spread == pytest.approx(max(rates) - min(rates))


def test_a_scheme_far_from_theory_does_not_look_even() -> None:
    """At the theoretical r_target none of these is valid; at the measured one a block stands out."""
    distances = np.random.default_rng(4).normal(1.4, 0.001, (5, 1000))
    distances[2] -= 0.01
    found = calibrate(PLAN, Measurement("abc", HIDDEN_SIZE, DIMENSION, distances, (0.1,) * 5))
    assert [block.valid_rate for block in found.blocks] == [0] * 5
    assert found.spread.spread > 0.4
    assert found.spread.exceeds_floor


def test_equal_measurements_give_equal_reports() -> None:
    assert report(PLAN, np.random.default_rng(5)) == report(PLAN, np.random.default_rng(5))


def test_block_hashes_follow_from_the_seed() -> None:
    hashes = block_hashes("seed", 3)
    assert len(set(hashes + block_hashes("other", 3))) == 6
    assert block_hashes("seed", 2) == hashes[:2]
    assert all(len(block_hash) == 64 and block_hash == block_hash.upper() for block_hash in hashes)


@pytest.mark.parametrize("rate", [0.1, 0.025])
def test_the_text_fits_a_terminal(rate: float) -> None:
    found = report(replace(PLAN, rate=rate), np.random.default_rng(6))
    lines = as_text(found).splitlines()
    assert max(map(len, lines)) <= 80
    assert any(f"p{100 * rate:g}" in line.split() for line in lines)
    for block in found.blocks:
        (line,) = (line for line in lines if block.block_hash[:12] in line)
        assert block.head_rate is not None
        rates = block.valid_rate, block.valid_rate_first, block.valid_rate_pooled, block.head_rate
        assert line.split()[-4:] == [f"{100 * rate:.2f}%" for rate in rates]
        assert line.split()[1:4] == [f"{value:.5f}" for value in (block.mean, block.std, block.quantile)]
    assert f"{found.expected_r_target:.6f} by theory" in as_text(found)
    assert "The spread does not exceed its floor" in " ".join(as_text(found).split())


# The command.


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, check=False)


OPTIONS: dict[str, Any] = {"model": "bundled:tiny-llama", "seq_len": 16, "nonces": 64, "blocks": 2, "seed": "a"}


def calibrating(**options: Any) -> list[str]:  # noqa: ANN401 - any option
    return ["calibrate", *(f"--{name.replace('_', '-')}={value}" for name, value in (OPTIONS | options).items())]


def calibrate_here(**options: Any) -> None:  # noqa: ANN401 - any option
    """The command without a process of its own, which would import torch once more."""
    cli_compute.calibrate(**(OPTIONS | options))


def test_the_command_measures_what_compute_computes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pocd", *calibrating(public_key="key", batch_size=24), "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    assert (ended.value.code or EXIT_OK, printed.err) == (EXIT_OK, "")
    found: dict[str, Any] = orjson.loads(printed.out)
    assert (found["hidden_size"], found["dimension"]) == (128, 8192)
    assert found["plan"]["nonces"] == 64
    assert found["expected_r_target"] == r_target_for(0.1, 8192)
    first, second = found["blocks"]
    assert [first["block_hash"], second["block_hash"]] == block_hashes("a", 2)

    request = ComputeRequest(
        model="bundled:tiny-llama",
        scheme="poc2",
        block_hash=second["block_hash"],
        public_key="key",
        seq_len=16,
        dtype="float32",
        device="cpu",
        batch_size=24,
    )
    distances = np.array([distance for _, distance in command.distances(request, range(64))])
    assert second["mean"] == pytest.approx(distances.mean(), abs=2e-5)
    assert second["quantile"] == pytest.approx(np.quantile(distances, 0.1), abs=2e-5)


def test_the_heads_rate_is_that_of_the_blocks_own_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the head is added up in parts."""
    monkeypatch.setattr(command, "HEAD_ROWS", 3000)
    runs = []

    def watched(self: engine.BlockRun, nonces: Sequence[int], *, batch_size: int) -> list[float]:
        assert batch_size == 32
        runs.append(self)
        return [1.4] * len(nonces)

    monkeypatch.setattr(engine.BlockRun, "distances", watched)
    steps: list[int] = []
    found = command.measure(replace(PLAN, blocks=2, nonces=50, batch_size=32), steps.append)
    assert steps == [32, 18, 32, 18]
    assert found.distances.shape == (2, 50)
    assert found.head_rates is not None
    for block, head_rate in zip(runs[::2], found.head_rates, strict=True):
        assert block.head is not None
        assert block.target is not None
        head, target = block.head.double().numpy(), block.target.double().numpy()
        expected = head_valid_rate(r_target_for(0.1, 8192), head.T @ head, head.T @ target)
        assert head_rate == pytest.approx(expected, abs=1e-5)
    assert found.head_rates[0] != found.head_rates[1]


def test_without_a_head_theory_is_exact_and_the_floor_sampling_noise_alone(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate_here(scheme="poc3", rate=0.2)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "hidden size H = 128, output dimension D = 128" in printed
    assert f"{r_target_for(0.2, 128):.6f} by theory" in printed
    words = " ".join(printed.split())
    assert "by sampling noise alone, as each nonce has a target of its own" in words
    assert "head" not in words


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate_here(scheme="trained", rate=0.2)
    printed = capsys.readouterr()
    assert printed.err == ""
    assert max(map(len, printed.out.splitlines())) <= 80
    assert "hidden size H = 128, output dimension D = 256" in printed.out
    assert all(block_hash[:12] in printed.out for block_hash in block_hashes("a", 2))


BAD_PLANS: list[tuple[dict[str, Any], str]] = [
    ({"rate": 0}, "rate must be above 0 and below 1, got 0"),
    ({"rate": 1}, "rate must be above 0 and below 1, got 1"),
    ({"rate": "nan"}, "rate must be above 0 and below 1, got nan"),
    ({"blocks": 1}, "blocks must be 2 or more, got 1"),
    ({"nonces": 49}, "nonces must be 50 or more for a rate of 0.1, got 49"),
    ({"nonces": 400, "rate": 0.99}, "nonces must be 500 or more for a rate of 0.99, got 400"),
    ({"scheme": "poc9"}, "scheme 'poc9' is unknown; allowed are: "),
    (
        {"scheme": "poc4"},
        "scheme 'poc4' gives vectors, all of which count: there are no distances, and no r_target",
    ),
    ({"dtype": "int8"}, "dtype 'int8' is unknown; allowed are: "),
    ({"device": "gpu"}, "device 'gpu' is unknown; allowed are: "),
    ({"model": "bundled:huge"}, "model 'bundled:huge' is not bundled; "),
    ({"revision": "main"}, "model 'bundled:tiny-llama' is a folder; a revision ('main') belongs to a hub id"),
]
# The command again and again in one process, which starts as `python -m pocd` does.
EACH = """
import json, sys
from pocd.cli.main import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["pocd", *arguments]
    try:
        main()
    except SystemExit as ended:
        print(ended.code, sorted({"torch", "transformers"} & sys.modules.keys()))
"""


def test_a_bad_plan_is_refused_in_a_line_before_torch_is_imported() -> None:
    commands = [[*calibrating(**options), "--json"] for options, _ in BAD_PLANS]
    ended = run(sys.executable, "-W", "error", "-c", EACH, orjson.dumps(commands).decode())
    assert ended.stdout.splitlines() == [f"{EXIT_CONFIG} []"] * len(BAD_PLANS)
    for line, (_, reason) in zip(ended.stderr.splitlines(), BAD_PLANS, strict=True):
        assert line.startswith(f"pocd: {reason}")


def test_a_revision_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, *, revision: str | None, **_options: object) -> None:
        raise ModelError(f"{name} at {revision}")

    monkeypatch.setattr(model, "load_model", load)
    with pytest.raises(EndedError, match=r"^org/name at v7$"):
        calibrate_here(model="org/name", revision="v7")
    with pytest.raises(EndedError, match=r"^org/name at v7$"):
        cli_compute.compute(model="org/name", revision="v7", block_hash="a", public_key="b", nonces="0")


def test_a_sequence_beyond_the_model_is_refused_before_its_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(model, "read_headers")
    with pytest.raises(EndedError, match=r"^seq_len 1000000 is outside 1 to ") as caught:
        calibrate_here(seq_len=1_000_000)
    assert caught.value.code == EXIT_CONFIG


def test_a_missing_gpu_is_its_own_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EndedError, match=r"^device 'cuda' is configured, but torch ") as caught:
        calibrate_here(device="cuda")
    assert caught.value.code == EXIT_NO_DEVICE


def test_nan_ends_it_with_a_clear_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(engine.BlockRun, "_batch", lambda _, nonces: torch.full((len(nonces),), torch.nan))
    with pytest.raises(EndedError, match=r"^model 'bundled:tiny-llama' in float32 gave NaN or infinity") as caught:
        calibrate_here()
    assert caught.value.code == EXIT_CONFIG
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Where tests run in the background SIGINT is ignored, and what they start would inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_on_a_terminal_a_bar_moves_and_an_interrupt_ends_it_silently() -> None:
    """More nonces than any test has time for, so that it ends for no other reason."""
    terminal, end = os.openpty()
    with subprocess.Popen(
        [*POCD, *calibrating(nonces=10**8, seq_len=8)],
        stdout=subprocess.PIPE,
        stderr=end,
        env=ENVIRONMENT | {"TERM": "xterm", "COLUMNS": "80", "FORKED": "yes"},
    ) as process:
        os.close(end)
        try:
            shown = b""
            while b"nonces/s" not in shown:  # the speed is known once the bar has moved
                shown += os.read(terminal, 65536)
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(OSError):  # when nobody has the terminal's other end any more
                while part := os.read(terminal, 65536):
                    shown += part
            output, _ = process.communicate()
        finally:
            process.kill()  # it would go on for days
    os.close(terminal)
    assert (process.returncode, output) == (130, b"")
    assert b"Traceback" not in shown
    assert b"pocd:" not in shown
