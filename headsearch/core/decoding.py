"""Image files to square uint8 arrays, in parallel. PIL releases the GIL while it decodes and resizes.

8-bit files are decoded in one pass. Files with more bits are read twice: the first pass finds the smallest
and the largest value of the whole data set (`value_range`), the second decodes them with the range that
follows.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from PIL import Image, ImageOps

from headsearch.core.photos import PhotoArray, sizes_of
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
from headsearch.cores import usable_cores
from headsearch.errors import StorageError

Pixels = NDArray[np.uint8]
Stored = Pixels | PhotoArray

_CHUNK = 32  # files a thread takes at a time
_SAMPLE = 256  # files whose sizes stand for all
_BYTES_PER_THREAD = 8192
_ORIENTATION = 0x0112
"""EXIF's tag of which way is up."""
_TURNED = 5
"""Its values from this on turn height into width."""
_ABSENT = {None, errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ELOOP, errno.EPERM}
"""OSErrors that say something about one file; PIL's own have no errno. Others are the disk's."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pictures:
    """Images (N, 3, S, S), or photos, with their labels (N,)."""

    images: Stored
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Decoded:
    """A whole data set. `skipped` are unreadable files; `total` counts them too."""

    classes: tuple[str, ...]
    train: Pictures
    test: Pictures
    total: int
    skipped: tuple[str, ...] = field(default=())
    unlabelled: Stored | None = None
    """Images (U, 3, S, S), or photos, that only pretraining uses."""
    notes: tuple[str, ...] = ()
    """What a person should know of how they were decoded, a line each."""
    whole: Stored | None = None
    """Training images and, after them, the unlabelled ones, where both lie in one array."""
    view_side: int = 0
    """Side of what is made of photos."""


class OtherSizeError(Exception):
    """An image is no square of the side that it was expected to have."""


def decode_file(
    path: Path,
    size: int,
    *,
    trim_bottom: int = 0,
    ranges: RangesByKind | None = None,
    seen: Callable[[Kind, Values], None] | None = None,
    resize: bool = True,
) -> Pixels:
    """One image as (3, size, size); `trim_bottom` pixels are cut off its lower edge first.

    What is kept is its central square. A file with more than 8 bits a channel is read with `ranges`, else
    with the range of its own values, which `seen` is told.

    Raises OtherSizeError if it is no such square and `resize` is false, and whatever PIL raises at a damaged
    file.
    """
    with Image.open(path) as image:
        if not resize and _upright_size(image, trim_bottom, size) != (size, size):
            raise OtherSizeError
        # A JPEG that is far too large is decoded at a half, a quarter or an eighth, but never to less than
        # twice the final size; large photographs take a fraction of the time.
        if not trim_bottom:
            image.draft(None, (2 * size, 2 * size))
        return fit(_upright(image, path, trim_bottom, ranges, seen), size)


def decode_photo(
    path: Path,
    height: int,
    width: int,
    *,
    trim_bottom: int = 0,
    ranges: RangesByKind | None = None,
    seen: Callable[[Kind, Values], None] | None = None,
) -> Pixels:
    """All of a photo as (3, height, width); otherwise like `decode_file`."""
    with Image.open(path) as image:
        if not trim_bottom:
            image.draft(None, (2 * max(height, width),) * 2)
        whole = _upright(image, path, trim_bottom, ranges, seen)
        if whole.size != (width, height):
            whole = whole.resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(whole).transpose(2, 0, 1)


def upright_size(path: Path, *, trim_bottom: int = 0) -> tuple[int, int]:
    """Height and width of a photo, the right way up. Raises whatever PIL raises at a damaged file."""
    with Image.open(path) as image:
        return _upright_size(image, trim_bottom)


def _upright_size(image: Image.Image, trim_bottom: int, square: int | None = None) -> tuple[int, int]:
    """Height and width of an opened image, the right way up.

    One of the size `square` is not asked which way is up: PIL decodes a whole PNG for it.
    """
    width, height = image.size
    if image.size != (square, square) and image.getexif().get(_ORIENTATION, 1) >= _TURNED:
        width, height = height, width
    return max(1, height - trim_bottom), width


def _upright(
    image: Image.Image,
    path: Path,
    trim_bottom: int,
    ranges: RangesByKind | None,
    seen: Callable[[Kind, Values], None] | None,
) -> Image.Image:
    """An opened image with 8 bits a channel, RGB, the right way up, without its lower edge."""
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
        image = narrow
    upright = ImageOps.exif_transpose(image)
    if trim_bottom:
        upright = upright.crop((0, 0, upright.width, upright.height - trim_bottom))
    return as_rgb(upright)


def as_rgb(image: Image.Image) -> Image.Image:
    """A PIL image with 8 bits a channel as RGB. Transparent parts lie on white."""
    if image.mode == "RGB":
        return image
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def fit(image: Image.Image, size: int) -> Pixels:
    """Central square of an RGB image, resized (bicubic, antialiased) to (3, size, size).

    The square is the same as resizing the shorter side to `size` and then cropping the centre, in one pass.
    """
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


@dataclass(frozen=True)
class Read:
    """What became of the files of one split."""

    images: Stored
    """A row for each file; those that could not be read are zero."""
    failures: dict[int, str]
    """Files that could not be read, with the reason."""
    other_size: NDArray[np.bool_]
    """(N,): true where a photo is no square of the side that was asked for. Without meaning for failures."""


def decode_splits(
    splits: Mapping[Path, Sequence[Path]],
    size: int,
    *,
    stored_side: int,
    trim_bottom: int = 0,
) -> tuple[dict[Path, Read], list[str]]:
    """Decode all files of a data set into new memory-mapped files, whose names are the keys of `splits`.

    Where all are squares of side `size`, to (N, 3, size, size) each, else to photos with a shorter side of
    at most `stored_side`. All share one value range, of which the notes tell. Raises StorageError if the
    disk fails rather than a file.
    """
    # A file is opened once where the first ones promise that all are such squares, else for its size, too.
    if _are_squares(
        _looked_at({key: paths[:1] for key, paths in splits.items()}, stored_side, trim_bottom), size
    ):
        try:
            return _decoded(splits, size, trim_bottom)
        except OtherSizeError:
            _log.info("not all are squares of %d pixels: decoding again, as photos", size)
    return _decoded(splits, size, trim_bottom, _looked_at(splits, stored_side, trim_bottom))


@dataclass(frozen=True)
class _Sizes:
    """Of the files of one split, as PIL finds them without decoding."""

    shapes: NDArray[np.int32]
    """(N, 4), as in `PhotoArray`; ones where a file could not be read."""
    failures: dict[int, str]


def _looked_at(
    splits: Mapping[Path, Sequence[Path]], stored_side: int, trim_bottom: int
) -> dict[Path, _Sizes]:
    sizes = {}
    for target, paths in splits.items():
        shapes = np.ones((len(paths), 4), dtype=np.int32)

        def look(index: int, paths: Sequence[Path], out: NDArray[np.int32]) -> None:
            height, width = upright_size(paths[index], trim_bottom=trim_bottom)
            scale = min(1.0, stored_side / min(height, width))
            out[index] = max(1, round(height * scale)), max(1, round(width * scale)), height, width

        failures = _each(partial(look, paths=paths, out=shapes), range(len(paths)), paths)
        sizes[target] = _Sizes(shapes, failures)
    return sizes


def _are_squares(sizes: Mapping[Path, _Sizes], size: int) -> bool:
    """Whether all that can be read are squares of side `size`."""
    return all(
        bool((np.delete(of.shapes, list(of.failures), axis=0)[:, 2:] == size).all()) for of in sizes.values()
    )


def _decoded(
    splits: Mapping[Path, Sequence[Path]],
    size: int,
    trim_bottom: int,
    photos: Mapping[Path, _Sizes] | None = None,
) -> tuple[dict[Path, Read], list[str]]:
    """Do what `decode_splits` does, to squares or, given their sizes, to `photos`.

    Raises OtherSizeError at the first file that is no such square.
    """
    extents = Extents()
    read: dict[Path, Read] = {}
    wide: dict[Path, list[int]] = {}

    def decode(index: int, paths: Sequence[Path], out: Stored, **how: Any) -> None:
        if isinstance(out, PhotoArray):
            height, width = map(int, out.shapes[index, :2])
            pixels = decode_photo(paths[index], height, width, trim_bottom=trim_bottom, **how)
            start = int(out.offsets[index])
            out.data[start : start + pixels.size] = pixels.ravel()
        else:
            out[index] = decode_file(paths[index], size, trim_bottom=trim_bottom, resize=False, **how)

    def first(index: int, paths: Sequence[Path], out: Stored, wide: list[int]) -> None:
        def seen(kind: Kind, values: Values) -> None:
            extents.add(kind, values)
            wide.append(index)

        decode(index, paths, out, seen=seen)

    for target, paths in splits.items():
        out: Stored
        failures: dict[int, str] = {}
        other_size = np.zeros(len(paths), dtype=np.bool_)
        if photos is None:
            out = new_array(target, (len(paths), 3, size, size))
        else:
            shapes, failures = photos[target].shapes, photos[target].failures
            other_size = (shapes[:, 2:] != size).any(1)
            out = PhotoArray.packed(new_array(target, (max(1, int(sizes_of(shapes).sum())),)), shapes)
        wide[target] = []
        rest = sorted(set(range(len(paths))) - set(failures))
        each = partial(first, paths=paths, out=out, wide=wide[target])
        read[target] = Read(out, failures | _each(each, rest, paths), other_size)
    ranges = extents.ranges()
    for target, paths in splits.items():
        again = sorted(set(wide[target]) - set(read[target].failures))
        each = partial(decode, paths=paths, out=read[target].images, ranges=ranges)
        read[target].failures.update(_each(each, again, paths))
    return read, extents.lines()


def _each(decode: Callable[[int], None], indices: Iterable[int], paths: Sequence[Path]) -> dict[int, str]:
    """Call `decode` for every index, in threads; returns the reasons of those that fail.

    Raises StorageError if the disk fails, OtherSizeError if `decode` does.
    """
    chosen = list(indices)

    def decode_chunk(start: int) -> dict[int, str]:
        failures = {}
        for index in chosen[start : start + _CHUNK]:
            try:
                decode(index)
            except OtherSizeError:
                raise
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
        with ThreadPoolExecutor(_threads(paths), "decode") as pool:
            for found in pool.map(decode_chunk, range(0, len(chosen), _CHUNK)):
                failures |= found
    return failures


def _threads(paths: Sequence[Path]) -> int:
    """How many threads decode files of their mean size at a time: one a core at most.

    PIL releases the GIL in its decoders only. A file of 1 kB spends nearly all its time elsewhere in PIL,
    where threads wait for each other: CIFAR-10's JPEG files took 0.70 ms each with 16 threads on 16 cores,
    and about 0.16 ms with one thread on another machine.
    """
    sizes = []
    for path in paths[:: 1 + len(paths) // _SAMPLE]:
        with contextlib.suppress(OSError):
            sizes.append(path.stat().st_size)
    wanted = 1 + sum(sizes) // max(1, len(sizes)) // _BYTES_PER_THREAD
    return min(wanted, usable_cores())


def _reason(error: Exception, path: Path) -> str:
    """Why a file cannot be read, in one line; its name stands before it."""
    if isinstance(error, OSError) and error.strerror:
        dangling = error.errno in (errno.ENOENT, errno.ELOOP) and path.is_symlink()
        return "a link that leads nowhere" if dangling else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def compacted(images: Pixels, kept: NDArray[np.int64]) -> Pixels:
    """Move the rows `kept` (ascending) to the front, in place: `images` may not fit into memory."""
    if len(kept) < len(images):
        for start in range(0, len(kept), 1024):
            rows = kept[start : start + 1024]
            images[start : start + len(rows)] = images[rows]
    return images[: len(kept)]
