"""Which device a training runs on."""

from __future__ import annotations

import warnings

import torch

from headsearch.errors import InputError


def pick_device(name: str) -> torch.device:
    """``auto`` (CUDA if there is any, else the CPU), ``cpu``, ``cuda`` or ``cuda:1`` as a device.

    Raises InputError if the name is none of these or the device is not there.
    """
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
