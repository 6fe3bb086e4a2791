"""Classes of transformers that have no plain decoder here: each is refused by its name, or its results are right."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocd.compute.engine import block_run
from pocd.compute.model import adapt
from pocd.protocol.errors import ModelError
from pocd.protocol.schemes import SCHEMES
from tests.reference import plain
from tests.support.family_models import SEQ_LEN
from tests.support.model_table import row
from tests.support.other_models import LINEAR, MLA, OTHERS, OWN, SPARSE, Hooked, build

TABLE = (Path(__file__).parents[2] / "docs" / "models.md").read_text()


@pytest.mark.parametrize("case", OTHERS)
def test_other_classes_are_refused_by_name_or_right(case: str) -> None:
    name, branch, config = OTHERS[case]
    causal = build(name, **config)
    try:
        adapt(deepcopy(causal), name="small")
    except ModelError as error:
        assert name in str(error)  # noqa: PT017 - refusing is one of two good ends
        is_in_table = row(case, causal, error) in TABLE
        assert is_in_table, "python -m tests.support.model_table makes the table of docs/models.md"
        return
    weights = {key: value.detach().double().numpy() for key, value in causal.named_parameters()}
    embedding = next(key for key, value in causal.named_parameters() if value is causal.get_input_embeddings().weight)
    decoder = plain.Decoder(weights, Hooked(causal, branch), embedding)
    expected = [
        plain.distance(decoder, block_hash="ABC", public_key="key", nonce=nonce, seq_len=SEQ_LEN) for nonce in (0, 9)
    ]
    model = adapt(causal, name="small")
    with block_run(model, SCHEMES["poc2"], block_hash="ABC", public_key="key", seq_len=SEQ_LEN) as run:
        assert run.distances([0, 9], batch_size=2) == pytest.approx(expected, abs=2e-5)
    is_in_table = row(case, causal, model) in TABLE
    assert is_in_table, "python -m tests.support.model_table makes the table of docs/models.md"


@pytest.mark.parametrize(
    ("name", "config"),
    [("DeepseekV32ForCausalLM", SPARSE), ("GlmMoeDsaForCausalLM", SPARSE), ("Qwen3NextForCausalLM", LINEAR)],
)
def test_what_cannot_carry_one_position_carries_all(name: str, config: dict[str, Any]) -> None:
    """An index of keys wants a cache of its own, and a linear attention a state."""
    causal = build(name, **config)
    weights = {key: value.detach().double().numpy() for key, value in causal.named_parameters()}
    decoder = plain.Decoder(weights, Hooked(causal, "mlp"), "model.embed_tokens.weight")
    model = adapt(causal, name="small")
    assert model.by_layers.carries_all
    assert "all positions go through its last layer" in model.decoder_reason
    for scheme in ("poc2", "poc3"):
        expected = [
            plain.result(decoder, block_hash="ABC", public_key="key", nonce=nonce, seq_len=SEQ_LEN, scheme=scheme)
            for nonce in (0, 9)
        ]
        with block_run(model, SCHEMES[scheme], block_hash="ABC", public_key="key", seq_len=SEQ_LEN) as run:
            assert run.values([0, 9], batch_size=2).numpy() == pytest.approx(np.array(expected), abs=2e-5)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("GraniteForCausalLM", {"residual_multiplier": 0.5}),  # residual + branch / 2
        ("MiniMaxForCausalLM", {"head_dim": 8, "num_local_experts": 4}),  # the residual is scaled, too
        ("MambaForCausalLM", {}),  # no attention, no MLP
        ("DeepseekV4ForCausalLM", MLA),  # four streams, and experts by tokens' ids
        ("BertLMHeadModel", OWN | {"is_decoder": True}),  # the sum is normalised
        ("OPTForCausalLM", OWN | {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),  # likewise
        ("T5ForConditionalGeneration", OWN | {"d_model": 32, "d_kv": 8, "d_ff": 48}),  # it needs an encoder's input
    ],
)
def test_layers_that_do_not_end_in_residual_and_branch_are_refused_by_name(name: str, config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=name) as error:
        adapt(build(name, **config), name="small")
    assert not any(word in str(error.value) for word in ("NoneType", "AttributeError"))
