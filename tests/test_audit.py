"""`pocd audit` finds a planted hole, and none where there is none; its shortcuts against plain ones."""

from __future__ import annotations

import contextlib
import hashlib
import re
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import pytest
import torch
from random_model import main as write_random_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pocd import cli_compute
from pocd.compute import cheater, shortcuts
from pocd.compute.audit import Attack, Attacks, Audit, Row, as_text, audit
from pocd.compute.calibration import Plan
from pocd.compute.engine import BlockRun, block_run
from pocd.compute.errors import NonFiniteError
from pocd.compute.linear import Linear
from pocd.compute.model import Model, adapt, load_model
from pocd.compute.random import normal, seeds_tensor
from pocd.compute.schemes import SCHEMES, SEGMENTS
from pocd.compute.transforms import JOIN
from pocd.exits import EXIT_CONFIG, EndedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

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
def prepared(model: Model, block_hash: str = "block", scheme: str = "poc2") -> Iterator[BlockRun]:
    with block_run(model, SCHEMES[scheme], block_hash=block_hash, public_key="key", seq_len=SEQ_LEN) as run:
        yield run


def tried(model: Model, run: BlockRun, known: shortcuts.Known) -> dict[str, shortcuts.Shortcut]:
    """All shortcuts by name."""
    found = shortcuts.shortcuts(run, known, lambda: prepared(model, "before", run.scheme.name), batch_size=4)
    return {shortcut.name: shortcut for shortcut in found}


def known_of(run: BlockRun, nonces: int) -> shortcuts.Known:
    return cheater.compute_honestly(run, range(nonces), nonces, 4).known


def attacked(model: Model, run: BlockRun, nonces: int) -> Audit:
    found = cheater.attack(
        run,
        lambda: prepared(model, "block before"),
        range(nonces),
        trained_on=nonces // 2,
        batch_size=250,
        advance=lambda _: None,
    )
    attacks = [
        Attack(
            shortcut.name,
            shortcut.cost,
            shortcut.rest,
            predicted.distances[None],
            predicted.own[None] if shortcut.is_claimed else None,
        )
        for shortcut, predicted in zip(found.shortcuts, found.predicted, strict=True)
    ]
    plan = Plan("small", run.scheme.name, 0.1, 1, nonces, SEQ_LEN, "float32", "cpu", 50, "key", "seed")
    return audit(plan, Attacks("abc", 32, found.true[None], attacks))


def rows(report: Audit) -> dict[str, Row]:
    return {row.name: row for row in report.rows}


# Holes.


@pytest.mark.parametrize(("scheme", "nonces"), [("poc2", 1000), ("poc3", 1000)])
def test_a_model_that_ignores_half_its_layers_is_found_out(scheme: str, nonces: int) -> None:
    causal = small_model()
    for layer in causal.model.layers[2:]:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    model = adapt(causal, name="half of it is idle")
    with prepared(model, scheme=scheme) as run:
        found = rows(attacked(model, run, nonces))
    hole = found["stop at layer 2"]
    assert hole.r_squared.low > 0.99
    assert hole.winners.value > 0.9
    assert hole.gain.low > 1.1  # at the most 1 / (0.5 + 0.1 · 0.5)
    assert found["stop at layer 1"].r_squared.value < 0.7
    assert found["8-bit weights"].r_squared.value > 0.9


def test_a_healthy_model_has_no_hole_at_half_its_layers() -> None:
    model = adapt(small_model(), name="healthy")
    with prepared(model, scheme="poc3") as run:
        found = rows(attacked(model, run, 600))
    assert found["stop at layer 2"].r_squared.value < 0.05
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
        report = attacked(model, hashed, 1000)
    # One half of the nonces is judged. Keeping a suffix or rounding changes every state, so nothing is left to know.
    assert len(report.rows) == 3 + (LAYERS - 1) + LAYERS + 1 + 2 + 8 + 2 + 3 + 2 + 1
    for row in report.rows:
        assert row.r_squared.value <= 0.02, row.name
        assert row.gain.low <= 1, row.name
    assert "No shortcut gains" in as_text(report)


