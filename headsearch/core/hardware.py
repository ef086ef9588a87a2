"""What this machine computes with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass

import torch

from headsearch.config import TrainingConfig
from headsearch.core.features import Precision, resolve_precision
from headsearch.core.processor import cpu_model, cpu_multiplies_bf16
from headsearch.cores import usable_cores


@dataclass(frozen=True)
class DeviceFacts:
    """One device: its name for ``--device``, what it is, and what precision ``auto`` means on it.

    `native_bf16` is whether it multiplies bf16 in hardware.
    """

    name: str
    model: str
    memory_bytes: int | None
    precision: Precision
    native_bf16: bool


@dataclass(frozen=True)
class Hardware:
    """Torch, its threads, and the devices that it sees; `cuda` is the version it was built for."""

    torch: str
    torchvision: str
    cuda: str | None
    threads: int
    devices: tuple[DeviceFacts, ...]


def hardware() -> Hardware:
    """Look at this machine; the CPU comes last."""
    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", index)
        facts = torch.cuda.get_device_properties(device)
        auto = resolve_precision(TrainingConfig(), device)
        devices.append(DeviceFacts(str(device), facts.name, facts.total_memory, auto, auto == "bf16"))
    capability = torch.backends.cpu.get_cpu_capability()
    auto = resolve_precision(TrainingConfig(), torch.device("cpu"))
    devices.append(DeviceFacts("cpu", capability, None, auto, cpu_multiplies_bf16()))
    return Hardware(
        torch.__version__,
        importlib.metadata.version("torchvision"),
        torch.version.cuda,
        torch.get_num_threads(),
        tuple(devices),
    )


def set_threads(threads: int | None) -> None:
    """Let torch use this many CPU threads; None takes no more than this process may use."""
    torch.set_num_threads(threads or min(torch.get_num_threads(), usable_cores()))


def software(device: torch.device | None = None) -> dict[str, str | int]:
    """What bit-identical results depend on beside the configuration: versions and CPU threads.

    On a GPU they also depend on its model, on CUDA and on cuDNN (9.10.2 is 91002): kernels are chosen by the
    number and kind of a model's processors, and add up in another order.
    """
    facts: dict[str, str | int] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    if device is not None and device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = torch.version.cuda or "none"
        facts["cudnn"] = torch.backends.cudnn.version() or 0
    return facts


def device_label(device: torch.device) -> str:
    """A device for people: ``cuda:0 NVIDIA A100``, ``cpu of 8 cores``."""
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    return f"cpu of {os.cpu_count()} cores"


def processor(device: torch.device) -> str:
    """What computes, for people: a GPU's name, or the CPU's model, its cores and what torch uses of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_model()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
