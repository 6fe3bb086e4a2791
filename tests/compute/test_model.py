from __future__ import annotations

import errno
import hashlib
import re
import socket
import struct
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import orjson
import pytest
import torch
from huggingface_hub.utils._http import get_session
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.utils import hub

from pocd.compute.fingerprint import checkpoint_fingerprint, fingerprint
from pocd.compute.model import _is_models_fault, adapt, is_built_for, load_model, pick_device
from pocd.protocol.errors import DeviceError, InputError, MemoryShortError, ModelError
from pocd.protocol.names import BUNDLED, DTYPES

SMALL: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-llama"])
def test_bundled_models_are_small_trained_and_in_their_form(name: str) -> None:
    weights = BUNDLED / name / "model.safetensors"
    assert weights.stat().st_size < 2_000_000
    assert "nats per byte" in (BUNDLED / name / "README.md").read_text()
    model = load_model(f"bundled:{name}", dtype="float32", device="cpu")
    assert (model.layers, model.hidden_size) == (4, 128)
    assert model.decoder.kind == "flat"
    assert not model.causal.training


@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-llama"])
def test_bundled_models_predict_python_source(name: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BUNDLED / name, dtype=torch.float32)
    # This file is no part of the standard library that they were trained on.
    tokens = torch.tensor(list(Path(__file__).read_bytes()[:1024])).view(4, 256)
    with torch.inference_mode():
        loss = model(input_ids=tokens, labels=tokens).loss.item()
    assert loss < 3.0  # nats per byte, here from short contexts; an untrained one has 5.5


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_models_load_in_the_dtype_asked_for(dtype: str) -> None:
    assert str(load_model("bundled:tiny-qwen3", dtype=dtype, device="cpu").dtype) == f"torch.{dtype}"


def test_a_local_path_loads(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    assert load_model(str(tmp_path), dtype="float32", device="cpu").hidden_size == 16


def test_an_unknown_bundled_model_names_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"bundled:nosuch.*bundled:tiny-llama, bundled:tiny-qwen3"):
        load_model("bundled:nosuch", dtype="float32", device="cpu")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no .*config\.json"):
        load_model(str(tmp_path / "nothing"), dtype="float32", device="cpu")


def test_a_folder_without_weights_is_an_error_in_one_line(tmp_path: Path) -> None:
    LlamaConfig(**SMALL).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot be loaded") as error:
        load_model(str(tmp_path), dtype="float32", device="cpu")
    assert "\n" not in str(error.value)


def test_broken_weights_are_an_error_in_one_line(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match="cannot be loaded") as error:
        load_model(str(tmp_path), dtype="float32", device="cpu")
    assert "\n" not in str(error.value)


def index(file: object) -> bytes:
    return orjson.dumps({"metadata": {}, "weight_map": {"model.embed_tokens.weight": file}})


INDEX = "model.safetensors.index.json"
KERNEL = {"attn_implementation": "someone/kernel"}


@pytest.mark.parametrize(
    ("changed", "file", "content", "reason"),
    [
        ({}, INDEX, index("weights.bin"), "'weights.bin', which is no safetensors file"),
        ({}, INDEX, index("../../elsewhere/model.safetensors"), "'../../elsewhere/model.safetensors', which is no"),
        ({}, INDEX, index("/etc/model.safetensors"), "'/etc/model.safetensors', which is no"),
        ({}, INDEX, index(7), "cannot be loaded"),
        ({}, INDEX, b"[]", "cannot be loaded"),
        ({}, "adapter_config.json", b"{}", "holds an adapter"),
        ({}, "config.json", b"[" * 100_000, "cannot be loaded: its config.json is no JSON"),
        ({}, "config.json", b"7", "cannot be loaded"),
        (KERNEL, "", b"", "names the kernel 'someone/kernel' of a hub"),
        ({"transformers_weights": "../x.safetensors"}, "", b"", "names its weights"),
        ({"quantization_config": {"quant_method": "aqlm"}}, "", b"", "'aqlm' is not read exactly"),
    ],
)
def test_a_folder_that_leads_elsewhere_or_cannot_be_read_is_refused_in_one_line(
    tmp_path: Path, changed: dict[str, object], file: str, content: bytes, reason: str
) -> None:
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_bytes(orjson.dumps(orjson.loads(config.read_bytes()) | changed))
    if file:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ModelError, match=re.escape(reason)) as error:
        load_model(str(tmp_path), dtype="float32", device="cpu")
    assert "\n" not in str(error.value)


