"""Which device a training runs on, and what is set there."""

from __future__ import annotations

import warnings

import torch

from headsearch.errors import InputError


def pick_device(name: str) -> torch.device:
    """``auto`` (CUDA if there is any, else the CPU), ``cpu``, ``cuda`` or ``cuda:1`` as a device, configured.

    Starts CUDA on it (see `configure_cuda`). Raises InputError if the name is none of these or the device is
    not there.
    """
    device = find_device(name)
    configure_cuda(device)
    return device


def find_device(name: str) -> torch.device:
    """What `pick_device` returns. Neither starts CUDA nor changes a setting. Raises InputError likewise."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    kind, colon, index = name.partition(":")
    if name != "cpu" and (kind != "cuda" or bool(colon) != index.isdecimal()):
        raise InputError(f"device: {name!r} is none of auto, cpu, cuda, cuda:<index>")
    if name == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        there = ", ".join(["cpu", *(f"cuda:{number}" for number in range(count))])
        raise InputError(f"device: {name} is not there; available: {there}")
    return torch.device("cuda", int(index or 0))


def configure_cuda(device: torch.device) -> None:
    """Make trainings on `device` repeatable; does nothing for a CPU. Each process that trains calls it once.

    Three settings of the process change:

    - `device` becomes the current device, where events, streams and kernels without a device of their own go;
      else that is ``cuda:0``.
    - cuDNN takes deterministic algorithms only. Others add up a convolution's weight gradients with atomics,
      in any order, and a trial that is resumed would differ in its last bits. It does not try out which
      algorithm is fastest either: the choice may differ from run to run.
    - fp32 is fp32. By default, cuDNN rounds the inputs of fp32 convolutions to TF32, of 10 bits.

    The last is set by ``allow_tf32``, which all torch releases from 2.6 on have. Where the newer
    ``fp32_precision`` is set in its place, reading ``allow_tf32`` raises an error, and torch reads it.
    """
    if device.type != "cuda":
        return
    torch.cuda.set_device(device)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.9 asks for the newer names; 2.11 and 2.14 do not
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False


def cuda_problem() -> str | None:
    """Why torch has no CUDA device here, in a few words; None if it has one. Starts CUDA."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    reasons = [line for warning in said for line in str(warning.message).splitlines()[:1]]
    return f"torch {torch.__version__} finds no device" + (f" ({reasons[0]})" if reasons else "")
