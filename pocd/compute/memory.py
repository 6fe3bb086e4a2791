"""Which of torch's errors no model is to blame for."""

from __future__ import annotations

import torch
import torch.distributed


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether torch means by `error` that the device's memory, or the host's, does not suffice."""
    # The CPU's allocator has no exception of its own.
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def is_fault(error: Exception) -> bool:
    """Tell whether torch means by `error` that the device, its driver or its memory failed, or another rank is gone."""
    # Neither gloo's errors nor, before torch 2.8, CUDA's have a class of their own. gloo's name their source file.
    is_told = any(word in str(error) for word in ("/gloo/", "CUDA error"))
    return is_told or is_out_of_memory(error) or isinstance(error, torch.distributed.DistError)
