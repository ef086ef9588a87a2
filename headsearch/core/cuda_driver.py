"""Kernels in CUDA C++, compiled at run time by NVRTC and launched through the CUDA driver.

No compiler and no CUDA toolkit is needed: NVRTC is one of the libraries that torch's wheels bring, and the
driver is there where a GPU is. `torch.cuda._compile_kernel` (torch 2.9 to 2.14) compiles in the same way, but
raises where CUDA_HOME is not found, as where torch was installed by pip alone, and it takes no structures.

Nothing here has state but what the driver keeps; errors are RuntimeError, or OSError and AttributeError where
a library or a function of it is missing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from contextlib import AbstractContextManager
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import torch

# Numbers from cuda.h, which never change.
_MULTIPROCESSORS: Final = 16
_CAPABILITY: Final = (75, 76)
_SHARED_PER_BLOCK: Final = 97
_STATIC_SHARED: Final = 1
_DYNAMIC_SHARED: Final = 8

_NVRTC_FUNCTIONS: Final = {
    "nvrtcCreateProgram": (POINTER(c_void_p), c_char_p, c_char_p, c_int, c_void_p, c_void_p),
    "nvrtcCompileProgram": (c_void_p, c_int, POINTER(c_char_p)),
    "nvrtcGetProgramLogSize": (c_void_p, POINTER(c_size_t)),
    "nvrtcGetProgramLog": (c_void_p, c_char_p),
    "nvrtcGetCUBINSize": (c_void_p, POINTER(c_size_t)),
    "nvrtcGetCUBIN": (c_void_p, c_char_p),
    "nvrtcDestroyProgram": (POINTER(c_void_p),),
}
_DRIVER_FUNCTIONS: Final = {
    "cuInit": (c_uint,),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxGetCurrent": (POINTER(c_void_p),),
    "cuCtxSetCurrent": (c_void_p,),
    "cuCtxSynchronize": (),
    "cuModuleLoadData": (POINTER(c_void_p), c_char_p),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuFuncGetAttribute": (POINTER(c_int), c_int, c_void_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuLaunchKernel": (c_void_p, *(c_uint,) * 7, c_void_p, POINTER(c_void_p), POINTER(c_void_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
}


def _declared(library: ctypes.CDLL, functions: Mapping[str, tuple[Any, ...]]) -> ctypes.CDLL:
    for name, types in functions.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, c_int
    return library


@lru_cache(maxsize=1)
def nvrtc() -> ctypes.CDLL:
    """Load the NVRTC of torch's CUDA version. Raises OSError if there is none."""
    name = f"libnvrtc.so.{(torch.version.cuda or 'none').partition('.')[0]}"
    # torch has loaded it already, or the system finds it, or it is where pip puts it.
    packages = Path(torch.__file__).parents[1] / "nvidia"
    for candidate in (name, *map(str, packages.glob(f"*/lib/{name}"))):
        try:
            return _declared(ctypes.CDLL(candidate), _NVRTC_FUNCTIONS)
        except OSError:
            continue
    raise OSError(f"no {name}")


@lru_cache(maxsize=1)
def driver() -> ctypes.CDLL:
    """Load the CUDA driver's library. Raises OSError if there is none."""
    return _declared(ctypes.CDLL("libcuda.so.1"), _DRIVER_FUNCTIONS)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Within: `device` is the current one."""
    return torch.cuda.device(device)


def current_stream(device: torch.device) -> int:
    """Give the handle of the stream that torch's operations on `device` go to now."""
    return torch.cuda.current_stream(device).cuda_stream


