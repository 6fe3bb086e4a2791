"""Who is called a fraud with a mixture of experts, with distances and chances that small deep mixtures give."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pocd.compute.engine import block_run
from pocd.compute.margins import measure_chances
from pocd.compute.model import Model, adapt
from pocd.protocol.mixtures import NEAR
from pocd.protocol.names import default_tolerance
from pocd.protocol.proof import FRAUD_THRESHOLD, MISMATCH, ValidatedBatch
from pocd.protocol.schemes import SCHEMES
from pocd.validation.claim import Claim
from pocd.validation.verdict import Recomputed, Terms, judge
from scripts.bench.models import random_model, rounded

if TYPE_CHECKING:
    from collections.abc import Callable

LAYERS, SEQ_LEN, POOL = 24, 12, 192
FORMS: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"num_experts": 32, "moe_intermediate_size": 16, "norm_topk_prob": True},
    "MiniMaxM2": {"num_local_experts": 32, "intermediate_size": 16},
}
SIZES = (1, 2, 5, 10, 20, 50, 192)
Claims = list[tuple[int, float]]


def build(form: str, dtype: str, layers: int) -> Model:
    shape = {"num_hidden_layers": layers, "hidden_size": 64, "head_dim": 16, "num_experts_per_tok": 4}
    causal = random_model(form, **shape, num_attention_heads=4, num_key_value_heads=2, **FORMS[form])
    return adapt(rounded(causal, getattr(torch, dtype)), name=form)


def computed(model: Model) -> list[float]:
    with block_run(model, SCHEMES["poc2"], block_hash="9F2E", public_key="02ab", seq_len=SEQ_LEN) as run:
        return run.distances(range(POOL), batch_size=POOL)  # each expert multiplies once a batch


@dataclass(frozen=True)
class Mixture:
    """A validator's distances and chances, and the distances of honest hosts that round otherwise."""

    dtype: str
    distances: list[float]
    turned: list[float]
    others: list[list[float]]

    def judge(self, claims: Claims, target: float, *, weighed: bool = True) -> ValidatedBatch:
        terms = Terms(
            r_target=target,
            fraud_threshold=FRAUD_THRESHOLD,
            mismatch=MISMATCH,
            tolerance=default_tolerance(self.dtype, SCHEMES["poc2"], 64),
            scheme="poc2",
            model="m",
            model_fingerprint="f00d",
            dtype="float32",  # by counting alone: differences decide nothing of distances
            seq_len=SEQ_LEN,
            node_count=1,
        )
        nonces = [nonce for nonce, _ in claims]
        own = {nonce: (self.distances[nonce],) for nonce in nonces}
        turned = {nonce: self.turned[nonce] for nonce in nonces} if weighed else None
        claim = Claim(
            public_key="02ab", block_hash="9F2E", block_height=7, nonces=nonces, dist=[each for _, each in claims]
        )
        return judge(claim, terms, Recomputed(own, turned=turned), None, None)

    def target(self, at: float = 0.5) -> float:
        """The r_target that this share of the nonces passes."""
        return sorted(self.distances)[int(at * POOL)]

    def far(self, other: list[float]) -> list[int]:
        """Nonces whose distance is another one on the other host, by more than the tolerance."""
        tolerance = default_tolerance(self.dtype, SCHEMES["poc2"], 64)
        return [n for n in range(POOL) if abs(other[n] - self.distances[n]) > tolerance]


@cache
def mixture(form: str, dtype: str, layers: int, *, every: bool = True) -> Mixture:
    model = build(form, dtype, layers)
    by_layers, causal = replace(model, decoder=model.by_layers), model.causal
    others = [computed(by_layers)]
    if every:
        causal.set_attn_implementation("eager")
        others.append(computed(by_layers))
        causal.set_attn_implementation("sdpa")
        tiles = causal.config._experts_implementation
        causal.set_experts_implementation("eager")
        others.append(computed(by_layers))
        causal.set_experts_implementation(tiles)
    with block_run(model, SCHEMES["poc2"], block_hash="9F2E", public_key="02ab", seq_len=SEQ_LEN) as run:
        turned = measure_chances(run, range(POOL), batch_size=POOL)
    assert turned is not None
    return Mixture(dtype, computed(model), turned.tolist(), others)


