"""Recognise torch's errors that are due to memory or the device, not to the model."""

from __future__ import annotations

import torch
import torch.distributed


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether torch's `error` means that the device's or the host's memory does not suffice."""
    # The CPU's allocator has no exception of its own.
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def is_fault(error: Exception) -> bool:
    """Tell whether torch's `error` means that the device, its driver or its memory failed, or another rank is gone."""
    # Neither gloo's errors nor, before torch 2.8, CUDA's have a class of their own. gloo's name their source file.
    is_named = any(word in str(error) for word in ("/gloo/", "CUDA error"))
    return is_named or is_out_of_memory(error) or isinstance(error, torch.distributed.DistError)
