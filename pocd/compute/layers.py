"""Any decoder, run by its own layers: branch and residual are caught at each layer's edges and replaced.

The hooks live for one call, so a model is bare before and after it, whatever happens inside.
"""

from __future__ import annotations

import contextlib
import inspect
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pocd.compute.memory import is_fault
from pocd.compute.routers import even_routers
from pocd.protocol.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from pocd.compute.routers import Observe as Choices
    from pocd.compute.transforms import Join

    Observe = Callable[[str, torch.Tensor], None]
    Between = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class LayerForm:
    """Names of the submodules at which a decoder layer's output, residual + branch, is found in two halves.

    Attributes:
        branch: The submodule whose output is added last: the MLP, or the norm after it.
        residual: The submodule whose input is the stream after attention. None in a parallel layer,
            where that stream is the layer's input plus the attention's output.
        attention: The attention of a parallel layer.
    """

    branch: str
    residual: str | None
    attention: str | None = None

    @property
    def parts(self) -> list[str]:
        """Names of the submodules."""
        return [part for part in (self.residual, self.attention, self.branch) if part is not None]

    def __str__(self) -> str:
        return " and ".join(self.parts)


FORMS = (
    LayerForm(residual="pre_feedforward_layernorm", branch="post_feedforward_layernorm"),  # Gemma 2 and 3
    LayerForm(residual="mlp", branch="post_feedforward_layernorm"),  # OLMo 2
    LayerForm(residual="post_attention_layernorm", branch="post_mlp_layernorm"),  # GLM-4
    LayerForm(residual="post_attention_layernorm", branch="mlp"),  # Llama, Mistral, Qwen, Phi-3, GPT-NeoX
    LayerForm(residual="post_attention_layernorm", branch="feed_forward"),  # Llama 4
    LayerForm(residual="pre_mlp_layernorm", branch="post_mlp_layernorm"),  # AFMoE
    LayerForm(residual="pre_ff_layernorm", branch="feed_forward"),  # Jamba, Bamba, Falcon-H1
    LayerForm(residual="ffn_norm", branch="feed_forward"),  # LFM2
    LayerForm(residual="ln_2", branch="mlp"),  # GPT-2
    LayerForm(residual=None, attention="attention", branch="mlp"),  # GPT-NeoX, parallel
    LayerForm(residual=None, attention="self_attn", branch="mlp"),  # Phi, Cohere
    LayerForm(residual=None, attention="attn", branch="mlp"),  # GPT-J
)
CACHES = ("cache", "layer_past")  # what the KV cache is called from transformers 5.24 on, and in GPT-NeoX and GPT-J
NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "embedding_norm")  # after the last layer


def _tensor(value: Any) -> torch.Tensor:  # noqa: ANN401 - modules give tensors, or tuples that begin with one
    found = value[0] if isinstance(value, tuple) else value
    assert isinstance(found, torch.Tensor), "a layer's parts pass tensors"
    return found


def _first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return _tensor(args[0] if args else kwargs["hidden_states"])


class _Edges:
    """Tensors that entered and left one layer and its parts in the current call."""

    def __init__(self, layer: nn.Module, parts: Sequence[str], hooks: ExitStack) -> None:
        self.entered: dict[str, torch.Tensor] = {}
        self.left: dict[str, torch.Tensor] = {}
        self.calls = 0
        self.output: torch.Tensor | None = None
        for name in ("", *parts):  # "" is the layer itself
            module = layer.get_submodule(name)
            hooks.enter_context(module.register_forward_pre_hook(self._entering(name), with_kwargs=True))
            if name:
                hooks.enter_context(module.register_forward_hook(self._leaving(name)))

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.entered[name] = _first_input(args, kwargs)

        return enter

    def _leaving(self, name: str) -> Callable[..., None]:
        def leave(_module: nn.Module, _args: object, output: object) -> None:
            self.left[name] = _tensor(output)

        return leave

    def note_output(self, _layer: nn.Module, _args: object, output: object) -> None:
        """Record the layer's own output (a hook)."""
        self.output = _tensor(output)
        self.calls += 1

    def branch(self, form: LayerForm) -> torch.Tensor:
        return self.left[form.branch].reshape(self.entered[""].shape)  # Llama 4's mixtures give rows

    def residual(self, form: LayerForm) -> torch.Tensor:
        if form.residual is not None:
            return self.entered[form.residual]
        assert form.attention is not None, "a parallel form names its attention"
        return self.left[form.attention] + self.entered[""]

    def fits(self, form: LayerForm) -> bool:
        """Tell whether the layer's output was the sum of this form's halves, bit for bit."""
        if not set(form.parts) <= self.entered.keys() or self.output is None:
            return False
        if self.left[form.branch].numel() != self.entered[""].numel():
            return False
        branch = self.branch(form)
        if form.residual is not None:
            totals = [self.entered[form.residual] + branch]
        else:
            assert form.attention is not None, "a parallel form names its attention"
            mixed, stream = self.left[form.attention], self.entered[""]
            totals = [branch + mixed + stream, branch + stream + mixed, mixed + stream + branch]
        return any(torch.equal(total.nan_to_num(), self.output.nan_to_num()) for total in totals)


