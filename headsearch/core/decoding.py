"""Image files to square uint8 arrays, in parallel. PIL releases the GIL while it decodes and resizes.

8-bit files are decoded in one pass. Files with more bits are read twice: the first pass finds the smallest
and the largest value of the whole data set (`value_range`), the second decodes them with the range that
follows.
"""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from PIL import Image, ImageOps

from headsearch.core.value_range import (
    Extents,
    Kind,
    RangesByKind,
    Values,
    full_range,
    to_eight_bits,
    wide_kind,
    wide_values,
)
from headsearch.errors import StorageError

Pixels = NDArray[np.uint8]

_CHUNK = 32  # files a thread takes at a time
_ORIENTATION = 0x0112
"""EXIF's tag of which way is up."""
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
    unlabelled: Pixels | None = None
    """Images (U, 3, S, S) that only pretraining uses."""
    notes: tuple[str, ...] = ()
    """What a person should know of how they were decoded, a line each."""
    whole: Pixels | None = None
    """Training images and, after them, the unlabelled ones, where both lie in one array."""


def decode_file(
    path: Path,
    size: int,
    *,
    trim_bottom: int = 0,
    squeeze: bool = False,
    ranges: RangesByKind | None = None,
    seen: Callable[[Kind, Values], None] | None = None,
) -> Pixels:
    """One image as (3, size, size); `trim_bottom` pixels are cut off its lower edge first.

    `squeeze` keeps all of it, whatever its proportions, else its central square. A file with more than 8 bits
    a channel is read with `ranges`, else with the range of its own values, which `seen` is told.

    Raises whatever PIL raises at a damaged file.
    """
    with Image.open(path) as image:
        if (kind := wide_kind(image)) is not None:
            values, alpha = wide_values(image, path)
            if seen is not None:
                seen(kind, values)
            if ranges is None or kind not in ranges:
                own = Extents()
                own.add(kind, values)
                ranges = own.ranges() or {kind: full_range(kind, 0, 1)}
            narrow = Image.fromarray(to_eight_bits(values, ranges[kind]))
            if alpha is not None:
                narrow.putalpha(Image.fromarray(alpha))
            narrow.getexif()[_ORIENTATION] = image.getexif().get(_ORIENTATION, 1)
            return _fitted(narrow, size, trim_bottom, squeeze=squeeze)
        # A JPEG that is far too large is decoded at a half, a quarter or an eighth, but never to less than
        # twice the final size; large photographs take a fraction of the time.
        if not trim_bottom:
            image.draft(None, (2 * size, 2 * size))
        return _fitted(image, size, trim_bottom, squeeze=squeeze)


def _fitted(image: Image.Image, size: int, trim_bottom: int, *, squeeze: bool) -> Pixels:
    upright = ImageOps.exif_transpose(image)
    if trim_bottom:
        upright = upright.crop((0, 0, upright.width, upright.height - trim_bottom))
    return fit(as_rgb(upright), size, squeeze=squeeze)


def as_rgb(image: Image.Image) -> Image.Image:
    """A PIL image with 8 bits a channel as RGB. Transparent parts lie on white."""
    if image.mode == "RGB":
        return image
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
) -> tuple[Pixels, dict[int, str], list[str]]:
    """All files as a memory-mapped (N, 3, size, size) array in the new file `target`.

    Also returns the indices of unreadable files, each with the reason, and notes; their rows are zero.
    Raises StorageError if the disk fails rather than a file.
    """
    read, notes = decode_splits({target: paths}, size, trim_bottom=trim_bottom, squeeze=squeeze)
    return *read[target], notes


def decode_splits(
    splits: Mapping[Path, Sequence[Path]], size: int, *, trim_bottom: int = 0, squeeze: bool = False
) -> tuple[dict[Path, tuple[Pixels, dict[int, str]]], list[str]]:
    """Do what `decode_files` does for several splits of one data set, which share their value range.

    Keys are the new files of their arrays.
    """
    extents = Extents()
    read: dict[Path, tuple[Pixels, dict[int, str]]] = {}
    wide: dict[Path, list[int]] = {}
    decode_one = partial(decode_file, trim_bottom=trim_bottom, squeeze=squeeze)
    for target, paths in splits.items():
        out = new_array(target, (len(paths), 3, size, size))
        wide[target] = []

        def first(index: int, paths: Sequence[Path], out: Pixels, wide: list[int]) -> None:
            def seen(kind: Kind, values: Values) -> None:
                extents.add(kind, values)
                wide.append(index)

            out[index] = decode_one(paths[index], size, seen=seen)

        decode = partial(first, paths=paths, out=out, wide=wide[target])
        read[target] = out, _each(decode, range(len(paths)), paths)
    ranges = extents.ranges()

    def second(index: int, paths: Sequence[Path], out: Pixels) -> None:
        out[index] = decode_one(paths[index], size, ranges=ranges)

    for target, paths in splits.items():
        out, failures = read[target]
        again = sorted(set(wide[target]) - set(failures))
        failures |= _each(partial(second, paths=paths, out=out), again, paths)
    return read, extents.lines()


def _each(decode: Callable[[int], None], indices: Iterable[int], paths: Sequence[Path]) -> dict[int, str]:
    """Call `decode` for every index, in threads; returns the reasons of those that fail."""
    chosen = list(indices)

    def decode_chunk(start: int) -> dict[int, str]:
        failures = {}
        for index in chosen[start : start + _CHUNK]:
            try:
                decode(index)
            except Exception as error:  # a damaged file makes PIL raise almost anything
                if isinstance(error, OSError) and error.errno not in _ABSENT:
                    raise StorageError(f"{paths[index]}: cannot be read ({error.strerror})") from error
                failures[index] = _reason(error, paths[index])
        return failures

    failures: dict[int, str] = {}
    if not chosen:
        return failures
    with warnings.catch_warnings():
        # PIL warns of odd metadata in files that it reads well.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "decode") as pool:
            for found in pool.map(decode_chunk, range(0, len(chosen), _CHUNK)):
                failures |= found
    return failures


def _reason(error: Exception, path: Path) -> str:
    """Why a file cannot be read, in one line; its name stands before it."""
    if isinstance(error, OSError) and error.strerror:
        dangling = error.errno in (errno.ENOENT, errno.ELOOP) and path.is_symlink()
        return "a link that leads nowhere" if dangling else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
