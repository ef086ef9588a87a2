"""Step 1: the machine, headsearch's own look at it, the lease of its GPU, and its images decoded."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lease
from setting import ROOT, TESTS, Clock, LeftOut, Say, Setting

sys.path.append(str(TESTS / "runtime"))
from fake_nvidia import FakeNvidia, gpus

QUERY = ("name", "driver_version", "memory.total", "clocks.max.sm", "power.limit")
PACKAGES = ("torchvision", "triton", "numba", "numpy", "optuna", "lightly")


def run(setting: Setting, say: Say, clock: Clock) -> None:
    """What there is; then the lease."""
    import torch

    from headsearch.core.device import cuda_problem, pick_device
    from headsearch.runtime.doctor import examine

    if setting.on_gpu and (problem := cuda_problem()):
        raise LeftOut(f"no CUDA device: {problem}")
    device = pick_device(setting.device)
    say("machine: versions", versions(setting.commit))
    say("machine: device", facts(device))
    say("machine: views", {"made_by": views_made_by(device)})
    findings = examine()
    told = [one for one in findings if one.state != "ok"]
    said = {"ok": len(findings) - len(told)} | {
        f"{one.state} {one.name}": one.text for one in told if one.name != "figures"
    }
    say("machine: headsearch doctor", said)
    say("machine: GPU lease", *leased(setting, device, torch))
    if setting.data is not None:
        say("machine: images decoded", decoded(setting))


def versions(commit: str | None) -> dict[str, Any]:
    """Date, commit and packages."""
    import torch

    found: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit or checked_out() or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()),
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found | {"c_compiler": shutil.which("cc") or shutil.which("gcc")}


def checked_out() -> str | None:
    """The commit of this checkout; None in a copy without its repository. `+` where files differ from it."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return None

    def git(*words: str) -> str:
        # The checkout may be another user's.
        command = ["git", "-c", f"safe.directory={ROOT}", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    commit, changed = git("rev-parse", "--short=10", "HEAD"), git("status", "--porcelain")
    return f"{commit}{'+' if changed else ''}" if commit else None


def facts(device: Any) -> dict[str, Any]:
    """The device, and what is around it."""
    import psutil
    import torch

    from headsearch.core.hardware import processor

    around = {"cores": len(os.sched_getaffinity(0)), "host_gib": psutil.virtual_memory().total / 2**30}
    if device.type != "cuda":
        return {"card": processor(device), **around}
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    found = {
        "card": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gib": total / 2**30,
        "free_gib": free / 2**30,
        "nvrtc_kernels": hasattr(torch.cuda, "_compile_kernel"),
    }
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout
        words = (answer.splitlines() or [""])[0].split(", ")
        found |= dict(zip(QUERY[1:], words[1:], strict=False))
    return found | around


def views_made_by(device: Any) -> str:
    """Which code makes views here."""
    from headsearch.config import TrialConfig
    from headsearch.core.benchmark import noise
    from headsearch.core.features import build_views

    kinds = {"cpu": "numba", "cuda": "whole batches in torch", "cuda-philox": "one kernel"}
    kind = build_views(TrialConfig(), noise(100, 32), device).stream_kind
    return kinds.get(kind, kind)


def leased(setting: Setting, device: Any, torch: Any) -> tuple[dict[str, Any]]:
    """Lease the GPU that nvidia-smi lists first; of a fake one where the run is on a CPU."""
    from headsearch.runtime.gpus import listing, visible_here

    folder = setting.home / "lease"
    folder.mkdir()
    if not setting.on_gpu:
        fake = FakeNvidia(folder)
        fake.show(gpus(1))
        os.environ["PATH"] = lease.with_path(fake.bin)["PATH"]
    found = visible_here(listing().gpus)
    if not found:
        raise AssertionError(f"nvidia-smi lists no GPU: {listing()}")
    values = {"nvidia_smi": shutil.which("nvidia-smi") if setting.on_gpu else "a fake one"}
    values |= lease.hand_on(found[0], folder, lease.with_path())
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None) if setting.on_gpu else None
    if uuid is not None:
        values["torch_has_the_same_uuid"] = f"GPU-{uuid}" == (found[0].parent or found[0].uuid)
    return (values,)


def decoded(setting: Setting) -> dict[str, Any]:
    """Decode the images, which later steps read from the cache."""
    from headsearch.config import DataConfig
    from headsearch.core.images import load_images

    began = time.perf_counter()
    config = DataConfig(name="folder", root=str(Path(setting.data or "").resolve()), image_size=32)
    images = load_images(config, home=setting.home)
    count = len(images.train) + len(images.validation) + len(images.test)
    return {"images": count, "left_out": len(images.skipped), "seconds": time.perf_counter() - began}
