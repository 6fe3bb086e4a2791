"""`scripts/trials/distribution.py`: its numbers against plain computations, its file, and its plots."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import runpy
import statistics
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from scipy import stats
from transformers import AutoModelForCausalLM

from pocd.process import EXIT_CONFIG
from pocd.protocol.names import BUNDLED
from scripts.trials.distribution import main
from scripts.trials.distribution_lines import Found, LineKey
from scripts.trials.distribution_verdict import equal_rates, verdict
from tests.reference.plain_torch import PlainRun

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

NONCES, SEQ_LEN, RATE = 40, 8, 0.2
BLOCKS, KEYS = ("block_alpha", "block_beta"), ("node_A", "node_B")
OPTIONS = (
    *("--models", "bundled:tiny-llama", "--schemes", "poc2", "hidden-householder", "--blocks", *BLOCKS),
    *("--keys", *KEYS, "--nonces", str(NONCES), "--seq-len", str(SEQ_LEN), "--rate", str(RATE)),
)


def run(folder: Path, *options: str) -> str:
    """What it printed; later options take the place of earlier ones."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main([*OPTIONS, "--out", str(folder), *options])
    return printed.getvalue()


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "distribution.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder, and what was printed when it was made, from there, by the module as `python -m` runs it."""
    folder = tmp_path_factory.mktemp("lab")
    with (
        pytest.MonkeyPatch.context() as patched,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        patched.setattr(sys, "argv", ["distribution", *OPTIONS, "--out", "."])
        patched.delitem(sys.modules, "scripts.trials.distribution")  # else runpy warns that it is imported twice
        runpy.run_module("scripts.trials.distribution", run_name="__main__")
    return folder, printed.getvalue()


@pytest.fixture
def folder(made: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    (tmp_path / "distribution.jsonl").write_bytes((made[0] / "distribution.jsonl").read_bytes())
    return tmp_path


# The numbers.


def test_distances_and_r_are_those_of_the_plain_scheme(made: tuple[Path, str]) -> None:
    """The hidden output is what the plain model gives at the last position, before the nonce's reflections."""
    causal = AutoModelForCausalLM.from_pretrained(BUNDLED / "tiny-llama", dtype=torch.float32)
    outputs: list[torch.Tensor] = []
    line = lines(made[0])[3]
    assert (line["scheme"], line["block_hash"], line["public_key"]) == ("poc2", "block_beta", "node_B")
    plain = PlainRun(causal, "block_beta", "node_B", SEQ_LEN)
    plain.decoder.register_forward_hook(lambda _module, _args, output: outputs.append(output.last_hidden_state[0, -1]))
    distances = [plain.distance(nonce) for nonce in range(NONCES)]
    assert line["distances"] == pytest.approx(distances, abs=2e-5)
    r = sum(output / output.norm() for output in outputs) / NONCES
    assert line["resultant_length"] == pytest.approx(float(torch.as_tensor(r).norm()), abs=1e-5)


def test_each_line_says_what_its_distances_say(made: tuple[Path, str]) -> None:
    found = lines(made[0])
    order = [(x["scheme"], x["block_hash"], x["public_key"]) for x in found]
    assert order == [(s, b, k) for s in ("poc2", "hidden-householder") for b in BLOCKS for k in KEYS]
    for index, line in enumerate(found):
        distances, dimension = line["distances"], {"poc2": 8192, "hidden-householder": 256}[line["scheme"]]
        first = found[index // 4 * 4]["distances"]
        beta = stats.beta((dimension - 1) / 2, (dimension - 1) / 2)
        r_first, r_theory = np.quantile(first, RATE), 2 * math.sqrt(beta.ppf(RATE))
        assert (line["dimension"], line["hidden_size"], line["target_per_nonce"]) == (dimension, 128, False)
        assert line["mean"] == pytest.approx(statistics.fmean(distances), abs=1e-7)
        assert line["std"] == pytest.approx(statistics.stdev(distances), rel=1e-4)
        assert line["p10"] == pytest.approx(np.percentile(distances, 10), abs=1e-6)
        assert (line["r_target_first"], line["r_target_theory"]) == pytest.approx((r_first, r_theory), abs=1e-6)
        assert line["valid_rate_first"] == sum(d < line["r_target_first"] for d in distances) / NONCES
        assert line["valid_rate_theory"] == sum(d < r_theory for d in distances) / NONCES
        # (1 - c)/2 = d²/4 follows the same Beta.
        squares = np.square(distances) / 4
        assert line["ks"] == pytest.approx(stats.kstest(squares, beta.cdf).statistic, abs=1e-5)


def test_a_line_has_all_that_it_depends_on(made: tuple[Path, str]) -> None:
    names = [field.name for kind in (LineKey, Found) for field in dataclasses.fields(kind)]
    for line in lines(made[0]):
        assert list(line) == names
        assert (line["model"], line["nonces"], line["seq_len"]) == ("bundled:tiny-llama", NONCES, SEQ_LEN)
        assert (line["device"], line["dtype"], line["rate"], line["seed"]) == ("cpu", "float32", RATE, "pocd")
        assert (line["first_block"], line["first_key"]) == (BLOCKS[0], KEYS[0])
        assert line["versions"]["torch"] == torch.__version__


def test_the_spread_counts_both_keys_of_a_block(made: tuple[Path, str]) -> None:
    folder, printed = made
    valid = [x["valid_rate_first"] for x in lines(folder)]
    for scheme, (a, b, c, d) in (("poc2", valid[:4]), ("hidden-householder", valid[4:])):
        row = next(x for x in reversed(printed.splitlines()) if f"| {scheme} " in x)
        assert float(row.split("|")[4]) == pytest.approx(50 * abs(a + b - c - d), abs=0.051)


# The file.


def test_nothing_is_computed_again_but_with_another_option(folder: Path) -> None:
    before = (folder / "distribution.jsonl").read_bytes()
    run(folder)
    assert (folder / "distribution.jsonl").read_bytes() == before
    run(folder, "--schemes", "poc2", "--blocks", *BLOCKS, "block_gamma")  # two lines more, one for each key
    run(folder, "--schemes", "poc2", "--seq-len", "4")  # all four are other lines
    after = (folder / "distribution.jsonl").read_bytes()
    assert after.startswith(before)
    added = lines(folder)[8:]
    assert [(x["block_hash"], x["seq_len"]) for x in added[:2]] == [("block_gamma", SEQ_LEN)] * 2
    assert [(x["block_hash"], x["seq_len"]) for x in added[2:]] == [(b, 4) for b in BLOCKS for _ in KEYS]


def test_a_line_that_was_cut_off_is_computed_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "distribution.jsonl"
    before = lines(folder)
    file.write_bytes(file.read_bytes()[:-1000])
    run(folder)
    *kept, again = lines(folder)
    assert kept == before[:-1]
    asked = [field.name for field in dataclasses.fields(LineKey)]
    assert [again[name] for name in asked] == [before[-1][name] for name in asked]
    assert again["distances"] == pytest.approx(before[-1]["distances"], abs=2e-5)
    assert "its last line was cut off" in capsys.readouterr().err


def test_hashes_are_drawn_where_a_number_is_given(tmp_path: Path) -> None:
    run(tmp_path, "--schemes", "poc2", "--blocks", "2", "--keys", "k", "--nonces", "30", "--seed", "x")
    # SHA-256 of x_0 and x_1.
    assert [line["block_hash"][:8] for line in lines(tmp_path)] == ["3078A096", "D9B1567A"]


@pytest.mark.parametrize(
    ("valid", "expected"),
    [([100, 100, 100], 1.0), ([100, 130, 90], 0.01), ([100, 200, 100], 3e-13), ([0, 0, 0], 1.0), ([1000] * 3, 1.0)],
)
def test_equal_rates_are_told_from_unequal_ones(valid: list[int], expected: float) -> None:
    """Against the sum of (observed - expected)² / expected, with its 2 degrees of freedom."""
    counts, n = np.array(valid), 1000
    found = equal_rates(counts, np.full(3, n))
    p = counts.mean() / n
    if 0 < p < 1:
        square = np.square(counts - n * p).sum() / (n * p * (1 - p))
        assert found == pytest.approx(stats.chi2.sf(square, 2))
    assert expected / 5 < found < 5 * expected


def test_blocks_whose_interval_misses_the_theoretical_rate_are_counted(made: tuple[Path, str]) -> None:
    asked = LineKey(**{field.name: lines(made[0])[0][field.name] for field in dataclasses.fields(LineKey)})
    found = Found(**{field.name: lines(made[0])[0][field.name] for field in dataclasses.fields(Found)})
    blocks = []
    for block, near in (("few", 0), ("as many as expected", 200), ("many", 700)):
        distances = [0.1] * near + [1.9] * (1000 - near)
        changed = dataclasses.replace(asked, block_hash=block, nonces=1000)
        blocks.append((changed, dataclasses.replace(found, distances=distances)))
    judged = verdict(blocks)
    assert judged.outside == 2
    assert judged.equal < 1e-6


# The plots.


def test_plots_show_something_in_both_halves(made: tuple[Path, str]) -> None:
    drawn = sorted(made[0].glob("*.png"))
    assert [path.name for path in drawn] == [
        "bundled_tiny-llama-hidden-householder.png",
        "bundled_tiny-llama-poc2.png",
    ]
    for path in drawn:
        picture = np.asarray(imread(path))
        assert path.stat().st_size < 60_000
        height, width, _ = picture.shape
        for half in (picture[:, : width // 2], picture[:, width // 2 :]):
            inside = half[height // 6 : -height // 4, width // 10 : -width // 20, :3].reshape(-1, 3)
            coloured = np.ptp(inside, axis=1) > 0.3  # neither white nor grey
            assert 0.001 < coloured.mean() < 0.5


# What is refused.


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--rate", "2"), "rate must be above 0 and below 1, got 2"),
        (("--blocks", "1"), "blocks must be 2 or more, got 1"),
        (("--nonces", "10"), "nonces must be 25 or more for a rate of 0.2, got 10"),
        (("--blocks", "a", "b", "a"), "blocks: 'a' is named twice"),
        (("--models", "bundled:no"), "model 'bundled:no' is not bundled"),
        (("--device", "tpu"), "device 'tpu' is unknown"),
        (("--seq-len", "5000"), "seq_len 5000 is outside"),
    ],
)
def test_a_refused_option_is_named_and_nothing_is_computed(
    options: Sequence[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, *options)
    assert ended.value.code == EXIT_CONFIG
    assert told in capsys.readouterr().err
    assert not any(path.stat().st_size for path in tmp_path.iterdir())


def test_lines_of_other_weights_and_foreign_lines_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "distribution.jsonl"
    fingerprint = lines(folder)[0]["fingerprint"]
    before = file.read_text()
    file.write_text(before.replace(fingerprint, "0" * len(fingerprint)))
    with pytest.raises(SystemExit):
        run(folder, "--blocks", *BLOCKS, "block_gamma")
    file.write_text(before + '{"test": 1}\n')
    with pytest.raises(SystemExit):
        run(folder)
    told = capsys.readouterr().err
    assert "lines of other weights of model 'bundled:tiny-llama'" in told
    assert "line 9 is not a line of this script" in told


def test_an_unknown_scheme_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, "--schemes", "poc9")
    assert "argument --schemes: invalid choice: 'poc9'" in capsys.readouterr().err
