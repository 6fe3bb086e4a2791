"""The trial of depth: its ways of computing are right ones, and its figures are those of their differences."""

from __future__ import annotations

import orjson
import pytest
import torch

from pocd.compute.engine import block_run
from pocd.protocol.schemes import SCHEMES
from scripts.trials import depth

NONCES = 4


@pytest.mark.parametrize("way", list(depth.WAYS)[1:])
def test_in_float32_every_way_is_the_engines(way: str) -> None:
    model = depth.build("bundled:tiny-qwen3", "float32", 0)
    for scheme in ("poc2", "poc4"):
        with block_run(model, SCHEMES[scheme], block_hash="a", public_key="b", seq_len=16) as run:
            engine = depth.results(run, NONCES)
            with depth.WAYS[way](run) as acting:
                assert depth.results(acting, NONCES) == pytest.approx(engine, abs=1e-5, rel=0)
            assert (depth.results(run, NONCES) == engine).all()


@pytest.mark.parametrize("way", list(depth.WAYS)[1:])
def test_in_half_precision_every_way_rounds_elsewhere(way: str) -> None:
    model = depth.build("random:3", "bfloat16", 64)
    with block_run(model, SCHEMES["poc4"], block_hash="a", public_key="b", seq_len=16) as run:
        engine = depth.results(run, NONCES)
        with depth.WAYS[way](run) as acting:
            found = depth.results(acting, NONCES)
    assert found == pytest.approx(engine, abs=0.3, rel=0)
    assert (found != engine).any()


def test_deep_poc2_has_less_in_common_than_poc4(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    shape = ["--nonces", "8", "--seq-len", "8", "--hidden-size", "64"]
    depth.main(["--models", "random:20", "--schemes", "poc2", "poc4", "--dtypes", "bfloat16", *shape, "--json"])
    poc2, poc4 = orjson.loads(capsys.readouterr().out)
    assert (poc2["layers"], poc2["scheme"], poc4["scheme"]) == (20, "poc2", "poc4")
    assert poc2["apart"] > 3 * poc4["apart"]
    assert poc2["flipped"] > 0
    assert poc4["flipped"] is None
    assert poc4["correlation"] > 0.95
