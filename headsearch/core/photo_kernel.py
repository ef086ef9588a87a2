"""Views and plain images of photos on the CPU; the formulas are those of `photos.Photos`.

Each is made whole while its pixels are in the core's cache, as `viewkernel` does it of square images, whose
functions come after the crop here, too.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from numpy import float32
from torch import Tensor

from headsearch.core.machine_code import compiled
from headsearch.core.photos import Photos
from headsearch.core.pil_kernels import TWO, blur_repeating, cubic
from headsearch.core.viewkernel import (
    HALF,
    LEAST_ROWS,
    ONE,
    TO_UNIT,
    ZERO,
    Array,
    blend,
    blur,
    finish,
    mean_grey,
    shift_hue,
)


@compiled()
def axis_weights(axis: Array, first: Array, count: Array, share: Array, bicubic: bool) -> None:
    """Fill for each output pixel (S,): the first source pixel, how many, and their weights (S, taps)."""
    start, scale, low, high = axis[0], axis[1], axis[2], axis[3]
    support = max(scale, ONE)
    reach = support * TWO if bicubic else support
    for x in range(first.shape[0]):
        center = start + (float32(x) + HALF) * scale
        begin = max(np.floor(center - reach + HALF), low)
        end = min(np.floor(center + reach + HALF), high)
        taps = max(int(end - begin), 1)
        total = ZERO
        for tap in range(taps):
            distance = abs((begin + float32(tap) + HALF - center) / support)
            weight = cubic(distance) if bicubic else max(ONE - distance, ZERO)
            share[x, tap] = weight
            total += weight
        for tap in range(taps):
            share[x, tap] /= total
        first[x], count[x] = int(begin), taps


@compiled()
def resample(
    data: Array,
    offset: int,
    shape: Array,
    across: Array,
    down: Array,
    flip: bool,
    bicubic: bool,
    pixels: Array,
    row: Array,
    firsts: Array,
    counts: Array,
    shares: Array,
) -> None:
    """Resize part of a photo to floats (3, S, S) in [0, 1]; arrays after `pixels` are space to work in."""
    size, height, width = pixels.shape[1], int(shape[0]), int(shape[1])
    axis_weights(across, firsts[0], counts[0], shares[0], bicubic)
    axis_weights(down, firsts[1], counts[1], shares[1], bicubic)
    left, right = firsts[0, 0], firsts[0, size - 1] + counts[0, size - 1]
    for channel in range(3):
        plane = offset + channel * height * width
        for y in range(size):
            first = plane + firsts[1, y] * width
            weight = shares[1, y, 0]
            line = data[first : first + width]
            for x in range(left, right):
                row[x] = float32(line[x]) * weight
            for tap in range(1, counts[1, y]):
                weight = shares[1, y, tap]
                line = data[first + tap * width : first + (tap + 1) * width]
                for x in range(left, right):
                    row[x] += float32(line[x]) * weight
            out = pixels[channel, y]
            for x in range(size):
                begin, total = firsts[0, x], ZERO
                for tap in range(counts[0, x]):
                    total += row[begin + tap] * shares[0, x, tap]
                value = total * TO_UNIT
                if bicubic:
                    value = min(max(value, ZERO), ONE)
                out[size - 1 - x if flip else x] = value


@compiled()
def make_rows(
    data: Array,
    offsets: Array,
    shapes: Array,
    across: Array,
    down: Array,
    space: tuple[int, int, int],
    view: Array,
    flip: Array,
    factors: Array,
    order: Array,
    hue: Array,
    grayscale: Array,
    weights: Array,
    solarize: Array,
    scale: Array,
    shift: Array,
    out: Array,
    last: bool,
    bicubic: bool,
    repeat: bool,
    rows: tuple[int, int],
) -> None:
    """Make the views of draws from `rows[0]` to `rows[1]`; `space` is view side, longest row and most taps.

    `across` and `down` (V, 4) are those of the draws. Draws without factors, (0, 3), are of plain images.
    """
    size = space[0]
    pixels = np.empty((3, size, size), np.float32)
    spare, row = np.empty((size, size), np.float32), np.empty(space[1], np.float32)
    firsts, counts = np.empty((2, size), np.int64), np.empty((2, size), np.int64)
    shares, line = (
        np.empty((2, size, space[2]), np.float32),
        np.empty(size + 2 * weights.shape[1], np.float32),
    )
    flat = pixels.reshape(3, size * size)
    for i in range(rows[0], rows[1]):
        photo = view[i] % offsets.shape[0]
        resample(
            data, offsets[photo], shapes[photo], across[i], down[i], flip[i], bicubic,
            pixels, row, firsts, counts, shares,
        )  # fmt: skip
        if factors.shape[0]:
            for position in range(4):
                if i % 4 == position and hue[i] != ZERO:
                    shift_hue(flat, hue[i])
                if position < 3:
                    operation = order[i, position]
                    factor = factors[i, operation]
                    if factor != ONE:
                        rest = ONE - factor
                        offset = rest * mean_grey(flat) if operation == 1 else ZERO
                        blend(flat, factor, offset, rest if operation == 2 else ZERO)
            if weights.shape[1] and weights[i, 0] != ONE:
                if repeat:
                    blur_repeating(pixels, weights[i], spare, line)
                else:
                    blur(pixels, weights[i], spare)
        finish(flat, grayscale[i], solarize[i], scale, shift, out[view[i]], last)


def make_photo_views(
    photos: Photos,
    box: Tensor,
    draws: tuple[Array, ...],
    out: Array,
    *,
    last: bool,
    bicubic: bool = False,
    repeat: bool = False,
    threads: int,
) -> None:
    """Make views into `out`, float32 (V, 3 S S); `draws` as for `viewkernel.make_views`, but without the box.

    `box` (V, 4) is in the originals' pixels.
    """
    view = torch.from_numpy(draws[0]) % len(photos)
    across, down = photos[view].crop_axes(box)
    _make(photos, across, down, draws, out, last=last, bicubic=bicubic, repeat=repeat, threads=threads)


def plain_images(photos: Photos, scale: Tensor, shift: Tensor, *, last: bool, threads: int) -> Tensor:
    """Plain images, normalised: float32 (N, S, S, 3) if channels come `last`, else (N, 3, S, S)."""
    count, size = len(photos), photos.image_size
    off = np.zeros(count, dtype=bool)
    none = np.empty((0, 3), np.float32)
    draws = (
        np.arange(count), off, none, none.astype(np.int64), np.zeros(0, np.float32), off,
        np.empty((0, 0), np.float32), off, scale.numpy(), shift.numpy(),
    )  # fmt: skip
    out = torch.empty(count, size, size, 3) if last else torch.empty(count, 3, size, size)
    across, down = photos.plain_axes()
    _make(photos, across, down, draws, out.flatten(1).numpy(), last=last, threads=threads)
    return out


def _make(
    photos: Photos,
    across: Tensor,
    down: Tensor,
    draws: tuple[Array, ...],
    out: Array,
    *,
    last: bool,
    bicubic: bool = False,
    repeat: bool = False,
    threads: int,
) -> None:
    size = photos.image_size
    taps = 2 * int(np.ceil((2 if bicubic else 1) * max(1.0, photos.longest / size))) + 2
    parts = max(1, min(threads, len(out) // LEAST_ROWS))
    edges = [len(out) * part // parts for part in range(parts + 1)]
    images = photos.data.numpy(), photos.offsets.numpy(), photos.shapes.numpy()
    axes = across.contiguous().numpy(), down.contiguous().numpy()

    def work(rows: tuple[int, int]) -> None:
        make_rows(*images, *axes, (size, photos.longest, taps), *draws, out, last, bicubic, repeat, rows)

    others = [_pool(parts - 1).submit(work, rows) for rows in pairwise(edges[1:])]
    work((0, edges[1]))
    for other in others:
        other.result()


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="photos")