class _Taken(BaseException):
    """Leaves a forward pass whose rest is not needed; not an Exception, so that nobody handles it as an error."""


class _KeysAndValues:
    """Stand-in for a KV cache: takes the keys and values of all positions, gives them to the last one."""

    def __init__(self) -> None:
        self._held: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._held is None:
            self._held = keys, values
            raise _Taken
        return self._held


def one_query() -> AbstractContextManager[None]:
    """Compute attention of a single query by plain products, while the context lasts.

    On the CPU the fused kernel's rounding depends, for one query, on which thread does it, so on the
    nonce's place in the batch.
    """
    return sdpa_kernel(SDPBackend.MATH)


def _entering_one_query(hooks: ExitStack) -> Callable[..., None]:
    """Return a hook that switches to `one_query` attention from here to the end of the call."""

    def enter(_layer: nn.Module, _args: object) -> None:
        hooks.enter_context(one_query())

    return enter


def _carry_last_position(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]]:
    """Before the last layer runs (a hook): compute all keys and values, then let it run on the last position alone."""
    forward: Any = layer.forward
    call = dict(zip(inspect.signature(forward).parameters, args, strict=False)) | kwargs
    call[next((name for name in CACHES if name in call), "past_key_values")] = _KeysAndValues()
    try:
        forward(**call)
    except _Taken:
        pass
    else:
        raise ModelError(f"{type(layer).__name__} passes its keys and values through no cache")
    call["hidden_states"] = call["hidden_states"][:, -1:]
    mask = call.get("attention_mask")
    if mask is not None and mask.dim() == 4:  # [B, 1, queries, keys]
        call["attention_mask"] = mask[:, :, -1:]
    if call.get("position_ids") is not None:
        call["position_ids"] = call["position_ids"][:, -1:]
    if call.get("position_embeddings") is not None:
        call["position_embeddings"] = tuple(part[:, -1:] for part in call["position_embeddings"])
    return (), call


