"""What every test process needs before torch and numpy are imported."""

from __future__ import annotations

import os
import resource
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

# Tests run beside worker processes: threads that wait have to sleep, not to spin on a core that another one needs.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as pocd.compute.threads
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Tests that hold a thousand connections open are at both ends of them.
_, _most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (_most, _most))

# The longest files, longest first: where files go to several processes, none of these is to begin last.
LONG = (
    *("compiled", "ranks", "worker", "daemon", "pool", "schemes", "validator", "disk", "crash", "operations"),
    *("install", "openapi", "bench_delivery", "page", "pow_api", "bench", "audit", "outbox_api", "reload"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; the order within a file, and of the others, stays."""
    rank = {f"test_{name}.py": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))
