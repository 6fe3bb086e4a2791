"""Who is called a fraud and who is not, with distances that the bundled models give."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest

from pocd.compute.engine import block_run
from pocd.compute.model import load_model
from pocd.protocol.names import DTYPES, TOLERANCE
from pocd.protocol.proof import FRAUD_THRESHOLD, MISMATCH
from pocd.protocol.schemes import SCHEMES
from pocd.validation.claim import BodyError, Claim, parse_json
from pocd.validation.conditions import MismatchError
from pocd.validation.verdict import Recomputed, Terms, check, judge, sampled

if TYPE_CHECKING:
    from pocd.compute.model import Model
    from pocd.protocol.proof import ValidatedBatch

MODELS = ("bundled:tiny-qwen3", "bundled:tiny-llama")
SEQ_LEN = 8
POOL = 2200  # nonces; a half of them is valid, where distances lie closest
BLOCK, KEY = "9F2E", "02ab"


@cache
def loaded(name: str, dtype: str) -> Model:
    return load_model(name, dtype=dtype, device="cpu", seq_len=SEQ_LEN)


def computed(
    model: Model, count: int, *, batch_size: int, scheme: str = "poc2", block: str = BLOCK, key: str = KEY
) -> list[float]:
    """Distances of the nonces below `count`."""
    with block_run(model, SCHEMES[scheme], block_hash=block, public_key=key, seq_len=SEQ_LEN) as run:
        return run.distances(range(count), batch_size=batch_size)


@dataclass(frozen=True)
class Validator:
    """One that has recomputed every nonce below len(distances)."""

    terms: Terms
    distances: list[float]

    @property
    def r_target(self) -> float:
        assert self.terms.r_target is not None
        return self.terms.r_target

    def judge(self, claims: list[tuple[int, float]], sample: int | None = None, **said: Any) -> ValidatedBatch:  # noqa: ANN401 - any field
        """Take the JSON that a miner sends, hold it to our terms, and judge."""
        seed = None if sample is None else "seed"
        claim = parse_json(Claim, body(claims, **said))
        check(claim, self.terms)
        drawn = {nonce: self.distances[nonce] for nonce in sampled(claim.nonces, sample, seed)}
        return judge(claim, self.terms, Recomputed({nonce: (d,) for nonce, d in drawn.items()}), sample, seed)

    @property
    def valid(self) -> list[int]:
        return [nonce for nonce, distance in enumerate(self.distances) if distance < self.r_target]

    @property
    def others(self) -> list[int]:
        """Those that no rounding makes valid: the tolerance could be claimed by anybody."""
        limit = self.r_target + self.terms.tolerance
        return [nonce for nonce, distance in enumerate(self.distances) if distance >= limit]

    def honest(self, count: int) -> list[tuple[int, float]]:
        """The first valid nonces and their distances."""
        return [(nonce, self.distances[nonce]) for nonce in self.valid[:count]]


def body(claims: list[tuple[int, float]], **said: Any) -> bytes:  # noqa: ANN401 - any field
    nonces, dist = [nonce for nonce, _ in claims], [distance for _, distance in claims]
    fields = {"public_key": KEY, "block_hash": BLOCK, "block_height": 7, "nonces": nonces, "dist": dist, **said}
    return json.dumps(fields).encode()


def validator_of(name: str, dtype: str, count: int) -> Validator:
    """One that computes in batches of 256 by the flat decoder, and knows a target that a half of the nonces passes."""
    model = loaded(name, dtype)
    distances = computed(model, count, batch_size=256)
    terms = Terms(
        r_target=sorted(distances)[count // 2],
        fraud_threshold=FRAUD_THRESHOLD,
        mismatch=MISMATCH,
        tolerance=TOLERANCE[dtype],
        scheme="poc2",
        model=name,
        model_fingerprint=model.fingerprint,
        dtype=dtype,
        seq_len=SEQ_LEN,
        node_count=1,
    )
    return Validator(terms, distances)


@pytest.fixture(scope="module")
def validator() -> Validator:
    return validator_of(MODELS[1], "float32", POOL)


# Honest miners.

HONEST = 256  # nonces of each miner
SIZES = (1, 2, 5, 10, 20, 50)


@cache
def honest_miners(name: str, dtype: str) -> tuple[Validator, list[list[tuple[int, float]]]]:
    """A validator, and miners who computed the same nonces in other batches or through transformers' own layers.

    Held to the target, near the median, that separates most of their distances from the validator's.
    """
    validator = validator_of(name, dtype, HONEST)
    model = loaded(name, dtype)
    layers = computed(replace(model, decoder=model.by_layers), HONEST, batch_size=32)
    found = [computed(model, HONEST, batch_size=12), layers]
    both = list(zip(layers, validator.distances, strict=True))

    def separated(target: float) -> int:
        return sum(mine < target <= theirs for mine, theirs in both)

    target = max(sorted(validator.distances)[HONEST // 4 : -HONEST // 4], key=separated)
    validator = replace(validator, terms=replace(validator.terms, r_target=target))
    return validator, [[(nonce, each) for nonce, each in enumerate(mine) if each < target] for mine in found]


def accused(tolerance_factor: float) -> tuple[int, int]:
    """How many of honest batches of all sizes, dtypes and models are called fraud, and of how many."""
    choice = random.Random(5)
    verdicts = []
    for name, dtype in itertools.product(MODELS, DTYPES):
        validator, miners = honest_miners(name, dtype)
        terms = replace(validator.terms, tolerance=validator.terms.tolerance * tolerance_factor)
        for claims in miners * 3:
            left, sizes = choice.sample(claims, len(claims)), itertools.cycle(SIZES)
            while left:
                size = next(sizes)
                verdicts.append(replace(validator, terms=terms).judge(left[:size]).fraud_detected)
                left = left[size:]
    return sum(verdicts), len(verdicts)


def test_honest_batches_of_every_dtype_model_and_size_are_not_accused() -> None:
    """Their distances differ from the validator's by a third of the tolerance at most (measured)."""
    fraud, batches = accused(1)
    # A quarter of the nonces or more is valid, which makes 6 batches or more: 64 = 1 + 2 + 5 + 10 + 20 + 26.
    assert batches >= 6 * 3 * 2 * len(MODELS) * len(DTYPES)
    assert fraud == 0


