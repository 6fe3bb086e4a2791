"""Which of torch's errors no model is to blame for."""

from __future__ import annotations

import torch.distributed


def is_fault(error: Exception) -> bool:
    """Tell whether torch means by `error` that the device or its driver failed, or that another rank is gone."""
    # Neither gloo's errors nor, before torch 2.8, CUDA's have a class of their own. gloo's name their source file.
    return isinstance(error, torch.distributed.DistError) or any(
        word in str(error) for word in ("/gloo/", "CUDA error")
    )
