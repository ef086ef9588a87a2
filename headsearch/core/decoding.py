"""Image files to square uint8 arrays, in parallel. PIL releases the GIL while it decodes and resizes."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from PIL import Image, ImageOps

from headsearch.errors import StorageError

Pixels = NDArray[np.uint8]

_CHUNK = 32  # files a thread takes at a time
_ABSENT = {None, errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ELOOP, errno.EPERM}
"""OSErrors that say something about one file; PIL's own have no errno. Others are the disk's."""


@dataclass(frozen=True)
class Pictures:
    """Images (N, 3, S, S) with their labels (N,)."""

    images: Pixels
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Decoded:
    """A whole data set. `skipped` are unreadable files; `total` counts them too."""

    classes: tuple[str, ...]
    train: Pictures
    test: Pictures
    total: int
    skipped: tuple[str, ...] = field(default=())


def decode_file(path: Path, size: int, *, trim_bottom: int = 0, squeeze: bool = False) -> Pixels:
    """One image as (3, size, size); `trim_bottom` pixels are cut off its lower edge first.

    `squeeze` keeps all of it, whatever its proportions, else its central square.

    Raises whatever PIL raises at a damaged file.
    """
    with Image.open(path) as image:
        # A JPEG that is far too large is decoded at a half, a quarter or an eighth, but never to less than
        # twice the final size; large photographs take a fraction of the time.
        if not trim_bottom:
            image.draft(None, (2 * size, 2 * size))
        upright = ImageOps.exif_transpose(image)
        if trim_bottom:
            upright = upright.crop((0, 0, upright.width, upright.height - trim_bottom))
        return fit(as_rgb(upright), size, squeeze=squeeze)


def as_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB.

    Transparent parts lie on white. Integer modes wider than 8 bits are taken for 16-bit, floats for [0, 1].
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        wide = np.clip(np.asarray(image, dtype=np.int64), 0, 65535)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        unit = np.clip(np.nan_to_num(np.asarray(image, dtype=np.float64)), 0.0, 1.0)
        return Image.fromarray(np.rint(unit * 255).astype(np.uint8)).convert("RGB")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def fit(image: Image.Image, size: int, *, squeeze: bool = False) -> Pixels:
    """Central square of an RGB image, or all of it, resized (bicubic, antialiased) to (3, size, size).

    The square is the same as resizing the shorter side to `size` and then cropping the centre, in one pass.
    """
    if squeeze:
        whole = image.resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(whole).transpose(2, 0, 1)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    square = image.crop(box) if side == size else image.resize((size, size), Image.Resampling.BICUBIC, box)
    return np.asarray(square).transpose(2, 0, 1)


def fit_array(images: Pixels, size: int | None) -> Pixels:
    """Images (N, 3, H, W) as (N, 3, size, size); `size` None keeps them as they are."""
    if size is None or images.shape[2:] == (size, size):
        return images
    return np.stack(
        [fit(Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))), size) for image in images]
    )


def new_array(path: Path, shape: tuple[int, ...]) -> Pixels:
    """Make a memory-mapped uint8 array in the new file `path`. Raises OSError if the disk has no room."""
    array = open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    with path.open("r+b") as file:
        # A disk that fills up under a mapping kills the process instead of raising.
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def decode_files(
    paths: Sequence[Path], size: int, target: Path, *, trim_bottom: int = 0, squeeze: bool = False
) -> tuple[Pixels, dict[int, str]]:
    """All files as a memory-mapped (N, 3, size, size) array in the new file `target`.

    Also returns the indices of unreadable files, each with the reason; their rows are zero.
    Raises StorageError if the disk fails rather than a file.
    """
    out = new_array(target, (len(paths), 3, size, size))

    def decode_chunk(start: int) -> dict[int, str]:
        failures = {}
        for index in range(start, min(start + _CHUNK, len(paths))):
            try:
                out[index] = decode_file(paths[index], size, trim_bottom=trim_bottom, squeeze=squeeze)
            except Exception as error:  # a damaged file makes PIL raise almost anything
                if isinstance(error, OSError) and error.errno not in _ABSENT:
                    raise StorageError(f"{paths[index]}: cannot be read ({error.strerror})") from error
                failures[index] = " ".join(str(error).split()) or type(error).__name__
        return failures

    failures: dict[int, str] = {}
    with warnings.catch_warnings():
        # PIL warns of odd metadata in files that it reads well.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "decode") as pool:
            for found in pool.map(decode_chunk, range(0, len(paths), _CHUNK)):
                failures |= found
    return out, failures
