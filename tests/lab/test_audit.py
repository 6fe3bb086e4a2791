"""`pocd audit` finds a planted hole, and none where there is none; its shortcuts and predictions against plain ones."""

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

from pocd.cli import compute as cli_compute
from pocd.compute.engine import BlockRun, block_run
from pocd.compute.model import Model, adapt, load_model
from pocd.compute.random import normal, seeds_tensor, signs
from pocd.compute.transforms import join_of
from pocd.lab import cheater, command, shortcuts
from pocd.lab.audit import Attack, Attacks, Audit, Caught, ShortcutScore, as_text, audit
from pocd.lab.audit_statistics import Estimate, ridge
from pocd.lab.calibration import Plan
from pocd.lab.linear import LinearMap
from pocd.process import EXIT_CONFIG, EndedError
from pocd.protocol.errors import NonFiniteError
from pocd.protocol.names import DTYPES, default_tolerance
from pocd.protocol.schemes import SCHEMES, SEGMENTS
from scripts.tools import random_model
from tests.support.family_models import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pocd.lab.cheater import Honest
    from pocd.lab.shortcuts import Shortcut

    Floats = NDArray[np.float64]

LAYERS, SEQ_LEN, HIDDEN_SIZE = 4, 16, 32
HEAD_ROWS = 256  # of a random head


def small_model(layers: int = LAYERS) -> Any:  # noqa: ANN401 - transformers gives its classes no common type
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=HIDDEN_SIZE,
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


def idle(causal: Any, layers: Sequence[int]) -> Model:  # noqa: ANN401 - as above
    """Let some layers add nothing to the stream."""
    for index in layers:
        causal.model.layers[index].self_attn.o_proj.weight.data.zero_()
        causal.model.layers[index].mlp.down_proj.weight.data.zero_()
    return adapt(causal, name="partly idle")


@pytest.fixture(scope="module")
def small() -> Model:
    return adapt(small_model(), name="small")


@contextlib.contextmanager
def prepared(model: Model, block_hash: str = "block", scheme: str = "poc2") -> Iterator[BlockRun]:
    with (
        block_run(model, SCHEMES[scheme], block_hash=block_hash, public_key="key", seq_len=SEQ_LEN) as run,
        torch.inference_mode(),
    ):
        if run.head is None or run.target is None:
            yield run
        else:  # 8192 rows would take most of the time
            target = torch.nn.functional.normalize(run.target[:HEAD_ROWS], dim=0)
            yield replace(run, head=run.head[:HEAD_ROWS], target=target)


def a_plan(nonces: int, scheme: str = "poc2") -> Plan:
    return Plan("small", scheme, 0.1, 1, nonces, SEQ_LEN, "float32", "cpu", 50, "key", "seed")


