"""How all of this process's GPUs compute, whatever their kind."""

from __future__ import annotations

import torch


def fix_arithmetic() -> None:
    """Have all GPUs compute in the same way: no TF32, no sums in half precision, the same attention kernels."""
    # The head's product counts as float32 (section 3).
    torch.backends.cuda.matmul.allow_tf32 = False
    # Else how a product is cut, which depends on its shape, decides what is rounded.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    # torch takes cuDNN's attention on some kinds of GPU only, and its own on all others.
    torch.backends.cuda.enable_cudnn_sdp(False)