KINDS = [("Qwen3Moe", "float32", LAYERS), ("MiniMaxM2", "float32", LAYERS), ("Qwen3Moe", "float16", 4)]


# Honest miners.


@pytest.mark.parametrize("kind", KINDS)
def test_no_nonce_turns_that_is_far_from_every_routers_boundary(kind: tuple[str, str, int]) -> None:
    found = mixture(*kind)
    turned = {nonce for other in found.others for nonce in found.far(other)}
    assert all(found.turned[nonce] > 100 * NEAR for nonce in turned)
    assert sum(chance <= NEAR for chance in found.turned) > POOL / 5
    assert len(turned) / len(found.others) < sum(found.turned) + 5


def accused(kind: tuple[str, str, int], *, weighed: bool, batches: int) -> tuple[int, int]:
    """Honest batches that are called fraud, and that are decided, of so many drawn.

    The target is that which parts most distances of two hosts, or those of one nonce that turns.
    """
    found, choice = mixture(*kind), random.Random(5)
    verdicts = []
    for other in found.others:
        nonces = [n for n in found.far(other) if other[n] < found.distances[n]] or [POOL // 2]
        target = found.distances[nonces[0]] - 2 * default_tolerance(found.dtype, SCHEMES["poc2"], 64)
        valid = [(nonce, each) for nonce, each in enumerate(other) if each < target]
        for _ in range(batches):
            drawn = choice.sample(valid, min(len(valid), choice.choice(SIZES)))
            verdicts.append(found.judge(drawn, target, weighed=weighed).verdict)
    return verdicts.count("fraud"), len(verdicts) - verdicts.count("undecidable")


def test_honest_hosts_that_round_otherwise_are_accused_in_no_batch_drawn() -> None:
    """None of 30,600 is: at most 1 in 10,000, as surely as 95 in 100. Counted as a dense model's, some are."""
    for kind in KINDS:
        fraud, decided = accused(kind, weighed=True, batches=3400)
        assert fraud == 0
        assert decided > 1000
    assert sum(accused(kind, weighed=False, batches=50)[0] for kind in KINDS) > 3


def test_where_every_nonce_turns_no_honest_batch_is_fraud_and_no_cheater_honest() -> None:
    found = mixture("Qwen3Moe", "bfloat16", 12, every=False)
    assert min(found.turned) > 0.9
    target = found.target()
    honest = [(nonce, each) for nonce, each in enumerate(found.others[0]) if each < target]
    counted = found.judge(honest, target, weighed=False)
    weighed = found.judge(honest, target)
    assert (counted.verdict, weighed.verdict, weighed.fraud_detected) == ("fraud", "undecidable", False)
    assert (weighed.n_invalid, weighed.probability_honest) == (counted.n_invalid, 1.0)
    forged = [(nonce, target - 0.01) for nonce in range(POOL)]
    assert found.judge(forged, target).verdict == "undecidable"
    impossible = [(nonce, target + 0.01) for nonce in range(POOL)]
    assert found.judge(impossible, target).verdict == "fraud", "no rounding makes an honest miner claim that"


# Cheaters.


def fabricated() -> list[float]:
    return [0.0] * POOL


def other_model() -> list[float]:
    return computed(build("Qwen3Moe", "float32", LAYERS - 1))


def quantised() -> list[float]:
    """Weights in 8 bits, a scale for each row, in float32 arithmetic."""
    model = build("Qwen3Moe", "float32", LAYERS)
    for parameter in model.causal.parameters():
        if parameter.dim() > 1:
            scale = parameter.data.abs().amax(dim=-1, keepdim=True) / 127
            parameter.data = (parameter.data / scale).round() * scale
    return computed(adapt(model.causal, name="quantised"))


@pytest.mark.parametrize("cheat", [fabricated, other_model, quantised], ids=lambda cheat: cheat.__name__)
def test_cheaters_are_caught_by_so_many_nonces(cheat: Callable[[], list[float]]) -> None:
    """Drawn in a hundred ways, of those that they claim at a target which one nonce in two passes."""
    found, choice, distances = mixture(*KINDS[0]), random.Random(7), cheat()
    target = found.target()
    claims = [(nonce, each) for nonce, each in enumerate(distances) if each < target]
    for size in (2, 10, 50):
        verdicts = [found.judge(choice.sample(claims, size), target).verdict for _ in range(100)]
        assert verdicts.count("honest") <= {2: 50, 10: 5, 50: 0}[size]
    assert verdicts.count("fraud") >= 99


def test_a_tenth_of_forged_nonces_is_caught_as_in_a_dense_model() -> None:
    """Who does not compute cannot tell which nonces are near: the others convict, at 0.05% each."""
    found, choice = mixture(*KINDS[0]), random.Random(3)
    target = found.target()
    valid = [(n, found.distances[n]) for n in range(POOL) if found.distances[n] < target]
    others = [n for n in range(POOL) if found.distances[n] >= target + 1e-4]
    caught = 0
    for _ in range(100):
        forged = [(nonce, target - 0.01) for nonce in choice.sample(others, 9)]
        caught += found.judge(choice.sample(valid, 81) + forged, target).fraud_detected
    assert caught >= 99


def test_who_forges_near_nonces_alone_gains_nothing() -> None:
    """That takes the computation of all; and so many invalid ones are more than routers turn."""
    found = mixture(*KINDS[0])
    target = found.target()
    valid = [(n, found.distances[n]) for n in range(POOL) if found.distances[n] < target]
    near = [n for n in range(POOL) if found.turned[n] > NEAR and found.distances[n] >= target + 1e-4]
    assert len(near) > 10
    forged = [(nonce, target - 0.01) for nonce in near]
    for claims in (forged, valid + forged):
        batch = found.judge(claims, target)
        assert batch.mixture is not None
        assert (batch.mixture.near_invalid, batch.n_invalid) == (len(near), len(near))
        assert batch.mixture.p_wide == 1
        assert batch.verdict == ("undecidable" if not batch.mixture.decidable else "fraud")
    assert batch.verdict == "fraud"


def test_who_picks_the_nearest_nonces_to_forge_gains_a_third_at_most() -> None:
    """The more they may turn, the sooner nothing is decided: below that no more than a quarter of a batch is forged."""
    found = mixture(*KINDS[0])
    target = found.target()
    valid = [(n, found.distances[n]) for n in range(POOL) if found.distances[n] < target]
    by_chance = sorted(range(POOL), key=lambda nonce: -found.turned[nonce])
    others = [(n, target - 0.01) for n in by_chance if found.distances[n] >= target + 1e-4]
    for count in range(1, len(others) + 1):
        if found.judge(valid + others[:count], target).verdict == "honest":
            assert count <= len(valid) / 3


# No claim has a part in it.


@given(data=st.data())
def test_altered_claims_change_nothing_of_what_is_near(data: st.DataObject) -> None:
    found = mixture(*KINDS[0])
    nonces = data.draw(st.lists(st.integers(0, POOL - 1), min_size=1, max_size=60, unique=True))
    distances = st.floats(-0.5, 2.5) | st.just(float("nan"))
    batches = [
        found.judge([(nonce, data.draw(distances)) for nonce in nonces], found.target(data.draw(st.floats(0.05, 0.9))))
        for _ in range(2)
    ]
    one, other = (batch.mixture for batch in batches)
    assert one is not None
    assert other is not None
    ours = ("turned", "near_above", "near", "mismatch", "p_quarter", "decidable")
    assert [getattr(one, name) for name in ours] == [getattr(other, name) for name in ours]
    assert list(one.turned) == [found.turned[nonce] for nonce in nonces]


def test_a_model_without_routers_is_judged_as_ever() -> None:
    """Bit for bit: its verdict has no word of routers."""
    found = mixture(*KINDS[0])
    target = found.target()
    honest = [(n, found.distances[n]) for n in range(POOL) if found.distances[n] < target]
    batch = found.judge(honest, target, weighed=False)
    assert batch.mixture is None
    assert b'"mixture"' not in batch.to_json()
    assert b'"mixture"' in found.judge(honest, target).to_json()
    # Where no router comes near another choice, the verdict is the same too.
    firm = replace(found, turned=[0.0] * POOL)
    for bad in range(4):
        forged = [(n, target - 0.01) for n in range(POOL) if found.distances[n] >= target + 1e-4][:bad]
        for size in (1, 20, 90):
            one, other = (firm.judge(honest[:size] + forged, target, weighed=each) for each in (True, False))
            assert one.probability_honest == pytest.approx(other.probability_honest, rel=1e-9)
            assert one.verdict == other.verdict
