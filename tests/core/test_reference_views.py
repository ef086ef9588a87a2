"""View operations against loops over pixels, torchvision, and the distributions they are drawn from.

Draws are tested with fixed seeds: their thresholds are met by chance and must not fail by chance.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import references
import torch
from scipy.stats import binomtest, chisquare, ks_2samp, kstest
from torchvision.transforms.v2 import functional as tv

from headsearch.config import ViewsConfig
from headsearch.core.draws import Draws
from headsearch.core.views import Views, kernel_size

IDENTITY = (torch.zeros(3), torch.ones(3))
ALL_ON = ViewsConfig(blur_probability=0.5, grayscale_probability=0.3, jitter_strength=1.0)


def images(count: int, size: int) -> torch.Tensor:
    pixels = references.fresh_generator().integers(0, 256, size=(count, 3, size, size), dtype=np.uint8)
    pixels[:, :, 0, :2] = 77  # grey: no hue
    pixels[:, 1, 1, :2] = pixels[:, 0, 1, :2]  # red and green tie
    return torch.from_numpy(pixels)


def still(count: int, size: int) -> Draws:
    """Draws that leave every image as it is."""
    whole = torch.tensor([0.0, 0.0, size, size])
    no = torch.zeros(count, dtype=torch.bool)
    return Draws(
        view=torch.arange(count), box=whole.repeat(count, 1), flip=no, factors=torch.ones(count, 3),
        order=torch.arange(3).repeat(count, 1), hue=torch.zeros(count), grayscale=no, blur=no,
        sigma=torch.ones(count), solarize=no,
    )  # fmt: skip


def by_hand(image: np.ndarray, draws: Draws, row: int) -> np.ndarray:
    """One view, one pixel at a time; hue is operation `row` mod 4."""
    left, top, width, height = draws.box[row].tolist()
    x = references.resample(image, (top, left, height, width), flip=bool(draws.flip[row]))
    change = (references.brightness, references.contrast, references.saturation)
    operations = draws.order[row].tolist()
    operations.insert(row % 4, 3)
    for operation in operations:
        if operation == 3:
            x = references.hue(x, float(draws.hue[row]))
        else:
            x = change[operation](x, float(draws.factors[row, operation]))
    if draws.grayscale[row]:
        x = references.grayscale(x)
    if draws.blur[row]:
        x = references.blur(x, kernel_size(image.shape[-1]), float(draws.sigma[row]))
    return x


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("size", [4, 9, 32])
def test_whole_views_pixel_by_pixel(size):
    pixels = images(2, size)
    count = 8 if size > 10 else 24
    views = Views(ALL_ON, size, IDENTITY)
    draws = views.draw(count, torch.Generator().manual_seed(size))
    got = views.apply(pixels, draws).double().numpy()
    for row, view in enumerate(draws.view.tolist()):
        want = by_hand(pixels[view % 2].double().numpy() / 255, draws, row)
        np.testing.assert_allclose(got[view], want, atol=3e-5, err_msg=f"row {row}")


@pytest.mark.usefixtures("way")
def test_normalisation_is_the_last_step():
    pixels = images(3, 6)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.1])
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    plain, normalised = (
        Views(ALL_ON, 6, statistics).pair(pixels, generator).double().numpy()
        for statistics, generator in zip((IDENTITY, (mean, std)), generators, strict=True)
    )
    want = (plain - mean.double().numpy()[:, None, None]) / std.double().numpy()[:, None, None]
    np.testing.assert_allclose(normalised, want, atol=1e-5)
    got = Views(ALL_ON, 6, (mean, std)).plain(pixels).double().numpy()
    raw = pixels.double().numpy() / 255
    np.testing.assert_allclose(
        got, (raw - mean.double().numpy()[:, None, None]) / std.double().numpy()[:, None, None], atol=1e-5
    )


@pytest.mark.usefixtures("way")
def test_operations_against_torchvision():
    """A second oracle, for what the references above and the code could both have wrong."""
    pixels = images(4, 12)
    unit = pixels.float() / 255
    views = Views(ALL_ON, 12, IDENTITY)
    draws = still(4, 12)
    box = torch.tensor([[2.0, 1, 7, 8], [0, 0, 12, 12], [11, 11, 1, 1], [3, 0, 9, 12]])
    got = views.apply(pixels, replace(draws, box=box))
    for image, view, (left, top, width, height) in zip(unit, got, box.int().tolist(), strict=True):
        torch.testing.assert_close(
            view, tv.resized_crop(image, top, left, height, width, [12, 12]), rtol=0, atol=2e-5
        )
    for operation, change in enumerate((tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)):
        for factor in (0.0, 0.4, 1.7):
            factors = torch.ones(4, 3)
            factors[:, operation] = factor
            got = views.apply(pixels, replace(draws, factors=factors))
            torch.testing.assert_close(got, change(unit, factor), rtol=0, atol=2e-5)
    for turns in (-0.4, -0.05, 0.2, 0.5):
        got = views.apply(pixels, replace(draws, hue=torch.full((4,), turns)))
        torch.testing.assert_close(got, tv.adjust_hue(unit, turns), rtol=0, atol=2e-5)
    everywhere = torch.ones(4, dtype=torch.bool)
    got = views.apply(pixels, replace(draws, flip=everywhere))
    torch.testing.assert_close(got, unit.flip(-1), rtol=0, atol=1e-5)
    got = views.apply(pixels, replace(draws, grayscale=everywhere))
    torch.testing.assert_close(got, tv.rgb_to_grayscale(unit, 3), rtol=0, atol=1e-5)
    for sigma in (0.1, 0.8, 2.0):
        got = views.apply(pixels, replace(draws, blur=everywhere, sigma=torch.full((4,), sigma)))
        torch.testing.assert_close(got, tv.gaussian_blur(unit, [3, 3], [sigma] * 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("size", "kernel"), [(8, 3), (32, 3), (96, 9), (128, 13), (224, 23)])
def test_kernel_is_a_tenth_of_the_image(size, kernel):
    assert kernel_size(size) == kernel


@pytest.mark.usefixtures("way")
def test_wide_blur_by_direct_sum():
    pixels = images(1, 96)[:, :, :, :]
    draws = replace(still(4, 96), blur=torch.ones(4, dtype=torch.bool), sigma=torch.full((4,), 1.7))
    got = Views(ALL_ON, 96, IDENTITY).apply(pixels, draws)[0].double().numpy()
    small = pixels[0, :, :20, :20].double().numpy() / 255  # far enough from the cut: 4 pixels
    np.testing.assert_allclose(got[:, :16, :16], references.blur(small, 9, 1.7)[:, :16, :16], atol=1e-5)


COUNT = 6_000


def drawn(config: ViewsConfig, size: int = 32, seed: int = 0) -> Draws:
    return Views(config, size, IDENTITY).draw(COUNT, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale_min", [0.08, 0.2, 1.0])
@pytest.mark.parametrize("size", [8, 32])
def test_crops_are_drawn_as_torchvision_draws_them(scale_min, size):
    left, top, width, height = drawn(ViewsConfig(crop_scale_min=scale_min), size).box.double().numpy().T
    rng = np.random.default_rng(1)
    want = np.array(list(references.crop_boxes(rng, size, COUNT, scale_min)), dtype=np.float64)
    want_top, want_left, want_height, want_width = want.T
    for name, got, wanted in (
        ("area", width * height, want_width * want_height),
        ("aspect", width / height, want_width / want_height),
        ("left", left, want_left),
        ("top", top, want_top),
        ("right gap", size - left - width, size - want_left - want_width),
        ("left of small", left[width < size * 0.7], want_left[want_width < size * 0.7]),
    ):
        if len(wanted):
            assert ks_2samp(got, wanted, method="asymp").pvalue > 1e-3, name
    assert min(left.min(), top.min()) >= 0
    assert max((left + width).max(), (top + height).max()) <= size
    assert min(width.min(), height.min()) >= 1
    assert (np.stack([left, top, width, height]) % 1 == 0).all()


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_jitter_is_uniform(strength):
    draws = drawn(ViewsConfig(jitter_strength=strength, jitter_probability=0.7))
    jittered = draws.hue != 0
    assert binomtest(int(jittered.sum()), COUNT, 0.7).pvalue > 1e-3
    assert torch.equal(jittered, (draws.factors != 1).any(1)), "all four operations or none"
    low, high = max(0.0, 1 - 0.8 * strength), 1 + 0.8 * strength
    for factor in draws.factors[jittered].double().numpy().T:
        assert kstest(factor, "uniform", (low, high - low)).pvalue > 1e-3
    hue = draws.hue[jittered].double().numpy()
    assert kstest(hue, "uniform", (-0.2 * strength, 0.4 * strength)).pvalue > 1e-3
    parameters = torch.column_stack([draws.factors[jittered], draws.hue[jittered]]).double().numpy()
    correlation = np.corrcoef(parameters.T) - np.eye(4)
    assert np.abs(correlation).max() < 5 / math.sqrt(len(parameters))


def test_all_24_orders_are_equally_likely_for_every_view():
    draws = drawn(ViewsConfig())
    seen: dict[tuple[int, ...], int] = dict.fromkeys(itertools.permutations(range(4)), 0)
    first_half = dict(seen)
    for row, view in enumerate(draws.view.tolist()):
        order = draws.order[row].tolist()
        order.insert(row % 4, 3)
        seen[tuple(order)] += 1
        first_half[tuple(order)] += view < COUNT // 2
    assert chisquare(list(seen.values())).pvalue > 1e-3
    assert chisquare(list(first_half.values())).pvalue > 1e-3


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("name", ["flip", "grayscale", "blur"])
def test_coins(name, probability):
    draws = drawn(ViewsConfig(**{f"{name}_probability": probability}))
    heads = int(getattr(draws, name).sum())
    assert heads == probability * COUNT or 0 < probability < 1
    assert binomtest(heads, COUNT, probability).pvalue > 1e-3
    assert kstest(draws.sigma.double().numpy(), "uniform", (0.1, 1.9)).pvalue > 1e-3


def by_view(draws: Draws) -> np.ndarray:
    """Everything drawn, one row a view, in the order of the views."""
    columns = [draws.box, draws.factors, draws.order, draws.hue, draws.sigma, draws.flip, draws.grayscale]
    columns += [draws.blur, torch.arange(len(draws)) % 4]
    table = torch.column_stack([column.double() for column in columns])
    return table[draws.view.argsort()].numpy()


def test_two_views_of_an_image_are_drawn_independently():
    first, second = np.split(by_view(drawn(ALL_ON)), 2)  # as `pair` pairs them
    for mine, other in itertools.product(first.T, second.T):
        assert abs(np.corrcoef(mine, other)[0, 1]) < 5 / math.sqrt(len(first))
    assert (first != second).any(axis=1).all()


@pytest.mark.usefixtures("way")
def test_a_pair_shows_each_image_twice_and_no_other():
    """Images of one colour each: no crop can hide which image a view came from."""
    colours = torch.arange(1, 8, dtype=torch.uint8)[:, None, None, None].expand(7, 3, 6, 6) * 30
    config = ViewsConfig(jitter_probability=0.0, grayscale_probability=0.0)
    pair = Views(config, 6, IDENTITY).pair(colours, torch.Generator().manual_seed(0))
    assert pair.shape == (14, 3, 6, 6)
    torch.testing.assert_close(pair, (colours.float() / 255).repeat(2, 1, 1, 1), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("way")
def test_the_two_views_of_an_image_differ_and_repeat_with_the_generator():
    pixels = images(5, 16)
    views = Views(ALL_ON, 16, IDENTITY)
    generator = torch.Generator().manual_seed(3)
    first, again = views.pair(pixels, generator), views.pair(pixels, generator)
    assert (first[:5] - first[5:]).abs().amax((1, 2, 3)).min() > 0.05
    assert (first - again).abs().amax((1, 2, 3)).min() > 0.05
    assert torch.equal(first, views.pair(pixels, torch.Generator().manual_seed(3)))
