"""Crops and blurs as Pillow makes them: against Pillow and torchvision, both ways to make views."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images
from test_views import PLAIN, STILL, generator, identity, random_images
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from headsearch.config import ViewsConfig
from headsearch.core.draws import Draws
from headsearch.core.images import IMAGENET, constants
from headsearch.core.views import Views, blur_weights, cubic_weights, kernel_size

BICUBIC = STILL.model_copy(update={"interpolation": "bicubic"})
PIL_BLUR = STILL.model_copy(update={"blur_probability": 1.0, "blur_kernel": "pil"})


def crops(size: int, count: int = 48) -> Draws:
    """Boxes of all sizes, among them single pixels and the whole image, half of them flipped."""
    sides = torch.randint(1, size + 1, (count, 2), generator=generator())
    sides[0], sides[1] = 1, size
    corner = (torch.rand(count, 2, generator=generator(1)) * (size - sides + 1)).floor()
    box = torch.cat([corner, sides.float()], 1)
    return dataclasses.replace(identity(count, size), box=box, flip=torch.arange(count) % 2 == 0)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("size", [8, 32, 33, 96])
def test_bicubic_crops_are_torchvisions(size: int) -> None:
    draws = crops(size)
    images = random_images(len(draws), size)
    ours = Views(BICUBIC, size, PLAIN).apply(images, draws)
    for row in range(len(draws)):
        left, top, width, height = (int(edge) for edge in draws.box[row])
        want = tv.resized_crop(
            images[row].float() / 255, top, left, height, width, [size, size], InterpolationMode.BICUBIC,
            antialias=True,
        )  # fmt: skip
        want = tv.horizontal_flip(want) if draws.flip[row] else want
        torch.testing.assert_close(ours[row], want.clamp(0, 1), rtol=0, atol=3e-5)


@pytest.mark.usefixtures("way")
def test_bicubic_crops_are_pillows_but_for_its_rounding() -> None:
    size, draws = 32, crops(32)
    images = random_images(len(draws), size)
    ours = Views(BICUBIC, size, PLAIN).apply(images, draws)
    for row in range(len(draws)):
        left, top, width, height = (int(edge) for edge in draws.box[row])
        cut = tv.to_pil_image(images[row]).crop((left, top, left + width, top + height))
        want = tv.pil_to_tensor(cut.resize((size, size), Image.Resampling.BICUBIC)).float() / 255
        want = want.flip(2) if draws.flip[row] else want
        # Pillow rounds and clips between its two passes: overshoots of noise lose more than one step there.
        off = (ours[row] - want).abs() * 255
        assert float(off.mean()) < 0.6
        assert float((off > 2).double().mean()) < 0.05


def test_cubic_weights_of_each_pixel_sum_to_one_inside_the_crop() -> None:
    weights = cubic_weights(16, torch.tensor([[3.0, 5.0, 1.0, 9.0]]), 1)[0]
    assert weights.sum(1).tolist() == pytest.approx([1.0] * 16)
    assert not weights[:, :5].any()
    assert not weights[:, 14:].any()


def blurred(sigma: float, images: Tensor) -> Tensor:
    draws = dataclasses.replace(
        identity(len(images), images.shape[-1]),
        blur=torch.ones(len(images), dtype=torch.bool),
        sigma=torch.full((len(images),), sigma),
    )
    return Views(PIL_BLUR, images.shape[-1], PLAIN).apply(images, draws)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("size", [9, 32, 65])
@pytest.mark.parametrize("sigma", [0.1, 0.4, 0.8, 1.3, 1.99])
def test_blur_is_pillows_but_for_its_rounding(sigma: float, size: int) -> None:
    """Pillow rounds six times, and repeats the edge anew in each of three passes: near it, noise may differ."""
    images = random_images(12, size)
    for image, got in zip(images, blurred(sigma, images), strict=True):
        pillow = tv.to_pil_image(image).filter(ImageFilter.GaussianBlur(sigma))
        off = (got * 255 - tv.pil_to_tensor(pillow).float()).abs()
        assert float(off.max()) < 45
        assert float(off.mean()) < (1.5 if size > 9 else 8)
        if size > 12:
            assert float(off[:, 6:-6, 6:-6].max()) < 3.2


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("size", [4, 5])
def test_images_smaller_than_the_kernel_stay_within_their_values(size: int) -> None:
    flat = torch.full((4, 3, size, size), 77, dtype=torch.uint8)
    torch.testing.assert_close(blurred(2.0, flat), flat / 255, rtol=0, atol=1e-6)
    noise = random_images(8, size) / 255
    low, high = noise.amin((2, 3), keepdim=True), noise.amax((2, 3), keepdim=True)
    got = blurred(2.0, random_images(8, size))
    assert bool(((got >= low - 1e-6) & (got <= high + 1e-6)).all())
    assert float((got[6:] - noise[6:]).abs().mean()) > 0.1


@pytest.mark.parametrize("sigma", [0.1, 0.33, 0.7, 1.0, 1.5, 2.0])
def test_kernels_have_the_variance_that_was_asked(sigma: float) -> None:
    draws = dataclasses.replace(
        identity(4, 32), blur=torch.ones(4, dtype=torch.bool), sigma=torch.full((4,), sigma)
    )
    half = blur_weights(32, draws, "pil")[0].double()
    taps = torch.arange(len(half)).double()
    assert float(half[0] + 2 * half[1:].sum()) == pytest.approx(1.0, abs=1e-6)
    assert float(2 * (half * taps.square()).sum()) == pytest.approx(sigma**2, rel=1e-5, abs=1e-7)
    few = blur_weights(32, draws)[0].double()
    assert float(2 * (few * torch.arange(len(few)).square()).sum()) ** 0.5 <= 0.82
    assert kernel_size(32) == 3


def test_pillows_blur_changes_photos_twice_as_much_as_three_taps_do() -> None:
    """Mean squared change of 32-pixel crops of two photos; at sigma U(0.1, 2) some .0017 against .0033."""
    photos = [torch.from_numpy(np.array(photo)).permute(2, 0, 1) for photo in load_sample_images().images]
    cut = torch.stack(
        [
            tv.resize(photo[:, y : y + 128, x : x + 128], [32, 32], antialias=True)
            for photo in photos
            for y in range(0, 256, 128)
            for x in range(0, 512, 128)
        ]
    )
    draws = dataclasses.replace(
        identity(16, 32), blur=torch.ones(16, dtype=torch.bool), sigma=torch.linspace(0.1, 2.0, 16)
    )
    change = {}
    for kernel in ("tenth", "pil"):
        config = PIL_BLUR.model_copy(update={"blur_kernel": kernel})
        change[kernel] = float((Views(config, 32, PLAIN).apply(cut, draws) - cut / 255).square().mean())
    assert change["pil"] > 1.5 * change["tenth"]


@pytest.mark.parametrize("config", [ViewsConfig(blur_probability=0.5), ViewsConfig(blur_probability=0.0)])
@pytest.mark.parametrize(
    "change", [{"interpolation": "bicubic"}, {"blur_kernel": "pil"}, {"interpolation": "bicubic", "blur_kernel": "pil"}]
)  # fmt: skip
def test_both_ways_make_the_same_views(
    config: ViewsConfig, change: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, made = random_images(8, 32), []
    for fused in ((), ("cpu",)):
        monkeypatch.setattr("headsearch.core.views.FUSED_ON", fused)
        views = Views(config.model_copy(update=change), 32, PLAIN)
        made.append(views.pair(images, generator(5)))
    # a pixel whose colours nearly tie may turn its hue another way
    assert float(((made[0] - made[1]).abs() > 1e-3).double().mean()) < 1e-3


def test_constants_are_the_libraries_own() -> None:
    assert constants("imagenet", "cifar10", probe=False) == IMAGENET
    mean, std = constants("solo-learn", "cifar100", probe=False)
    assert (mean, std) == ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
    assert constants("solo-learn", "cifar100", probe=True)[0] == (0.4914, 0.4822, 0.4465)
    assert constants("solo-learn", "imagenette", probe=True) == IMAGENET
    assert math.isclose(constants("solo-learn", "cifar10", probe=False)[1][0], 0.247)
