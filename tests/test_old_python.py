"""The oldest Python that is supported, 3.11.2, which is Debian 12's own and whose asyncio has faults of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.support import cleaning_up

DEBIANS = Path("/usr/bin/python3.11")
MENDED = (3, 11, 4)


@cache
def lack() -> str | None:
    """Why the tests of the old interpreter cannot run here; None where they can."""
    if sys.version_info[:2] != MENDED[:2]:
        return "this environment's packages are not for Python 3.11"
    if not DEBIANS.exists():
        return f"{DEBIANS} is not there"
    asked = subprocess.run(
        [DEBIANS, "-c", "import sys; print(*sys.version_info[:3])"], capture_output=True, text=True, check=True
    )
    version = tuple(map(int, asked.stdout.split()))
    return f"{DEBIANS} is {'.'.join(map(str, version))}, which is mended" if version >= MENDED else None


async def test_a_cancelled_task_cleans_up_though_that_takes_too_long() -> None:
    await cleaning_up.main()


def test_a_cancelled_task_cleans_up_on_the_old_interpreter_too() -> None:
    if reason := lack():
        pytest.skip(reason)
    root = Path(__file__).parent.parent
    packages = Path(pytest.__file__).parent.parent
    paths = {"PYTHONPATH": f"{root}:{packages}", "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([DEBIANS, "-W", "error", cleaning_up.__file__], cwd=root, env=os.environ | paths, check=True)
