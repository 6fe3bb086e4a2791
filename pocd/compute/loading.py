"""From the tensors of a checkpoint to transformers' model, one tensor at a time, straight to its device."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from pocd.compute.checkpoint import is_tied
from pocd.protocol.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from pocd.compute.quantised import Matrix

ROUTER_BIASES = ("e_score_correction_bias", "expert_bias")
"""Biases that pick a mixture's experts: float32 in every dtype, as they differ by less than bfloat16 can tell."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as glibc's malloc.h has them

TEXT_PART = (
    (re.compile(r"^(model\.)?(language_model\.)?lm_head\."), "lm_head."),
    (re.compile(r"^(model\.)?(language_model|text_model)\.(model\.)?"), "model."),
)
"""How files call the decoder of text in a model of images and text, and what it is called here."""


@dataclass(frozen=True, slots=True)
class _Lazy:
    """A tensor for transformers' loader, which asks for it, or for the part that a rank holds, when it is needed."""

    matrix: Matrix
    device: torch.device

    def get_shape(self) -> list[int]:
        return list(self.matrix.shape)

    def __getitem__(self, places: Any) -> torch.Tensor:  # noqa: ANN401 - slices
        stored = [part.read() for part in self.matrix.parts.values()]
        if len(stored) > 1:  # it is computed, which the device does faster, and bit for bit alike
            stored = [part.to(self.device) for part in stored]
        return self.matrix.compute(*stored)[places]


@contextmanager
def _exactly() -> Iterator[None]:
    """Have transformers keep `ROUTER_BIASES` in float32 in every class, and hold no more tensors than it works on.

    MiniMax-M2's class does not say it itself. Threads would read ahead of a mixture's experts, which are joined.
    """
    before = PreTrainedModel._keep_in_fp32_modules_strict, os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")  # noqa: SLF001 - there is no argument for it
    PreTrainedModel._keep_in_fp32_modules_strict = list(ROUTER_BIASES)  # noqa: SLF001 - as above
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    try:
        yield
    finally:
        PreTrainedModel._keep_in_fp32_modules_strict = before[0]  # noqa: SLF001 - as above
        if before[1] is None:
            del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
        else:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = before[1]


@contextmanager
def _in_blocks_of_their_own() -> Iterator[None]:
    """Have the C library give each large tensor memory of its own, which goes back when the tensor goes.

    Else what is computed on the way leaves holes between the weights, up to half their size.
    """
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if adjust is None:
        yield
        return
    adjust(M_MMAP_THRESHOLD, 2**17)
    try:
        yield
    finally:  # as it does by itself once large tensors come and go: tensors of a batch are no new pages each time
        adjust(M_MMAP_THRESHOLD, 2**25)
        adjust(M_TRIM_THRESHOLD, 2**26)


def has_text_part(config: Any) -> bool:  # noqa: ANN401 - each family has its own class
    """Tell whether a model is one of images (or sounds) and text, of which the decoder of text is run."""
    return "text_config" in config.sub_configs and config.get_text_config() is not config


def _renamed(
    names: Iterable[str], conversions: Iterable[Any], root: Callable[[str], str] = lambda name: name
) -> dict[str, str]:
    """Return the tensors `names` of files by what they are called in a model.

    Args:
        names: Names of the tensors.
        conversions: What transformers does with tensors of the model's files; those that rename them count.
        root: What changes their beginning afterwards.

    Raises:
        ModelError: Two would have one name; transformers would take one, without a word.
    """
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    found: dict[str, str] = {}
    for name in names:
        here = name
        for renaming in renamings:
            here, _ = renaming.rename_source_key(here)
        here = root(here)
        if here in found:
            raise ModelError(f"its files hold {found[here]} and {name}, two names of one tensor: remove the wrong one")
        found[here] = name
    return found


def _root_of_text(name: str) -> str:
    """Return what a tensor is called in the decoder of text; tensors of other parts keep their names."""
    return next((pattern.sub(root, name) for pattern, root in TEXT_PART if pattern.search(name)), name)