def test_an_attention_that_the_configuration_names_is_not_taken(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    ours = load_model(str(tmp_path), dtype="float32", device="cpu").causal.config._attn_implementation
    config = tmp_path / "config.json"
    config.write_bytes(orjson.dumps(orjson.loads(config.read_bytes()) | {"attn_implementation": "flex_attention"}))
    assert load_model(str(tmp_path), dtype="float32", device="cpu").causal.config._attn_implementation == ours


def test_links_of_a_hubs_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "a"
    snapshot.mkdir(parents=True)
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(blobs, max_shard_size="4KB")
    for number, file in enumerate(sorted(blobs.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert load_model(str(snapshot), dtype="float32", device="cpu").hidden_size == 16


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.EIO, "a disk"), False),
        (OSError(errno.EMFILE, "no files"), False),
        (MemoryError(), False),
        (caused(OSError("the hub is away"), ConnectionRefusedError(errno.ECONNREFUSED, "refused")), False),
        (caused(OSError("the hub is away"), socket.gaierror(socket.EAI_AGAIN, "no name")), False),
        (ModuleNotFoundError("No module named 'transformers.models.llama'", name="transformers.models.llama"), False),
        (ModuleNotFoundError("No module named 'gptqmodel'", name="gptqmodel"), True),
        (ImportError("needs a package"), True),
        (FileNotFoundError(errno.ENOENT, "no shard"), True),
        (KeyError("weight_map"), True),
    ],
)
def test_only_what_the_files_say_is_the_models_fault(error: Exception, *, expected: bool) -> None:
    assert _is_models_fault(error) is expected


def test_a_hub_that_does_not_answer_is_not_the_models_fault() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        with pytest.raises(Exception, match="refused") as away:
            get_session().get(f"http://127.0.0.1:{nobody.getsockname()[1]}")
    assert not _is_models_fault(caused(OSError("We couldn't connect"), away.value))


def test_weights_that_do_not_fill_the_model_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks .*mlp\.up_proj\.weight"):
        load_model(str(tmp_path), dtype="float32", device="cpu")


def test_a_family_without_branch_and_residual_is_refused_by_its_class(tmp_path: Path) -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=16, hidden_size=16, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"BloomForCausalLM.*layer 0, a BloomBlock, does not end in residual"):
        load_model(str(tmp_path), dtype="float32", device="cpu")


def test_a_decoder_that_looks_ahead_is_refused() -> None:
    config = Gemma3TextConfig(**SMALL, head_dim=8, num_key_value_heads=1, use_bidirectional_attention=True)
    with pytest.raises(ModelError, match=r"Gemma3ForCausalLM.*is not causal"):
        adapt(Gemma3ForCausalLM(config), name="x")


def test_a_sequence_beyond_the_positions_is_refused_before_the_weights_are_read(tmp_path: Path) -> None:
    LlamaConfig(**SMALL, max_position_embeddings=64).save_pretrained(tmp_path)  # there are no weights
    with pytest.raises(InputError, match="seq_len 65 is outside 1 to 64"):
        load_model(str(tmp_path), dtype="float32", device="cpu", seq_len=65)


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a folder; a revision"):
        load_model(str(tmp_path), dtype="float32", device="cpu", revision="main")