# The shortcuts.


def test_stopping_early_is_a_model_with_fewer_layers() -> None:
    whole, half = small_model(), small_model(2)
    half.load_state_dict(whole.state_dict(), strict=False)
    embeddings = torch.randn(3, SEQ_LEN, 32)
    passed = dict.fromkeys(range(2, LAYERS), shortcuts._pass)
    decoder = adapt(whole, name="whole").by_layers
    kept = decoder.states(embeddings, JOIN["none"], torch.zeros(LAYERS, 32), between=passed)
    with torch.inference_mode():
        expected = half.eval().model(inputs_embeds=embeddings).last_hidden_state
    assert torch.allclose(kept, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["bundled:tiny-qwen3", "bundled:tiny-llama"])
def test_all_layers_at_all_positions_give_the_honest_distances(name: str) -> None:
    model = load_model(name, dtype="float32", device="cpu")
    with prepared(model) as run, torch.inference_mode():
        honest = cheater.compute_honestly(run, range(10), 6, 4)
        assert honest.distances == pytest.approx(run.distances(range(10), batch_size=4), abs=2e-6)
        states = shortcuts.run_states(run, run.inputs(range(6)))
    assert torch.allclose(honest.known.average, states.mean(dim=0), atol=1e-5)
    assert honest.known.nonces == range(3)
    assert torch.allclose(honest.known.states, states[:3], atol=1e-5)


def test_costs_by_hand() -> None:
    model = load_model("bundled:tiny-llama", dtype="float32", device="cpu")
    with prepared(model) as run, torch.inference_mode():
        found = tried(model, run, known_of(run, 2))
    config = model.causal.config
    width, narrow, middle = 128, config.num_key_value_heads * 32, config.intermediate_size
    matrices, mlp = 2 * width * width + 2 * width * narrow + 3 * width * middle, 3 * width * middle

    def layer(positions: int, elements: int = matrices) -> int:
        return positions * elements + 2 * width * sum(range(1, positions + 1))

    assert found["stop at layer 3"].cost == 0.75
    assert found["stop at layer 3"].rest == 0.25
    assert found["every 2nd layer"].cost == 0.5
    assert (found["without layer 2"].cost, found["without layer 2"].rest) == (0.75, 1)
    linear = 16 * 2 * width * width / (4 * layer(16))
    assert found["first half linear"].cost == pytest.approx(0.5 + linear)
    assert found["every 2nd linear"].cost == pytest.approx(0.5 + 2 * linear)
    assert found["8-bit, 2nd linear"].cost == pytest.approx(0.25 + linear)
    assert found["every 2nd position"].cost == pytest.approx(layer(8) / layer(16))
    assert found["first 3/4"].cost == pytest.approx(layer(12) / layer(16))
    assert found["quarters apart"].cost == pytest.approx(4 * layer(4) / layer(16))
    assert found["last quarter"].cost == pytest.approx(layer(4) / layer(16))
    assert (found["last quarter"].rest, found["first quarter"].rest) == (1, 1 - found["first quarter"].cost)
    assert found["low-rank MLP"].cost == pytest.approx(layer(16, matrices - mlp + 3 * 32 * (128 + middle)) / layer(16))
    assert found["8-bit, low-rank MLP"].cost == pytest.approx(found["low-rank MLP"].cost / 2)
    assert (found["8-bit weights"].cost, found["4-bit weights"].cost) == (0.5, 0.25)
    assert found["old transforms"].cost == 1


@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_rows_are_whole_multiples_of_their_step(bits: int) -> None:
    weight = torch.randn(5, 7)
    weight[3] = 0
    rounded = shortcuts._rounded("any", weight, bits=bits)
    for row, found in zip(weight.numpy(), rounded.numpy(), strict=True):
        step = np.abs(row).max() / (127 if bits == 8 else 7)
        expected = [step * round(float(x / step)) if step else 0.0 for x in row]
        assert found == pytest.approx(expected, abs=1e-6)


