"""Views against slow references: torchvision's functions, one image at a time."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from kernel_on_host import no_waiting
from scipy import stats
from torch import Tensor
from torchvision.transforms import ColorJitter, GaussianBlur, RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from headsearch.config import ViewsConfig
from headsearch.core import views as views_module
from headsearch.core.draws import ATTEMPTS, NUMBERS, Distribution, Draws
from headsearch.core.viewkernel import draw_views
from headsearch.core.views import Views, kernel_size

PLAIN = (torch.zeros(3), torch.ones(3))
ZSCORE = (torch.tensor([0.49, 0.48, 0.44]), torch.tensor([0.25, 0.24, 0.26]))
STILL = ViewsConfig(
    crop_scale_min=1.0, flip_probability=0, jitter_probability=0, grayscale_probability=0, blur_probability=0
)
ALL = ViewsConfig(blur_probability=0.5)
SECOND = ViewsConfig(second_blur_probability=0.1, solarize_probability=0.0, second_solarize_probability=0.2)
TOLERANCE = 2e-5  # of pixels in [0, 1]; float32 sampling positions of a 96-pixel image are good to about 1e-5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(count: int, size: int) -> Tensor:
    """Noise on smooth colours, with black, white, grey and saturated images among them."""
    source = torch.rand(count, 3, size, size, generator=generator(7))
    images = (source * 255).to(torch.uint8)
    for index, color in enumerate(
        [(0, 0, 0), (255, 255, 255), (90, 90, 90), (255, 0, 0), (0, 255, 255), (255, 255, 0)]
    ):
        images[index] = torch.tensor(color, dtype=torch.uint8)[:, None, None]
    return images


def identity(count: int, size: int) -> Draws:
    """Draws that change nothing; view i is made by row i."""
    return Draws(
        view=torch.arange(count),
        box=torch.tensor([0.0, 0.0, size, size]).expand(count, 4),
        flip=torch.zeros(count, dtype=torch.bool),
        factors=torch.ones(count, 3),
        order=torch.arange(3).expand(count, 3),
        hue=torch.zeros(count),
        grayscale=torch.zeros(count, dtype=torch.bool),
        blur=torch.zeros(count, dtype=torch.bool),
        sigma=torch.ones(count),
        solarize=torch.zeros(count, dtype=torch.bool),
    )


def reference(image: Tensor, draws: Draws, row: int) -> Tensor:
    """One view by torchvision; `image` is float in [0, 1]."""
    left, top, width, height = (int(edge) for edge in draws.box[row])
    image = tv.resized_crop(image, top, left, height, width, list(image.shape[-2:]), antialias=True)
    if draws.flip[row]:
        image = tv.horizontal_flip(image)
    operations = [
        (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)[i] for i in draws.order[row]
    ]
    factors = [float(draws.factors[row, i]) for i in draws.order[row]]
    operations.insert(row % 4, tv.adjust_hue)
    factors.insert(row % 4, float(draws.hue[row]))
    for operation, factor in zip(operations, factors, strict=True):
        image = operation(image, factor)
    if draws.grayscale[row]:
        image = tv.rgb_to_grayscale(image, num_output_channels=3)
    if draws.blur[row]:
        kernel = kernel_size(image.shape[-1])
        image = tv.gaussian_blur(image, [kernel, kernel], [float(draws.sigma[row])] * 2)
    return image


def compare(draws: Draws, size: int, tolerance: float = TOLERANCE) -> None:
    images = random_images(len(draws), size)
    ours = Views(ALL, size, PLAIN).apply(images, draws)
    theirs = torch.stack([reference(images[v].float() / 255, draws, row) for row, v in enumerate(draws.view)])
    torch.testing.assert_close(ours[draws.view], theirs, rtol=0, atol=tolerance)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("size", [8, 32, 33, 96])
def test_crop_and_flip_match_torchvision(size: int) -> None:
    count = 32
    sides = torch.randint(1, size + 1, (count, 2), generator=generator())
    corner = (torch.rand(count, 2, generator=generator(1)) * (size - sides + 1)).floor()
    compare(
        dataclasses.replace(
            identity(count, size),
            box=torch.cat([corner, sides.float()], 1),
            flip=torch.rand(count, generator=generator(2)) < 0.5,
        ),
        size,
    )


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("operation", range(3))
def test_brightness_contrast_saturation_match_torchvision(operation: int) -> None:
    count = 48
    factors = torch.ones(count, 3)
    factors[:, operation] = torch.linspace(0, 2.6, count)
    compare(dataclasses.replace(identity(count, 12), factors=factors), 12)


@pytest.mark.usefixtures("way")
def test_hue_matches_torchvision() -> None:
    count = 64
    compare(dataclasses.replace(identity(count, 12), hue=torch.linspace(-0.5, 0.5, count)), 12)


@pytest.mark.usefixtures("way")
def test_grayscale_matches_torchvision() -> None:
    compare(dataclasses.replace(identity(8, 12), grayscale=torch.arange(8) % 2 == 0), 12)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("size", [8, 32, 96, 128])
def test_blur_matches_torchvision(size: int) -> None:
    count = 12
    compare(
        dataclasses.replace(
            identity(count, size), blur=torch.arange(count) % 3 != 0, sigma=torch.linspace(0.1, 2.0, count)
        ),
        size,
    )


@pytest.mark.parametrize(("size", "kernel"), [(4, 3), (8, 3), (32, 3), (96, 9), (128, 13), (224, 23)])
def test_kernel_is_the_odd_number_nearest_to_a_tenth(size: int, kernel: int) -> None:
    assert kernel_size(size) == kernel


@pytest.mark.usefixtures("way")
def test_all_operations_in_every_order_match_torchvision() -> None:
    orders = [order for order in itertools.permutations(range(3)) for _ in range(4)]
    draws = dataclasses.replace(
        Views(ALL, 32, PLAIN).draw(len(orders), generator(3)), order=torch.tensor(orders)
    )
    # A hue just at a sixth of the wheel, or a saturated image's, may turn rounding into a larger step.
    compare(draws, 32, tolerance=2e-4)


@pytest.mark.usefixtures("way")
def test_random_views_match_torchvision_through_the_public_call() -> None:
    images, views = random_images(30, 32), Views(ALL, 32, ZSCORE)
    ours = views.pair(images, generator(5))
    draws = views.draw(60, generator(5))
    for row, view in enumerate(draws.view.tolist()):
        expected = tv.normalize(
            reference(images[view % 30].float() / 255, draws, row), *map(Tensor.tolist, ZSCORE)
        )
        torch.testing.assert_close(ours[view], expected, rtol=0, atol=1e-3)


@pytest.mark.usefixtures("way")
def test_nothing_asked_for_changes_nothing() -> None:
    images = random_images(10, 16)
    views = Views(STILL, 16, ZSCORE)
    expected = (images.double() / 255 - ZSCORE[0].double()[:, None, None]) / ZSCORE[1].double()[:, None, None]
    for made in (views(images, generator()), views.plain(images)):
        torch.testing.assert_close(made.double(), expected, rtol=0, atol=1e-5)
    pair = views.pair(images, generator())
    assert torch.equal(pair[:10], pair[10:])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 300])
def test_any_number_of_images(count: int) -> None:
    images = random_images(max(count, 6), 32)[:count]
    views = Views(ALL, 32, PLAIN)
    assert views(images, generator()).shape == (count, 3, 32, 32)
    pair = views.pair(images, generator())
    assert pair.shape == (2 * count, 3, 32, 32)
    assert torch.isfinite(pair).all()
    assert pair.numel() == 0 or (pair.min() >= 0 and pair.max() <= 1 + 1e-6)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_memory_format(dtype: torch.dtype) -> None:
    images = random_images(9, 32)
    wanted = Views(ALL, 32, PLAIN).pair(images, generator(1))
    views = Views(ALL, 32, PLAIN, dtype=dtype, channels_last=True)
    made = views.pair(images, generator(1))
    for out in (made, views.plain(images), views(images, generator(1))):
        assert out.dtype == dtype
        assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(made, wanted.to(dtype))


@pytest.mark.usefixtures("way")
def test_the_generator_determines_the_views() -> None:
    images, views = random_images(40, 32), Views(ALL, 32, PLAIN)
    first = views.pair(images, generator(1))
    torch.manual_seed(123)
    assert torch.equal(first, views.pair(images, generator(1)))
    assert not torch.equal(first, views.pair(images, generator(2)))
    assert not torch.equal(first[:40], first[40:])
    stream = generator(1)
    assert torch.equal(first, views.pair(images, stream))
    assert not torch.equal(first, views.pair(images, stream))


@pytest.mark.usefixtures("way")
def test_chunks_do_not_change_the_views(monkeypatch: pytest.MonkeyPatch) -> None:
    images, views = random_images(50, 16), Views(ALL, 16, PLAIN)
    whole = views.pair(images, generator(4))
    monkeypatch.setitem(views.apply.__globals__["_CHUNK_VALUES"], "cpu", 1)
    torch.testing.assert_close(views.pair(images, generator(4)), whole, rtol=0, atol=1e-6)


def test_threads_do_not_change_the_views() -> None:
    images, views = random_images(70, 16)[:, :, ::2], Views(ALL, 8, ZSCORE, channels_last=True)
    assert not images.is_contiguous()
    images = images[..., ::2]
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append(views.pair(images, generator(1)))
    finally:
        torch.set_num_threads(before)
    assert made[0].equal(made[1])
    assert made[0].equal(made[2])


@pytest.mark.usefixtures("way")
def test_images_are_left_as_they_were() -> None:
    images = random_images(12, 16)
    before = images.clone()
    Views(ALL, 16, ZSCORE).pair(images, generator())
    assert torch.equal(images, before)


DRAWN = 8000


def test_crops_are_distributed_as_torchvisions() -> None:
    config = ViewsConfig(crop_scale_min=0.08)
    left, top, width, height = Views(config, 32, PLAIN).draw(DRAWN, generator(0)).box.T.numpy()
    torch.manual_seed(0)
    image = torch.empty(3, 32, 32)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(DRAWN)]
    )  # top, left, height, width
    for ours, other in ((top, 0), (left, 1), (height, 2), (width, 3)):
        assert_same_distribution(ours, theirs[:, other])
    assert_same_distribution(width * height, theirs[:, 2] * theirs[:, 3])
    assert_same_distribution(width / height, theirs[:, 3] / theirs[:, 2])
    assert (left + width).max() <= 32
    assert (top + height).max() <= 32


@pytest.mark.parametrize("firsts", [None, 4000])
@pytest.mark.parametrize(
    "config", [ALL, ViewsConfig(crop_scale_min=1.0), SECOND], ids=["all", "whole", "second"]
)
def test_one_pass_draws_what_operations_on_batches_draw(config: ViewsConfig, firsts: int | None) -> None:
    distribution = Distribution(config, 32, torch.device("cpu"))
    uniform = torch.rand(8000, NUMBERS, generator=generator(4))
    uniform[:10, 6:9] = 0.5  # ties keep their order
    uniform[10, -4 * ATTEMPTS :] = 0.99
    ours = draw_views(uniform, distribution, firsts or len(uniform))
    theirs = distribution.draws(uniform, firsts or len(uniform))
    for field in dataclasses.fields(Draws):
        one, other = getattr(ours, field.name), getattr(theirs, field.name)
        assert one.dtype == other.dtype
        if field.name == "box":
            # A side between two pixels may be rounded to either.
            assert (one != other).any(1).sum() <= 2
        elif field.name == "order":
            assert torch.equal(one[10:], other[10:])
            assert one[:10].tolist() == [[0, 1, 2]] * 10
        else:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_crop_that_never_fits_is_the_whole_image() -> None:
    views = Views(ViewsConfig(crop_scale_min=1.0), 8, PLAIN)
    uniform = torch.full((4, 4, 10), 0.99)
    uniform[1] = 0.0  # ratio 3/4 of the full area: higher than the image
    assert torch.equal(views.distribution.boxes(uniform), torch.tensor([0.0, 0.0, 8.0, 8.0]).expand(4, 4))


def test_jitter_is_distributed_as_torchvisions() -> None:
    draws = Views(ViewsConfig(jitter_strength=0.5, jitter_probability=1.0), 32, PLAIN).draw(
        DRAWN, generator(0)
    )
    torch.manual_seed(0)
    jitter = ColorJitter(0.4, 0.4, 0.4, 0.1)
    theirs = [
        jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        for _ in range(DRAWN)
    ]
    for column in range(3):
        assert_same_distribution(
            draws.factors[:, column].numpy(), np.array([draw[1 + column] for draw in theirs])
        )
    assert_same_distribution(draws.hue.numpy(), np.array([draw[4] for draw in theirs]))


def test_strong_jitter_never_has_a_negative_factor() -> None:
    draws = Views(ViewsConfig(jitter_strength=2.0, jitter_probability=1.0), 8, PLAIN).draw(4000, generator())
    assert draws.factors.min() >= 0
    assert math.isclose(draws.factors.max(), 2.6, abs_tol=0.01)
    assert draws.hue.abs().max() <= 0.4


def test_every_order_of_operations_is_equally_likely_for_every_view() -> None:
    views, images, runs = Views(ViewsConfig(), 8, PLAIN), 6, 4000
    counts = np.zeros((images, 24))
    stream = generator(1)
    orders = {order: index for index, order in enumerate(itertools.permutations(range(4)))}
    for _ in range(runs):
        draws = views.draw(8, stream)
        for row, (view, order) in enumerate(zip(draws.view.tolist(), draws.order.tolist(), strict=True)):
            if view < images:
                counts[view, orders[(*order[: row % 4], 3, *order[row % 4 :])]] += 1
    for view in counts:
        assert stats.chisquare(view).pvalue > 1e-4


@pytest.mark.parametrize("field", ["flip", "grayscale", "blur"])
def test_probabilities(field: str) -> None:
    config = ViewsConfig(**{f"{field}_probability": 0.3})
    drawn = getattr(Views(config, 32, PLAIN).draw(DRAWN, generator(1)), field)
    assert stats.binomtest(int(drawn.sum()), DRAWN, 0.3).pvalue > 1e-4


@pytest.mark.usefixtures("way")
def test_a_share_of_views_keeps_its_colours() -> None:
    draws = Views(ViewsConfig(jitter_probability=0.8), 32, PLAIN).draw(DRAWN, generator(1))
    kept = (draws.factors == 1).all(1)
    assert torch.equal(kept, draws.hue == 0)
    assert stats.binomtest(int(kept.sum()), DRAWN, 0.2).pvalue > 1e-4


def test_sigma_is_distributed_as_torchvisions() -> None:
    sigma = Views(ALL, 32, PLAIN).draw(DRAWN, generator(1)).sigma.numpy()
    torch.manual_seed(0)
    assert_same_distribution(sigma, np.array([GaussianBlur.get_params(0.1, 2.0) for _ in range(DRAWN)]))


def assert_same_distribution(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Two-sample Kolmogorov-Smirnov; seeds are fixed, so that this either always passes or never."""
    assert stats.ks_2samp(ours, theirs, method="asymp").pvalue > 1e-3


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """A device on which views are made by whole batches. What runs on GPUs so runs in CI, too."""
    monkeypatch.setattr(views_module, "FUSED_ON", ())
    monkeypatch.setattr(views_module, "KERNEL_ON", ())
    return torch.device(request.param)