def compile_source(source: str, architecture: str, definitions: Mapping[str, str]) -> bytes:
    """Compile CUDA C++ for `architecture`, such as ``sm_90``, to machine code (a cubin).

    `definitions` are preprocessor macros. Raises RuntimeError with the compiler's words.
    """
    library, program, size = nvrtc(), c_void_p(), c_size_t()

    def check(result: int, doing: str) -> None:
        if result:
            raise RuntimeError(f"NVRTC: error {result} while {doing}")

    options = [f"--gpu-architecture={architecture}", "--std=c++17"]
    options += [f"--define-macro={name}={value}" for name, value in definitions.items()]
    encoded = (c_char_p * len(options))(*(option.encode() for option in options))
    check(
        library.nvrtcCreateProgram(byref(program), source.encode(), b"kernel.cu", 0, None, None), "it starts"
    )
    try:
        if library.nvrtcCompileProgram(program, len(options), encoded):
            check(library.nvrtcGetProgramLogSize(program, byref(size)), "it reports")
            log = ctypes.create_string_buffer(size.value)
            check(library.nvrtcGetProgramLog(program, log), "it reports")
            raise RuntimeError(f"NVRTC: {log.value.decode(errors='replace').strip()}")
        check(library.nvrtcGetCUBINSize(program, byref(size)), "it gives its code")
        code = ctypes.create_string_buffer(size.value)
        check(library.nvrtcGetCUBIN(program, code), "it gives its code")
        return code.raw
    finally:
        library.nvrtcDestroyProgram(byref(program))


def _check(result: int) -> None:
    if result:
        text = c_char_p()
        driver().cuGetErrorString(result, byref(text))
        raise RuntimeError(f"CUDA error: {(text.value or b'unknown').decode()} ({result})")


class Kernel:
    """The function `name` of `source`, compiled for `device` and loaded there; it takes one structure.

    Compiles and waits for the device when it is made, never afterwards.
    """

    def __init__(self, device: torch.device, source: str, name: str, definitions: Mapping[str, str]) -> None:
        self.device = device
        number, self._function, module = c_int(), c_void_p(), c_void_p()
        _check(driver().cuInit(0))  # torch may not have used CUDA yet
        _check(driver().cuDeviceGet(byref(number), device.index))
        self._number = number.value
        major, minor = map(self._attribute, _CAPABILITY)
        code = compile_source(source, f"sm_{major}{minor}", definitions)
        static = c_int()
        with on_device(device):
            self._enter()
            _check(driver().cuModuleLoadData(byref(module), code))
            _check(driver().cuModuleGetFunction(byref(self._function), module, name.encode()))
            _check(driver().cuFuncGetAttribute(byref(static), _STATIC_SHARED, self._function))
            self.shared_bytes = self._attribute(_SHARED_PER_BLOCK) - static.value
            """Shared memory that a launch may ask for."""
            _check(driver().cuFuncSetAttribute(self._function, _DYNAMIC_SHARED, self.shared_bytes))
        self.processors = self._attribute(_MULTIPROCESSORS)

    def launch(self, blocks: int, threads: int, shared: int, arguments: ctypes.Structure) -> None:
        """Launch `blocks` of `threads` with `shared` bytes of dynamic shared memory each.

        Goes to torch's current stream of the device and does not wait; a CUDA graph may capture it. Raises
        RuntimeError if the driver refuses.
        """
        values = (c_void_p * 1)(ctypes.addressof(arguments))  # the driver copies them before it returns
        with on_device(self.device):
            self._enter()
            stream = current_stream(self.device)
            _check(
                driver().cuLaunchKernel(
                    self._function, blocks, 1, 1, threads, 1, 1, shared, stream, values, None
                )
            )

    def wait(self) -> None:
        """Return when the device has done all that it was told. Raises RuntimeError if something failed."""
        with on_device(self.device):
            self._enter()
            _check(driver().cuCtxSynchronize())

    def _attribute(self, attribute: int) -> int:
        value = c_int()
        _check(driver().cuDeviceGetAttribute(byref(value), attribute, self._number))
        return value.value

    def _enter(self) -> None:
        """Give this thread the context of torch on the device, which torch itself does as late as it can."""
        context = c_void_p()
        _check(driver().cuCtxGetCurrent(byref(context)))
        if not context:
            _check(driver().cuDevicePrimaryCtxRetain(byref(context), self._number))
            _check(driver().cuCtxSetCurrent(context))
