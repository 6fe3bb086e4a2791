"""A linear map between hidden states: the cheapest stand-in for layers that can be trained (`pocd audit`)."""

from __future__ import annotations

import torch

PENALTY = 1e-6  # of the mean square of the features: enough where some of them never change


class LinearMap:
    """Least-squares map from a position's state, and the mean of the states up to it, to another state there.

    The mean is the output of attention with equal weights. Call `add` with known states first, then the object.
    """

    def __init__(self) -> None:
        self._squares: torch.Tensor | None = None
        self._products: torch.Tensor | None = None
        self._weights: torch.Tensor | None = None

    def add(self, states: torch.Tensor, outputs: torch.Tensor) -> None:
        """Learn from the states [B, S, H] of nonces, and the outputs [B, S, H] that belong to them."""
        x, y = _features(states).flatten(0, 1), outputs.float().flatten(0, 1)
        squares, products = (x.T @ x).double(), (x.T @ y).double()
        self._squares = squares if self._squares is None else self._squares + squares
        self._products = products if self._products is None else self._products + products
        self._weights = None

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Return predicted outputs, float32 [B, S, H], by all states that were added."""
        if self._weights is None:
            assert self._squares is not None, "something was added"
            assert self._products is not None, "something was added"
            damping = PENALTY * self._squares.diagonal().mean() * torch.eye(len(self._squares), device=states.device)
            self._weights = torch.linalg.solve(self._squares + damping, self._products).float()
        return _features(states) @ self._weights


def _features(states: torch.Tensor) -> torch.Tensor:
    """Return states, their means up to each position, and 1, float32 [B, S, 2H + 1]."""
    x = states.float()
    count = torch.arange(1, x.shape[1] + 1, device=x.device).view(1, -1, 1)
    return torch.cat([x, x.cumsum(dim=1) / count, torch.ones_like(x[..., :1])], dim=-1)
