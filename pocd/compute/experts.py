"""Experts of a mixture, of which a router chooses a few for each position, as products of groups of rows.

Rows are sorted by expert. On the CPU they are multiplied in tiles of one shape, whatever number of rows an expert has,
so that what it computes for a row does not depend on the row's neighbours: kernels sum in another order where there are
few rows, and a rounding that differs turns a later router's choice. On a GPU all experts' products are one operation:
nothing waits for the device, and no shape depends on what the router chooses, so a layer can be compiled whole and
captured as a CUDA graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.library import custom_op
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from pocd.compute.routers import choose

if TYPE_CHECKING:
    from collections.abc import Callable

# transformers' classes that are a router by softmax and its experts, and nothing else.
MIXTURES = ("MixtralSparseMoeBlock", "Qwen3MoeSparseMoeBlock")
ALIGNED = 16  # bytes: torch's grouped products want rows of a multiple of them
TILE = 16  # rows of a product on the CPU
IN_TILES = "tiles"  # what `in_tiles` is called among transformers' ways of computing experts


class Mixture(NamedTuple):
    """A mixture's parameters, which share memory with transformers' modules, and how its router shares out.

    Attributes:
        router: Matrix of the router [experts, H].
        gate_up: Matrices of the experts' gates and, below them, of what these are multiplied with [experts, 2·I, H].
        down: Matrices of the experts' outputs [experts, H, I].
        top: Number of experts that compute a position.
        shares_sum_to_one: Whether the shares of the chosen experts are divided by their sum.
    """

    router: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    top: int
    shares_sum_to_one: bool


def can_mix(block: Any) -> bool:  # noqa: ANN401 - transformers gives its classes no common type
    """Tell whether a layer's mixture is one that `mix` computes exactly so, on its device and in its dtype."""
    if type(block).__name__ not in MIXTURES:
        return False
    matrices = block.experts.gate_up_proj, block.experts.down_proj
    if matrices[0].device.type == "cpu":
        return True
    capability = torch.cuda.get_device_capability(matrices[0].device)
    is_aligned = all(matrix.shape[-1] * matrix.itemsize % ALIGNED == 0 for matrix in matrices)
    return is_aligned and are_products_grouped(matrices[0].dtype, capability, torch.__version__)


def are_products_grouped(dtype: torch.dtype, capability: tuple[int, int], version: str) -> bool:
    """Tell whether torch has products of groups of rows that do not wait for the GPU.

    Args:
        dtype: Precision of the factors.
        capability: The GPU's compute capability.
        version: torch's version.
    """
    if torch.torch_version.TorchVersion(version) < "2.11":  # it has none, or wants weights at aligned addresses
        return False
    # Others are a loop over the groups, whose sizes the host waits for.
    return dtype == torch.bfloat16 and capability[0] in (9, 10)


def mixture_of(block: Any) -> Mixture:  # noqa: ANN401 - as above
    """Return the parameters of a mixture that `can_mix`."""
    router, experts = block.gate, block.experts
    return Mixture(
        router=router.weight.detach(),
        gate_up=experts.gate_up_proj.detach(),
        down=experts.down_proj.detach(),
        top=router.top_k,
        shares_sum_to_one=type(block).__name__ == "MixtralSparseMoeBlock" or router.norm_topk_prob,
    )