def test_without_the_tolerance_honest_miners_would_be_accused() -> None:
    """So that the test above can fail."""
    fraud, _ = accused(0)
    assert fraud > 0


# Liars.


@pytest.mark.parametrize("draw", range(10))
def test_a_twentieth_of_forged_nonces_among_a_thousand_is_always_fraud(validator: Validator, draw: int) -> None:
    """Forged ones are not valid, and claimed with distances as valid ones have."""
    choice = random.Random(draw)
    plausible = [validator.distances[nonce] for nonce in choice.sample(validator.valid, 50)]
    forged = list(zip(choice.sample(validator.others, 50), plausible, strict=True))
    honest = [(nonce, validator.distances[nonce]) for nonce in choice.sample(validator.valid, 950)]
    batch = validator.judge(choice.sample(honest + forged, 1000))
    assert (batch.n, batch.n_invalid, batch.fraud_detected) == (1000, 50, True)
    assert "shifted" in batch.suspicions
    assert not validator.judge(honest).fraud_detected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_wider_tolerance_lets_no_forger_through(dtype: str) -> None:
    validator, _ = honest_miners(MODELS[0], dtype)
    forged = [(nonce, validator.r_target - 1e-3) for nonce in validator.others[:6]]
    batch = validator.judge(validator.honest(114) + forged)
    assert (batch.n_invalid, batch.fraud_detected) == (6, True)


@pytest.mark.parametrize("lie", [{"block": "9F2F"}, {"key": "02ac"}, {"scheme": "trained"}])
def test_another_block_key_or_scheme_under_a_false_name_is_fraud(validator: Validator, lie: dict[str, str]) -> None:
    found = computed(loaded(MODELS[1], "float32"), 200, batch_size=256, **lie)
    target = sorted(found)[100]
    claims = [(nonce, min(each, validator.r_target - 1e-6)) for nonce, each in enumerate(found) if each < target]
    batch = validator.judge(claims)
    assert (batch.fraud_detected, batch.impossible_claims) == (True, 0)
    assert batch.n_invalid > 20


def test_another_model_under_a_false_name_is_fraud(validator: Validator) -> None:
    found = computed(loaded(MODELS[0], "float32"), 200, batch_size=256)
    claims = [(nonce, each) for nonce, each in enumerate(found) if each < validator.r_target]
    batch = validator.judge(claims, model_fingerprint=validator.terms.model_fingerprint)
    assert batch.fraud_detected
    assert batch.shifted > 0.9 * len(claims)  # one or another may come near by chance


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("model_fingerprint", "another"),
        ("model", MODELS[0]),
        ("scheme", "trained"),
        ("dtype", "bfloat16"),
        ("seq_len", 1),
        ("r_target", 2.0),
    ],
)
def test_what_a_batch_admits_is_refused_and_not_called_fraud(validator: Validator, field: str, said: object) -> None:
    claim = parse_json(Claim, body(validator.honest(100), **{field: said}))
    with pytest.raises(MismatchError) as caught:
        check(claim, validator.terms)
    assert caught.value.field == field


def test_distances_shifted_within_the_valid_ones_are_reported(validator: Validator) -> None:
    claims = [(nonce, distance - 1e-3) for nonce, distance in validator.honest(100)]
    batch = validator.judge(claims)
    assert (batch.fraud_detected, batch.shifted, batch.suspicions) == (False, 100, ("shifted",))
    assert batch.largest_difference == pytest.approx(1e-3)