def test_whole_batches_never_wait_for_the_device(device: torch.device) -> None:
    images = random_images(64, 32).to(device)
    views = Views(SECOND, 32, (ZSCORE[0].to(device), ZSCORE[1].to(device)), channels_last=True)
    stream = views.stream(3, "views")
    assert views.stream_kind == device.type
    assert stream.device.type == device.type
    views.pair(images, stream)
    with no_waiting(device):
        made = views.pair(images, stream)
        views.plain(images)
    assert torch.isfinite(made).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [8, 32, 33, 96])
def test_whole_batches_on_any_device_are_the_views_of_the_cpu(
    device: torch.device, size: int, dtype: torch.dtype
) -> None:
    config = ViewsConfig(blur_probability=0.5, grayscale_probability=0.3, solarize_probability=0.3)
    images, normalization = random_images(16, size), (ZSCORE[0].to(device), ZSCORE[1].to(device))
    views = Views(config, size, normalization, dtype=dtype, channels_last=True)
    draws = views.draw(48, torch.Generator(device).manual_seed(1))
    on_cpu = Draws(**{field.name: getattr(draws, field.name).cpu() for field in dataclasses.fields(draws)})
    expected = Views(config, size, ZSCORE)._apply_fused(images, on_cpu)
    made = views.apply(images.to(device), draws).cpu()
    assert made.dtype == dtype
    allowed = 1e-3 + (2**-8 * expected.abs() if dtype == torch.bfloat16 else 0.0)
    differences = (made.float() - expected).abs()
    # A pixel at the threshold of solarisation may be on either side of it.
    assert (differences > allowed).float().mean() <= 1e-4
    assert (differences <= allowed + 0.02).all()


def test_plain_images_are_the_same_on_any_device(device: torch.device) -> None:
    images = random_images(8, 16)
    views = Views(ALL, 16, (ZSCORE[0].to(device), ZSCORE[1].to(device)), channels_last=True)
    expected = Views(ALL, 16, ZSCORE).plain(images)
    torch.testing.assert_close(views.plain(images.to(device)).cpu(), expected, rtol=0, atol=1e-5)
