"""What the kernel of views is measured by: its parameters in numpy, its views on the CPU."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import torch
from kernel_on_host import Machine
from torch import Tensor

from headsearch.config import ViewsConfig
from headsearch.core.draws import ATTEMPTS, COLUMNS, LOG_RATIO, SIGMA, Draws
from headsearch.core.randomness import Philox
from headsearch.core.views import Views

EVERYTHING = ViewsConfig(
    blur_probability=0.5, grayscale_probability=0.3, solarize_probability=0.3, jitter_strength=1.0
)
SECOND = ViewsConfig(
    blur_probability=1.0,
    second_blur_probability=0.1,
    solarize_probability=0.0,
    second_solarize_probability=0.2,
)
TOLERANCE = 1e-3
"""Of normalised pixels in float32. With 8 threads or more they differ by 2e-4 at most (4e-5 in [0, 1] at 224 pixels);
a single thread adds up the mean of an image one by one, which is good to 9e-4."""
HALF_ULP = 2**-8
"""Of a bfloat16, at most, relative."""
SEED = 1234567890123456789
BOX, FLIP, FACTORS, HUE, ORDER = slice(0, 4), 4, slice(5, 8), 8, slice(9, 13)
GRAYSCALE, BLUR, SIGMA_AT, SOLARIZE = 13, 14, 15, 16


def stream(machine: Machine, seed: int = SEED) -> Philox:
    return Philox(seed, machine.device)


def on(device: torch.device, draws: Draws) -> Draws:
    return Draws(**{field.name: getattr(draws, field.name).to(device) for field in fields(draws)})


def from_cpu(
    images: Tensor, table: Tensor, config: ViewsConfig, normalization: tuple[Tensor, Tensor]
) -> Tensor:
    """The views of parameters (V, COLUMNS) as a CPU makes them.

    A row of `Draws` shifts the hue at the place that its number says, so each view is made at each of them.
    """
    order = table[:, ORDER].long()
    hue_at, others = (order == 3).int().argmax(1), order[order != 3].view(-1, 3)
    rows = torch.arange(len(table)).repeat_interleave(4)
    draws = Draws(
        view=torch.arange(len(rows)),
        box=table[rows, BOX],
        flip=table[rows, FLIP] == 1,
        factors=table[rows, FACTORS],
        order=others[rows],
        hue=table[rows, HUE],
        grayscale=table[rows, GRAYSCALE] == 1,
        blur=table[rows, BLUR] == 1,
        sigma=table[rows, SIGMA_AT],
        solarize=table[rows, SOLARIZE] == 1,
    )
    made = Views(config, images.shape[-1], normalization)._apply_fused(images[rows % len(images)], draws)
    return made[4 * torch.arange(len(table)) + hue_at]


def assert_close(ours: Tensor, expected: Tensor, *, threshold: float = 0.0) -> None:
    """Equal up to rounding; a share `threshold` of pixels may be on either side of solarisation's threshold."""
    ours = ours.cpu()
    allowed = TOLERANCE + (HALF_ULP * expected.abs() if ours.dtype == torch.bfloat16 else 0.0)
    beyond = (ours.float() - expected).abs() - allowed
    assert (beyond > 0).float().mean() <= threshold
    assert beyond.max() <= (0.02 if threshold else 0)


def replace_probability(config: ViewsConfig, **changes: float) -> ViewsConfig:
    return config.model_copy(update=changes)


def drawn(made: Views, source: Philox, count: int, firsts: int | None = None) -> Tensor:
    """Parameters (V, COLUMNS) of the next views of a stream, on the CPU."""
    assert made._kernel is not None
    return made._kernel.draw(count, count if firsts is None else firsts, source).cpu()


def numpy_philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 of counters (..., 4), after Salmon et al. 2011, figure 2."""
    left, right = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
    low = np.uint64(0xFFFFFFFF)
    words = [counter[..., i].astype(np.uint64) for i in range(4)]
    for turn in range(10):
        keys = [np.uint64((key[i] + turn * (0x9E3779B9, 0xBB67AE85)[i]) % 2**32) for i in range(2)]
        one, other = words[0] * left, words[2] * right
        words = [
            (other >> np.uint64(32)) ^ words[1] ^ keys[0],
            other & low,
            (one >> np.uint64(32)) ^ words[3] ^ keys[1],
            one & low,
        ]
    return np.stack(words, -1).astype(np.uint32)


def numpy_table(config: ViewsConfig, size: int, seed: int, batch: int, count: int, firsts: int) -> np.ndarray:
    """Parameters (V, COLUMNS) that the kernel is to draw, in float64."""
    counter = np.zeros((count, 3 + ATTEMPTS, 4), np.uint64)
    counter[..., 0] = np.arange(3 + ATTEMPTS)
    counter[..., 1] = np.arange(count)[:, None]
    counter[..., 2], counter[..., 3] = batch % 2**32, batch >> 32
    words = numpy_philox(counter, (seed % 2**32, seed >> 32))
    uniform = (words >> np.uint32(8)).astype(np.float64) / 2**24
    table = np.zeros((count, COLUMNS))
    second = (np.arange(count) >= firsts).astype(int)
    both = np.array([[config.blur_probability, config.second_blur_probability],
                     [config.solarize_probability, config.second_solarize_probability]], dtype=object)  # fmt: skip
    blur, solarize = ([first, first if other is None else other] for first, other in both)
    strength = np.array([config.brightness, config.contrast, config.saturation]) * config.jitter_strength
    low, high = np.maximum(0, 1 - strength), 1 + strength
    jittered = uniform[:, 0, 0] < config.jitter_probability
    table[:, FACTORS] = np.where(jittered[:, None], low + uniform[:, 0, 1:] * (high - low), 1)
    table[:, HUE] = np.where(jittered, (2 * uniform[:, 1, 0] - 1) * config.hue * config.jitter_strength, 0)
    table[:, FLIP] = uniform[:, 1, 1] < config.flip_probability
    table[:, GRAYSCALE] = uniform[:, 1, 2] < config.grayscale_probability
    table[:, BLUR] = uniform[:, 2, 0] < np.array(blur)[second]
    table[:, SIGMA_AT] = SIGMA[0] + uniform[:, 2, 1] * (SIGMA[1] - SIGMA[0])
    table[:, SOLARIZE] = uniform[:, 2, 2] < np.array(solarize)[second]
    for row, word in zip(table, words[:, 1, 3].tolist(), strict=True):
        number, places = word * 24 >> 32, [9, 10, 11, 12]
        for operation in range(4):
            left = len(places)
            row[places.pop(number % left)] = operation
            number //= left
        row[BOX] = (0, 0, size, size)
    for row, parts in zip(table, uniform[:, 3:], strict=True):
        for part in parts:
            area = size * size * (config.crop_scale_min + part[0] * (1 - config.crop_scale_min))
            ratio = np.exp(LOG_RATIO[0] + part[1] * (LOG_RATIO[1] - LOG_RATIO[0]))
            width, height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
            if 0 < width <= size and 0 < height <= size:
                row[BOX] = (
                    part[2] * (size - width + 1) // 1,
                    part[3] * (size - height + 1) // 1,
                    width,
                    height,
                )
                break
    return table