def test_distances_shifted_across_the_target_are_fraud(validator: Validator) -> None:
    target = validator.r_target
    claims = [(nonce, each - 0.02) for nonce, each in enumerate(validator.distances) if each - 0.02 < target][:200]
    batch = validator.judge(claims)
    assert batch.fraud_detected
    assert "shifted" in batch.suspicions


@pytest.mark.parametrize("claimed", [math.nan, math.inf, -math.inf, -1.0, 2.0])
def test_nan_or_infinity_passing_as_valid(validator: Validator, claimed: float) -> None:
    """The defect: each comparison with NaN is false, so `dist > r_target` finds nothing."""
    claims = [(nonce, claimed) for nonce in validator.valid[:100]]
    batch = validator.judge(claims)
    assert (batch.fraud_detected, batch.n_invalid, batch.impossible_claims) == (True, 100, 100)
    assert batch.non_finite == (0 if math.isfinite(claimed) else 100)


def test_a_dist_list_of_another_length_skipping_the_fraud_check(validator: Validator) -> None:
    """The defect: where the lengths differed, nothing was compared, and the batch was honest."""
    claims = validator.honest(100)
    for dist in ([], [1.0], [distance for _, distance in claims][:-1], [1.0] * 101):
        with pytest.raises(BodyError) as caught:
            validator.judge(claims, dist=dist)
        assert (caught.value.field, str(caught.value)) == ("dist", f"dist: {len(dist)} values for 100 nonces")


def test_one_borderline_nonce_called_fraud(validator: Validator) -> None:
    """The defect: a distance that rounds over the target on the validator's side was enough."""
    nonce = validator.valid[0]
    for above in (0.0, 0.9 * validator.terms.tolerance):
        rounded = list(validator.distances)
        rounded[nonce] = validator.r_target + above
        claims = [(nonce, math.nextafter(validator.r_target, 0)), *validator.honest(31)[1:]]
        for size in (1, 2, 30):
            batch = replace(validator, distances=rounded).judge(claims[:size])
            assert (batch.n_invalid, batch.fraud_detected, batch.suspicions) == (0, False, ())
    # And one that lies beyond it is not fraud either, in a batch that is large enough to tell.
    rounded[nonce] = validator.r_target + 0.01
    batch = replace(validator, distances=rounded).judge(claims)
    assert (batch.n_invalid, batch.fraud_detected, batch.suspicions) == (1, False, ("shifted",))


def test_repeats_are_reported_and_weigh_nothing(validator: Validator) -> None:
    claims = validator.honest(50)
    batch = validator.judge(claims * 4)
    assert (batch.n, batch.duplicates, batch.fraud_detected) == (50, 150, False)
    assert batch.suspicions == ("duplicates",)
    forged = [(nonce, 1.0) for nonce in validator.others[:3]]
    assert (
        validator.judge(claims * 100 + forged).probability_honest == validator.judge(claims + forged).probability_honest
    )
    assert validator.judge(claims * 100 + forged).fraud_detected


def test_of_two_claims_for_one_nonce_the_worse_counts(validator: Validator) -> None:
    claims = validator.honest(50)
    again = [(nonce, distance + 1) for nonce, distance in claims[:3]]
    batch = validator.judge(claims + again)
    assert (batch.n_invalid, batch.impossible_claims, batch.duplicates, batch.shifted) == (3, 3, 3, 3)
    assert batch.fraud_detected


def test_sparse_nonces_are_reported(validator: Validator) -> None:
    chosen = [validator.valid[0], next(nonce for nonce in validator.valid if nonce >= 200)]
    batch = validator.judge([(nonce, validator.distances[nonce]) for nonce in chosen])
    assert (batch.sparse, batch.suspicions, batch.fraud_detected) == (True, ("sparse",), False)
    assert validator.judge(validator.honest(100)).suspicions == ()


def test_an_empty_batch_is_refused(validator: Validator) -> None:
    with pytest.raises(BodyError) as caught:
        validator.judge([])
    assert caught.value.field == "nonces"


def test_a_sample_misses_nothing_that_claims_alone_show(validator: Validator) -> None:
    claims = validator.honest(500)
    drawn = set(sampled([nonce for nonce, _ in claims], 20, "seed"))
    bad = [nonce for nonce, _ in claims if nonce not in drawn][:5]
    spoiled = [(nonce, math.nan if nonce in bad else each) for nonce, each in claims]
    batch = validator.judge(spoiled, sample=20)
    assert (batch.n, batch.n_invalid, len(batch.nonces)) == (20, 0, 20)
    assert batch.impossible_claims == 5
    assert batch.fraud_detected
    assert not validator.judge(claims, sample=20).fraud_detected


def test_a_sample_finds_the_forger(validator: Validator) -> None:
    """Half of the nonces are forged, so that 3 or more of 50 are drawn but for a chance of 1e-12."""
    forged = [(nonce, validator.r_target - 1e-3) for nonce in validator.others[:250]]
    batch = validator.judge(validator.honest(250) + forged, sample=50)
    assert (batch.n, batch.sample, batch.seed, batch.fraud_detected) == (50, 50, "seed", True)
