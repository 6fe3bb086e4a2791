"""What most tests of deliveries stand on: a store, a bench over it, and a receiver on a real socket."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.delivering import prepared, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.support.delivering import Bench, Server


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def bench(path: Path) -> Iterator[Bench]:
    with prepared(path) as one:
        yield one


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving() as one:
        yield one
