"""What machines a Ray cluster has, with resources and versions as each of them tells: a program for `pocd check`.

It starts no worker, and asks for no core and no GPU, so a daemon that uses all of them is not disturbed.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pocd.cluster.joining import join
from pocd.cluster.versions import versions

ANSWER_SECONDS = 30.0  # for all machines to tell their versions: each starts a process for that


def survey() -> list[dict[str, Any]]:
    """Return each machine that is alive: name, address, resources, and its versions or why it does not tell them."""
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]  # of Ray
    ask = ray.remote(num_cpus=0, max_retries=0)(versions)
    asked = [
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
        for node in nodes
    ]
    done, _ = ray.wait(asked, num_returns=len(asked), timeout=ANSWER_SECONDS)
    return [
        {
            "node": node["NodeName"],
            "address": node["NodeManagerAddress"],
            "resources": {name: node["Resources"].get(name, 0) for name in ("CPU", "GPU")},
            **(_answer(reference) if reference in done else {"problem": f"no answer within {ANSWER_SECONDS:.0f} s"}),
        }
        for node, reference in zip(nodes, asked, strict=True)
    ]


def _answer(reference: ray.ObjectRef[Any]) -> dict[str, Any]:
    try:
        return {"versions": ray.get(reference)}
    except RayError as error:  # such as a machine without pocd
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        return {"problem": lines[-1][:300]}


def main() -> None:
    """Run the survey: `python -m pocd.cluster.survey ADDRESS`; its last line is the machines as JSON."""
    (address,) = sys.argv[1:]
    join(address)
    print(json.dumps(survey()), flush=True)  # noqa: T201 - the answer of this program


if __name__ == "__main__":
    main()
