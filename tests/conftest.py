"""What every test process needs before torch and numpy are imported, and the order in which they take the tests."""

from __future__ import annotations

import gc
import os
import resource

import pytest
from hypothesis import HealthCheck, settings

from tests.support import forking

# Tests run beside worker processes: threads that wait have to sleep, not to spin on a core that another one needs.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as pocd.process
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Each of many processes would have a thread per core; where threads may matter, a test asks for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Each process that compiles would try a program in each of the vectors that the CPU names, for ten seconds.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

# What is imported and collected stays to the end: looking through it for garbage takes a fifth of that time.
gc.disable()

# Tests that hold a thousand connections open are at both ends of them.
_, _most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (_most, _most))

# How long an example takes, or takes to be drawn, says how busy the machine is. Every run draws the same examples, so
# that none fails by luck; `pytest --hypothesis-profile=search` draws others, to find what these do not show.
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("patient", parent=settings.get_profile("search"), derandomize=True)
settings.load_profile("patient")

# Files that take half a minute and more: they begin first, so that no process is left alone with one at the end.
LONG = (
    *("cluster/test_cluster.py", "system/test_systemd.py", "compute/test_compiled.py", "cluster/test_partition.py"),
    *("system/test_install.py", "system/test_orchestrator.py", "system/test_daemon_epochs.py", "admin/test_pow_api.py"),
    *("admin/test_openapi.py", "system/test_operations.py", "worker/test_ranks.py", "compute/test_engine.py"),
    *("system/test_disk.py", "dev/test_demo.py", "system/test_daemon.py", "worker/test_worker.py"),
    *("scripts/test_first_contact.py", "compute/test_poc3.py", "pool/test_pool.py", "cluster/test_ranks_apart.py"),
)
# Folders of which other files take longer than most.
SLOW = ("system", "scripts", "compute", "admin", "lab", "worker", "daemon", "cli")


def pytest_configure(config: pytest.Config) -> None:
    """Let processes that tests start be forked from others that have imported what they need."""
    forking.offer(config)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the files by how long they take, longest first."""

    def place(item: pytest.Item) -> tuple[int, int]:
        folder = item.path.parent.name
        file = f"{folder}/{item.path.name}"
        return (
            LONG.index(file) if file in LONG else len(LONG),
            SLOW.index(folder) if folder in SLOW else len(SLOW),
        )

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """Look for garbage again, in what comes from now on."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Take two processes per core, as tests wait for other processes half of their time; at most sixteen."""
    return min(2 * len(os.sched_getaffinity(0)), 16)
