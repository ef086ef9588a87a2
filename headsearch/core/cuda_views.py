"""Views on GPUs: one launch draws the parameters of all views of a batch and makes them (`views.cu`).

The path of whole batches needs some 310 launches for that, each as long as a small encoder's layer takes to
run. Where the kernel cannot be had, the log says why, once, and views are made by that path.

Shapes: B images, V views, S image side.
"""

from __future__ import annotations

import ctypes
import logging
from ctypes import c_float, c_int, c_void_p
from functools import cache
from importlib.resources import files
from typing import Final, Protocol

import torch
from torch import Tensor

from headsearch.core.color import LUMA
from headsearch.core.cuda_driver import Kernel
from headsearch.core.draws import ATTEMPTS, COLUMNS, LOG_RATIO, SIGMA, SOLARIZE_FROM, Distribution
from headsearch.core.randomness import Philox

logger = logging.getLogger(__name__)

MOST_TAPS: Final = 64
"""Half of the largest blur kernel, its middle included: for images of up to 1,279 pixels."""
MOST_THREADS: Final = 1024
SCRATCH_VALUES: Final = 1 << 28
"""Floats of GPU memory used at most for views that are too large for shared memory."""

DTYPES: Final = (torch.float32, torch.bfloat16)
"""What views may come in."""

POINTERS: Final = ("images", "out", "at", "given", "record", "scratch", "scale", "shift")
INTEGERS: Final = (
    "image_count",
    "views",
    "firsts",
    "size",
    "blur_half",
    "bfloat16",
    "channels_last",
)
FLOATS: Final = (
    "crop_scale_min",
    "jitter_probability",
    "hue",
    "flip_probability",
    "grayscale_probability",
    "blur_first",
    "blur_second",
    "solarize_first",
    "solarize_second",
    "brightness_low",
    "contrast_low",
    "saturation_low",
    "brightness_high",
    "contrast_high",
    "saturation_high",
)
"""In the order of `Distribution.numbers`, which begins with the image side."""


class Arguments(ctypes.Structure):
    """The structure of this name in `views.cu`, field for field."""

    _fields_ = (
        *((name, c_void_p) for name in POINTERS),
        *((name, c_int) for name in INTEGERS),
        *((name, c_float) for name in FLOATS),
    )


def source() -> str:
    """Read the kernel's source."""
    return files("headsearch.core").joinpath("views.cu").read_text(encoding="utf-8")


def definitions() -> dict[str, str]:
    """Constants that the source asks for."""
    numbers = {
        "LOG_RATIO": LOG_RATIO[0],
        "LOG_SPAN": LOG_RATIO[1] - LOG_RATIO[0],
        "SIGMA_LOW": SIGMA[0],
        "SIGMA_SPAN": SIGMA[1] - SIGMA[0],
        **dict(zip(("RED", "GREEN", "BLUE"), LUMA, strict=True)),
        "SOLARIZE_FROM": SOLARIZE_FROM,
    }
    sizes = {"ATTEMPTS": ATTEMPTS, "MOST_TAPS": MOST_TAPS, "MOST_THREADS": MOST_THREADS}
    return {name: f"({value!r}f)" for name, value in numbers.items()} | {
        name: str(value) for name, value in sizes.items()
    }


class Launcher(Protocol):
    """What `load` gives. A test that has no GPU replaces `load`, and with it all that touches the driver."""

    shared_bytes: int
    """Shared memory that a block may have."""
    processors: int
    """Multiprocessors of the GPU."""

    def launch(
        self, arguments: Arguments, tensors: dict[str, Tensor], blocks: int, threads: int, shared: int
    ) -> None:
        """Launch the kernel; `tensors` are what the pointers of `arguments`, still null, point to."""


class ViewKernel:
    """The kernel on one GPU. Raises what `cuda_driver.Kernel` raises."""

    def __init__(self, device: torch.device) -> None:
        self._kernel = Kernel(device, source(), "make_views", definitions())
        self.shared_bytes, self.processors = self._kernel.shared_bytes, self._kernel.processors
        self.launch(Arguments(views=0), {}, blocks=1, threads=MOST_THREADS, shared=self.shared_bytes)
        self._kernel.wait()

    def launch(
        self, arguments: Arguments, tensors: dict[str, Tensor], blocks: int, threads: int, shared: int
    ) -> None:
        """Launch the kernel on torch's current stream; see `Launcher`."""
        filled = Arguments.from_buffer_copy(arguments)
        for name, tensor in tensors.items():
            setattr(filled, name, tensor.data_ptr())
        self._kernel.launch(blocks, threads, shared, filled)


