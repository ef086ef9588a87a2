"""Solarisation, what the two views of a pair have of their own, and the four ranges of colour jitter.

torchvision and PIL are the references, one image at a time. Draws are tested with fixed seeds: their
thresholds are met by chance and must not fail by chance.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy.stats import binomtest, chi2_contingency, kstest
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from headsearch.config import TrialConfig, ViewsConfig
from headsearch.core.draws import Draws
from headsearch.core.views import Views, kernel_size

IDENTITY = (torch.zeros(3), torch.ones(3))
ZSCORE = (torch.tensor([0.49, 0.48, 0.44]), torch.tensor([0.25, 0.24, 0.26]))
ON = ViewsConfig(blur_probability=0.5, solarize_probability=0.5, grayscale_probability=0.3)
"""All operations; which views have them is what the draws say."""
STILL = {"crop_scale_min": 1.0, "flip_probability": 0, "jitter_probability": 0, "grayscale_probability": 0}
THRESHOLD = 128 / 255
TOLERANCE = 5e-5
COUNT = 24_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(count: int, size: int) -> Tensor:
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator(3), dtype=torch.uint8)
    images[:, :, 0, 0] = 128  # at the threshold
    images[:, :, 0, 1] = 127  # and just below it
    return images


def still(count: int, size: int) -> Draws:
    """Draws that leave every image as it is."""
    no = torch.zeros(count, dtype=torch.bool)
    return Draws(
        view=torch.arange(count), box=torch.tensor([0.0, 0.0, size, size]).repeat(count, 1), flip=no,
        factors=torch.ones(count, 3), order=torch.arange(3).repeat(count, 1), hue=torch.zeros(count),
        grayscale=no, blur=no, sigma=torch.ones(count), solarize=no,
    )  # fmt: skip


def reference(image: Tensor, draws: Draws, row: int) -> tuple[Tensor, Tensor]:
    """One view by torchvision before and after solarisation; `image` is float in [0, 1]."""
    left, top, width, height = (int(edge) for edge in draws.box[row])
    image = tv.resized_crop(image, top, left, height, width, list(image.shape[-2:]), antialias=True)
    if draws.flip[row]:
        image = tv.horizontal_flip(image)
    change = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)
    operations = [(change[i], float(draws.factors[row, i])) for i in draws.order[row]]
    operations.insert(row % 4, (tv.adjust_hue, float(draws.hue[row])))
    for operation, amount in operations:
        image = operation(image, amount)
    if draws.grayscale[row]:
        image = tv.rgb_to_grayscale(image, num_output_channels=3)
    if draws.blur[row]:
        kernel = kernel_size(image.shape[-1])
        image = tv.gaussian_blur(image, [kernel, kernel], [float(draws.sigma[row])] * 2)
    return image, tv.solarize(image, THRESHOLD) if draws.solarize[row] else image


def assert_views(pixels: Tensor, draws: Draws, tolerance: float = TOLERANCE) -> int:
    """Compare all views with the reference; return how many pixels were inverted.

    A pixel that stands at the threshold up to `tolerance` may be on either side of it.
    """
    ours = Views(ON, pixels.shape[-1], IDENTITY).apply(pixels, draws)
    inverted = 0
    for row, view in enumerate(draws.view.tolist()):
        before, after = reference(pixels[view % len(pixels)].float() / 255, draws, row)
        sure = (before - THRESHOLD).abs() > tolerance
        inverted += int((before != after).sum())
        np.testing.assert_allclose(ours[view][sure], after[sure], rtol=0, atol=tolerance, err_msg=f"{row}")
        unsure = ours[view][~sure]
        assert (torch.minimum((unsure - before[~sure]).abs(), (unsure - after[~sure]).abs()) < 1 / 200).all()
    return inverted


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("size", [8, 33])
def test_solarised_views_are_torchvisions_and_the_others_stay(size: int) -> None:
    draws = replace(still(12, size), solarize=torch.arange(12) % 3 != 1)
    assert assert_views(random_images(12, size), draws) > 8 * size * size


@pytest.mark.usefixtures("way")
def test_every_pixel_value_is_that_of_pil() -> None:
    """Byte by byte: 127 stays, 128 becomes 127."""
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    draws = replace(still(4, 16), solarize=torch.ones(4, dtype=torch.bool))
    ours = Views(ON, 16, IDENTITY).apply(values, draws)
    pil = ImageOps.solarize(Image.fromarray(values[0, 0].numpy()))
    for view in ours:
        for channel in view:
            assert (channel * 255).round().int().tolist() == np.asarray(pil).astype(int).tolist()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("field", ["grayscale", "blur"])
def test_grayscale_and_blur_come_first(field: str) -> None:
    """The other order gives other pixels: a grey of inverted colours is not an inverted grey."""
    yes = torch.ones(8, dtype=torch.bool)
    draws = replace(still(8, 16), solarize=yes, sigma=torch.linspace(0.4, 2.0, 8), **{field: yes})
    pixels = random_images(8, 16)
    assert_views(pixels, draws)
    made = Views(ON, 16, IDENTITY).apply(pixels, draws)
    swapped = tv.solarize(pixels.float() / 255, THRESHOLD)
    if field == "grayscale":
        swapped = tv.rgb_to_grayscale(swapped, 3)
    else:
        swapped = torch.stack([
            tv.gaussian_blur(image, [3, 3], [float(sigma)] * 2)
            for image, sigma in zip(swapped, draws.sigma, strict=True)
        ])  # fmt: skip
    assert (made - swapped).abs().amax((1, 2, 3)).min() > 0.05


@pytest.mark.usefixtures("way")
def test_all_operations_together_are_torchvisions() -> None:
    draws = Views(ON, 16, IDENTITY).draw(64, generator(1), firsts=32)
    assert draws.solarize.any()
    assert (draws.solarize & draws.blur & draws.grayscale).any()
    # a hue at a sixth of the wheel may turn rounding into a larger step, as in test_views.py
    assert assert_views(random_images(32, 16), draws, tolerance=2e-4) > 0


@pytest.mark.usefixtures("way")
def test_normalisation_comes_after_solarisation() -> None:
    pixels, draws = random_images(16, 8), Views(ON, 8, IDENTITY).draw(32, generator(2))
    plain = Views(ON, 8, IDENTITY).apply(pixels, draws)
    normalised = Views(ON, 8, ZSCORE).apply(pixels, draws)
    wanted = tv.normalize(plain, *map(Tensor.tolist, ZSCORE))
    torch.testing.assert_close(normalised, wanted, rtol=0, atol=1e-5)
    again = Views(ON, 8, ZSCORE, dtype=torch.bfloat16, channels_last=True).apply(pixels, draws)
    assert torch.equal(again, normalised.bfloat16())


def by_view(draws: Draws, field: str) -> Tensor:
    """A drawn column in the order of the views."""
    column = torch.empty_like(getattr(draws, field))
    column[draws.view] = getattr(draws, field)
    return column


PROBABILITIES = [  # blur, second blur, solarize, second solarize
    (0.3, None, 0.2, None),
    (1.0, 0.1, 0.0, 0.2),
    (0.0, 0.6, 0.45, 0.0),
    (0.0, 0.0, 1.0, 0.5),
    (0.5, 0.5, 0.0, None),
]


@pytest.mark.parametrize(("blur", "second_blur", "solarize", "second_solarize"), PROBABILITIES)
def test_each_view_has_its_own_probabilities(
    blur: float, second_blur: float | None, solarize: float, second_solarize: float | None
) -> None:
    config = ViewsConfig(
        blur_probability=blur,
        second_blur_probability=second_blur,
        solarize_probability=solarize,
        second_solarize_probability=second_solarize,
    )
    draws = Views(config, 8, IDENTITY).draw(COUNT, generator(7), firsts=COUNT // 2)
    drawn = {"blur": by_view(draws, "blur"), "solarize": by_view(draws, "solarize")}
    wanted = {
        "blur": (blur, blur if second_blur is None else second_blur),
        "solarize": (solarize, solarize if second_solarize is None else second_solarize),
    }
    for field, probabilities in wanted.items():
        for views, probability in zip(drawn[field].chunk(2), probabilities, strict=True):
            heads = int(views.sum())
            assert heads == probability * len(views) or 0 < probability < 1, field
            assert binomtest(heads, len(views), probability).pvalue > 1e-3, field
    for blurred, solarised in zip(*(drawn[field].chunk(2) for field in drawn), strict=True):
        table = [[int((blurred == b).logical_and(solarised == s).sum()) for s in (0, 1)] for b in (0, 1)]
        if all(map(sum, table)) and all(map(sum, zip(*table, strict=True))):
            assert chi2_contingency(table).pvalue > 1e-3, "drawn independently of each other"


@pytest.mark.usefixtures("way")
def test_without_a_number_of_firsts_all_are_first_views() -> None:
    config = ViewsConfig(solarize_probability=0.0, second_solarize_probability=1.0, blur_probability=1.0,
                         second_blur_probability=0.0)  # fmt: skip
    draws = Views(config, 8, IDENTITY).draw(COUNT, generator())
    assert not draws.solarize.any()
    assert draws.blur.all()


@pytest.mark.parametrize("firsts", [0, 1, 5, 8])
def test_second_views_are_numbered_from_firsts_on(firsts: int) -> None:
    config = ViewsConfig(second_solarize_probability=1.0)
    draws = Views(config, 8, IDENTITY).draw(8, generator(firsts), firsts=firsts)
    assert by_view(draws, "solarize").tolist() == [number >= firsts for number in range(8)]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("count", [1, 3, 6, 7])
@pytest.mark.parametrize("second", [True, False])
def test_a_pair_counts_its_images_as_first_views(count: int, second: bool) -> None:
    """Also where views are drawn beyond those of the pair, to a multiple of 4."""
    name = "second_solarize_probability" if second else "solarize_probability"
    other = {"second_solarize_probability": 0.0} if not second else {}
    views = Views(ViewsConfig(**STILL, **{name: 1.0}, **other), 8, IDENTITY)
    pixels = torch.full((count, 3, 8, 8), 200, dtype=torch.uint8)
    first, last = (views.pair(pixels, generator(count)) * 255).round().int().split(count)
    assert first.unique().tolist() == [200 if second else 55]
    assert last.unique().tolist() == [55 if second else 200]
    single = (views(pixels, generator(count)) * 255).round().int()
    assert single.unique().tolist() == [200 if second else 55], "a lone view is a first one"


@pytest.mark.usefixtures("way")
def test_blur_of_a_pair_is_that_of_its_views() -> None:
    config = ViewsConfig(**STILL, blur_probability=1.0, second_blur_probability=0.0)
    pixels = random_images(7, 16)
    first, last = Views(config, 16, IDENTITY).pair(pixels, generator()).split(7)
    torch.testing.assert_close(last, pixels.float() / 255, rtol=0, atol=1e-5)
    # A sigma near the smallest leaves the image as it is.
    assert (first - pixels.float() / 255).abs().amax((1, 2, 3)).median() > 1e-3


def recipe_views(name: str) -> ViewsConfig:
    return TrialConfig.model_validate({"recipe": name, "training": {"epochs": 200}}).views


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("name", "blur", "solarize"),
    [
        ("ouyang2025-barlow-cifar", (0.0, 0.0), (0.0, 0.2)),
        ("ouyang2025-barlow-imagenet100", (1.0, 0.1), (0.0, 0.2)),
        ("ouyang2025-simclr-cifar", (0.5, 0.5), (0.0, 0.0)),
    ],
)
def test_recipes_of_two_different_views(name: str, blur: tuple[float, float], solarize: tuple[float, float]):
    draws = Views(recipe_views(name), 32, IDENTITY).draw(COUNT, generator(5), firsts=COUNT // 2)
    for field, probabilities in (("blur", blur), ("solarize", solarize)):
        for half, probability in zip(by_view(draws, field).chunk(2), probabilities, strict=True):
            assert binomtest(int(half.sum()), len(half), probability).pvalue > 1e-3


BARLOW = (0.4, 0.4, 0.2, 0.1)
"""Brightness, contrast, saturation, hue of solo-learn's Barlow Twins."""
OWN = {"brightness": 0.3, "contrast": 0.6, "saturation": 0.9, "hue": 0.15}
JITTERS = {
    "barlow": (recipe_views("ouyang2025-barlow-cifar"), BARLOW),
    "barlow-imagenet100": (recipe_views("ouyang2025-barlow-imagenet100"), BARLOW),
    "simclr": (recipe_views("ouyang2025-simclr-cifar"), (0.8, 0.8, 0.8, 0.2)),
    "google": (recipe_views("google-research-cifar10"), (0.4, 0.4, 0.4, 0.1)),
    "own": (ViewsConfig(**OWN, jitter_strength=1.0), (0.3, 0.6, 0.9, 0.15)),
    "doubled": (ViewsConfig(**OWN, jitter_strength=2.0), (0.6, 1.2, 1.8, 0.3)),
    "halved": (ViewsConfig(**OWN, jitter_strength=0.5), (0.15, 0.3, 0.45, 0.075)),
    "none": (ViewsConfig(brightness=0, contrast=0, saturation=0, hue=0), (0.0, 0.0, 0.0, 0.0)),
}


@pytest.mark.parametrize("name", JITTERS)
def test_jitter_ranges_are_their_own_fields_times_the_strength(name: str) -> None:
    config, ranges = JITTERS[name]
    config = config.model_copy(update={"jitter_probability": 1.0})
    draws = Views(config, 8, IDENTITY).draw(COUNT, generator(11))
    columns = {**dict(zip(("brightness", "contrast", "saturation"), draws.factors.T, strict=True)),
               "hue": draws.hue + 1}  # fmt: skip
    for (field, column), half in zip(columns.items(), ranges, strict=True):
        low, high = max(0.0, 1 - half), 1 + half
        width = high - low
        assert low - 1e-6 <= float(column.min()) <= low + 1e-3 * width + 1e-6, field
        assert high - 1e-3 * width - 1e-6 <= float(column.max()) <= high + 1e-6, field
        assert abs(float(column.double().mean()) - (low + high) / 2) <= 5 * width / (12 * COUNT) ** 0.5, field
        if width:
            assert kstest(column.double().numpy(), "uniform", (low, width)).pvalue > 1e-4, field
