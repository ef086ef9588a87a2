"""Where the kernel of views runs in tests: on the CPU, from the same source compiled by a C++ compiler, or on CUDA.

The host's library also stands in for the CUDA driver, so that all of the way from `Views` to the kernel is run.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from headsearch.core import cuda_driver, cuda_views, views

SHARED_PER_BLOCK = 232_448
"""Of an H100, in bytes."""
FREE, ASCENDING, DESCENDING = range(3)
"""How the threads of a block run on the host; see `views_on_host.cpp`."""
QUIET = ("empty", "slice", "alias", "detach", "view", "permute")
"""Operations that launch nothing."""


def build(folder: Path, *flags: str, source: str | None = None, output: str = "views") -> Path:
    """Compile `source`, or the kernel's, with the host's harness. Skips the test where there is no compiler."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if not compiler:
        pytest.skip("no C++ compiler")
    kernel, built = folder / f"{output}.cu", folder / output
    kernel.write_text(source or cuda_views.source(), encoding="utf-8")
    constants = [f"-D{name}={value}" for name, value in cuda_views.definitions().items()]
    harness = str(Path(__file__).with_name("views_on_host.cpp"))
    command = [compiler, "-std=c++17", "-O1", "-pthread", f'-DKERNEL="{kernel}"', *constants, *flags, harness]
    done = subprocess.run([*command, "-o", str(built)], capture_output=True, text=True, check=False)
    if "sanitize" in " ".join(flags) and "cannot find" in done.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert done.returncode == 0, done.stderr
    return built


def load_library(path: Path) -> ctypes.CDLL:
    """The driver that `build` made."""
    loaded = cuda_driver._declared(ctypes.CDLL(str(path)), cuda_driver._DRIVER_FUNCTIONS)
    loaded.host_stream.restype = ctypes.c_void_p
    return loaded


@lru_cache(maxsize=1)
def loaded_library() -> ctypes.CDLL:
    """The driver that runs the kernel on the host."""
    with tempfile.TemporaryDirectory() as folder:
        return load_library(build(Path(folder), "-O2", "-fPIC", "-shared"))


class Counted:
    """Passes launches on, and counts them."""

    def __init__(self, launcher: cuda_views.Launcher) -> None:
        self.launcher, self.launches = launcher, 0
        self.shared_bytes, self.processors = launcher.shared_bytes, launcher.processors

    def launch(self, *args: object, **kwargs: object) -> None:
        self.launches += 1
        self.launcher.launch(*args, **kwargs)


class Machine:
    """A device on which the kernel runs."""

    def __init__(self, device: torch.device, launcher: cuda_views.Launcher) -> None:
        self.device, self.launcher = device, Counted(launcher)

    def views(self, *args, normalization, **kwargs) -> views.Views:
        """Views on the device. Its kernel is there."""
        made = views.Views(*args, tuple(part.to(self.device) for part in normalization), **kwargs)
        assert made.stream_kind == "cuda-philox"
        return made

    def no_waiting(self) -> AbstractContextManager[None]:
        """Within: whatever makes the host wait for the device is an error."""
        return no_waiting(self.device)

    def capture(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Give a function that replays `run` from a CUDA graph; the host calls it. Runs it once to warm up."""
        if self.device.type == "cpu":
            run()
            return run
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Within: whatever makes the host wait for `device` is an error; on the CPU, reading a value is."""
    if device.type == "cpu":
        with Waits():
            yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Waits(TorchDispatchMode):
    """Raises where a value of a tensor is read, as a GPU would have to be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in func.name(), func
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Counts torch's operations that would launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name not in QUIET:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def install(
    monkeypatch: pytest.MonkeyPatch,
    driver: ctypes.CDLL | None = None,
    *,
    threads: int = 1,
    order: int = FREE,
    shared: int = SHARED_PER_BLOCK,
) -> Machine:
    """Let `Views` on the CPU use the kernel on the host, with so many threads a block and shared bytes."""
    loaded = driver or loaded_library()
    loaded.host_set(threads, order, shared)
    monkeypatch.setattr(cuda_driver, "driver", lambda: loaded)
    monkeypatch.setattr(cuda_driver, "compile_source", lambda *_: b"machine code")
    monkeypatch.setattr(cuda_driver, "on_device", lambda _: nullcontext())
    monkeypatch.setattr(cuda_driver, "current_stream", lambda _: 0)
    monkeypatch.setattr(views, "KERNEL_ON", ("cpu",))
    machine = Machine(torch.device("cpu"), cuda_views.ViewKernel(torch.device("cpu", 0)))
    monkeypatch.setattr(cuda_views, "load", lambda _: machine.launcher)
    return machine


def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Let `Views` on CUDA use the kernel, as they do, and count its launches."""
    device = torch.device("cuda")
    launcher = cuda_views.load(device)
    assert launcher is not None, "the kernel cannot be had; the log says why"
    machine = Machine(device, launcher)
    monkeypatch.setattr(cuda_views, "load", lambda _: machine.launcher)
    return machine


def launched(driver: ctypes.CDLL) -> tuple[int, int, int, int]:
    """How many launches the host's driver has seen; of the last: blocks, threads, shared bytes."""
    told = (ctypes.c_uint * 4)()
    driver.host_last(told)
    return tuple(told)