def test_a_matrix_of_low_rank_is_the_nearest() -> None:
    weight = torch.randn(12, 8)
    found = shortcuts._reduced("mlp.up_proj.weight", weight)
    assert shortcuts._reduced("self_attn.q_proj.weight", weight) is weight
    assert torch.linalg.matrix_rank(found) == 2
    singular = torch.linalg.svdvals(weight)
    assert float((weight - found).norm()) == pytest.approx(float(singular[2:].norm()), rel=1e-5)


def test_the_weights_come_back_also_after_a_failure() -> None:
    model = adapt(small_model(), name="small")
    before = {name: weight.clone() for name, weight in model.causal.named_parameters()}

    def to_nan(_name: str, weight: torch.Tensor) -> torch.Tensor:
        return torch.full_like(weight, torch.nan)

    with prepared(model) as run, torch.inference_mode():
        honest = cheater.compute_honestly(run, range(4), 2, 4)
        rounded = tried(model, run, honest.known)["4-bit weights"]
        broken = replace(rounded, prepared=lambda: shortcuts._replacing(run, to_nan))
        with pytest.raises(NonFiniteError, match="'4-bit weights' gave NaN or infinity, though the honest pass did"):
            cheater.predict(run, broken, honest, range(4), 2, 4)
    for name, weight in model.causal.named_parameters():
        assert torch.equal(weight, before[name])


# Stand-ins for layers, and parts of the sequence.


def with_means(states: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """States [B, S, H] with the mean of those up to each position, and 1, as rows."""
    rows = []
    for one in states.double().numpy():
        rows += [np.concatenate([one[s], one[: s + 1].mean(axis=0), [1.0]]) for s in range(len(one))]
    return np.array(rows)


def test_a_linear_map_is_the_least_squares_one_and_finds_a_linear_truth() -> None:
    generator = torch.Generator().manual_seed(1)
    known, fresh = (torch.randn(count, 9, 4, generator=generator) for count in (60, 5))
    truth = torch.randn(9, 3, generator=generator).double()
    outputs = torch.from_numpy(with_means(known)) @ truth
    noisy = outputs.view(60, 9, 3) + 0.3 * torch.randn(60, 9, 3, generator=generator)
    for target, exact in ((outputs.view(60, 9, 3), True), (noisy, False)):
        linear = Linear()
        for part in range(0, 60, 20):
            linear.add(known[part : part + 20], target[part : part + 20])
        weights = np.linalg.lstsq(with_means(known), target.reshape(-1, 3).double().numpy())[0]
        found = linear(fresh).reshape(-1, 3).numpy()
        assert found == pytest.approx(with_means(fresh) @ weights, abs=1e-3)
        if exact:
            assert found == pytest.approx(with_means(fresh) @ truth.numpy(), abs=1e-3)


@pytest.mark.parametrize("spans", [[(0, 1)], [(1, 1)], [(0, 0), (2, 2)]])
def test_layers_that_are_linear_are_predicted_exactly(spans: list[tuple[int, int]]) -> None:
    """Without attention and MLP, and where nothing is normalised, a layer is no more than a reflection."""
    causal = small_model()
    left_out = [index for first, last in spans for index in range(first, last + 1)]
    for index in left_out:
        causal.model.layers[index].self_attn.o_proj.weight.data.zero_()
        causal.model.layers[index].mlp.down_proj.weight.data.zero_()
    with prepared(adapt(causal, name="some layers are idle"), scheme="trained") as run, torch.inference_mode():
        between = shortcuts.linear_layers(run, range(100), spans, 20)
        assert sorted(between) == left_out
        embeddings = run.inputs(range(100, 110))
        honest = shortcuts.run_states(run, embeddings)
        found = shortcuts.run_states(run, embeddings, between)
        passed = shortcuts.run_states(run, embeddings, dict.fromkeys(between, shortcuts._pass))
    assert torch.allclose(found, honest, atol=1e-3)
    assert (passed - honest).abs().mean() > 0.01


def test_a_prefix_has_the_honest_states_and_a_suffix_has_not() -> None:
    model = adapt(small_model(), name="small")
    with prepared(model, scheme="poc3") as run, torch.inference_mode():
        found = tried(model, run, known_of(run, 4))
        honest = shortcuts.run_states(run, run.inputs(range(3)))
        for name in ("first half", "first quarter", "first eighth", "first 3/4"):
            where = found[name].where
            assert torch.allclose(found[name].states(run, range(3)), honest[:, where], atol=1e-5)
        quarters = found["quarters apart"].states(run, range(3))
        assert torch.allclose(quarters[:, :4], honest[:, :4], atol=1e-5)
        assert (quarters[:, 4:] - honest[:, 4:]).abs().mean() > 0.01
        for name in ("last half", "every 2nd position"):
            states = found[name].states(run, range(3))
            assert states.shape == honest[:, found[name].where].shape
            assert (states - honest[:, found[name].where]).abs().mean() > 0.01


def test_parts_of_the_sequence_are_at_their_own_positions() -> None:
    """GPT-2 adds a learned vector by position, so it shows there."""
    causal = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=64, n_embd=32, n_layer=2, n_head=2))
    torch.nn.init.normal_(causal.transformer.wpe.weight)
    decoder = adapt(causal.eval(), name="gpt2").by_layers
    embeddings, vectors = torch.randn(2, 4, 32), torch.zeros(2, 32)
    with torch.inference_mode():
        shifted = decoder.states(embeddings, JOIN["none"], vectors, between={}, positions=torch.arange(4, 8))
        moved = causal.transformer.wpe.weight[4:8] - causal.transformer.wpe.weight[:4]
        by_hand = decoder.states(embeddings + moved, JOIN["none"], vectors, between={})
        at_start = decoder.states(embeddings, JOIN["none"], vectors, between={})
    assert torch.allclose(shifted, by_hand, atol=1e-5)
    assert not torch.allclose(shifted, at_start, atol=1e-2)


