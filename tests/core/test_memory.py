"""What counts as running out of memory, in the words that torch 2.11 and 2.14 and CUDA's libraries have for it."""

from __future__ import annotations

import re

import pytest
import torch

from headsearch.core.memory import memory_checked
from headsearch.errors import TrialFailure

ADVICE = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
)
NO_MEMORY = [
    "CUDA error: out of memory" + ADVICE,
    "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com/cuda/"
    + ADVICE,
    "CUDA error: out of memory (2)",  # of `cuda_driver`
    "CUDA driver error: out of memory",
    "CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY (out of memory)",
    "CUDA ran out of memory outside PyTorch's allocator. If this workload uses many dynamic shapes, ...",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "cuFFT error: CUFFT_ALLOC_FAILED",
    "NVRTC_ERROR_OUT_OF_MEMORY",
    "Triton Error [CUDA]: out of memory",
    "MAGMA: cannot allocate memory on GPU device",
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried 99 bytes.",
    "unable to mmap 8000000000 bytes from file <train.images>: Cannot allocate memory (12)",
]
OTHER = [
    "CUDA error: an illegal memory access was encountered" + ADVICE,
    "CUDA error: misaligned address" + ADVICE,
    "CUDA error: device-side assert triggered" + ADVICE,
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle, ...)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "CUDA error: uncorrectable ECC error encountered" + ADVICE,
    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!",
    "mat1 and mat2 shapes cannot be multiplied (4x3 and 4x3)",
]
CLASSES = [RuntimeError, getattr(torch, "AcceleratorError", RuntimeError)]
"""torch has the second from 2.8 on, for errors of the CUDA runtime."""


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("text", NO_MEMORY)
def test_errors_that_are_a_lack_of_memory(text: str, kind: type[RuntimeError]) -> None:
    with pytest.raises(TrialFailure, match=re.escape(text.splitlines()[0])) as failed, memory_checked():
        raise kind(text)
    assert failed.value.reason == "out_of_memory"
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("text", OTHER)
def test_errors_that_are_not(text: str, kind: type[RuntimeError]) -> None:
    with pytest.raises(kind) as raised, memory_checked():
        raise kind(text)
    assert str(raised.value) == text


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("Tried to allocate 2.00 GiB."), MemoryError()])
def test_errors_that_have_a_class(error: Exception) -> None:
    with pytest.raises(TrialFailure, match="out of memory") as failed, memory_checked():
        raise error
    assert failed.value.reason == "out_of_memory"
    assert failed.value.__cause__ is error


def test_an_allocation_that_no_machine_can_serve() -> None:
    with pytest.raises(TrialFailure, match="can't allocate memory"), memory_checked():
        torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.gpu
def test_an_allocation_that_no_gpu_can_serve() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with pytest.raises(TrialFailure, match="CUDA out of memory"), memory_checked():
        torch.empty(1 << 45, dtype=torch.uint8, device="cuda")