def mix(h: torch.Tensor, mixture: Mixture, activation: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Compute a mixture of experts: [B, S, H] in, [B, S, H] out.

    Args:
        h: Input hidden states.
        mixture: Parameters.
        activation: Activation function of the experts' gates.
    """
    positions = h.flatten(0, 1)
    chosen, shares = route(positions, mixture)

    def compute(rows: torch.Tensor, _: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        gate, up = grouped_product(rows, mixture.gate_up, ends).chunk(2, dim=-1)
        outputs: torch.Tensor = grouped_product(activation(gate).mul_(up), mixture.down, ends)
        return outputs

    return by_expert(positions, chosen, shares, len(mixture.router), compute).view(h.shape)


def route(positions: torch.Tensor, mixture: Mixture) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the experts of each position and their shares, both [positions, top], as transformers' routers do.

    In float32, whatever the dtype, as `even_routers` has them compute.
    """
    logits = functional.linear(positions.float(), mixture.router.float())
    shares, chosen = choose(logits.softmax(dim=-1), mixture.top)
    if mixture.shares_sum_to_one:
        shares = shares / shares.sum(dim=-1, keepdim=True)
    return chosen, shares


def by_expert(
    positions: torch.Tensor,
    chosen: torch.Tensor,
    shares: torch.Tensor,
    experts: int,
    compute: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Have each position computed by its experts, and return the sum of these by their shares [positions, H].

    Args:
        positions: Input hidden states [positions, H].
        chosen: Experts of each position [positions, top]; numbers beyond the experts' are those of other devices.
        shares: Shares of these in the result, float32 or in the model's dtype [positions, top].
        experts: Number of experts.
        compute: Gives the outputs of rows from these, sorted by expert, the expert of each, and the row before which
            each expert's rows end, int32 [experts].
    """
    top = chosen.shape[-1]
    numbers, order = chosen.flatten().sort(stable=True)
    ends = torch.searchsorted(numbers, torch.arange(experts, device=chosen.device), right=True, out_int32=True)
    outputs = compute(positions[order // top], numbers, ends)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    parts = outputs[places].view(*chosen.shape, -1) * shares.unsqueeze(-1).float()
    # One after the other: not where they belong, as the order of such sums is left to chance on a GPU; and by no sum
    # over a dimension, whose order may depend on how many positions there are.
    total = parts[:, 0]
    for index in range(1, top):
        total = total + parts[:, index]
    return total.to(positions.dtype)


def in_tiles(module: Any, hidden_states: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:  # noqa: ANN401 - as above
    """Compute any experts of transformers' as `mix` does; it chooses grouped products itself on other devices.

    Args:
        module: transformers' experts, with the properties that its decorator `use_experts_implementation` gives.
        hidden_states: [positions, H].
        chosen: Experts of each position [positions, top].
        shares: Shares of these in the result [positions, top].
    """
    if hidden_states.device.type != "cpu":
        every: torch.Tensor = grouped_mm_experts_forward(module, hidden_states, chosen, shares)
        return every

    def product(name: str, rows: torch.Tensor, numbers: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        matrices = getattr(module, name)
        if module.is_transposed:
            matrices = matrices.transpose(-2, -1)
        found: torch.Tensor = grouped_product(rows, matrices, ends)
        if module.has_bias:
            found = found + getattr(module, f"{name}_bias")[numbers.clamp(max=module.num_experts - 1)]
        return found

    def compute(rows: torch.Tensor, numbers: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        if module.has_gate:
            inner = module._apply_gate(product("gate_up_proj", rows, numbers, ends))  # noqa: SLF001 - a family's own
        else:
            inner = module.act_fn(product("up_proj", rows, numbers, ends))
        outputs = product("down_proj", inner, numbers, ends)
        return module.post_expert_norm(outputs) if getattr(module, "has_post_expert_norm", False) else outputs

    return by_expert(hidden_states, chosen, shares, module.num_experts, compute)


ALL_EXPERTS_FUNCTIONS.register(IN_TILES, in_tiles)


def compute_in_tiles(causal: torch.nn.Module) -> None:
    """Have all experts of a model of transformers that others may compute be computed by `in_tiles`.

    transformers' own switch leaves out classes that it does not find in the source of their module.
    """
    for module in causal.modules():
        if hasattr(module, "has_gate"):
            module.config._experts_implementation = IN_TILES  # noqa: SLF001 - transformers has no other name for it


# An operation of our own, since the compiler knows torch's in bfloat16 only.
@custom_op("pocd::grouped_product", mutates_args=())
def grouped_product(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Multiply each group of rows with its own matrix; on the CPU in tiles of `TILE` rows, the last one padded.

    Args:
        rows: Rows of all groups, one group after the other [rows, in].
        matrices: The groups' matrices [groups, out, in].
        ends: Row before which each group ends, int32 [groups]; rows beyond the last are nobody's: 0 on the CPU.
    """
    if rows.device.type != "cpu":
        return functional.grouped_mm(rows, matrices.transpose(-2, -1), offs=ends)
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    tiles = (counts + TILE - 1) // TILE
    groups = torch.arange(len(ends))
    group = groups.repeat_interleave(counts)  # of each row
    slots = ((tiles.cumsum(0) - tiles) * TILE - (ends - counts))[group] + torch.arange(len(group))
    tiled = rows.new_zeros(int(tiles.sum()), TILE, rows.shape[1])
    tiled.view(-1, rows.shape[1])[slots] = rows[: len(group)]
    products = tiled.new_empty(*tiled.shape[:2], matrices.shape[1])
    factors = matrices.transpose(-2, -1).unbind()
    for tile, product, number in zip(tiled, products, groups.repeat_interleave(tiles).tolist(), strict=True):
        torch.mm(tile, factors[number], out=product)
    found = rows.new_zeros(len(rows), matrices.shape[1])
    found[: len(group)] = products.view(-1, matrices.shape[1])[slots]
    return found


@grouped_product.register_fake
def _shaped(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    assert len(ends) == len(matrices), "each group has a matrix"
    return rows.new_empty(len(rows), matrices.shape[1])
