"""Colour operations on batches of RGB images (V, 3, S, S) in [0, 1], with a parameter for each image.

The formulas are torchvision's (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue).
"""

from __future__ import annotations

import torch
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in a grey value, ITU-R BT.601 as torchvision rounds them."""


def luma(pixels: Tensor) -> Tensor:
    """Grey values (V, S, S)."""
    red, green, blue = pixels.unbind(1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def blend_(pixels: Tensor, factor: Tensor, contrast: Tensor, saturation: Tensor) -> None:
    """Brightness, contrast or saturation in place, for each image its own.

    Each is ``clamp(factor x + (1 - factor) other)`` where the other image is black, the mean grey value, or
    the grey image. `factor`, `contrast` and `saturation` (V,) weigh the image, its mean grey value and its
    grey image: the last two are 0 or 1 - factor, and not both.
    """
    grey = luma(pixels)
    offset = contrast * grey.mean((1, 2))
    grey.mul_(saturation[:, None, None]).add_(offset[:, None, None])
    pixels.mul_(factor[:, None, None, None]).add_(grey[:, None]).clamp_(0.0, 1.0)


def shift_hue_(pixels: Tensor, turns: Tensor) -> None:
    """Turn the hue in place by `turns` (V,) of the HSV colour wheel; value and saturation stay.

    In HSV a channel is ``low + chroma * r(hue)`` with a ramp r that depends on the hue's distance from the
    channel's own on the wheel: 1 up to one sixth of a turn, falling to 0 at two sixths. So the new channels
    follow from the largest and smallest old one, without a conversion to HSV and back.
    """
    red, green, blue = pixels.unbind(1)
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    # A grey pixel's differences are 0 whatever they are divided by.
    scale = chroma.clamp(min=1e-12).reciprocal_()
    # Sixths of a turn: red 0, green 2, blue 4. Weights of 0 and 1 choose exactly, faster than torch.where.
    hue = (blue - red).mul_(scale).add_(2).lerp_((red - green).mul_(scale).add_(4), (high - green).sign_())
    hue = (green - blue).mul_(scale).lerp_(hue, (high - red).sign_())
    hue.add_(turns[:, None, None] * 6)
    hue.sub_(torch.floor(hue / 6).mul_(6))
    for channel, ramp in (
        (red, (hue - 3).abs_().sub_(1)),
        (green, (hue - 2).abs_().neg_().add_(2)),
        (blue, (hue - 4).abs_().neg_().add_(2)),
    ):
        torch.addcmul(low, chroma, ramp.clamp_(0.0, 1.0), out=channel)
