"""Tensors of checkpoints that have no part in a result."""

from __future__ import annotations

import re

HARMLESS = {
    r"(^|\.)rotary_emb\.inv_freq$": "a buffer of old files, computed from the configuration",
    r"(^|\.)position_ids$": "a buffer of old files: 0, 1, 2, …",
    r"\.(attn|attention)\.(masked_)?bias$": "the causal mask of GPT-2, GPT-J and GPT-NeoX, and its constant",
    r"^(model\.)?(visual|vit|image_tower|vision_(tower|model|embedder|encoder))\.": "looks at images",
    r"^(model\.)?(((multi_modal|mm|vision)_)?projector|vision_(projection|adapter))\.": "makes embeddings of images",
    r"^(model\.)?((patch_)?merger|connector|aligner)\.": "makes embeddings of images",
    r"^(model\.)?(vision_embed_tokens\.|image_newline$|visual_embeddings_table\.)": "embeddings of images",
    r"^(model\.)?(embed_vision|embed_audio|(audio|video)_tower)\.": "makes embeddings of images and sounds",
    r"\.(input|activation)(_global)?_scale(_ub)?$": "rounds activations, which no host may do",
    r"\.([kv]_proj\.output|k|v|q)_scale$": "rounds a cache of keys and values, and there is none",
}
"""Tensors without a part in a result though they are in the files, with the reason. Prediction layers and others
that transformers' class lists itself (`_keys_to_ignore_on_load_unexpected`) are not reported as unexpected."""


def is_harmless(name: str) -> bool:
    """Tell whether the tensor `name` has no part in a result, where a model has no use for it."""
    return any(re.search(pattern, name) for pattern in HARMLESS)