@contextmanager
def _converting(kind: type[PreTrainedModel], conversions: Sequence[Any]) -> Iterator[None]:
    """Have transformers join or turn tensors of a text part as it does for the whole model, such as its experts."""
    known: dict[str, Any] = conversion_mapping._checkpoint_conversion_mapping_cache or {}  # noqa: SLF001 - to unregister
    if not conversions or kind.__name__ in known:
        yield
        return
    conversion_mapping.register_checkpoint_conversion_mapping(kind.__name__, list(conversions))
    try:
        yield
    finally:
        known.pop(kind.__name__)
        conversion_mapping.USER_REGISTERED_MAPPINGS.discard(kind.__name__)


def _class_of(config: Any) -> type[PreTrainedModel]:  # noqa: ANN401 - as above
    """Return transformers' class for the next token of text, or one that adds the head to a decoder without.

    Raises:
        ModelError: transformers has neither.
    """
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)  # its annotation knows tuples, and it has none
    decoder: Any = MODEL_MAPPING.get(type(config), None)
    if found is None and decoder is not None:  # some are not listed there (Mistral 4)
        own = f"{decoder.__name__.removesuffix('Model')}ForCausalLM"
        found = getattr(sys.modules[decoder.__module__], own, None)
    if found is not None:
        return cast("type[PreTrainedModel]", found)
    if decoder is None or "Text" not in decoder.__name__:
        raise ModelError(f"transformers has no class that gives the next token for a {type(config).__name__}")
    family = next(base for base in decoder.__mro__ if base.__name__.endswith("PreTrainedModel"))

    def create(self: Any, config: Any) -> None:  # noqa: ANN401 - as above
        family.__init__(self, config)
        self.model = decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    return type(
        f"{decoder.__name__}WithHead",
        (family,),
        {
            "__init__": create,
            "config_class": type(config),
            "base_model_prefix": "model",
            "_tied_weights_keys": {"lm_head.weight": "model.embed_tokens.weight"},
        },
    )


def load_causal(
    config: Any,  # noqa: ANN401 - as above
    matrices: Iterable[Matrix],
    *,
    dtype: torch.dtype,
    device: torch.device,
    placed: Mapping[str, Any],
) -> tuple[Any, Mapping[str, Any]]:
    """Make a model of a checkpoint's tensors, in `dtype`.

    Args:
        config: Configuration of the model.
        matrices: Tensors of the checkpoint.
        dtype: Precision of the weights.
        device: Device that tensors are dequantised on.
        placed: Arguments that say where the weights go.

    Returns:
        The model, and transformers' report: keys that are missing, unexpected, or of another shape.

    Raises:
        ModelError: transformers has no class for the configuration, or the files hold a tensor under two names.
    """
    tensors = {matrix.name: _Lazy(matrix, device) for matrix in matrices}
    conversions: Sequence[Any] = []
    if has_text_part(config):
        whole = conversion_mapping.get_checkpoint_conversion_mapping(config.model_type) or []
        text = config.get_text_config()
        text.tie_word_embeddings = is_tied(config)
        conversions = [each for each in whole if not isinstance(each, WeightRenaming)]
        names = _renamed(tensors, whole, _root_of_text)
        config, tensors = text, {here: tensors[name] for here, name in names.items()}
    kind = _class_of(config)
    loader: Any = kind  # its annotation knows nothing of output_loading_info
    with _exactly(), _in_blocks_of_their_own(), _converting(kind, conversions):
        found: tuple[Any, Mapping[str, Any]] = loader.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=dtype,
            **placed,
            attn_implementation=None,  # whatever the configuration says: transformers chooses
            experts_implementation=None,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # are in the report, by name
        )
        model, prefix = found[0], f"{kind.base_model_prefix}."
        _renamed(
            tensors, conversion_mapping.get_model_conversion_mapping(model), lambda name: name.removeprefix(prefix)
        )
    return found