def load(device: torch.device) -> Launcher | None:
    """Compile the kernel for `device`, once per process; None, and a warning in the log, where that fails."""
    try:
        index = torch.cuda.current_device() if device.index is None else device.index
    except (RuntimeError, AssertionError):  # torch without CUDA, or without a driver
        index = 0
    return _loaded(torch.device(device.type, index))


@cache
def _loaded(device: torch.device) -> Launcher | None:
    try:
        return ViewKernel(device)
    except (OSError, AttributeError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning("views on %s are made without the fused kernel, which is slower: %s", device, reason)
        return None


@cache
def supported(image_size: int, blur_half: int) -> bool:
    """Whether the kernel makes views of this size; says once in the log if it does not."""
    if image_size >= 2 and blur_half < MOST_TAPS:
        return True
    logger.warning("views of %d pixels are made without the fused kernel, which is slower", image_size)
    return False


class FusedViews:
    """Makes views of one `distribution` by the kernel.

    `blur_half` is half of the blur kernel's side, rounded down, and 0 if no view is blurred; `scale` and
    `shift` (3,) are the normalisation, float32 on the device. Nothing here waits for the device, and a CUDA
    graph may capture all of it; each replay then goes on in the stream of random numbers.
    """

    def __init__(
        self,
        launcher: Launcher,
        distribution: Distribution,
        blur_half: int,
        normalization: tuple[Tensor, Tensor],
        *,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
    ) -> None:
        self._launcher, self._dtype, self._format = launcher, dtype, memory_format
        scale, shift = (part.flatten().contiguous() for part in normalization)
        self._normalization = {"scale": scale, "shift": shift}
        size, *numbers = distribution.numbers()
        self._size = int(size)
        self._arguments = Arguments(
            size=self._size,
            blur_half=blur_half,
            bfloat16=dtype == torch.bfloat16,
            channels_last=memory_format == torch.channels_last,
            **dict(zip(FLOATS, numbers, strict=True)),
        )
        self._values = (4 if blur_half else 3) * self._size**2
        self._threads = 256 if self._size <= 48 else 512 if self._size <= 80 else MOST_THREADS

    def make(self, images: Tensor, count: int, firsts: int, stream: Philox) -> Tensor:
        """Draw `count` views (V, 3, S, S) of uint8 images (B, 3, S, S), view v of image v mod B.

        Views from number `firsts` on are second ones. Raises ValueError if the images are not as said, or
        on another device.
        """
        out = self._views(images, count, firsts, {"at": stream.at})
        stream.advance()
        return out

    def apply(self, images: Tensor, table: Tensor) -> Tensor:
        """Make the views (V, 3, S, S) whose parameters are `table`; see `Draws.table`."""
        return self._views(images, len(table), len(table), {"given": table.contiguous()})

    def draw(self, count: int, firsts: int, stream: Philox) -> Tensor:
        """Draw parameters as `make` does, and make no views; give their table (V, `COLUMNS`)."""
        table = torch.empty(count, COLUMNS, device=stream.at.device)
        self._launch(1, count, firsts, {"at": stream.at, "record": table})
        stream.advance()
        return table

    def _views(self, images: Tensor, count: int, firsts: int, drawn: dict[str, Tensor]) -> Tensor:
        expected, device = (3, self._size, self._size), self._normalization["scale"].device
        if images.dtype != torch.uint8 or images.shape[1:] != expected or images.device != device:
            raise ValueError(
                f"images: {images.dtype} {tuple(images.shape)} on {images.device}, "
                f"expected torch.uint8 (B, 3, {self._size}, {self._size}) on {device}"
            )
        shape = (count, *expected)
        out = torch.empty(shape, dtype=self._dtype, device=device, memory_format=self._format)
        self._launch(len(images), count, firsts, {"images": images.contiguous(), "out": out, **drawn})
        return out

    def _launch(self, image_count: int, views: int, firsts: int, tensors: dict[str, Tensor]) -> None:
        blocks, shared = views, 4 * self._values
        tensors |= self._normalization
        if "out" not in tensors:
            shared = 0
        elif shared > self._launcher.shared_bytes:
            # Two blocks a multiprocessor, each of which makes one view after the other.
            blocks, shared = min(views, 2 * self._launcher.processors, SCRATCH_VALUES // self._values), 0
            tensors["scratch"] = torch.empty(blocks, self._values, device=tensors["out"].device)
        arguments = Arguments.from_buffer_copy(self._arguments)
        arguments.image_count, arguments.views, arguments.firsts = image_count, views, firsts
        self._launcher.launch(arguments, tensors, blocks, self._threads, shared)
