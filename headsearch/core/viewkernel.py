"""Views on the CPU: each is made whole, from crop to normalisation, while its pixels are in the core's cache.

The formulas are those of `views.Views`, which works on whole batches: there each operation reads and writes
all pixels, which a GPU's memory bears, and which on a CPU takes four times as long as this. Compiled by
numba, in some seconds, once per machine: the machine code is kept beside this file, or in the home folder
where nobody may write there.

A Python float in an expression would make it float64, so constants are float32 by name. No value is NaN or
infinite, and products and sums may be contracted; no view depends on the others, or on threads.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final

import numpy as np
import torch
from numpy import float32, uint32
from numpy.typing import NDArray
from torch import Tensor

from headsearch.core.color import LUMA
from headsearch.core.draws import ATTEMPTS, RATIO, SIGMA, Distribution, Draws
from headsearch.core.machine_code import compiled
from headsearch.core.pil_kernels import blur_repeating, crop_bicubic

RED, GREEN, BLUE = (float32(weight) for weight in LUMA)
ZERO, HALF, ONE, TWO, THREE, FOUR, SIX = (float32(x) for x in (0, 0.5, 1, 2, 3, 4, 6))
TO_UNIT = float32(1 / 255)
ONE_STEP = uint32(1)
TINY = float32(1e-12)
SOLARIZE_FROM = float32(128 / 255)
LOG_RATIO, LOG_SPAN = float32(math.log(RATIO[0])), float32(math.log(RATIO[1]) - math.log(RATIO[0]))
SIGMA_LOW, SIGMA_SPAN = float32(SIGMA[0]), float32(SIGMA[1] - SIGMA[0])

Array = NDArray[Any]

LEAST_ROWS: Final = 32
"""Views for which another thread is worth its start."""


@compiled()
def crop(
    image: Array,
    box: Array,
    flip: bool,
    pixels: Array,
    rows: Array,
    first: Array,
    share: Array,
) -> None:
    """Crop, flip and resize one uint8 image (3, S, S) to floats (3, S, S) in [0, 1], bilinearly.

    `rows` (3, S + 1), `first` and `share` (S,) are space to work in.
    """
    size = image.shape[1]
    left, top, width, height = box[0], box[1], box[2], box[3]
    across, down = width / float32(size), height / float32(size)
    for x in range(size):
        at = min(max((float32(x) + HALF) * across - HALF, ZERO), width - ONE) + left
        to = size - 1 - x if flip else x
        first[to] = uint32(at)
        share[to] = at - float32(uint32(at))
    for channel in range(3):
        rows[channel, size] = ZERO  # read with a share of zero
    for y in range(size):
        at = min(max((float32(y) + HALF) * down - HALF, ZERO), height - ONE) + top
        above = int(at)
        below = min(above + 1, size - 1)
        weight = at - float32(above)
        for channel in range(3):
            upper, lower, row = image[channel, above], image[channel, below], rows[channel]
            # All of the row, not the crop's part: what does not fill whole vectors costs five times as much.
            for x in range(size):
                high, low = float32(upper[x]), float32(lower[x])
                row[x] = (high + (low - high) * weight) * TO_UNIT
        red, green, blue = rows[0], rows[1], rows[2]
        to_red, to_green, to_blue = pixels[0, y], pixels[1, y], pixels[2, y]
        for x in range(size):
            # Unsigned, or each index would be looked at for its sign.
            here, part = first[x], share[x]
            beside = here + ONE_STEP
            to_red[x] = red[here] + (red[beside] - red[here]) * part
            to_green[x] = green[here] + (green[beside] - green[here]) * part
            to_blue[x] = blue[here] + (blue[beside] - blue[here]) * part


@compiled()
def blend(pixels: Array, factor: float, offset: float, saturation: float) -> None:
    """``clamp(factor x + saturation grey + offset)`` of flat pixels (3, N), in place."""
    red, green, blue = pixels[0], pixels[1], pixels[2]
    for i in range(red.shape[0]):
        r, g, b = red[i], green[i], blue[i]
        add = (r * RED + g * GREEN + b * BLUE) * saturation + offset
        red[i] = min(max(r * factor + add, ZERO), ONE)
        green[i] = min(max(g * factor + add, ZERO), ONE)
        blue[i] = min(max(b * factor + add, ZERO), ONE)


@compiled("reassoc")
def mean_grey(pixels: Array) -> Any:
    """Mean grey value of flat pixels (3, N)."""
    red, green, blue = pixels[0], pixels[1], pixels[2]
    total = ZERO
    for i in range(red.shape[0]):
        total += red[i] * RED + green[i] * GREEN + blue[i] * BLUE
    return total / float32(red.shape[0])


@compiled()
def shift_hue(pixels: Array, turns: Any) -> None:
    """Turn the hue of flat pixels (3, N) in place; see `color.shift_hue_`."""
    red, green, blue = pixels[0], pixels[1], pixels[2]
    sixths = turns * SIX
    for i in range(red.shape[0]):
        r, g, b = red[i], green[i], blue[i]
        high, low = max(max(r, g), b), min(min(r, g), b)
        chroma = high - low
        scale = ONE / max(chroma, TINY)
        hue = (b - r) * scale + TWO if high == g else (r - g) * scale + FOUR
        hue = ((g - b) * scale if high == r else hue) + sixths
        hue -= np.floor(hue / SIX) * SIX
        red[i] = low + chroma * min(max(abs(hue - THREE) - ONE, ZERO), ONE)
        green[i] = low + chroma * min(max(TWO - abs(hue - TWO), ZERO), ONE)
        blue[i] = low + chroma * min(max(TWO - abs(hue - FOUR), ZERO), ONE)


@compiled()
def blur(pixels: Array, weights: Array, spare: Array) -> None:
    """Blur (3, S, S) in place by a symmetric kernel of which `weights` is one half, edges reflected."""
    size, half = pixels.shape[1], weights.shape[0] - 1
    for channel in range(3):
        image, columns = pixels[channel], spare
        for y in range(size):
            for x in range(size):
                columns[y, x] = image[y, x] * weights[0]
            for tap in range(1, half + 1):
                up, down = abs(y - tap), y + tap
                down = down if down < size else 2 * (size - 1) - down
                for x in range(size):
                    columns[y, x] += (image[up, x] + image[down, x]) * weights[tap]
        for y in range(size):
            for x in range(size):
                image[y, x] = columns[y, x] * weights[0]
            for tap in range(1, half + 1):
                for x in range(tap, size - tap):
                    image[y, x] += (columns[y, x - tap] + columns[y, x + tap]) * weights[tap]
                for x in range(size):
                    if x < tap or x >= size - tap:
                        right = x + tap if x + tap < size else 2 * (size - 1) - x - tap
                        image[y, x] += (columns[y, abs(x - tap)] + columns[y, right]) * weights[tap]


@compiled()
def finish(
    pixels: Array,
    grayscale: bool,
    solarize: bool,
    scale: Array,
    shift: Array,
    out: Array,
    last: bool,
) -> None:
    """Grayscale, solarisation and normalisation of flat pixels (3, N), into ``out`` (3, N) or (N, 3)."""
    for i in range(pixels.shape[1]):
        r, g, b = pixels[0, i], pixels[1, i], pixels[2, i]
        if grayscale:
            r = r * RED + g * GREEN + b * BLUE
            g, b = r, r
        if solarize:
            r = ONE - r if r >= SOLARIZE_FROM else r
            g = ONE - g if g >= SOLARIZE_FROM else g
            b = ONE - b if b >= SOLARIZE_FROM else b
        r, g, b = r * scale[0] + shift[0], g * scale[1] + shift[1], b * scale[2] + shift[2]
        if last:
            out[3 * i], out[3 * i + 1], out[3 * i + 2] = r, g, b
        else:
            out[i], out[pixels.shape[1] + i], out[2 * pixels.shape[1] + i] = r, g, b


@compiled()
def make_rows(
    images: Array,
    view: Array,
    box: Array,
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
    """Make the views of draws from `rows[0]` to `rows[1]`; see `make_views`."""
    size = images.shape[2]
    line, across = np.empty(size + 2 * weights.shape[1] + 6, np.float32), np.empty((4, size), np.float32)
    pixels = np.empty((3, size, size), np.float32)
    spare, wide = np.empty((size, size), np.float32), np.empty((3, size + 1), np.float32)
    first, share = np.empty(size, np.uint32), np.empty(size, np.float32)
    flat = pixels.reshape(3, size * size)
    for i in range(rows[0], rows[1]):
        image = images[view[i] % images.shape[0]]
        if bicubic:
            crop_bicubic(image, box[i], flip[i], pixels, line, first, across)
        else:
            crop(image, box[i], flip[i], pixels, wide, first, share)
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


@compiled()
def draw_rows(
    uniform: Array,
    numbers: Array,
    view: Array,
    firsts: int,
    box: Array,
    flip: Array,
    factors: Array,
    order: Array,
    hue: Array,
    grayscale: Array,
    blurs: Array,
    sigma: Array,
    solarize: Array,
) -> None:
    """Fill the arrays of draws from uniform numbers (V, `NUMBERS`); see `draws.Distribution.draws`."""
    size, least, jittered_of, hue_of = numbers[0], numbers[1], numbers[2], numbers[3]
    crops = uniform.shape[1] - 4 * ATTEMPTS
    for i in range(uniform.shape[0]):
        row = uniform[i]
        jittered, second = row[1] < jittered_of, int(view[i] >= firsts)
        for operation in range(3):
            low, high = numbers[10 + operation], numbers[13 + operation]
            factors[i, operation] = low + row[2 + operation] * (high - low) if jittered else ONE
            place = 0
            for other in range(3):
                tie = other < operation and row[6 + other] == row[6 + operation]
                place += row[6 + other] < row[6 + operation] or tie
            order[i, place] = operation
        hue[i] = (TWO * row[5] - ONE) * hue_of if jittered else ZERO
        flip[i], grayscale[i] = row[9] < numbers[4], row[10] < numbers[5]
        blurs[i], sigma[i] = row[11] < numbers[6 + second], SIGMA_LOW + row[12] * SIGMA_SPAN
        solarize[i] = row[13] < numbers[8 + second]
        box[i, 0], box[i, 1], box[i, 2], box[i, 3] = ZERO, ZERO, size, size
        for attempt in range(ATTEMPTS):
            area = size * size * (least + row[crops + attempt] * (ONE - least))
            half = np.exp((LOG_RATIO + row[crops + ATTEMPTS + attempt] * LOG_SPAN) * HALF)
            width, height = np.rint(np.sqrt(area) * half), np.rint(np.sqrt(area) / half)
            if ZERO < width <= size and ZERO < height <= size:
                left = np.floor(row[crops + 2 * ATTEMPTS + attempt] * (size - width + ONE))
                top = np.floor(row[crops + 3 * ATTEMPTS + attempt] * (size - height + ONE))
                box[i, 0], box[i, 1] = min(left, size - width), min(top, size - height)
                box[i, 2], box[i, 3] = width, height
                break


def draw_views(uniform: Tensor, distribution: Distribution, firsts: int) -> Draws:
    """Do what ``distribution.draws(uniform, firsts)`` does, in one pass."""
    count = len(uniform)
    view = uniform[:, 0].argsort()
    draws = Draws(
        view=view,
        box=torch.empty(count, 4),
        flip=torch.empty(count, dtype=torch.bool),
        factors=torch.empty(count, 3),
        order=torch.empty(count, 3, dtype=torch.int64),
        hue=torch.empty(count),
        grayscale=torch.empty(count, dtype=torch.bool),
        blur=torch.empty(count, dtype=torch.bool),
        sigma=torch.empty(count),
        solarize=torch.empty(count, dtype=torch.bool),
    )
    _, *rest = (getattr(draws, field.name).numpy() for field in fields(draws))
    draw_rows(uniform.numpy(), np.array(distribution.numbers(), np.float32), view.numpy(), firsts, *rest)
    return draws


def make_views(
    images: Array,
    draws: tuple[Array, ...],
    out: Array,
    *,
    last: bool,
    bicubic: bool = False,
    repeat: bool = False,
    threads: int,
) -> None:
    """Make views into `out`, float32 (V, 3 S S), of uint8 images (B, 3, S, S), on so many threads.

    `draws` are arrays of V rows as `views.Draws` has them: view, box, flip, factors, order, hue, grayscale,
    then half of each blur's kernel (V, half + 1), or (V, 0) without, solarize; and the normalisation's scale
    and shift, (3,) each. A view is stored as (3, S, S), or as (S, S, 3) if channels come `last`. Crops are
    resampled bilinearly or `bicubic`; at the edges the blur reflects pixels or, with `repeat`, repeats them.
    """
    count = len(out)
    parts = max(1, min(threads, count // LEAST_ROWS))
    edges = [count * part // parts for part in range(parts + 1)]

    def work(rows: tuple[int, int]) -> None:
        make_rows(images, *draws, out, last, bicubic, repeat, rows)

    others = [_pool(parts - 1).submit(work, rows) for rows in pairwise(edges[1:])]
    work((0, edges[1]))
    for other in others:
        other.result()


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="views")
