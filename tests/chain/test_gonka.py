"""The live network's `epoch_info`: read in both forms, refused where it makes no sense; and a node that serves it."""

from __future__ import annotations

import copy
from contextlib import suppress
from decimal import Decimal
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocd.chain.gonka import FALLBACK, MOST_MODELS, parse_epoch_info
from pocd.chain.source import ChainError
from pocd.protocol.epochs import (
    Confirmation,
    EpochInfo,
    LiveScheme,
    NotComputedError,
    Recipe,
    StatTest,
    Windows,
    recipe_of,
)

WHERE = "http://host:8000/chain-api/epoch_info"
MODEL = "MiniMaxAI/MiniMax-M2.7"
SEED = "9b4c" * 16
STAT_TEST = {
    "dist_threshold": {"value": "75", "exponent": -2},
    "p_mismatch": {"value": "1", "exponent": -1},
    "p_value_threshold": {"value": "5", "exponent": -2},
}
TERMS = StatTest(Decimal("0.75"), Decimal("0.1"), Decimal("0.05"))
# The form of the chain's protobuf in JSON, with what rounds follow from and some of what they do not.
ANSWER: dict[str, Any] = {
    "block_height": "6455010",
    "params": {
        "epoch_params": {
            "epoch_length": "15391",
            "epoch_multiplier": "1",
            "poc_stage_duration": "35",
            "poc_exchange_duration": "0",
            "poc_validation_delay": "5",
            "poc_validation_duration": "240",
            "set_new_validators_delay": "120",
            "inference_validation_cutoff": "2",
        },
        "poc_params": {
            "validation_sample_size": 200,
            "poc_v2_enabled": True,
            "confirmation_poc_v2_enabled": True,
            "poc_stronger_rng_enabled": False,
            "models": [{"model_id": MODEL, "seq_len": "1024", "stat_test": STAT_TEST, "weight_scale_factor": None}],
        },
    },
    "latest_epoch": {"index": "419", "poc_start_block_height": "6450112"},
    "is_confirmation_poc_active": True,
    "active_confirmation_poc_event": {
        "epoch_index": "419",
        "event_sequence": "1",
        "trigger_height": "6455000",
        "generation_start_height": "6455002",
        "phase": "CONFIRMATION_POC_GENERATION",
        "poc_seed_block_hash": SEED,
    },
}


def read(answer: object) -> EpochInfo:
    return parse_epoch_info(orjson.dumps(answer), WHERE)


def changed(path: str, value: object) -> dict[str, Any]:
    """The answer with another value at a dotted path; ... takes it away."""
    answer = copy.deepcopy(ANSWER)
    *way, last = (int(name) if name.isdecimal() else name for name in path.split("."))
    inner: Any = answer
    for name in way:
        inner = inner[name]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return answer


def test_an_answer() -> None:
    assert read(ANSWER) == EpochInfo(
        height=6_455_010,
        epoch=419,
        start=6_450_112,
        windows=Windows(15_391, 35, 0, 5, 240, 120),
        confirmation=Confirmation(1, 6_455_000, 6_455_002, SEED),
        recipes=(Recipe(MODEL, LiveScheme.PREFILL, 1024, TERMS),),
        scheme=LiveScheme.PREFILL,
        confirmation_scheme=LiveScheme.PREFILL,
        confirmation_scheme_rounds=0,
        stronger_rng=False,
    )


def test_what_later_versions_tell_in_a_list_of_schemes() -> None:
    blocks = [
        {"scheme": "POC_SCHEME_PREFILL", "seq_len": "1024", "max_tokens": "0", "stat_test": STAT_TEST},
        {"scheme": "POC_SCHEME_DECODE", "seq_len": "256", "max_tokens": "256", "stat_test": None},
    ]
    answer = changed("params.poc_params.models.0", {"model_id": MODEL, "seq_len": "0", "schemes": blocks})
    answer["params"]["poc_params"] |= {
        "poc_scheme": "POC_SCHEME_PREFILL",
        "confirmation_poc_scheme": "POC_SCHEME_DECODE",
        "confirmation_scheme_events": 1,
    }
    info = read(answer)
    assert info.recipes == (
        Recipe(MODEL, LiveScheme.PREFILL, 1024, TERMS),
        Recipe(MODEL, LiveScheme.DECODE, 256, None),
    )
    assert (info.scheme, info.confirmation_scheme) == (LiveScheme.PREFILL, LiveScheme.DECODE)
    assert info.confirmation_scheme_rounds == 1
    assert recipe_of(info, LiveScheme.PREFILL, MODEL).seq_len == 1024
    with pytest.raises(NotComputedError, match="the chain asks for POC_SCHEME_DECODE, which pocd does not compute"):
        recipe_of(info, LiveScheme.DECODE, MODEL)


def test_a_scheme_that_nobody_knows_yet_is_no_obstacle_until_it_is_due() -> None:
    known = {"scheme": "POC_SCHEME_PREFILL", "seq_len": "1024", "stat_test": STAT_TEST}
    blocks = [{"scheme": "POC_SCHEME_NEXT", "points": [1]}, known]
    answer = changed("params.poc_params.models.0", {"model_id": MODEL, "schemes": blocks})
    assert read(answer).recipes == read(ANSWER).recipes
    only = changed("params.poc_params.models.0", {"model_id": MODEL, "schemes": blocks[:1]})
    with pytest.raises(NotComputedError, match="no POC_SCHEME_PREFILL of model"):
        recipe_of(read(only), LiveScheme.PREFILL, MODEL)


def test_an_empty_list_of_schemes_means_the_fields_of_the_model() -> None:
    assert read(changed("params.poc_params.models.0.schemes", [])) == read(ANSWER)


