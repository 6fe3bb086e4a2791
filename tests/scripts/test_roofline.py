"""Predictions of what a card does: their arithmetic, against figures reached in another way."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pocd.protocol.schemes import SCHEMES
from scripts.bench.models import SHAPES, config_of
from scripts.bench.roofline import CARDS, Card, Shape, predict, predict_path, shape_of

POC2, POC3 = SCHEMES["poc2"], SCHEMES["poc3"]
H200 = CARDS["NVIDIA H200"]


def shape(name: str) -> Shape:
    return shape_of(config_of(*SHAPES[name]))


@pytest.mark.parametrize(
    ("name", "captured", "eager"),
    # An expert's own, of each kernel by itself; the ranges are that expert's, or a tenth.
    [
        ("qwen3-0.6b", (1900, 2250), (1220, 1530)),
        ("llama-8b", (165, 190), (135, 165)),
        ("qwen3-32b", (38, 43), None),
        ("qwen3-30b-a3b", (230, 280), None),
    ],
)
def test_an_h200_does_as_much_as_an_expert_expects(
    name: str, captured: tuple[float, float], eager: tuple[float, float] | None
) -> None:
    assert captured[0] <= predict(H200, shape(name), POC2, 256) <= captured[1]
    if eager is not None:
        assert eager[0] <= predict(H200, shape(name), POC2, 256, is_eager=True) <= eager[1]


def test_with_memory_without_limit_it_is_the_rate_of_products() -> None:
    one = Shape(layers=1, hidden=64, queries=64, keys=32, inner=128)
    card = Card(copy=math.inf, product=1e12, basis="")
    flop = 2.0 * (64 * 128 + 64 * 64 + 64 * 256 + 128 * 64)
    expected = 1e12 / (10 * (flop / 0.91 + 2 * 10 * 64 / 0.38))
    assert predict(card, one, POC3, 10) == pytest.approx(expected)
    twice = 2 * (64 * 128 + 64 * 64)  # of experts, a position has two, and a router
    experts = replace(one, experts=8, top=2)
    flop = twice + 2 * 2 * (64 * 256 + 128 * 64) / 0.55 + 2 * 64 * 8
    assert predict(card, experts, POC3, 10) == pytest.approx(1e12 / (10 * (flop / 0.91 + 2 * 10 * 64 / 0.38)))


def test_the_last_position_alone_costs_less_than_a_layer() -> None:
    shallow = replace(shape("qwen3-0.6b"), layers=2)
    assert 1.3 < predict(H200, shallow, POC2, 256) / predict(H200, shallow, POC3, 256) < 2


def test_nothing_is_predicted_of_what_is_not_known() -> None:
    config = config_of(*SHAPES["llama-1b"])
    assert predict_path("NVIDIA H200", config, POC2, 256, "bfloat16", "captured") is not None
    assert predict_path("NVIDIA H200", config, POC2, 256, "float32", "captured") is None
    assert predict_path("x86_64", config, POC2, 256, "bfloat16", "eager") is None
