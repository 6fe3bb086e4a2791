"""Claims of cheap results in `pocd audit`: values of few bits, what is measured, and who is caught."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import pytest
import torch

from pocd.lab import cheap, few_bits
from pocd.lab.calibration import Plan
from pocd.lab.cheap import HONEST, Claimed, Measured
from pocd.lab.command import measure_claims
from pocd.lab.residual import LADDER, as_text, check_claims, judge_residuals
from pocd.protocol.errors import InputError

if TYPE_CHECKING:
    from pocd.compute.engine import BlockRun


def plan(**changes: Any) -> Plan:  # noqa: ANN401 - any field
    known: dict[str, Any] = {
        "model": "bundled:tiny-llama",
        "scheme": "poc4",
        "rate": 0.1,
        "blocks": 1,
        "nonces": 16,
        "seq_len": 8,
        "dtype": "bfloat16",
        "device": "cpu",
        "batch_size": 8,
        "public_key": "audit",
        "seed": "pocd",
    }
    return Plan(**known | changes)


# Values of few bits.


def test_values_of_few_bits_are_the_nearest_of_their_kind() -> None:
    row = torch.tensor([[448.0, 7.9, -0.1, 1.0, 17.0]])
    assert few_bits.to_fp8(row).tolist() == [[448.0, 8.0, pytest.approx(-0.1015625), 1.0, pytest.approx(17, abs=1)]]
    assert few_bits.to_bits(torch.tensor([[127.0, 1.4, -3.6, 0.0]]), 8).tolist() == [[127.0, 1.0, -4.0, 0.0]]
    levels = torch.tensor([few_bits.NF4]) * 3
    assert torch.allclose(few_bits.to_nf4(levels), levels)
    assert few_bits.two_of_four(torch.tensor([[1.0, -3.0, 2.0, 0.5]])).tolist() == [[0.0, -3.0, 2.0, 0.0]]


@pytest.mark.parametrize("change", [few_bits.to_fp8, few_bits.to_nf4, lambda x: few_bits.to_bits(x, 8)])
def test_rounding_keeps_the_dtype_the_shape_and_zeros(change: Any) -> None:  # noqa: ANN401 - a function
    values = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    values[0] = 0
    found = change(values)
    assert (found.dtype, found.shape) == (values.dtype, values.shape)
    assert (found[0] == 0).all()
    assert float((found - values).float().norm() / values.float().norm()) < 0.2


# Who is caught.


def judged(factors: dict[str, tuple[float, float]], scheme: str = "poc4") -> dict[str, Any]:
    """Rows of ways that err `factor` times as much as the validator, at a cost."""
    generator = np.random.default_rng(2)
    own = np.exp(generator.normal(-9, 0.5, 64))
    ways = [
        Claimed(name, cost, own * factor**2 * np.exp(generator.normal(0, 0.5, 64)))
        for name, (factor, cost) in factors.items()
    ]
    report = judge_residuals(plan(scheme=scheme), [Measured(own, 1.0, ways)])
    assert all(row.name in as_text(report) for row in report.rows)
    return {row.name: row for row in report.rows}


def test_larger_errors_are_caught_sooner_and_gain_less() -> None:
    rows = judged({"same": (1, 0.5), "thrice": (3, 0.5), "far": (30, 0.5), "free": (30, 0.0)})
    assert rows["same"].caught_by == (None, None)
    assert rows["same"].gain == 2
    assert all(found <= 65 for found in rows["thrice"].caught_by)
    assert rows["thrice"].caught_by[0] <= rows["thrice"].caught_by[1]
    assert rows["far"].caught_by == (3, 3)
    assert 1 <= rows["far"].gain < 1.05
    assert rows["far"].residual == pytest.approx(30, rel=0.3)
    assert rows["free"].gain < 1.1
    assert orjson.loads(orjson.dumps(list(rows.values())))[0]["name"] == "same"


def test_where_the_validator_errs_too_much_the_report_says_that_nothing_is_judged() -> None:
    """A way that costs nothing then earns a thousand times as much, and the table is no wider for it."""
    own = np.full(64, 0.3)
    ways = [Claimed("mean output", 0.0, own * 4), Claimed("transformers' layers", 1.0, own)]
    report = judge_residuals(plan(scheme="poc2"), [Measured(own, 1.0, ways)])
    assert report.decidable == 0
    assert [(row.caught_by, row.gain) for row in report.rows] == [((None, None), 1000), ((None, None), 1)]
    text = as_text(report)
    assert "says undecidable of 100% of batches" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    sure = judge_residuals(plan(scheme="poc2"), [Measured(own / 1e4, 1.0, ways)])
    assert sure.decidable == 1
    assert "undecidable" not in as_text(sure)


def test_a_distance_catches_later_than_a_vector() -> None:
    one, twelve = (judged({"thrice": (3, 0.5)}, scheme)["thrice"].caught_by[1] for scheme in ("poc3", "poc4"))
    assert LADDER[0] < twelve < one


# What is measured.


@pytest.mark.parametrize("scheme", ["poc2", "poc4"])
def test_honest_results_pass_and_cheap_ones_do_not_and_the_model_is_left_as_it_was(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[bool] = []
    measured = cheap.measure

    def watched(run: BlockRun, *given: Any, **options: Any) -> Measured:  # noqa: ANN401 - passed on
        before = [weight.clone() for weight in run.model.causal.parameters()]
        found = measured(run, *given, **options)
        left.extend(map(torch.equal, run.model.causal.parameters(), before))
        return found

    monkeypatch.setattr(cheap, "measure", watched)
    first = measure_claims(plan(scheme=scheme), lambda _: None)
    assert left
    assert all(left)
    ways = {way.name: way for way in first[0].ways}
    own = first[0].own.mean()
    assert 0.5 < np.sqrt(ways[HONEST].errors.mean() / own) < 2
    for name in ("W8A8", "FP8 W8A8", "NF4 weights", "2:4 weights", "mean output", "without layer 2", "4-bit weights"):
        assert ways[name].errors.mean() > 2 * own, name
    assert ways["FP8 W8A8"].errors.mean() < ways["2:4 weights"].errors.mean()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scheme": "poc2", "dtype": "float32"}, "dtype must be float16 or bfloat16"),
        ({"nonces": 4}, "nonces must be 16 or more"),
        ({"blocks": 0}, "blocks must be 1 or more"),
        ({"seq_len": 4}, "seq_len must be 8 or more"),
    ],
)
def test_a_plan_that_cannot_be_judged_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        check_claims(plan(**changes))
    check_claims(plan(dtype="float32"))
