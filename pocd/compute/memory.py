"""Recognise torch's errors that are due to memory or the device, not to the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed

if TYPE_CHECKING:
    from collections.abc import Iterator

# Most of these errors are a RuntimeError, known by its text alone. Memory that a library takes outside torch's
# allocator is missed in the library's own words.
LACKS_MEMORY = (
    "DefaultCPUAllocator",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",
)
FAILS = (
    "/gloo/",  # gloo names its source file
    "CUBLAS_STATUS",
    "CUDA NVRTC error",
    "CUDA driver error",
    "CUDA error",
    "CUDA initialization error",
    "CUDNN_STATUS",
    "NCCL Error",
    "NCCL error",
    "Triton Error",
    "cuBLAS error",
    "cuDNN Frontend error",
    "cuDNN error",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether torch's `error` means that the device's or the host's memory does not suffice."""
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in LACKS_MEMORY)


def is_fault(error: BaseException) -> bool:
    """Tell whether torch's `error` means that the device, its driver or its memory failed, or another rank is gone."""
    # Before torch 2.8 CUDA's errors have no class of their own.
    classes = (torch.distributed.DistError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))
    return isinstance(error, classes) or is_out_of_memory(error) or any(word in str(error) for word in FAILS)


def with_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield `error` and the errors that led to it: compilers wrap errors, and one that ends a capture hides another."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__
