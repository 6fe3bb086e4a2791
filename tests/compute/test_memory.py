"""Which of torch's errors are lack of memory, which are faults, and which are the model's."""

from __future__ import annotations

import pytest
import torch

from pocd.compute.compiled import spoils_process
from pocd.compute.memory import is_fault, is_out_of_memory, with_causes

LACKS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
]
FAULTS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, opa, opb)`"),
    RuntimeError("CUDA driver error: unspecified launch failure"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("cuDNN Frontend error: No valid engine configs"),
    RuntimeError("NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:94, remote process exited"),
    RuntimeError("NCCL Error 1: unhandled cuda error"),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection closed by peer"),
    torch.distributed.DistNetworkError("the store is gone"),
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
]
MODELS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    TypeError("forward() got an unexpected keyword argument 'inputs_embeds'"),
]


@pytest.mark.parametrize("error", LACKS, ids=str)
def test_lack_of_memory_is_known_whoever_lacks_it(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert is_fault(error), "it is not the model's"


@pytest.mark.parametrize("error", FAULTS, ids=str)
def test_faults_of_the_device_and_its_libraries_are_no_lack_of_memory(error: Exception) -> None:
    assert is_fault(error)
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("error", MODELS, ids=str)
def test_what_a_model_does_wrong_is_no_fault(error: Exception) -> None:
    assert not is_fault(error)


def test_an_error_is_followed_by_what_led_to_it() -> None:
    first, second, third = ValueError("1"), ValueError("2"), ValueError("3")
    third.__cause__, second.__context__ = second, first
    assert list(with_causes(third)) == [third, second, first]


@pytest.mark.parametrize(
    ("error", "spoils"),
    [
        (RuntimeError("CUDA error: operation not permitted when stream is capturing"), True),
        (RuntimeError("CUDA error: operation failed due to a previous error during capture"), True),
        (TypeError("a Python error inside a capture"), True),
        (FAULTS[0], False),
        (LACKS[0], False),
    ],
    ids=str,
)
def test_a_capture_fails_by_itself_unless_memory_lacks_or_the_device_failed(error: Exception, *, spoils: bool) -> None:
    assert spoils_process(error) == spoils


def test_the_error_that_ends_a_capture_does_not_hide_a_lack_of_memory() -> None:
    error = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    error.__context__ = LACKS[0]
    assert not spoils_process(error)
