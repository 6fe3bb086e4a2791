"""A Ray cluster for each test that asks for one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.ray_machines import Machines


@pytest.fixture
def machines() -> Iterator[Machines]:
    """Machines that a test starts; all of them are killed afterwards."""
    from tests.support.networks import network
    from tests.support.ray_machines import Machines

    with network(2) as wires, Machines(wires) as cluster:
        yield cluster
