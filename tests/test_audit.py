"""`pocd audit` finds a planted hole, and none where there is none; its shortcuts against plain ones."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pocd import cli_compute
from pocd.compute import shortcuts
from pocd.compute.audit import Attack, Attacks, Audit, Row, as_text, audit
from pocd.compute.calibration import Plan
from pocd.compute.engine import BlockRun, block_run
from pocd.compute.errors import NonFiniteError
from pocd.compute.model import Model, adapt, load_model
from pocd.compute.random import normal, seeds_tensor
from pocd.compute.schemes import SCHEMES
from pocd.compute.transforms import JOIN
from pocd.exits import EXIT_CONFIG, EndedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LAYERS, SEQ_LEN = 4, 16
POC2 = SCHEMES["poc2"]


def small_model(layers: int = LAYERS) -> Any:  # noqa: ANN401 - transformers gives its classes no common type
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    causal = LlamaForCausalLM(config)
    for name, weight in causal.named_parameters():
        if weight.ndim > 1:
            weight.data.copy_(0.2 * normal(seeds_tensor([name])[0], weight.numel()).view_as(weight))
    return causal


@contextlib.contextmanager
def prepared(model: Model, block_hash: str = "block") -> Iterator[BlockRun]:
    with block_run(model, POC2, block_hash=block_hash, public_key="key", seq_len=SEQ_LEN) as run:
        yield run


def attacked(model: Model, run: BlockRun, nonces: int) -> Audit:
    found = shortcuts.attack(
        run,
        lambda: prepared(model, "block before"),
        range(nonces),
        trained_on=nonces // 2,
        batch_size=250,
        advance=lambda _: None,
    )
    attacks = [
        Attack(shortcut.name, shortcut.cost, shortcut.rest, predicted[None])
        for shortcut, predicted in zip(found.shortcuts, found.predicted, strict=True)
    ]
    plan = Plan("small", "poc2", 0.1, 1, nonces, SEQ_LEN, "float32", "cpu", 50, "key", "seed")
    return audit(plan, Attacks("abc", 32, found.true[None], attacks))


def rows(report: Audit) -> dict[str, Row]:
    return {row.name: row for row in report.rows}


# Holes.


def test_a_model_that_ignores_half_its_layers_is_found_out() -> None:
    causal = small_model()
    for layer in causal.model.layers[2:]:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    model = adapt(causal, name="half of it is idle")
    with prepared(model) as run:
        found = rows(attacked(model, run, 2000))
    hole = found["stop at layer 2"]
    assert hole.r_squared.low > 0.99
    assert hole.winners.value > 0.9
    assert hole.gain.low > 1.2  # at the most 1 / (0.5 + 0.1 · 0.5)
    assert found["stop at layer 1"].r_squared.value < 0.7
    assert found["8-bit weights"].r_squared.value > 0.9


def test_a_healthy_model_has_no_hole_at_half_its_layers() -> None:
    model = adapt(small_model(), name="healthy")
    with prepared(model) as run:
        found = rows(attacked(model, run, 600))
    assert found["stop at layer 2"].r_squared.value < 0.3
    assert found["stop at layer 2"].gain.low <= 1
    assert found["another nonce's"].cost == found["mean output"].cost == 0


class Hashed(BlockRun):
    """Its readout is an independent random vector for states that differ by more than rounding."""

    def readout(self, states: torch.Tensor, _nonces: Sequence[int]) -> torch.Tensor:
        texts = [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in states[:, -1].mul(1000).round().int()]
        return normal(seeds_tensor(texts), self.model.hidden_size)


def test_independent_random_vectors_have_no_hole() -> None:
    model = adapt(small_model(), name="small")
    with prepared(model) as run:
        hashed = Hashed(**{field.name: getattr(run, field.name) for field in fields(run)})
        report = attacked(model, hashed, 2000)
    # One half of the nonces is judged. Keeping a suffix or rounding changes every state, so nothing is left to know.
    assert len(report.rows) == 3 + (LAYERS - 1) + 1 + 6 + 2 + 1 + 1
    for row in report.rows:
        assert row.r_squared.value <= 0.02, row.name
        assert row.gain.low <= 1, row.name
    assert "No shortcut gains" in as_text(report)


# The shortcuts.


def test_stopping_early_is_a_model_with_fewer_layers() -> None:
    whole, half = small_model(), small_model(2)
    half.load_state_dict(whole.state_dict(), strict=False)
    embeddings = torch.randn(3, SEQ_LEN, 32)
    kept = adapt(whole, name="whole").by_layers.states(embeddings, JOIN["none"], torch.zeros(LAYERS, 32), kept=range(2))
    with torch.inference_mode():
        expected = half.eval().model(inputs_embeds=embeddings).last_hidden_state
    assert torch.allclose(kept, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["bundled:tiny-qwen3", "bundled:tiny-llama"])
def test_all_layers_at_all_positions_give_the_honest_distances(name: str) -> None:
    model = load_model(name, dtype="float32", device="cpu")
    with prepared(model) as run, torch.inference_mode():
        honest = shortcuts.compute_honestly(run, range(10), 6, 4)
        assert honest.distances == pytest.approx(run.distances(range(10), batch_size=4), abs=2e-6)
        states = run.model.by_layers.states(run.inputs(range(6)), JOIN[POC2.layer_step], run.vectors, kept=range(4))
    assert torch.allclose(honest.average, states.mean(dim=0), atol=1e-5)
    assert torch.allclose(honest.first, states[0], atol=1e-5)


def test_costs_by_hand() -> None:
    model = load_model("bundled:tiny-llama", dtype="float32", device="cpu")
    with prepared(model) as run, torch.inference_mode():
        honest = shortcuts.compute_honestly(run, range(2), 2, 2)
        found = {
            shortcut.name: shortcut for shortcut in shortcuts.shortcuts(run, honest, lambda: prepared(model, "before"))
        }
    config = model.causal.config
    width, narrow, middle = 128, config.num_key_value_heads * 32, config.intermediate_size
    matrices, mlp = 2 * width * width + 2 * width * narrow + 3 * width * middle, 3 * width * middle

    def layer(positions: int, elements: int = matrices) -> int:
        return positions * elements + 2 * width * sum(range(1, positions + 1))

    assert found["stop at layer 3"].cost == 0.75
    assert found["stop at layer 3"].rest == 0.25
    assert found["every other layer"].cost == 0.5
    assert found["last quarter"].cost == pytest.approx(layer(4) / layer(16))
    assert (found["last quarter"].rest, found["first quarter"].rest) == (1, 1 - found["first quarter"].cost)
    assert found["low-rank MLP"].cost == pytest.approx(layer(16, matrices - mlp + 3 * 32 * (128 + middle)) / layer(16))
    assert (found["8-bit weights"].cost, found["4-bit weights"].cost) == (0.5, 0.25)
    assert found["old transforms"].cost == 1


@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_rows_are_whole_multiples_of_their_step(bits: int) -> None:
    weight = torch.randn(5, 7)
    weight[3] = 0
    rounded = shortcuts._rounded(weight, bits=bits)
    for row, found in zip(weight.numpy(), rounded.numpy(), strict=True):
        step = np.abs(row).max() / (127 if bits == 8 else 7)
        expected = [step * round(float(x / step)) if step else 0.0 for x in row]
        assert found == pytest.approx(expected, abs=1e-6)


def test_a_matrix_of_low_rank_is_the_nearest() -> None:
    weight = torch.randn(12, 8)
    found = shortcuts._of_low_rank(weight)
    assert torch.linalg.matrix_rank(found) == 2
    singular = torch.linalg.svdvals(weight)
    assert float((weight - found).norm()) == pytest.approx(float(singular[2:].norm()), rel=1e-5)


def test_the_weights_come_back_also_after_a_failure() -> None:
    model = adapt(small_model(), name="small")
    before = {name: weight.clone() for name, weight in model.causal.named_parameters()}

    def to_nan(weight: torch.Tensor) -> torch.Tensor:
        return torch.full_like(weight, torch.nan)

    with prepared(model) as run, torch.inference_mode():
        honest = shortcuts.compute_honestly(run, range(4), 2, 4)
        tried = shortcuts.shortcuts(run, honest, lambda: prepared(model, "before"))
        broken = replace(tried[-3], prepared=lambda: shortcuts._replacing(run, to_nan, lambda _: True))
        with pytest.raises(NonFiniteError, match="'4-bit weights' gave NaN or infinity, though the honest pass did"):
            shortcuts.predict(run, broken, honest, range(4), 2, 4)
    for name, weight in model.causal.named_parameters():
        assert torch.equal(weight, before[name])


# The command.

OPTIONS: dict[str, Any] = {"model": "bundled:tiny-llama", "seq_len": 8, "nonces": 200, "blocks": 1}


def audit_here(**options: Any) -> None:  # noqa: ANN401 - any option
    cli_compute.audit(**(OPTIONS | options))


def test_the_command_prints_a_table_and_the_same_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    audit_here()
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in printed.out
    audit_here(as_json=True)
    found = orjson.loads(capsys.readouterr().out)
    assert (found["judged"], found["hidden_size"], found["plan"]["scheme"]) == (100, 128, "poc2")
    assert len(found["rows"]) == 17
    for row in found["rows"]:
        (line,) = (line for line in lines if line.strip().startswith(row["name"]) and "%" in line)
        shown = line.strip().removeprefix(row["name"]).split()
        assert shown[:2] == [f"{100 * row['cost']:.0f}%", f"{row['r_squared']['value']:.3f}"]
        assert shown[-2] == f"{row['gain']['value']:.2f}"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rate": 0}, "rate 0 is no share of nonces; give a number above 0 and below 1"),
        ({"blocks": 0}, "0 blocks are none; give 1 or more"),
        ({"nonces": 199}, "199 nonces per block tell too little of a rate of 0.1; give 200 or more"),
        ({"seq_len": 7}, "seq_len 7 has no eighths to keep; give 8 or more"),
        ({"scheme": "poc9"}, "scheme 'poc9' is unknown; allowed are: "),
        ({"device": "gpu"}, "device 'gpu' is unknown; allowed are: "),
        ({"batch_size": 65536, "seq_len": 4096, "nonces": 65536}, "a batch of 65536 × 4096 positions does not fit"),
    ],
)
def test_a_bad_plan_is_refused_in_a_line(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(EndedError) as caught:
        audit_here(**options)
    assert str(caught.value).startswith(reason)
    assert caught.value.code == EXIT_CONFIG
