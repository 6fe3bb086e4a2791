"""For how many ranks a machine of the cluster has room: a pure function of what Ray says of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


def room_for(node: Mapping[str, Any], *, cpus: int, gpus: int) -> int:
    """Return how many ranks of so many cores and GPUs the machine can have; 0 of one that is gone.

    A worker is one rank, or several where its model is split, which need not be on one machine.

    Args:
        node: A machine as `ray.nodes()` describes it.
        cpus: Cores that a rank needs.
        gpus: GPUs that a rank needs; one of the two is above 0.
    """
    if not node["Alive"]:
        return 0
    wanted = {"CPU": cpus, "GPU": gpus}
    return min(int(node["Resources"].get(name, 0) // count) for name, count in wanted.items() if count)
