"""Parameters of random views: what is drawn of each, from uniform numbers that any device can give."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Final

import torch
from torch import Tensor

from headsearch.config import ViewsConfig

ATTEMPTS: Final = 10
"""Draws of a crop before the whole image is taken, as in torchvision's RandomResizedCrop."""
RATIO: Final = (3 / 4, 4 / 3)
"""Aspect ratios of crops, width over height."""
LOG_RATIO: Final = (math.log(RATIO[0]), math.log(RATIO[1]))
SIGMA: Final = (0.1, 2.0)
"""Standard deviations of the blur, in pixels."""
SOLARIZE_FROM: Final = 128 / 255
"""Pixels from this value on are inverted by solarisation, PIL's default."""
NUMBERS: Final = 14 + 4 * ATTEMPTS
"""Uniform numbers of a view: its place, whether it is jittered, three factors, hue, three that order the
operations, flip, grayscale, blur, sigma, solarisation; then areas, ratios, lefts and tops of its crops."""
COLUMNS: Final = 17
"""Parameters of a view as one row of numbers: left, top, width and height of its crop; flip; factors of
brightness, contrast and saturation; hue; four operations in their order (0 brightness, 1 contrast,
2 saturation, 3 hue); grayscale, blur, sigma, solarisation. Flags are 0 or 1."""


@dataclass(frozen=True)
class Draws:
    """Parameters of V views, one row each; V is a multiple of 4.

    Row i makes the view number ``view[i]`` and shifts its hue as operation i mod 4 of its colour jitter;
    ``order`` holds the other three (0 brightness, 1 contrast, 2 saturation) in order. With `view` a random
    permutation and `order` uniform, a view's order of operations is uniform over all 24, while each
    operation runs once over the batch.
    """

    view: Tensor  # int64 (V,), a permutation
    box: Tensor  # float32 (V, 4): left, top, width, height in pixels
    flip: Tensor  # bool (V,)
    factors: Tensor  # float32 (V, 3): brightness, contrast, saturation; 1 leaves the image as it is
    order: Tensor  # int64 (V, 3)
    hue: Tensor  # float32 (V,), turns of the colour wheel
    grayscale: Tensor  # bool (V,)
    blur: Tensor  # bool (V,)
    sigma: Tensor  # float32 (V,), pixels
    solarize: Tensor  # bool (V,)

    def __len__(self) -> int:
        return len(self.view)

    def rows(self, start: int, stop: int) -> Draws:
        """Rows from `start` to `stop`."""
        return Draws(**{field.name: getattr(self, field.name)[start:stop] for field in fields(self)})

    def table(self) -> Tensor:
        """Write the parameters of view v as row v of a float32 table (V, `COLUMNS`)."""
        place = torch.arange(4, device=self.view.device)
        hue_at = place.repeat(len(self) // 4)[:, None]
        others = self.order.gather(1, (place - (place > hue_at).long()).clamp_(max=2))
        order = torch.where(place == hue_at, 3, others)
        columns = (
            self.flip,
            self.factors,
            self.hue,
            order,
            self.grayscale,
            self.blur,
            self.sigma,
            self.solarize,
        )
        rows = [part.float().reshape(len(self), -1) for part in (self.box, *columns)]
        return torch.empty(len(self), COLUMNS, device=place.device).index_copy_(
            0, self.view, torch.cat(rows, 1)
        )


class Distribution:
    """What the parameters of views of images of side `image_size` are, given uniform numbers."""

    def __init__(self, config: ViewsConfig, image_size: int, device: torch.device) -> None:
        self.config, self.image_size = config, image_size
        half = [config.jitter_strength * x for x in (config.brightness, config.contrast, config.saturation)]
        self._ranges = (*(max(0.0, 1 - x) for x in half), *(1 + x for x in half))
        self.low = torch.tensor(self._ranges[:3], device=device)
        self.high = torch.tensor(self._ranges[3:], device=device)
        self.hue = config.hue * config.jitter_strength
        self.blur = _both(config.blur_probability, config.second_blur_probability)
        self.solarize = _both(config.solarize_probability, config.second_solarize_probability)

    def draws(self, uniform: Tensor, firsts: int) -> Draws:
        """Parameters from uniform numbers (V, `NUMBERS`); second views are those from number `firsts` on."""
        config = self.config
        jittered = uniform[:, 1] < config.jitter_probability
        factors = self.low + uniform[:, 2:5] * (self.high - self.low)
        hue = (2 * uniform[:, 5] - 1) * self.hue
        view = uniform[:, 0].argsort()
        second = view >= firsts
        return Draws(
            view=view,
            box=self.boxes(uniform[:, -4 * ATTEMPTS :].unflatten(1, (4, ATTEMPTS)).transpose(0, 1)),
            flip=uniform[:, 9] < config.flip_probability,
            factors=torch.where(jittered[:, None], factors, 1.0),
            order=uniform[:, 6:9].argsort(1),
            hue=torch.where(jittered, hue, 0.0),
            grayscale=uniform[:, 10] < config.grayscale_probability,
            blur=uniform[:, 11] < torch.where(second, self.blur[1], self.blur[0]),
            sigma=SIGMA[0] + uniform[:, 12] * (SIGMA[1] - SIGMA[0]),
            solarize=uniform[:, 13] < torch.where(second, self.solarize[1], self.solarize[0]),
        )

    def boxes(self, uniform: Tensor) -> Tensor:
        """Crop boxes (V, 4) from uniform numbers (4, V, attempts), by torchvision's rejection rule."""
        size, least = self.image_size, self.config.crop_scale_min
        area = size * size * (least + uniform[0] * (1 - least))
        log_ratio = LOG_RATIO[0] + uniform[1] * (LOG_RATIO[1] - LOG_RATIO[0])
        half = (log_ratio / 2).exp_()
        width, height = (area.sqrt() * half).round_(), (area.sqrt() / half).round_()
        fits = (width > 0) & (width <= size) & (height > 0) & (height <= size)
        first = fits.to(torch.uint8).argmax(1, keepdim=True)
        left = (uniform[2] * (size - width + 1)).floor_().minimum(size - width)
        top = (uniform[3] * (size - height + 1)).floor_().minimum(size - height)
        boxes = torch.stack([left, top, width, height], -1)
        chosen = boxes.gather(1, first[:, :, None].expand(-1, -1, 4)).squeeze(1)
        # An image is square, so that its own ratio is within RATIO and the fallback is all of it.
        whole = torch.cat([area.new_zeros(2), area.new_full((2,), float(size))])
        return torch.where(fits.any(1, keepdim=True), chosen, whole)

    def numbers(self) -> tuple[float, ...]:
        """Everything that the kernels of `viewkernel` and `cuda_views` ask of this, in their order."""
        config = self.config
        return (
            self.image_size,
            config.crop_scale_min,
            config.jitter_probability,
            self.hue,
            config.flip_probability,
            config.grayscale_probability,
            *self.blur,
            *self.solarize,
            *self._ranges,
        )


def _both(first: float, second: float | None) -> tuple[float, float]:
    """Probabilities of the first and of the second view."""
    return first, first if second is None else second