def test_a_revision_of_a_hub_model_is_found_in_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache as huggingface_hub lays it out: what a host has that downloaded two revisions."""
    cache = tmp_path / "models--someone--small"
    (cache / "refs").mkdir(parents=True)
    fingerprints = {}
    for seed, (revision, commit) in enumerate({"main": "a" * 40, "v1": "b" * 40}.items()):
        (cache / "refs" / revision).write_text(commit)
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(cache / "snapshots" / commit)
        fingerprints[revision] = checkpoint_fingerprint(cache / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "is_offline_mode", lambda: True)
    for revision, expected in fingerprints.items():
        found = load_model("someone/small", dtype="float32", device="cpu", revision=revision)
        assert found.fingerprint == expected
    assert len(set(fingerprints.values())) == 2
    with pytest.raises(ModelError, match=r"someone/small.*cannot be loaded"):
        load_model("someone/small", dtype="float32", device="cpu", revision="v2")


def test_a_fingerprint_is_the_checkpoints_in_every_dtype_sharding_and_way_of_loading(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="4KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    found = {
        load_model(str(tmp_path / name), dtype=dtype, device="cpu").fingerprint
        for name in ("whole", "sharded")
        for dtype in DTYPES
    }
    assert found == {adapt(model, name="in memory").fingerprint}
    (fingerprint,) = found
    assert re.fullmatch("v2-[0-9a-f]{32}", fingerprint)


def test_a_fingerprint_is_the_written_one() -> None:
    """By hand: SHA-256 over name, shape and float32 values of a tensor that is shorter than a sample, and JSON."""
    tensor = torch.tensor([[1.0, -2.5], [0.0, 3.0]], dtype=torch.bfloat16)
    hashed = b"a.weight\0[2, 2]\0" + struct.pack("<4f", 1.0, -2.5, 0.0, 3.0) + b'{"config":{"a":1,"b":[2]}}'
    digest = hashlib.sha256(hashed).hexdigest()[:32]
    assert fingerprint([("a.weight", tensor)], {"config": {"b": [2], "a": 1}}) == f"v2-{digest}"


@pytest.mark.parametrize("change", ["name", "shape", "every value", "last value", "order"])
def test_a_fingerprint_tells_weights_apart(change: str) -> None:
    one, two = torch.arange(1000.0), torch.ones(4)
    before = fingerprint([("a", one), ("b", two)], {})
    other = one.clone()
    if change == "every value":
        other += 1e-3
    if change == "last value":
        other[-1] = 0
    if change == "shape":
        other = other.view(10, 100)
    names = {"name": ("a", "c"), "order": ("b", "a")}.get(change, ("a", "b"))
    assert fingerprint(zip(names, (other, two), strict=True), {}) != before
    assert fingerprint([("b", two), ("a", one)], {}) == before, "the order in which they are read counts for nothing"


def test_an_unknown_dtype_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"float64.*float32, float16, bfloat16"):
        load_model("bundled:tiny-qwen3", dtype="float64", device="cpu")


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((9, 0), ["sm_75", "sm_80", "sm_90"], True),
        ((8, 6), ["sm_80"], True),
        ((7, 0), ["sm_75", "sm_80", "sm_90"], False),
        ((12, 0), ["sm_90", "sm_100"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((7, 0), ["compute_75"], False),
        ((10, 3), ["sm_100a"], False),
        ((9, 0), ["sm_90a"], True),
        ((9, 0), [], True),
    ],
)
def test_a_gpu_needs_a_torch_that_was_built_for_it(
    capability: tuple[int, int], built_for: list[str], *, runs: bool
) -> None:
    assert is_built_for(capability, built_for) == runs


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:0"])
def test_an_unknown_device_names_the_known_ones(name: str) -> None:
    with pytest.raises(InputError, match="allowed are: cpu, cuda, cuda:N"):
        pick_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_a_missing_gpu_is_an_error_and_never_the_cpu() -> None:
    with pytest.raises(DeviceError, match=r"sees no GPU.*set device = 'cpu'"):
        load_model("bundled:tiny-qwen3", dtype="float32", device="cuda")


@pytest.mark.parametrize("calls", [0, 3], ids=["when it is tried out", "when it carries one position"])
def test_a_device_that_fails_is_no_fault_of_the_model(calls: int) -> None:
    causal = LlamaForCausalLM(LlamaConfig(**SMALL, pad_token_id=None))
    left = iter(range(calls))

    def fail(*_: object) -> None:
        if next(left, None) is None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    causal.model.layers[0].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match=r"^CUDA error"):
        adapt(causal, name="small")


@pytest.mark.parametrize("part", ["load_causal", "flatten"])
def test_a_model_that_does_not_fit_says_what_helps(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """As a GPU says it, of weights or of merged ones; the host's own memory is larger than any model here."""

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(f"pocd.compute.model.{part}", fail)
    with pytest.raises(MemoryShortError, match=r"does not fit into the memory of cpu in float32: split it .*parallel"):
        load_model("bundled:tiny-qwen3", dtype="float32", device="cpu")
