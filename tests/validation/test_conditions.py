"""What decides a result: a body that names something else than what is run is refused, wherever it names it."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from pydantic import ValidationError

from pocd.validation.conditions import (
    MOST_UNKNOWN,
    BodyConditions,
    Conditions,
    MismatchError,
    Params,
    named,
    refuse_mismatch,
    running,
)

RUNS = running(model="/models/tiny", revision="r1", fingerprint="f00d", scheme="poc2", dtype="float32", seq_len=16)
OTHERS: dict[str, object] = {
    "model": "org/tiny",
    "model_id": "/models/Tiny",
    "revision": "main",
    "model_fingerprint": "beef",
    "fingerprint": "F00D",
    "scheme": "poc3",
    "poc_scheme": "POC_SCHEME_PREFILL",
    "dtype": "bfloat16",
    "seq_len": 17,
    "poc_stronger_rng": True,
    "group_id": 1,
    "n_groups": 2,
    "k_dim": 12,
    "max_tokens": 256,
    "quantization": "fp8",
    "kv_cache_dtype": "auto",
}
"""Of each name a value that is not run."""


def parsed(body: object) -> BodyConditions:
    return BodyConditions.model_validate_json(orjson.dumps(body))


def refuse(body: object, runs: dict[str, object] = RUNS) -> None:
    refuse_mismatch(parsed(body), runs, "asked is {asked}, run is {runs}", "nothing was done")


def refusal(body: object, runs: dict[str, object] = RUNS) -> MismatchError:
    with pytest.raises(MismatchError) as caught:
        refuse(body, runs)
    return caught.value


def test_each_name_has_one_value_that_is_run_and_no_name_is_forgotten() -> None:
    assert list(RUNS) == list(Conditions.model_fields) == list(OTHERS)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("in_params", [False, True])
def test_what_is_not_run_is_refused_with_both_values(name: str, *, in_params: bool) -> None:
    named = {name: OTHERS[name]}
    error = refusal({"params": named} if in_params else named)
    assert (error.code, error.field) == ("mismatch", f"params.{name}" if in_params else name)
    if RUNS[name] is not None:
        both = {name: RUNS[name], "params": named} if in_params else {**named, "params": {name: RUNS[name]}}
        assert str(refusal(both)) == str(error)
    held = "none" if RUNS[name] is None else repr(RUNS[name])
    message = f"{error.field}: asked is {OTHERS[name]!r}, run is {held}; nothing was done"
    assert str(error).split(". ")[0] == message


def test_a_folder_is_not_the_hub_id_it_came_from_and_the_refusal_says_what_to_do() -> None:
    message = str(refusal({"model": "org/tiny"}))
    assert "'org/tiny'" in message
    assert "'/models/tiny'" in message
    assert "folder's name" in message
    assert "model_fingerprint" in message
    refuse({"model_fingerprint": "f00d"})


@pytest.mark.parametrize("name", [name for name, value in RUNS.items() if value is not None])
def test_what_is_run_is_taken_in_both_places(name: str) -> None:
    refuse({name: RUNS[name]})
    refuse({name: RUNS[name], "params": {name: RUNS[name]}})


def test_null_names_nothing() -> None:
    nothing = dict.fromkeys(OTHERS)
    refuse({**nothing, "params": nothing})
    refuse({"params": None})
    assert named(parsed({**nothing, "params": nothing})) == {}


@pytest.mark.parametrize("name", ["k_dim", "max_tokens"])
def test_zero_is_named_too(name: str) -> None:
    assert refusal({name: 0}).field == name


def test_what_is_not_compared_may_still_not_contradict_itself() -> None:
    runs = {name: value for name, value in RUNS.items() if name != "seq_len"}
    refuse({"seq_len": 17, "params": {"seq_len": 17}}, runs)
    refuse({"params": {"seq_len": 17}}, runs)
    error = refusal({"seq_len": 16, "params": {"seq_len": 17}}, runs)
    assert (error.field, str(error)) == (
        "params.seq_len",
        "params.seq_len: 17 contradicts seq_len, which is 16; nothing was done",
    )


def test_unknown_parameters_are_refused_by_their_names() -> None:
    error = refusal({"params": {"seq_len": 16, "dim": 1024, "n_layers": None}})
    assert error.field == "params"
    assert str(error) == (
        "params: 'dim', 'n_layers': this daemon does not know them, and they may decide a result; nothing was done"
    )


def test_a_refusal_of_many_long_names_is_short() -> None:
    message = str(refusal({"params": {f"{number}" * 1000: 1 for number in range(1000, 1000 + MOST_UNKNOWN + 3)}}))
    assert " and 3 more: " in message
    assert len(message) < 2000


def test_the_batch_size_decides_nothing() -> None:
    refuse({"batch_size": 32, "params": {"batch_size": 32}})


@pytest.mark.parametrize(
    "body",
    [
        *({name: []} for name in OTHERS),
        *({name: 0.5} for name in OTHERS),
        *({"params": {name: {}}} for name in OTHERS),
        {"params": 7},
        {"params": []},
        {"params": "model"},
        {"model": ""},
        {"seq_len": 0},
        {"seq_len": "16"},
        {"seq_len": 16.0},
        {"seq_len": True},
        {"poc_stronger_rng": "false"},
        {"poc_stronger_rng": 0},
    ],
)
def test_a_wrong_type_is_no_body(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        parsed(body)


def test_every_name_says_what_it_means() -> None:
    assert all(field.description for field in (*Conditions.model_fields.values(), *Params.model_fields.values()))