def test_a_model_that_the_chain_does_not_have_is_refused_by_name() -> None:
    with pytest.raises(NotComputedError, match=f"no POC_SCHEME_PREFILL of model 'tiny'; it has models {MODEL}"):
        recipe_of(read(ANSWER), LiveScheme.PREFILL, "tiny")


@pytest.mark.parametrize("seed", [SEED, SEED.upper(), "9b4C" * 16])
def test_a_seed_is_kept_exactly_as_it_is_written(seed: str) -> None:
    event = read(changed("active_confirmation_poc_event.poc_seed_block_hash", seed)).confirmation
    assert event is not None
    assert event.seed == seed


@pytest.mark.parametrize("seed", ["", None, ...])
def test_a_seed_that_is_not_there_yet(seed: object) -> None:
    event = read(changed("active_confirmation_poc_event.poc_seed_block_hash", seed)).confirmation
    assert event is not None
    assert event.seed is None


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("is_confirmation_poc_active", False),
        ("is_confirmation_poc_active", ...),
        ("active_confirmation_poc_event.phase", "CONFIRMATION_POC_COMPLETED"),
        ("active_confirmation_poc_event.phase", "CONFIRMATION_POC_INACTIVE"),
    ],
)
def test_a_confirmation_round_that_is_over_is_none(path: str, value: object) -> None:
    assert read(changed(path, value)).confirmation is None


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ({"value": "75", "exponent": -2}, "0.75"),
        ({"value": "4", "exponent": "-1"}, "0.4"),
        ({"value": 3, "exponent": 0}, "3"),
        ({"value": "123456789012345678", "exponent": -18}, "0.123456789012345678"),
    ],
)
def test_decimals(written: object, number: str) -> None:
    (recipe,) = read(changed("params.poc_params.models.0.stat_test.dist_threshold", written)).recipes
    assert recipe.stat_test is not None
    assert recipe.stat_test.dist_threshold == Decimal(number)


@pytest.mark.parametrize("path", ["stat_test", "stat_test.dist_threshold"])
@pytest.mark.parametrize("value", [None, ...])
def test_terms_that_the_chain_does_not_name_are_the_networks_own(path: str, value: object) -> None:
    (recipe,) = read(changed(f"params.poc_params.models.0.{path}", value)).recipes
    assert recipe.stat_test == FALLBACK


def test_whole_numbers_may_be_numbers() -> None:
    answer = changed("latest_epoch", {"index": 419, "poc_start_block_height": 6_450_112})
    assert read(answer) == read(ANSWER)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("block_height", "-1", "block_height must be a whole number"),
        ("block_height", True, "block_height must be a whole number"),
        ("block_height", 1.5, "block_height must be a whole number"),
        ("block_height", "9223372036854775808", "block_height must be below 2^63"),
        ("block_height", ..., "has no block_height"),
        ("latest_epoch", None, "has no latest_epoch.index"),
        ("params.epoch_params.epoch_multiplier", "2", "epoch_multiplier must be 1"),
        ("params.epoch_params.poc_stage_duration", "0", "poc_stage_duration must be at least 1"),
        ("params.epoch_params.epoch_length", "399", "epoch_length must be at least 400"),
        ("params.poc_params.poc_v2_enabled", False, "poc_v2_enabled must be true: pocd knows no other protocol"),
        ("params.poc_params.poc_stronger_rng_enabled", "yes", "poc_stronger_rng_enabled must be true or false"),
        ("params.poc_params.poc_scheme", "POC_SCHEME_NEXT", "one of POC_SCHEME_PREFILL, POC_SCHEME_DECODE"),
        ("params.poc_params.models", {}, "models must be a list"),
        ("params.poc_params.models", [{}] * (MOST_MODELS + 1), "models must be a list of at most"),
        ("params.poc_params.models.0.model_id", 3, "models.0.model_id must be a non-empty string"),
        ("params.poc_params.models.0.seq_len", "0", "models.0.seq_len must be at least 1"),
        ("params.poc_params.models.0.stat_test.p_mismatch", None, "no params.poc_params.models.0.stat_test.p_mismatch"),
        (
            "params.poc_params.models.0.stat_test.p_mismatch",
            {"value": "1", "exponent": -999_999_999},
            "p_mismatch.exponent must be from -64 to 64",
        ),
        ("active_confirmation_poc_event", None, "has no active_confirmation_poc_event.phase"),
        ("active_confirmation_poc_event.phase", "SOON", "phase must be one of"),
        ("active_confirmation_poc_event.poc_seed_block_hash", "9b4c", "must be 64 hex digits"),
        ("active_confirmation_poc_event.generation_start_height", "1", "at least trigger_height, 6455000"),
    ],
)
def test_nonsense_is_refused_by_its_field(path: str, value: object, said: str) -> None:
    with pytest.raises(ChainError) as caught:
        read(changed(path, value))
    assert str(caught.value).startswith(WHERE)
    assert said in str(caught.value)
    assert str(caught.value).isprintable()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def paths(value: object, path: str = "") -> list[str]:
    """Every path of a value, dotted."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    below = [(f"{path}.{name}" if path else str(name), each) for name, each in inner]
    return [name for name, _ in below] + [deeper for name, each in below for deeper in paths(each, name)]


@given(st.sampled_from(sorted(set(paths(ANSWER)))), json_values)
def test_any_value_anywhere_is_read_or_refused(path: str, value: object) -> None:
    answer = changed(path, value)
    try:
        raw = orjson.dumps(answer)
    except orjson.JSONEncodeError:  # an integer of more than 64 bits
        return
    with suppress(ChainError):
        parse_epoch_info(raw, WHERE)
