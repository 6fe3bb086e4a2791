"""Whole numbers of 64 bits, as the configuration and JSON bodies may hold them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

MOST_NODES = 1_000_000  # whose nonces stay within 64 bits for longer than anybody computes
Count = Annotated[int, Field(ge=1, le=2**63 - 1)]
Index = Annotated[int, Field(ge=0, le=2**63 - 1)]
