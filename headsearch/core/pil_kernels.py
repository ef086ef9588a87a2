"""Crops and blurs as Pillow makes them, for `viewkernel`, which says what is special about such code.

numba keeps `viewkernel.make_rows` with these functions in it, and makes it anew only when its own file has
another time: who edits this file touches that one too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy import float32, uint32
from numpy.typing import NDArray

from headsearch.core.machine_code import compiled

Array = NDArray[Any]

ZERO, HALF, ONE, TWO, FOUR = (float32(x) for x in (0, 0.5, 1, 2, 4))
TO_UNIT = float32(1 / 255)
CUBIC_A, CUBIC_B = float32(1.5), float32(2.5)


@compiled()
def cubic(distance: Any) -> Any:
    """Catmull-Rom's kernel, a = -0.5."""
    if distance < ONE:
        return (CUBIC_A * distance - CUBIC_B) * distance * distance + ONE
    if distance < TWO:
        return ((CUBIC_B - HALF * distance) * distance - FOUR) * distance + TWO
    return ZERO


@compiled()
def cubic_taps(place: int, scale: Any, first: Any, extent: Any, taps: Array) -> int:
    """Fill `taps` (4,) for one output pixel; return the first input pixel that they weigh.

    `views.cubic_weights` has the formula; taps outside the crop are 0, and the four lie in the image.
    """
    at = (float32(place) + HALF) * scale
    start = int(np.floor(at - HALF)) - 1
    # Four neighbours in the image; those beyond the crop get no weight.
    total = ZERO
    for tap in range(4):
        pixel = start + tap
        distance = abs(float32(pixel) + HALF - at)
        weight = cubic(distance) if 0 <= pixel < extent else ZERO
        taps[tap] = weight
        total += weight
    for tap in range(4):
        taps[tap] /= total
    return start + int(first)


@compiled()
def crop_bicubic(
    image: Array, box: Array, flip: bool, pixels: Array, row: Array, first: Array, across: Array
) -> None:
    """Crop, flip and resize one uint8 image (3, S, S) to floats (3, S, S) in [0, 1], bicubically.

    `row` (S + 6,), `first` (S,) and `across` (4, S) are space to work in.
    """
    size = image.shape[1]
    left, top, width, height = box[0], box[1], box[2], box[3]
    down = np.empty(4, np.float32)
    for x in range(size):
        to = size - 1 - x if flip else x
        # Three columns of zeros on either side stand for pixels outside the image, whose taps are 0.
        first[to] = uint32(cubic_taps(x, width / float32(size), left, width, across[:, to]) + 3)
    row[:] = ZERO
    for y in range(size):
        start = cubic_taps(y, height / float32(size), top, height, down)
        for channel in range(3):
            inner = row[3 : 3 + size]
            for x in range(size):
                inner[x] = ZERO
            for tap in range(4):
                if down[tap] != ZERO:
                    line, weight = image[channel, start + tap], down[tap] * TO_UNIT
                    for x in range(size):
                        inner[x] += float32(line[x]) * weight
            out, second, third, fourth = pixels[channel, y], row[1:], row[2:], row[3:]
            for x in range(size):
                at = first[x]
                value = row[at] * across[0, x] + second[at] * across[1, x]
                value += third[at] * across[2, x] + fourth[at] * across[3, x]
                out[x] = min(max(value, ZERO), ONE)


@compiled()
def blur_repeating(pixels: Array, weights: Array, spare: Array, line: Array) -> None:
    """Blur (3, S, S) in place by a symmetric kernel of which `weights` is one half, edges repeated.

    `spare` (S, S) and `line` (S + 2 * half,) are space to work in.
    """
    size, half = pixels.shape[1], weights.shape[0] - 1
    reach = half
    while reach > 0 and weights[reach] == ZERO:
        reach -= 1
    for channel in range(3):
        image, columns = pixels[channel], spare
        for y in range(size):
            for x in range(size):
                columns[y, x] = image[y, x] * weights[0]
            for tap in range(1, reach + 1):
                up, down = max(y - tap, 0), min(y + tap, size - 1)
                for x in range(size):
                    columns[y, x] += (image[up, x] + image[down, x]) * weights[tap]
        for y in range(size):
            for x in range(size):
                line[half + x] = columns[y, x]
            for x in range(half):
                line[x], line[half + size + x] = columns[y, 0], columns[y, size - 1]
            for x in range(size):
                image[y, x] = line[half + x] * weights[0]
            for tap in range(1, reach + 1):
                for x in range(size):
                    image[y, x] += (line[half + x - tap] + line[half + x + tap]) * weights[tap]