def test_the_size_of_a_product_is_the_variance_that_its_first_factors_leave() -> None:
    model = adapt(small_model(), name="small")
    with prepared(model, scheme="poc3") as run, torch.inference_mode():
        states = shortcuts.run_states(run, run.inputs(range(5)))
        found = cheater._size(run, states, SEQ_LEN // 2, range(5))
        factors, targets = run.factors(states, range(5)).double().numpy(), run.targets(range(5)).numpy()
    for nonce in range(5):
        product = np.prod(factors[nonce, : SEGMENTS // 2], axis=0)
        expected = sum((t * y) ** 2 for t, y in zip(targets[nonce], product, strict=True)) / sum(product**2)
        assert float(found[nonce]) == pytest.approx(expected)


def test_a_random_model_is_written_with_the_layers_asked_for(tmp_path: Path) -> None:
    write_random_model([str(tmp_path / "m"), "--form", "llama", "--layers", "3", "--hidden-size", "64"])
    model = load_model(str(tmp_path / "m"), dtype="float32", device="cpu")
    assert (model.layers, model.hidden_size, model.causal.config.model_type) == (3, 64, "llama")


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
    assert len(found["rows"]) == 29
    claims = lines.index(next(line for line in lines if line.startswith("claimed")))
    for row in found["rows"]:
        (line,) = (line for line in lines[:claims] if re.match(re.escape(row["name"]) + r" +\d+%", line))
        shown = line.strip().removeprefix(row["name"]).split()
        assert shown[:2] == [f"{100 * row['cost']:.0f}%", f"{row['r_squared']['value']:.3f}"]
        assert shown[-2] == f"{row['gain']['value']:.2f}"
    assert [(each["name"], each["dtype"]) for each in found["caught"]] == [
        (f"{bits}-bit weights", dtype) for bits in (8, 4) for dtype in ("float32", "float16", "bfloat16")
    ]
    for each, line in zip(found["caught"], lines[claims + 2 :], strict=False):
        assert line.startswith(each["name"])
        shown = line.removeprefix(each["name"]).split()
        assert shown[:3] == [each["dtype"], f"{each['tolerance']:.1g}", f"{100 * each['mismatch']['value']:.1f}%"]
        assert shown[-2:] == [f"{100 * each['detection'][n]:.0f}%" for n in ("100", "1000")]


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
