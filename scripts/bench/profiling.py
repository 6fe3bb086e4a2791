"""Share of the engine's time by groups of operations; `scripts.bench.engine --profile` prints it."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from pocd.compute.compiled import Compiled
from pocd.compute.transforms import join_of

if TYPE_CHECKING:
    from pocd.compute.engine import BlockRun

GENERATOR, DECODER, HEAD = "generator", "norms and transforms", "readout and head"  # a batch's stages, in order
MATRICES, ATTENTION = "matrix products", "attention"
OTHER = "other"
IS_ATTENTION = re.compile(r"scaled_dot_product|flash|fmha|sdpa", re.IGNORECASE)
IS_PRODUCT = re.compile(r"::(add|b|badd)?mm$|gemm|nvjet|cutlass|xmma", re.IGNORECASE)
IS_GENERATOR = re.compile(r"_draw_normal|_cos_.*?log_.*?sin")  # of the inputs; or fused, and called after its parts


def shares(run: BlockRun, batch_size: int, batches: int) -> dict[str, float]:
    """Return each group's share of the time of some batches; they add up to 1.

    On the CPU it is each operation's own time. On a GPU it is the time of the kernels, by their names, as
    they run in the path that the model takes: a graph's kernels do not tell which operation they belong to.
    """
    spans = [range(start * batch_size, (start + 1) * batch_size) for start in range(batches + 1)]
    on_cpu = run.model.device.type == "cpu"
    batch = _by_stages if on_cpu else _as_it_runs
    batch(run, spans[0])  # does not count
    activities = [ProfilerActivity.CPU] if on_cpu else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as found:
        for span in spans[1:]:
            batch(run, span)
        if not on_cpu:
            torch.cuda.synchronize()
    spent: Counter[str] = Counter()
    for event in found.events() or []:
        if on_cpu:
            spent[_group_of_operation(event)] += event.self_cpu_time_total
        elif str(event.device_type).endswith("CUDA"):
            spent[_group_of_kernel(event.name)] += event.self_device_time_total
    return {group: time / spent.total() for group, time in spent.most_common()}


@torch.inference_mode()
def _by_stages(run: BlockRun, nonces: range) -> None:
    """Compute a batch stage by stage; compiled code counts as the stage's own time."""
    program = run.model.program
    if isinstance(program, Compiled):
        seeds, inputs = run.host_seeds(nonces), program.new_inputs()
        with record_function(GENERATOR):
            program.fill(inputs, seeds)
        with record_function(DECODER):
            states = program.run_layers(inputs, run.block)
        with record_function(HEAD):
            program.measure(states, seeds, run.block)
        return
    with record_function(GENERATOR):
        inputs = run.inputs(nonces)
    with record_function(DECODER):
        join = join_of(run.scheme.layer_step, run.model.layers)
        states = run.model.decoder(inputs, join, run.vectors, all_positions=run.scheme.reads_all)
    with record_function(HEAD):
        run.measure(states, nonces)


def _as_it_runs(run: BlockRun, nonces: range) -> None:
    run.start(nonces, batch_size=len(nonces)).values()


def _group_of_operation(event: Any) -> str:  # noqa: ANN401 - the profiler gives its events no public type
    """Return the group of an operation on the CPU: by its name and those it is part of, else by its stage."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    stage = next((name for name in names if name in {GENERATOR, DECODER, HEAD}), OTHER)
    if stage == DECODER and any(IS_ATTENTION.search(name) for name in names):
        return ATTENTION
    return MATRICES if stage == DECODER and any(IS_PRODUCT.search(name) for name in names) else stage


def _group_of_kernel(name: str) -> str:
    """Return the group of a kernel on a GPU, by the kernel's name."""
    if IS_GENERATOR.search(name):
        return GENERATOR
    if name.startswith("triton_"):  # and then whatever it is fused of, and whom it is for
        return DECODER
    if IS_ATTENTION.search(name):
        return ATTENTION
    return MATRICES if IS_PRODUCT.search(name) else OTHER