@dataclass(frozen=True, slots=True)
class LayerDecoder:
    """A decoder that is run by its own layers.

    Attributes:
        decoder: transformers' decoder.
        layers: Layers of the decoder.
        forms: Form of each layer.
        norm: Norm after the last layer.
        carries_all: Whether all positions go through the last layer where the last one is wanted, as some families
            need it.
        choices: Called at each choice of a mixture's router, see `even_routers`.
    """

    decoder: nn.Module
    layers: Sequence[nn.Module]
    forms: Sequence[LayerForm]
    norm: nn.Module
    carries_all: bool = False
    choices: Choices | None = None
    kind = "layers"

    def __call__(
        self,
        embeddings: torch.Tensor,
        join: Join,
        vectors: torch.Tensor,
        *,
        all_positions: bool = False,
        observe: Observe | None = None,
    ) -> torch.Tensor:
        """Return the last position's hidden state after the final norm [B, H], or all positions' [B, S, H].

        In the first case nothing else is carried through what follows the last layer's keys and values, unless
        the decoder `carries_all`.

        Args:
            embeddings: [B, S, H] in the model's dtype.
            join: Computes a layer's output from branch, residual and the layer's vector.
            vectors: Unit vector of each layer [layers, H].
            all_positions: Whether to return all positions.
            observe: Called with a name and each half of each layer's output as they are computed.
        """
        with ExitStack() as hooks:
            last = self.layers[-1]
            if not all_positions and not self.carries_all:
                hooks.enter_context(last.register_forward_pre_hook(_carry_last_position, with_kwargs=True))
                hooks.enter_context(last.register_forward_pre_hook(_entering_one_query(hooks)))
            for index, (layer, form) in enumerate(zip(self.layers, self.forms, strict=True)):
                edges = _Edges(layer, form.parts, hooks)
                hook = _joining(edges, form, join, vectors[index], f"layer {index}", observe)
                hooks.enter_context(layer.register_forward_hook(hook))
            output = _output_of_last_layer(self, embeddings, hooks)
        states: torch.Tensor = self.norm(output if all_positions else output[:, -1])
        return states

    def states(
        self,
        embeddings: torch.Tensor,
        join: Join,
        vectors: torch.Tensor,
        *,
        between: Mapping[int, Between],
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the hidden states of all positions after the final norm [B, S, H], with some layers' work changed.

        Args:
            embeddings: [B, S, H] in the model's dtype.
            join: Computes a layer's output from branch, residual and the layer's vector.
            vectors: Unit vector of each layer [layers, H].
            between: Functions, by layer number, that give a layer's new output from its input and output [B, S, H].
            positions: Positions of the embeddings in the sequence [S]; None for 0, 1, 2, ….
        """
        with ExitStack() as hooks:
            for index, (layer, form) in enumerate(zip(self.layers, self.forms, strict=True)):
                edges = _Edges(layer, form.parts, hooks)
                hook = _joining(edges, form, join, vectors[index], f"layer {index}", None)
                if index in between:
                    hook = _changing(edges, hook, between[index])
                hooks.enter_context(layer.register_forward_hook(hook))
            output = _output_of_last_layer(self, embeddings, hooks, positions)
        states: torch.Tensor = self.norm(output)
        return states


def _changing(edges: _Edges, joining: Callable[..., Any], between: Between) -> Callable[..., Any]:
    """Return the hook that replaces a layer's joined output by `between` of its input and that output."""

    def replace(layer: nn.Module, args: object, output: Any) -> Any:  # noqa: ANN401 - tensor or tuple, as the layer has it
        entered = edges.entered[""]
        left = joining(layer, args, output)
        passed = between(entered, _tensor(left))
        return (passed, *left[1:]) if isinstance(left, tuple) else passed

    return replace


def _output_of_last_layer(
    by_layers: LayerDecoder,
    embeddings: torch.Tensor,
    hooks: ExitStack,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run a decoder up to the end of its last layer; what follows may need all positions (GPT-2)."""
    found: list[torch.Tensor] = []

    def leave(_layer: nn.Module, _args: object, output: object) -> None:
        found.append(_tensor(output))
        raise _Taken

    hooks.enter_context(by_layers.layers[-1].register_forward_hook(leave))
    with contextlib.suppress(_Taken), even_routers(by_layers.layers, by_layers.choices):
        where = {}
        if positions is not None:
            # Without a mask transformers takes a gap between positions for the start of another sequence.
            where = {"position_ids": positions.unsqueeze(0), "attention_mask": positions.new_ones(embeddings.shape[:2])}
        by_layers.decoder(inputs_embeds=embeddings, use_cache=False, **where)
    (last,) = found
    return last


def _joining(
    edges: _Edges, form: LayerForm, join: Join, vector: torch.Tensor, name: str, observe: Observe | None
) -> Callable[..., Any]:
    """Return the hook that replaces a layer's output by the joined branch and residual."""

    def replace(_layer: nn.Module, _args: object, output: Any) -> Any:  # noqa: ANN401 - tensor or tuple, as the layer has it
        branch, residual = edges.branch(form), edges.residual(form)
        edges.entered.clear()
        edges.left.clear()
        if observe is not None:
            observe(f"{name}, in its residual (the stream after attention)", residual)
            observe(f"{name}, in its branch (the MLP)", branch)
        joined = join(branch, residual, vector)
        return (joined, *output[1:]) if isinstance(output, tuple) else joined

    return replace


@torch.inference_mode()
def find_forms(decoder: nn.Module, layers: Sequence[nn.Module], probe: torch.Tensor, *, owner: str) -> list[LayerForm]:
    """Find the form of each layer by running the bare decoder once.

    A form counts only if the layer's output is the sum of its halves bit for bit: names alone are no
    proof (Gemma 2's post_attention_layernorm is another thing than Llama's), and a factor on the
    branch (Granite) shows.

    Args:
        decoder: transformers' decoder.
        layers: Layers of the decoder.
        probe: Embeddings [1, S, H] in the model's dtype.
        owner: Name of the model in error messages.

    Raises:
        ModelError: A layer has no known form; the message names the layer's class and what was missing.
    """
    with ExitStack() as hooks:
        edges = []
        for layer in layers:
            names = sorted({part for form in FORMS for part in form.parts})
            parts = [name for name in names if isinstance(getattr(layer, name, None), nn.Module)]
            edges.append(_Edges(layer, parts, hooks))
            hooks.enter_context(layer.register_forward_hook(edges[-1].note_output))
        try:
            decoder(inputs_embeds=probe, use_cache=False)
        except (TypeError, ValueError, RuntimeError, AssertionError, KeyError, AttributeError) as error:
            if is_fault(error):
                raise
            said = f": {error}" if isinstance(error, ValueError) else ""  # others say what a programmer wants to know
            raise ModelError(
                f"{owner} does not run on embeddings alone, as in one stream: its layers want token ids, several "
                f"streams or other inputs{said}"
            ) from error
    forms = []
    for index, (layer, edge) in enumerate(zip(layers, edges, strict=True)):
        kind = f"{owner}: its layer {index}, a {type(layer).__name__},"
        if edge.calls != 1:
            raise ModelError(f"{kind} ran {edge.calls} times in one pass; it has to run once")
        form = next((form for form in FORMS if edge.fits(form)), None)
        if form is None:
            named = [str(form) for form in FORMS if set(form.parts) <= edge.entered.keys()]
            reason = (
                f"does not end in residual + branch: its output is not their sum as found at {'; '.join(named)}"
                if named
                else f"has no known residual and branch; looked for {'; '.join(map(str, FORMS))}"
            )
            raise ModelError(f"{kind} {reason}")
        forms.append(form)
    return forms
