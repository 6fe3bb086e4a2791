"""What orchestrators may write into their bodies: what is taken as it is meant, ignored, or refused by its field."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from pydantic import ValidationError

from pocd.admin.orchestrator.bodies import GenerateBody, RoundBody
from tests.support.orchestrating import CONFIRMATION, MODEL, REGULAR, generate_body, init_body

VECTOR = "zLE+LOqw86RaJ9S4BTThM8Ssorhis5Iz"


def init(**changes: Any) -> RoundBody:  # noqa: ANN401 - JSON
    return RoundBody.model_validate_json(orjson.dumps(init_body("http://api:9100", **changes)))


def generate(nonces: list[Any], **changes: Any) -> GenerateBody:  # noqa: ANN401 - JSON
    return GenerateBody.model_validate_json(orjson.dumps(generate_body(nonces, **changes)))


@pytest.mark.parametrize(
    ("node_id", "node_count"),
    [(1, 1), (1, 2), (2, 2), (8, 8), (7, 2), (0, 1), (1_000_000, 1024)],
)
def test_a_node_of_any_number_is_taken(node_id: int, node_count: int) -> None:
    body = init(node_id=node_id, node_count=node_count)
    assert (body.node_id, body.node_count) == (node_id, node_count)


def test_both_cases_of_a_hash_and_whole_numbers_as_text_are_taken() -> None:
    assert init(block_hash=CONFIRMATION).block_hash == CONFIRMATION != init().block_hash == REGULAR
    assert init(block_height="6450112").block_height == init(block_height=6450112.0).block_height == 6450112
    assert generate(["5", 6.0]).nonces == [5, 6]


def test_what_is_left_out_or_unknown_changes_nothing() -> None:
    plain = init_body("http://api:9100")
    del plain["url"]
    body = RoundBody.model_validate_json(orjson.dumps(plain))
    assert (body.url, body.poc_stronger_rng, body.params.k_dim) == (None, False, 12)
    assert init(batch_size=32, group_id=0, n_groups=1, unknown={"a": [1]}) == init()
    job = generate([1], stat_test=None, validation=None)
    assert (job.wait, job.stat_test, job.validation) == (False, generate([1]).stat_test, None)


@pytest.mark.parametrize("given", [5, 0, -1, 1, "0.05", None, True, {"value": "5", "exponent": -2}, [], 1e300])
def test_no_p_value_threshold_is_refused_as_none_decides(given: object) -> None:
    terms = generate([1], stat_test={"dist_threshold": 0.75, "p_mismatch": 0.1, "p_value_threshold": given}).stat_test
    assert (terms.fraud_threshold, terms.p_value_threshold) == (0.01, None)


def test_a_p_value_threshold_is_kept_beside_the_one_that_decides() -> None:
    terms = generate([1], stat_test={"dist_threshold": 0.75, "p_mismatch": 0.1, "p_value_threshold": 0.05}).stat_test
    assert (terms.fraud_threshold, terms.p_value_threshold) == (0.01, 0.05)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"params": {"model": MODEL, "seq_len": 16, "max_tokens": 256}}, ("params", "max_tokens")),
        ({"params": {"model": MODEL, "seq_len": 0}}, ("params", "seq_len")),
        ({"params": None}, ("params",)),
        ({"node_count": 0}, ("node_count",)),
        ({"node_count": 1025}, ("node_count",)),
        ({"node_id": -1}, ("node_id",)),
        ({"node_id": 10**7}, ("node_id",)),
        ({"block_height": 6450112.5}, ("block_height",)),
        ({"block_height": -1}, ("block_height",)),
        ({"block_hash": ""}, ("block_hash",)),
        ({"public_key": ""}, ("public_key",)),
        ({"url": "ftp://api"}, ("url",)),
        ({"nonces": []}, ("nonces",)),
        ({"nonces": [2**31]}, ("nonces", 0)),
        ({"nonces": [1.5]}, ("nonces", 0)),
        ({"validation": {"artifacts": [{"nonce": 1, "k_points_steps": [0]}]}}, ("validation", "artifacts", 0)),
        ({"stat_test": {"dist_threshold": {"value": "75", "exponent": -2}}}, ("stat_test", "dist_threshold")),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
def test_what_may_decide_a_result_is_refused_by_its_field(
    changes: dict[str, Any], field: tuple[str | int, ...]
) -> None:
    with pytest.raises(ValidationError) as refused:
        generate(**{"nonces": [1], **changes})
    assert refused.value.errors()[0]["loc"][: len(field)] == field