def attacked(run: BlockRun, nonces: int, names: set[str] | None = None) -> Audit:
    """The report on all shortcuts, or on those named."""
    honest = cheater.compute_honestly(run, range(nonces), nonces // 2, 250)
    attacks = []
    for each in shortcuts.shortcuts(run, honest.known, lambda: prepared(run.model, "before", run.scheme.name), 250):
        if names is None or each.name in names:
            found = cheater.predict(run, each, honest, range(nonces), nonces // 2, 250)
            attacks.append(Attack(each.name, each.cost, each.rest, found.distances[None], found.own[None]))
    true = honest.distances[None, nonces // 2 :]
    return audit(a_plan(nonces, run.scheme.name), Attacks("abc", HIDDEN_SIZE, true, attacks))


def rows(report: Audit) -> dict[str, ShortcutScore]:
    return {row.name: row for row in report.rows}


def tried(run: BlockRun, honest: Honest) -> dict[str, Shortcut]:
    found = shortcuts.shortcuts(run, honest.known, lambda: prepared(run.model, "before", run.scheme.name), 8)
    return {shortcut.name: shortcut for shortcut in found}


# Holes.


@pytest.mark.parametrize("scheme", ["poc2", "poc3"])
def test_a_model_that_ignores_half_its_layers_is_found_out(scheme: str) -> None:
    model = idle(small_model(), range(2, LAYERS))
    with prepared(model, scheme=scheme) as run:
        found = rows(attacked(run, 800, {"stop at layer 1", "stop at layer 2", "8-bit weights"}))
    hole = found["stop at layer 2"]
    assert hole.r_squared.low > 0.99
    assert hole.winners.value > 0.9
    assert hole.gain.low > 1.2  # at the most 1 / (0.5 + 0.1 · 0.5)
    assert found["stop at layer 1"].r_squared.value < 0.7
    assert found["8-bit weights"].r_squared.value > 0.9


def test_a_healthy_model_has_no_hole_at_half_its_layers(small: Model) -> None:
    with prepared(small) as run:
        found = rows(attacked(run, 600, {"stop at layer 2", "another nonce's", "mean output"}))
    assert found["stop at layer 2"].r_squared.value < 0.5
    assert found["stop at layer 2"].gain.low <= 1
    assert found["another nonce's"].cost == found["mean output"].cost == 0


class Hashed(BlockRun):
    """Its readout is an independent random vector for states that differ by more than rounding."""

    def readout(self, states: torch.Tensor, _nonces: Sequence[int]) -> torch.Tensor:
        texts = [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in states[:, -1].mul(1000).round().int()]
        return normal(seeds_tensor(texts), self.model.hidden_size)


def test_independent_random_vectors_have_no_hole(small: Model) -> None:
    with prepared(small) as run:
        hashed = Hashed(**{field.name: getattr(run, field.name) for field in fields(run)})
        report = attacked(hashed, 600)
    # Half of the nonces are judged. Keeping a suffix or rounding changes every state, so nothing is left to know.
    by_layers, by_positions, by_weights = (LAYERS - 1) + LAYERS + 1 + 2, 4 * 2 + 2, 5
    assert len(report.rows) == 3 + by_layers + by_positions + by_weights + 1
    for row in report.rows:
        assert row.r_squared.value <= 0.04, row.name
        assert row.gain.low <= 1, row.name
    assert "No shortcut gains" in as_text(report)


# Linear maps.


def plain_features(states: torch.Tensor) -> Floats:
    """The state, the mean of those up to it, and 1 [B * S, 2H + 1], position by position."""
    found = []
    for sequence in states.double().numpy():
        found += [np.concatenate([state, sequence[: i + 1].mean(axis=0), [1]]) for i, state in enumerate(sequence)]
    return np.array(found)


def plain_map(states: torch.Tensor, outputs: torch.Tensor, to: torch.Tensor) -> Floats:
    weights = np.linalg.lstsq(plain_features(states), outputs.double().flatten(0, 1).numpy())[0]
    return np.asarray((plain_features(to) @ weights).reshape(to.shape))


def test_a_linear_map_is_that_of_least_squares() -> None:
    states, fresh = (normal(seeds_tensor([text])[0], 40 * 9 * 6).view(40, 9, 6) for text in ("known", "fresh"))
    means = states.cumsum(dim=1) / torch.arange(1, 10).view(1, -1, 1)
    outputs = states.flip(-1) + 2 * means.square() + means + 3
    linear = LinearMap()
    for start in (0, 25):
        linear.add(states[start : start + 25], outputs[start : start + 25])
    assert linear(fresh).numpy() == pytest.approx(plain_map(states, outputs, fresh), abs=1e-4)


def test_a_linear_stand_in_is_the_fit_to_the_honest_stream(small: Model) -> None:
    """In place of two layers: from what entered the first to what left the second; the rest runs on its output."""
    with prepared(small) as run:
        left: dict[str, torch.Tensor] = {}
        shortcuts.run_states(run, run.inputs(range(12)), {1: lambda _, leaving: left.setdefault("", leaving)})
        fresh = run.inputs([50, 60])
        fit = torch.from_numpy(plain_map(run.inputs(range(12)), left[""], fresh)).float()
        expected = shortcuts.run_states(run, fresh, {1: lambda *_: fit})
        honest = cheater.compute_honestly(run, range(30), 24, 8)
        assert len(honest.known.nonces) == 12
        shortcut = tried(run, honest)["first half linear"]
        assert torch.allclose(shortcut.states(run, [50, 60]), expected, atol=2e-3)
        assert not torch.allclose(shortcuts.run_states(run, fresh), expected, atol=0.1)


@pytest.mark.parametrize("spans", [[(1, 1)], [(0, 1)], [(1, 1), (3, 3)], [(0, 3)], [(0, 1), (2, 3)]])
def test_layers_that_are_linear_are_replaced_exactly(spans: list[tuple[int, int]]) -> None:
    model = idle(small_model(), range(LAYERS))
    with prepared(model, scheme="trained") as run:  # after each layer a reflection, which is linear
        between = shortcuts.linear_layers(run, range(20), spans, 8)
        assert set(between) == {layer for first, last in spans for layer in range(first, last + 1)}
        inputs = run.inputs([50, 60])
        expected = shortcuts.run_states(run, inputs)
        assert torch.allclose(shortcuts.run_states(run, inputs, between), expected, atol=1e-3)
        passed = shortcuts.run_states(run, inputs, dict.fromkeys(between, lambda entered, _: entered))
        assert not torch.allclose(passed, expected, atol=0.1)


# Positions.


def test_a_prefix_has_the_honest_states(small: Model) -> None:
    with prepared(small, scheme="poc3") as run:
        honest = cheater.compute_honestly(run, range(8), 8, 4)
        found = tried(run, honest)
        states = honest.known.states
        assert states.shape == (4, SEQ_LEN, HIDDEN_SIZE)
        for name, count in (("half", 8), ("quarter", 4), ("eighth", 2), ("3/4", 12)):
            first, last = found[f"first {name}"], found[f"last {name}"]
            assert torch.allclose(first.states(run, range(4)), states[:, :count], atol=1e-5)
            assert (first.where, last.where) == (slice(0, count), slice(SEQ_LEN - count, None))
            assert not torch.allclose(last.states(run, range(4)), states[:, -count:], atol=0.1)
        apart = found["quarters apart"].states(run, range(4))
        assert torch.allclose(apart[:, :4], states[:, :4], atol=1e-5)
        assert torch.allclose(apart[:, -4:], found["last quarter"].states(run, range(4)), atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt 2"])
@pytest.mark.parametrize("where", [slice(6, None), slice(1, None, 2)])
def test_some_positions_see_each_other_and_nothing_else(family: str, where: slice) -> None:
    """As if the others were hidden from them: positions with gaps are one sequence, not many."""
    model = adapt(FAMILIES[family].build(), name=family)
    embeddings = normal(seeds_tensor(["some"])[0], 2 * 12 * HIDDEN_SIZE).view(2, 12, HIDDEN_SIZE)
    positions = torch.arange(12)[where]
    vectors = torch.zeros(model.layers, HIDDEN_SIZE)
    seen = torch.eye(12, dtype=torch.bool)
    seen[:, positions] = True
    seen = seen.tril().expand(2, 1, 12, 12)
    with torch.inference_mode():
        found = model.by_layers.states(
            embeddings[:, where], join_of("none", 1), vectors, between={}, positions=positions
        )
        bare = model.by_layers.decoder(inputs_embeds=embeddings, attention_mask=seen, use_cache=False)
        from_zero = model.by_layers.states(embeddings[:, where], join_of("none", 1), vectors, between={})
    assert torch.allclose(found, bare.last_hidden_state[:, where], atol=1e-4)
    # Rotary positions count by their differences alone, GPT-2's by themselves.
    is_moved_only = family == "llama" and where.step is None
    assert torch.allclose(found, from_zero, atol=1e-4) == is_moved_only


# Predictions.


def plain_product(run: BlockRun, states: torch.Tensor, nonce: int, segments: int) -> Floats:
    """The product of the first segments' unit vectors [H], by loops."""
    assert run.standard is not None
    mean = run.standard.mean.expand(SEQ_LEN, HIDDEN_SIZE).double().numpy()
    deviation = run.standard.deviation.expand(SEQ_LEN, HIDDEN_SIZE).double().numpy()
    sign = signs(seeds_tensor([f"block_key_nonce_{nonce}_signs"]), SEQ_LEN)[0].numpy()
    unit = torch.nn.functional.normalize(states.double(), dim=-1).numpy()
    product = np.ones(HIDDEN_SIZE)
    for g in range(segments):
        inside = range(g * SEQ_LEN // SEGMENTS, (g + 1) * SEQ_LEN // SEGMENTS)
        total = sum((sign[i] * (unit[i] - mean[i]) / deviation[i] for i in inside), np.zeros(HIDDEN_SIZE))
        product *= total / np.linalg.norm(total)
    return product / np.asarray(np.linalg.norm(product))


@pytest.mark.parametrize(("name", "count"), [("half", 8), ("3/4", 12)])
def test_the_size_of_what_is_known_is_the_plain_one(small: Model, name: str, count: int) -> None:
    known = sum((g + 1) * SEQ_LEN // SEGMENTS <= count for g in range(SEGMENTS))
    assert 1 <= known < SEGMENTS
    with prepared(small, scheme="poc3") as run:
        nonces = range(12)
        honest = cheater.compute_honestly(run, nonces, 8, 5)
        shortcut = tried(run, honest)[f"first {name}, size"]
        found = cheater.predict(run, shortcut, honest, nonces, 8, 5)
        states = shortcuts.run_states(run, run.inputs(nonces))
        products = np.array([plain_product(run, states[i], i, known) for i in nonces])
        expected = -np.square(run.targets(nonces).numpy() * products).sum(axis=1)
    # The most uncertain come first.
    assert found.distances == pytest.approx(expected[8:], rel=1e-4)
    assert np.array_equal(found.own, found.distances)


@pytest.mark.parametrize("name", ["first half", "stop at layer 2", "every 2nd position"])
def test_a_prediction_is_the_plain_one(small: Model, name: str) -> None:
    """Three guesses of nonces that neither was fitted to are weighed; then both are fitted to all that is known."""
    nonces, trained_on, half = range(130), 100, 50
    with prepared(small, scheme="poc3") as run:
        honest = cheater.compute_honestly(run, nonces, trained_on, 50)
        shortcut = tried(run, honest)[name]
        found = cheater.predict(run, shortcut, honest, nonces, trained_on, 40)
        some, every = shortcut.states(run, nonces), shortcuts.run_states(run, run.inputs(nonces))
        aims = run.targets(nonces).numpy()
    average = every[:trained_on].mean(dim=0)

    def products(states: torch.Tensor) -> Floats:
        whole = average.repeat(len(nonces), 1, 1)
        whole[:, shortcut.where] = states
        return np.array([plain_product(run, whole[i], i, SEGMENTS) for i in nonces])

    def distances(readouts: Floats) -> Floats:
        return np.asarray(np.sqrt(2 - 2 * (readouts * aims).sum(axis=1)))

    own = products(some)
    mapped = products(torch.from_numpy(plain_map(some[:half], every[:half, shortcut.where], some)).float())
    last = torch.nn.functional.normalize(some[:, -1].double(), dim=-1).numpy()
    features = np.concatenate([own, last], axis=1) if name == "first half" else own
    truth = np.array([plain_product(run, every[i], i, SEGMENTS) for i in nonces])

    def guesses(known: int) -> Floats:
        weights, bias = ridge(features[:known], truth[:known])
        short = distances(features @ weights + bias)
        return np.stack([distances(own), distances(mapped), short], axis=1)

    between = slice(half, trained_on)
    weighing, bias = ridge(guesses(half)[between], distances(truth)[between, None])
    expected = (guesses(trained_on)[trained_on:] @ weighing + bias)[:, 0]
    assert honest.distances == pytest.approx(distances(truth), abs=2e-5)
    assert found.own == pytest.approx(distances(own)[trained_on:], abs=1e-4)
    assert found.distances == pytest.approx(expected, abs=1e-4)


# The shortcuts.


def test_stopping_early_is_a_model_with_fewer_layers(small: Model) -> None:
    half = small_model(2)
    half.load_state_dict(small.causal.state_dict(), strict=False)
    embeddings = normal(seeds_tensor(["early"])[0], 3 * SEQ_LEN * HIDDEN_SIZE).view(3, SEQ_LEN, HIDDEN_SIZE)
    between = dict.fromkeys(range(2, LAYERS), lambda entered, _: entered)
    with torch.inference_mode():
        kept = small.by_layers.states(embeddings, join_of("none", 1), torch.zeros(LAYERS, HIDDEN_SIZE), between=between)
        expected = half.eval().model(inputs_embeds=embeddings).last_hidden_state
    assert torch.allclose(kept, expected, atol=1e-5)


@pytest.mark.parametrize("scheme", ["poc2", "poc3"])
@pytest.mark.parametrize("name", ["bundled:tiny-qwen3", "bundled:tiny-llama"])
def test_all_layers_at_all_positions_give_the_honest_distances(name: str, scheme: str) -> None:
    model = load_model(name, dtype="float32", device="cpu")
    with prepared(model, scheme=scheme) as run:
        honest = cheater.compute_honestly(run, range(10), 6, 4)
        assert honest.distances == pytest.approx(run.distances(range(10), batch_size=4), abs=2e-5)
        states = shortcuts.run_states(run, run.inputs(range(6)))
    assert honest.known.nonces == range(3)
    assert torch.allclose(honest.known.average, states.mean(dim=0), atol=1e-5)
    assert torch.allclose(honest.known.states, states[:3], atol=1e-5)


def test_costs_by_hand() -> None:
    model = load_model("bundled:tiny-llama", dtype="float32", device="cpu")
    with prepared(model, scheme="poc3") as run:
        found = tried(run, cheater.compute_honestly(run, range(2), 2, 2))
    config = model.causal.config
    width, narrow, middle = 128, config.num_key_value_heads * 32, config.intermediate_size
    matrices, mlp = 2 * width * width + 2 * width * narrow + 3 * width * middle, 3 * width * middle

    def layer(positions: int, elements: int = matrices) -> int:
        return positions * elements + 2 * width * sum(range(1, positions + 1))

    whole, low_rank = layer(16), layer(16, matrices - mlp + 3 * 32 * (128 + middle)) / layer(16)
    linear = 16 * 2 * 128 * 128 / (4 * whole)
    expected = {
        "stop at layer 3": (0.75, 0.25),
        "without layer 2": (0.75, 1),
        "every 2nd layer": (0.5, 1),
        "first half linear": (0.5 + linear, 1),
        "every 2nd linear": (0.5 + 2 * linear, 1),
        "first quarter": (layer(4) / whole, 1 - layer(4) / whole),
        "first 3/4": (layer(12) / whole, 1 - layer(12) / whole),
        "first half, size": (layer(8) / whole, 1 - layer(8) / whole),
        "last quarter": (layer(4) / whole, 1),
        "every 2nd position": (layer(8) / whole, 1),
        "quarters apart": (4 * layer(4) / whole, 1),
        "low-rank MLP": (low_rank, 1),
        "8-bit weights": (0.5, 1),
        "4-bit weights": (0.25, 1),
        "8-bit, low-rank MLP": (low_rank / 2, 1),
        "8-bit, 2nd linear": (0.25 + linear, 1),
        "old transforms": (1, 1),
    }
    for name, costs in expected.items():
        assert (found[name].cost, found[name].rest) == pytest.approx(costs), name
    assert [name for name, shortcut in found.items() if shortcut.is_claimed] == ["8-bit weights", "4-bit weights"]
    assert max(map(len, found)) <= 19  # so that the table keeps to 80 columns


@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_rows_are_whole_multiples_of_their_step(bits: int) -> None:
    weight = normal(seeds_tensor(["rows"])[0], 5 * 7).view(5, 7)
    weight[3] = 0
    rounded = shortcuts._rounded("any", weight, bits=bits)
    for row, found in zip(weight.numpy(), rounded.numpy(), strict=True):
        step = np.abs(row).max() / (127 if bits == 8 else 7)
        multiples = found / step if step else found
        assert multiples == pytest.approx(multiples.round(), abs=1e-4)
        assert np.abs(found - row).max() <= (0.5 + 1e-4) * step  # which of two is nearer may be a matter of rounding


def test_a_matrix_of_low_rank_is_the_nearest() -> None:
    weight = normal(seeds_tensor(["any"])[0], 12 * 8).view(12, 8)
    found = shortcuts._reduced("mlp.up_proj", weight)
    assert torch.linalg.matrix_rank(found, rtol=1e-4) == 2
    singular = torch.linalg.svdvals(weight)
    assert float((weight - found).norm()) == pytest.approx(float(singular[2:].norm()), rel=1e-5)
    assert torch.equal(shortcuts._reduced("self_attn.q_proj", weight), weight)
    assert torch.equal(shortcuts._both("mlp.up_proj", weight), shortcuts._rounded("", found, bits=8))


def test_the_weights_come_back_also_after_a_failure(small: Model) -> None:
    before = {name: weight.clone() for name, weight in small.causal.named_parameters()}

    def to_nan(_name: str, weight: torch.Tensor) -> torch.Tensor:
        return torch.full_like(weight, torch.nan)

    with prepared(small) as run:
        honest = cheater.compute_honestly(run, range(8), 4, 4)
        shortcut = tried(run, honest)["4-bit weights"]
        broken = replace(shortcut, prepared=lambda: shortcuts.replacing(run, to_nan))
        with pytest.raises(NonFiniteError, match="'4-bit weights' gave NaN or infinity, though the honest pass did"):
            cheater.predict(run, broken, honest, range(8), 4, 4)
        with shortcut.prepared():
            assert not torch.equal(small.causal.model.layers[0].mlp.up_proj.weight, before[UP])
    for name, weight in small.causal.named_parameters():
        assert torch.equal(weight, before[name])


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("layers", [2, 3])
def test_a_random_model_is_written_with_the_layers_asked_for(tmp_path: Path, layers: int) -> None:
    folder = tmp_path / "model"
    form = "qwen3" if layers == 2 else "llama"
    random_model.main([str(folder), "--layers", str(layers), "--hidden-size", "32", "--form", form])
    model = load_model(str(folder), dtype="float32", device="cpu")
    assert (model.layers, model.hidden_size) == (layers, 32)
    assert type(model.causal).__name__.lower() == f"{form}forcausallm"
    random_model.main([str(tmp_path / "again"), "--layers", str(layers), "--hidden-size", "32", "--form", form])
    assert load_model(str(tmp_path / "again"), dtype="float32", device="cpu").fingerprint == model.fingerprint
    other = [str(tmp_path / "other"), "--layers", str(layers), "--hidden-size", "32", "--form", form, "--seed", "1"]
    random_model.main(other)
    assert load_model(str(tmp_path / "other"), dtype="float32", device="cpu").fingerprint != model.fingerprint


# The report.


def test_the_widest_numbers_fit_into_the_tables() -> None:
    surely, much = Estimate(1, 0.9993, 1), Estimate(12.345, 11.111, 13.579)
    row = ShortcutScore("8-bit, low-rank MLP", 1, 1, surely, surely, much)
    nearly = Estimate(0.99, 0.9881, 1)
    caught = [Caught("8-bit weights", dtype, 0.000123, nearly, {"100": 1.0, "1000": 0.5}) for dtype in DTYPES]
    text = as_text(Audit(a_plan(200), "abc", HIDDEN_SIZE, 100, (row,), tuple(caught)))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "8-bit, low-rank MLP 100% 1.000 [0.999–1.000] 100% [100–100] 12.35 [11.11–13.58]" in text
    (line,) = (line.split() for line in text.splitlines() if line.startswith("8-bit weights") and "bfloat16" in line)
    assert line == ["8-bit", "weights", "bfloat16", "0.0001", "99.0%", "[98.8–100.0]", "100%", "50%"]
    assert "A cheater gains (the interval lies above 1) by: 8-bit, low-rank MLP." in text


def test_claims_are_judged_by_each_dtypes_tolerance() -> None:
    true = np.linspace(1, 2, 200)[None]
    attacks = [Attack("honest", 1, 1, true, true), Attack("shy", 1, 1, true, None)]
    attacks.append(Attack("liar", 1, 1, true, true[:, ::-1]))
    report = audit(a_plan(400, "poc3"), Attacks("abc", HIDDEN_SIZE, true, attacks))
    assert [(each.name, each.dtype) for each in report.caught] == [
        (name, dtype) for name in ("honest", "liar") for dtype in DTYPES
    ]
    for each in report.caught:
        assert each.tolerance == default_tolerance(each.dtype, SCHEMES["poc3"], HIDDEN_SIZE)
        assert each.mismatch.value == (each.name == "liar")
        for probability in each.detection.values():
            assert (probability == 1) == (each.name == "liar")


# The command.

OPTIONS: dict[str, Any] = {"model": "bundled:tiny-llama", "scheme": "poc3", "seq_len": 8, "nonces": 200, "blocks": 1}


def audit_here(**options: Any) -> None:  # noqa: ANN401 - any option
    cli_compute.audit(**(OPTIONS | options))


def test_the_command_prints_tables_and_the_same_as_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    attack, measured = command.attack, dict[Plan, Attacks]()

    def once(plan: Plan, advance: Callable[[float], None]) -> Attacks:
        if plan not in measured:
            measured[plan] = attack(plan, advance)
        return measured[plan]

    monkeypatch.setattr(command, "attack", once)  # what is printed in two ways is measured once
    audit_here(batch_size=100)
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in printed.out
    audit_here(batch_size=100, as_json=True)
    assert len(measured) == 1
    found = orjson.loads(capsys.readouterr().out)
    assert (found["judged"], found["hidden_size"], found["plan"]["scheme"]) == (100, 128, "poc3")
    claims_begin = next(i for i, line in enumerate(lines) if line.startswith("claimed"))
    shown_rows = {line[:19].strip(): line[19:].split() for line in lines[:claims_begin] if "%" in line}
    for row in found["rows"]:
        shown = shown_rows[row["name"]]
        assert shown[:2] == [f"{100 * row['cost']:.0f}%", f"{row['r_squared']['value']:.3f}"]
        assert shown[-2:] == [
            f"{row['gain']['value']:.2f}",
            f"[{row['gain']['low']:.2f}–{row['gain']['high']:.2f}]",
        ]
    assert len(found["caught"]) == 2 * len(DTYPES)
    for each, line in zip(found["caught"], lines[claims_begin + 2 :], strict=False):
        wrong = each["mismatch"]
        assert line.split() == [
            *each["name"].split(),
            each["dtype"],
            f"{each['tolerance']:.1g}",
            f"{100 * wrong['value']:.1f}%",
            f"[{100 * wrong['low']:.1f}–{100 * wrong['high']:.1f}]",
            f"{100 * each['detection']['100']:.0f}%",
            f"{100 * each['detection']['1000']:.0f}%",
        ]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rate": 0}, "rate must be above 0 and below 1, got 0"),
        ({"blocks": 0}, "blocks must be 1 or more, got 0"),
        ({"nonces": 199}, "nonces must be 200 or more for a rate of 0.1, got 199"),
        ({"seq_len": 7}, "seq_len must be 8 or more, got 7"),
        ({"scheme": "poc9"}, "scheme 'poc9' is unknown; allowed are: "),
        ({"device": "gpu"}, "device 'gpu' is unknown; allowed are: "),
        (
            {"scheme": "poc2", "batch_size": 65536, "seq_len": 4096, "nonces": 65536},
            "a batch of 65536 × 4096 positions does not fit",
        ),
    ],
)
def test_a_bad_plan_is_refused_in_a_line(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(EndedError) as caught:
        audit_here(**options)
    assert str(caught.value).startswith(reason)
    assert caught.value.code == EXIT_CONFIG
