"""A mixture of experts, gated MLPs of which a router chooses a few for each position, as products of groups of rows.

Rows are sorted by expert, and all experts' products are one operation. Nothing waits for the device, and no shape
depends on what the router chooses, so a layer can be compiled whole and captured as a CUDA graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.library import custom_op
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

# transformers' classes that are a router by softmax and its experts, and nothing else.
MIXTURES = ("MixtralSparseMoeBlock", "Qwen3MoeSparseMoeBlock")
ALIGNED = 16  # bytes: torch's grouped products want rows of a multiple of them


class Mixture(NamedTuple):
    """A mixture's parameters, which share memory with transformers' modules, and how its router shares out.

    Attributes:
        router: Matrix of the router [experts, H].
        gate_up: Matrices of the experts' gates and, below them, of what these are multiplied with [experts, 2·I, H].
        down: Matrices of the experts' outputs [experts, H, I].
        top: Number of experts that compute a position.
        shares_sum_to_one: Whether the shares of the chosen experts are divided by their sum.
        shares_dtype: Precision that shares are rounded to.
    """

    router: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    top: int
    shares_sum_to_one: bool
    shares_dtype: torch.dtype


def can_mix(block: Any) -> bool:  # noqa: ANN401 - transformers gives its classes no common type
    """Tell whether a layer's mixture is one that `mix` computes exactly so, on its device and in its dtype."""
    if type(block).__name__ not in MIXTURES:
        return False
    matrices = block.experts.gate_up_proj, block.experts.down_proj
    device, dtype = matrices[0].device, matrices[0].dtype
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    is_aligned = all(matrix.shape[-1] * matrix.itemsize % ALIGNED == 0 for matrix in matrices)
    return is_aligned and are_products_grouped(dtype, capability, torch.__version__)


def are_products_grouped(dtype: torch.dtype, capability: tuple[int, int] | None, version: str) -> bool:
    """Tell whether torch has products of groups of rows that do not wait for the device.

    Args:
        dtype: Precision of the factors.
        capability: The GPU's compute capability; None for the CPU.
        version: torch's version.
    """
    if torch.torch_version.TorchVersion(version) < "2.11":  # it has none, or wants weights at aligned addresses
        return False
    # Others are a loop over the groups, whose sizes the host waits for.
    return capability is None or (dtype == torch.bfloat16 and capability[0] in (9, 10))


def mixture_of(block: Any) -> Mixture:  # noqa: ANN401 - as above
    """Return the parameters of a mixture that `can_mix`."""
    router, experts = block.gate, block.experts
    is_mixtral = type(block).__name__ == "MixtralSparseMoeBlock"
    return Mixture(
        router=router.weight.detach(),
        gate_up=experts.gate_up_proj.detach(),
        down=experts.down_proj.detach(),
        top=router.top_k,
        shares_sum_to_one=is_mixtral or router.norm_topk_prob,
        shares_dtype=torch.float32 if is_mixtral else router.weight.dtype,
    )


def mix(h: torch.Tensor, mixture: Mixture, activation: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Compute a mixture of experts: [B, S, H] in, [B, S, H] out.

    Args:
        h: Input hidden states.
        mixture: Parameters.
        activation: Activation function of the experts' gates.
    """
    positions, top = h.flatten(0, 1), mixture.top
    chosen, shares = route(positions, mixture)
    experts, order = chosen.flatten().sort(stable=True)
    numbers = torch.arange(len(mixture.router), device=h.device)
    ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
    gate, up = grouped_product(positions[order // top], mixture.gate_up, ends).chunk(2, dim=-1)
    outputs = grouped_product(activation(gate).mul_(up), mixture.down, ends)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=h.device))
    # Not added up where they belong: on a GPU the order of such sums is left to chance.
    parts: torch.Tensor = outputs[places].view(*chosen.shape, -1) * shares.unsqueeze(-1)
    return parts.sum(dim=1).to(h.dtype).view_as(h)


def route(positions: torch.Tensor, mixture: Mixture) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the experts of each position and their shares, both [positions, top], as transformers' routers do."""
    logits = functional.linear(positions, mixture.router)
    shares, chosen = logits.softmax(dim=-1, dtype=torch.float32).topk(mixture.top, dim=-1)
    if mixture.shares_sum_to_one:
        shares = shares / shares.sum(dim=-1, keepdim=True)
    return chosen, shares.to(mixture.shares_dtype)


# An operation of our own, since the compiler knows torch's in bfloat16 only.
@custom_op("pocd::grouped_product", mutates_args=())
def grouped_product(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Multiply each group of rows with its own matrix.

    Args:
        rows: Rows of all groups, one group after the other [rows, in].
        matrices: The groups' matrices [groups, out, in].
        ends: Row before which each group ends, int32 [groups].
    """
    return functional.grouped_mm(rows, matrices.transpose(-2, -1), offs=ends)


@grouped_product.register_fake
def _shaped(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    assert len(ends) == len(matrices), "each group has a matrix"
    return rows.new_empty(len(rows), matrices.shape[1])
