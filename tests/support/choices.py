"""Choices of experts that several honest hosts make of the same scores, each with rounding of its own."""

from __future__ import annotations

import torch

CHOICES, POSITIONS, EXPERTS, TOP = 8, 25, 16, 2


def draw_choices(hosts: int, *, rows: int, sigma: float) -> tuple[list[list[torch.Tensor]], torch.Tensor]:
    """Return the gaps of each host, by choice, and which rows turn between the first host and the last, bool [rows].

    Args:
        hosts: How many there are.
        rows: Nonces, of `POSITIONS` positions each.
        sigma: Standard deviation of the difference between two hosts' scores.
    """
    generator = torch.Generator().manual_seed(0)
    gaps: list[list[torch.Tensor]] = [[] for _ in range(hosts)]
    turned = torch.zeros(rows, dtype=torch.bool)
    for _ in range(CHOICES):
        exact = torch.rand(rows * POSITIONS, EXPERTS, generator=generator, dtype=torch.float64)
        chosen = []
        for host in gaps:
            scores = exact + sigma * torch.randn(exact.shape, generator=generator, dtype=torch.float64) / 2**0.5
            ordered, places = scores.sort(dim=-1, descending=True)
            host.append(ordered[:, TOP - 1] - ordered[:, TOP])
            chosen.append(places[:, :TOP].sort(dim=-1).values)
        turned |= (chosen[0] != chosen[-1]).any(dim=-1).view(rows, -1).any(dim=-1)
    return gaps, turned
