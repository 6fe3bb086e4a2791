"""Every family through the engine, against the plain decoders of plain_families.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pocd.compute.engine import block_run
from pocd.compute.model import adapt
from pocd.protocol.schemes import SCHEMES
from tests.reference import plain
from tests.support.family_models import FAMILIES, SEQ_LEN, Family, layers_of


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def inputs() -> plain.Array:
    return np.random.default_rng(2).standard_normal((SEQ_LEN, 32))


def test_the_bare_model_computes_what_the_plain_decoder_does(family: Family) -> None:
    model = family.build().eval()
    seen: dict[str, list[plain.Array]] = {"branch": [], "output": []}

    def note(which: str) -> Any:  # noqa: ANN401 - a hook
        def hook(_module: object, _args: object, output: Any) -> None:  # noqa: ANN401 - tensor or tuple
            seen[which].append((output[0] if isinstance(output, tuple) else output)[0].double().numpy())

        return hook

    for layer in layers_of(model):
        layer.get_submodule(family.branch).register_forward_hook(note("branch"))
        layer.register_forward_hook(note("output"))
    with torch.inference_mode():
        found = model.base_model(inputs_embeds=torch.from_numpy(inputs()).float()[None], use_cache=False)

    expected: dict[str, list[plain.Array]] = {"branch": [], "output": []}

    def step(_layer: int, branch: plain.Array, residual: plain.Array) -> tuple[plain.Array, plain.Array]:
        expected["branch"].append(branch)
        expected["output"].append(branch + residual)
        return branch, residual

    decoder = family.plain(model)
    states = decoder.run(decoder.weights, inputs(), step)
    pairs = [
        *zip(seen["branch"], expected["branch"], strict=True),
        *zip(seen["output"], expected["output"], strict=True),
    ]
    assert len(pairs) == 6
    for ours, theirs in [*pairs, (found.last_hidden_state[0].numpy(), states)]:
        assert np.abs(ours - theirs).max() < 2e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("scheme", ["poc2", "trained", "random-weights", "random-embed", "poc3", "poc4"])
def test_results_agree_with_the_plain_ones(family: Family, scheme: str) -> None:
    causal = family.build()
    decoder = family.plain(causal)
    model = adapt(causal, name="small")
    with block_run(model, SCHEMES[scheme], block_hash="ABC", public_key="key", seq_len=SEQ_LEN) as run:
        found = run.values([0, 2**63 - 1], batch_size=2).numpy()
    expected = [
        plain.result(decoder, block_hash="ABC", public_key="key", nonce=nonce, seq_len=SEQ_LEN, scheme=scheme)
        for nonce in (0, 2**63 - 1)
    ]
    assert found == pytest.approx(np.array(expected), abs=2e-5, rel=0)
