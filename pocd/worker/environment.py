"""The environment of a worker's process."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pocd.process import WAITING

if TYPE_CHECKING:
    from collections.abc import Mapping

ALLOCATOR = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}  # the second one before torch 2.9


def environment(
    given: Mapping[str, str],
    *,
    cards: tuple[str, ...] | None,
    cache: Path,
    threads: int | None = None,
    interface: str = "lo",
) -> dict[str, str]:
    """Return the environment of a worker's processes. What the given one sets stays, but for its cards.

    All but PYTHONOPTIMIZE: transformers reads its own docstrings, which Python leaves out with -OO.

    Args:
        given: The environment of the process that starts them.
        cards: The names of the cards that CUDA shows; none hides all of them, None leaves the given ones.
        cache: The folder for what compilers make, which outlives the workers.
        threads: How many threads torch uses; None for its own choice.
        interface: The network interface by which ranks reach one another: those of one machine need no network.

    Raises:
        OSError: The system has no folder for temporary files, and none can be made in the cache.
    """
    variables = {
        **WAITING,
        "TMPDIR": str(_temporary_folder(cache / "tmp")),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": f"={interface}",  # else all whose names begin so
    }
    if not ALLOCATOR & given.keys():
        # Else blocks that batches of several shapes leave behind do not serve one another.
        variables |= dict.fromkeys(ALLOCATOR, "expandable_segments:True")
    if threads is not None:
        variables["OMP_NUM_THREADS"] = str(threads)
    dropped = {"TMPDIR", "PYTHONOPTIMIZE"}
    variables |= {name: value for name, value in given.items() if name not in dropped}
    if cards is not None:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(cards)
    return variables


def _temporary_folder(otherwise: Path) -> Path:
    """Return the folder for temporary files: the system's, or where that has none that can be written, another one."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        otherwise.mkdir(parents=True, exist_ok=True)
        return otherwise
