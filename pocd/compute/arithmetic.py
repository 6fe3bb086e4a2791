"""How all of this process's GPUs compute, whatever their kind."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


def fix_arithmetic() -> None:
    """Have all GPUs compute in the same way: no TF32, no sums in half precision, the same attention kernels."""
    # The head's product counts as float32 (section 3).
    torch.backends.cuda.matmul.allow_tf32 = False
    # Else how a product is cut, which depends on its shape, decides what is rounded.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    # torch takes cuDNN's attention on some kinds of GPU only, and its own on all others.
    torch.backends.cuda.enable_cudnn_sdp(False)


@contextmanager
def tensor_cores(*, enabled: bool) -> Iterator[None]:
    """Let a GPU round the factors of float32 products to TF32 (11 significant bits), many times as fast, meanwhile."""
    torch.backends.cuda.matmul.allow_tf32 = enabled
    try:
        yield
    finally:
        fix_arithmetic()
