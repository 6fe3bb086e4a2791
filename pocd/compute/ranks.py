"""Several processes that run one model together, each with a share of its matrices (tensor parallelism).

Between the ranks the stream of hidden states is whole on each of them, so layer transforms, readout and distances are
the same code as with one process, and every rank gets the same distances. What a rank must never do alone is
anything that runs the model, since the others have to take part: forward passes, preparing a round, asking where NaN
came from.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # torch does not list them
from torch.distributed.distributed_c10d import _set_pg_timeout

from pocd.protocol.errors import ComputeError, DeviceError, ModelError

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator, Sequence

PATIENCE = timedelta(minutes=30)  # with the other ranks, which may load at another pace
JOINING = timedelta(minutes=5)  # until all ranks of several machines have met, and have connected to each other


@contextmanager
def joined(rank: int, size: int, rendezvous: str, device: str, listener: socket.socket | None = None) -> Iterator[None]:
    """Join a process group of `size` ranks while the context lasts; waits until all ranks have joined.

    Args:
        rank: Index of this rank, from 0.
        size: Number of ranks.
        rendezvous: Where the ranks find each other: file:// and a path, on one machine, where there is no file when the
            first one joins; or tcp://HOST:PORT/NAME, with a name that no other group has, and nobody else knows.
        device: Device of this rank.
        listener: Socket that listens at HOST:PORT, of rank 0; None for any other.

    Raises:
        RuntimeError: A rank did not join, or ended (see `is_fault`); raised here, or by whatever runs the model then.
    """
    target = torch.device(device)
    # transformers reads these; the last one says which of this host's cards is ours.
    own = str(target.index or 0) if target.type == "cuda" else str(rank)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=own)
    if target.type == "cuda":
        torch.cuda.set_device(target)
    is_local = rendezvous.startswith("file://")
    torch.distributed.init_process_group(
        "nccl" if target.type == "cuda" else "gloo",
        init_method=rendezvous if is_local else None,
        store=None if is_local else meet(rank, size, rendezvous, listener),
        rank=rank,
        world_size=size,
        timeout=PATIENCE if is_local else JOINING,
        device_id=target if target.type == "cuda" else None,
    )
    if not is_local:  # whose ranks have connected to each other by now
        _set_pg_timeout(PATIENCE)
    try:
        yield
    except ComputeError:  # which all ranks get
        torch.distributed.destroy_process_group()
        raise
    # Not after other errors: it would wait for a rank or a device that failed, and this process is to end.
    torch.distributed.destroy_process_group()


def meet(rank: int, size: int, rendezvous: str, listener: socket.socket | None) -> Store:
    """Return what ranks of several machines share to find each other, once all of them have; see `joined`.

    Raises:
        RuntimeError: Not all ranks met in time.
    """
    address, _, name = rendezvous.removeprefix("tcp://").partition("/")
    host, _, port = address.rpartition(":")
    remedy = "do the cluster's machines reach one another on all ports (docs/scale.md)?"
    try:
        shared = TCPStore(
            host.strip("[]"),
            int(port),
            size,
            is_master=rank == 0,
            timeout=JOINING,
            wait_for_workers=False,
            master_listen_fd=listener.detach() if listener else None,
        )
        # Whoever finds the port finds nothing without the name, neither another worker's ranks nor strangers.
        store = PrefixStore(name, shared)
        store.set(f"rank {rank}", "is here")
    except torch.distributed.DistError as error:
        text = f"rank {rank} does not reach rank 0 at {address}: {remedy} {error}"
        raise RuntimeError(text) from error
    try:
        store.wait([f"rank {each}" for each in range(size)], JOINING)
    except torch.distributed.DistError as error:
        missing = ", ".join(f"rank {each}" for each in range(size) if not store.check([f"rank {each}"]))
        text = f"{missing} did not come to rank 0 at {address} within {JOINING.total_seconds():.0f} s: {remedy}"
        raise RuntimeError(text) from error
    return store


def check_alike(name: str, fingerprint: str, place: str) -> None:
    """Check that all ranks have read the same checkpoint; all have to call this together.

    Args:
        name: Name of the model.
        fingerprint: Fingerprint of the checkpoint that this rank has read.
        place: The machine of this rank, for people; empty where all ranks are on one.

    Raises:
        ModelError: The checkpoints of two ranks differ.
    """
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, (fingerprint, place))
    if len({each for each, _ in found}) > 1:
        told = ", ".join(f"rank {rank}{where and f' on {where}'}: {each}" for rank, (each, where) in enumerate(found))
        raise ModelError(
            f"model {name!r} has other weights on one machine than on another ({told}): give all machines the same "
            "model (a hub's by model.revision)"
        )


def check_split(config: Any, name: str, ranks: int) -> None:  # noqa: ANN401 - each family has its own class
    """Raise a ModelError for a model that cannot be split over `ranks` devices."""
    text = config.get_text_config()
    if not getattr(text, "base_model_tp_plan", None):
        raise ModelError(
            f"model {name!r} cannot be split over {ranks} devices: transformers has no plan for {type(text).__name__}; "
            "set model.parallel = 1"
        )
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, key, None)
        if heads is not None and heads % ranks:
            raise ModelError(
                f"model {name!r} cannot be split over {ranks} devices: its {key}, {heads}, is not a multiple of {ranks}"
            )


def split_as_planned(ranks: int, device: torch.device) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that make each rank load its share onto its device.

    Raises:
        DeviceError: The device is the CPU, and the host has GPUs, which transformers would take.
    """
    if device.type == "cpu" and torch.cuda.is_available():
        raise DeviceError(
            "a model is not split over the CPU where there are GPUs, which transformers would take; "
            "set model.device to them, model.parallel = 1, or CUDA_VISIBLE_DEVICES='' in the environment"
        )
    from transformers.distributed.configuration_utils import DistributedConfig  # noqa: PLC0415 - few workers are split

    return {"distributed_config": DistributedConfig(tp_size=ranks)}


def whole(weight: torch.Tensor) -> torch.Tensor:
    """Return the whole of a weight of which each rank may hold a share; all ranks have to call this together."""
    if not torch.distributed.is_initialized():
        return weight
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - few workers are split

    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def largest(values: Sequence[float], device: torch.device) -> list[float]:
    """Return the largest of each value over all ranks; all have to call this together, with as many values."""
    if not torch.distributed.is_initialized():
        return list(values)
    shared = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
    found: list[float] = shared.tolist()
    return found
