"""The kernel that draws and makes views on GPUs, beside the views of the CPU, torchvision and numpy.

Without a GPU its source runs on the host (see `kernel_on_host`); the same tests run on CUDA where there is one.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import subprocess
import threading
from dataclasses import fields, replace
from pathlib import Path

import kernel_on_host as host
import numpy as np
import pytest
import torch
from kernel_on_host import Machine, Operations
from scipy import stats
from test_views import ALL, PLAIN, ZSCORE, assert_same_distribution, generator, random_images
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import ColorJitter, GaussianBlur, RandomResizedCrop

from headsearch.config import ViewsConfig
from headsearch.core import cuda_driver, cuda_views, views
from headsearch.core.cuda_views import Arguments
from headsearch.core.draws import ATTEMPTS, COLUMNS, LOG_RATIO, NUMBERS, SIGMA, Draws
from headsearch.core.randomness import Philox, derive_seed
from headsearch.core.views import Views, kernel_size

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
BATCH, SEED = 3, 1234567890123456789
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


class TestPixels:
    @pytest.mark.parametrize("size", [8, 32, 33, 64, 96])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("channels_last", [False, True])
    def test_given_parameters_make_the_views_of_the_cpu(
        self, machine: Machine, size: int, dtype: torch.dtype, channels_last: bool
    ) -> None:
        images, count = random_images(16, size), 48
        on_cpu = Views(EVERYTHING, size, ZSCORE)
        draws = on_cpu.draw(count, generator(size))
        ours = machine.views(EVERYTHING, size, normalization=ZSCORE, dtype=dtype, channels_last=channels_last)
        made = ours.apply(images.to(machine.device), on(machine.device, draws))
        assert made.dtype == dtype
        assert made.shape == (count, 3, size, size)
        assert made.is_contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )
        assert_close(made, on_cpu._apply_fused(images, draws), threshold=1e-4)
        exact = machine.views(EVERYTHING, size, normalization=ZSCORE)
        assert torch.equal(made, exact.apply(images.to(machine.device), on(machine.device, draws)).to(dtype))

    @pytest.mark.parametrize(
        "changed",
        [
            {},
            {"flip": torch.ones(8, dtype=torch.bool)},
            {"box": torch.tensor([[3.0, 5.0, 1.0, 1.0], [30.0, 31.0, 2.0, 1.0], [0.0, 0.0, 32.0, 9.0]] + [[7.0, 2.0, 16.0, 21.0]] * 5)},
            {"factors": torch.tensor([[0.4, 1.0, 1.0]] * 4 + [[1.8, 1.0, 1.0]] * 4)},
            {"factors": torch.tensor([[1.0, 0.0, 1.0]] * 4 + [[1.0, 2.6, 1.0]] * 4)},
            {"factors": torch.tensor([[1.0, 1.0, 0.0]] * 4 + [[1.0, 1.0, 1.7]] * 4)},
            {"hue": torch.linspace(-0.5, 0.5, 8)},
            {"grayscale": torch.ones(8, dtype=torch.bool)},
            {"blur": torch.ones(8, dtype=torch.bool), "sigma": torch.linspace(0.1, 2.0, 8)},
            {"solarize": torch.ones(8, dtype=torch.bool)},
        ],
        ids=["nothing", "flip", "crop", "brightness", "contrast", "saturation", "hue", "grayscale", "blur", "solarize"],
    )  # fmt: skip
    def test_each_operation_by_itself_is_that_of_the_cpu(self, machine: Machine, changed: dict) -> None:
        images, no = random_images(8, 32), torch.zeros(8, dtype=torch.bool)
        draws = replace(
            Draws(
                view=torch.arange(8), box=torch.tensor([[0.0, 0.0, 32.0, 32.0]] * 8), flip=no, factors=torch.ones(8, 3),
                order=torch.arange(3).repeat(8, 1), hue=torch.zeros(8), grayscale=no, blur=no, sigma=torch.ones(8),
                solarize=no,
            ),
            **changed,
        )  # fmt: skip
        expected = Views(EVERYTHING, 32, PLAIN)._apply_fused(images, draws)
        unchanged = (expected - images.float() / 255).abs().amax((1, 2, 3)) < 1e-6
        assert bool(unchanged.all()) == (not changed)
        ours = machine.views(EVERYTHING, 32, normalization=PLAIN)
        assert_close(ours.apply(images.to(machine.device), on(machine.device, draws)), expected)

    def test_what_a_stream_draws_is_what_is_made_in_every_order(self, machine: Machine) -> None:
        images = random_images(50, 32)
        ours = machine.views(EVERYTHING, 32, normalization=ZSCORE, channels_last=True)
        table = drawn(ours, stream(machine), 400)
        made = ours._make(images.to(machine.device), 400, stream(machine))
        assert len({tuple(row) for row in table[:, ORDER].tolist()}) == 24
        assert_close(made, from_cpu(images, table, EVERYTHING, ZSCORE), threshold=1e-4)

    @pytest.mark.parametrize("blurs", [False, True])
    @pytest.mark.parametrize("size", [128, 160, 224])
    def test_large_views_are_made_in_scratch_memory(self, machine: Machine, size: int, blurs: bool) -> None:
        config = replace_probability(EVERYTHING, blur_probability=0.7 if blurs else 0.0)
        images = random_images(6, size)
        ours = machine.views(config, size, normalization=ZSCORE, dtype=torch.bfloat16, channels_last=True)
        table = drawn(ours, stream(machine), 12, firsts=6)
        made = ours.pair(images.to(machine.device), stream(machine))
        assert_close(made, from_cpu(images, table, config, ZSCORE), threshold=1e-4)

    def test_each_block_has_scratch_memory_of_its_own(self, machine: Machine) -> None:
        real, seen = machine.launcher.launcher, []

        class Marking:
            def launch(self, arguments: Arguments, tensors: dict[str, Tensor], *shape: int) -> None:
                seen.append(tensors["scratch"].fill_(-7.0))
                real.launch(arguments, tensors, *shape)

        machine.launcher.launcher = Marking()
        ours = machine.views(replace_probability(EVERYTHING, blur_probability=1.0), 240, normalization=ZSCORE)
        ours(random_images(6, 240)[:4].to(machine.device), stream(machine))
        (scratch,) = seen
        assert scratch.shape == (4, 4 * 240 * 240)
        assert (scratch != -7.0).all()

    def test_images_that_lie_otherwise_in_memory_give_the_same_views(self, machine: Machine) -> None:
        images = random_images(10, 16).to(machine.device)
        ours = machine.views(ALL, 16, normalization=PLAIN)
        expected = ours.pair(images, stream(machine))
        assert torch.equal(
            ours.pair(images.contiguous(memory_format=torch.channels_last), stream(machine)), expected
        )
        assert torch.equal(ours.pair(images.repeat(1, 1, 1, 2)[..., :16], stream(machine)), expected)

    def test_other_images_are_refused(self, machine: Machine) -> None:
        ours = machine.views(ALL, 16, normalization=PLAIN)
        for images in (
            torch.zeros(2, 3, 16, 16, device=machine.device),
            torch.zeros(2, 3, 16, 8, dtype=torch.uint8, device=machine.device),
            torch.zeros(2, 1, 16, 16, dtype=torch.uint8, device=machine.device),
            torch.zeros(2, 3, 16, 16, dtype=torch.uint8, device="meta"),
        ):
            with pytest.raises(ValueError, match=r"expected torch.uint8 \(B, 3, 16, 16\)"):
                ours.pair(images, stream(machine))

    @pytest.mark.parametrize("count", [0, 1, 3])
    def test_any_number_of_images(self, machine: Machine, count: int) -> None:
        ours = machine.views(ALL, 8, normalization=ZSCORE, dtype=torch.bfloat16)
        images = random_images(6, 8)[:count].to(machine.device)
        assert ours(images, stream(machine)).shape == (count, 3, 8, 8)
        assert ours.pair(images, stream(machine)).shape == (2 * count, 3, 8, 8)


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


class TestRandomNumbers:
    @pytest.mark.parametrize(
        ("counter", "key", "expected"),
        [
            ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
            ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
            (
                [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
                [0xA4093822, 0x299F31D0],
                [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
            ),
        ],
        ids=["zeros", "ones", "pi"],
    )
    def test_philox_gives_the_known_answers_of_random123(
        self, counter: list[int], key: list[int], expected: list[int]
    ) -> None:
        words = (ctypes.c_uint * 4)(*counter)
        host.library().host_philox(words, *map(ctypes.c_uint, key))
        assert list(words) == expected
        assert numpy_philox(np.array(counter), tuple(key)).tolist() == expected

    @pytest.mark.parametrize("config", [EVERYTHING, SECOND, ViewsConfig(crop_scale_min=1.0)])
    def test_parameters_are_those_that_numpy_draws(self, machine: Machine, config: ViewsConfig) -> None:
        source, count, firsts, batch = stream(machine), 1000, 400, 2**32 + 17
        source.set_state(torch.tensor([SEED, batch]))
        ours = drawn(machine.views(config, 32, normalization=PLAIN), source, count, firsts).double().numpy()
        theirs = numpy_table(config, 32, SEED, batch, count, firsts)
        # A side or corner between two pixels may be rounded to either.
        assert (ours[:, BOX] != theirs[:, BOX]).any(1).sum() <= 2
        np.testing.assert_allclose(ours[:, 4:], theirs[:, 4:], rtol=0, atol=3e-7)

    def test_seeds_batches_and_views_have_numbers_of_their_own(self, machine: Machine) -> None:
        ours = machine.views(EVERYTHING, 32, normalization=PLAIN)
        source = stream(machine)
        tables = [drawn(ours, source, 100) for _ in range(3)]
        tables += [drawn(ours, stream(machine, seed), 100) for seed in (SEED + 1, SEED + 2**32, 0)]
        sigmas = torch.cat(tables)[:, SIGMA_AT]
        assert len(sigmas.unique()) > 0.999 * len(sigmas)
        assert torch.equal(drawn(ours, stream(machine), 100), tables[0])

    def test_a_view_does_not_depend_on_how_many_there_are(self, machine: Machine) -> None:
        ours = machine.views(EVERYTHING, 16, normalization=PLAIN)
        images = random_images(40, 16).to(machine.device)
        few, many = (ours(images[:count], stream(machine)) for count in (7, 40))
        assert torch.equal(few, many[:7])
        assert torch.equal(many, ours(images, stream(machine)))

    def test_a_state_goes_on_where_it_was_taken(self, machine: Machine) -> None:
        ours = machine.views(ALL, 16, normalization=PLAIN)
        images, source = random_images(10, 16).to(machine.device), stream(machine)
        ours.pair(images, source)
        state, address = source.get_state(), source.at.data_ptr()
        assert state.tolist() == [SEED, 1]
        assert state.device.type == "cpu"
        following = [ours.pair(images, source) for _ in range(2)]
        assert state.tolist() == [SEED, 1]
        source.set_state(state)
        assert source.at.data_ptr() == address
        assert all(torch.equal(ours.pair(images, source), views) for views in following)
        other = stream(machine, 5)
        other.set_state(state)
        assert torch.equal(ours.pair(images, other), following[0])
        for wrong in (state.int(), torch.zeros(3, dtype=torch.int64), torch.Generator().get_state()):
            with pytest.raises(ValueError, match="state of a Philox"):
                source.set_state(wrong)

    def test_a_stream_is_seeded_for_its_purpose(self, machine: Machine) -> None:
        ours = machine.views(ALL, 16, normalization=PLAIN)
        source = ours.stream(3, "views", 7)
        assert isinstance(source, Philox)
        assert source.get_state().tolist() == [derive_seed(3, "views", 7), 0]


class TestDistributions:
    count = 20_000

    def test_crops_are_distributed_as_torchvisions(self, machine: Machine) -> None:
        ours = machine.views(ViewsConfig(crop_scale_min=0.08), 32, normalization=PLAIN)
        # In fp64, or equal ratios of sides would be told apart by their rounding.
        left, top, width, height = drawn(ours, stream(machine), self.count)[:, BOX].double().T.numpy()
        torch.manual_seed(0)
        image = torch.empty(3, 32, 32)
        theirs = np.array(
            [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(self.count)]
        )  # top, left, height, width
        for ours_one, other in ((top, 0), (left, 1), (height, 2), (width, 3)):
            assert_same_distribution(ours_one, theirs[:, other])
        assert_same_distribution(width * height, theirs[:, 2] * theirs[:, 3])
        assert_same_distribution(width / height, theirs[:, 3] / theirs[:, 2])
        assert (left + width).max() <= 32
        assert (top + height).max() <= 32
        assert min(left.min(), top.min()) >= 0

    def test_jitter_is_distributed_as_torchvisions(self, machine: Machine) -> None:
        config = ViewsConfig(jitter_strength=0.5, jitter_probability=1.0)
        table = drawn(machine.views(config, 32, normalization=PLAIN), stream(machine), self.count).numpy()
        torch.manual_seed(0)
        jitter = ColorJitter(0.4, 0.4, 0.4, 0.1)
        theirs = [
            jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
            for _ in range(self.count)
        ]
        for column in range(4):
            assert_same_distribution(table[:, 5 + column], np.array([draw[1 + column] for draw in theirs]))
        ours = [tuple(order) for order in table[:, ORDER].astype(int).tolist()]
        orders = list(itertools.permutations(range(4)))
        counts = [[ours.count(order) for order in orders]]
        counts.append([[tuple(draw[0].tolist()) for draw in theirs].count(order) for order in orders])
        assert min(counts[0]) > 0
        assert stats.chisquare(counts[0]).pvalue > 1e-3
        assert stats.chi2_contingency(counts).pvalue > 1e-3

    def test_sigma_is_distributed_as_torchvisions(self, machine: Machine) -> None:
        sigma = drawn(machine.views(ALL, 32, normalization=PLAIN), stream(machine), self.count)[:, SIGMA_AT]
        torch.manual_seed(0)
        theirs = np.array([GaussianBlur.get_params(0.1, 2.0) for _ in range(self.count)])
        assert_same_distribution(sigma.numpy(), theirs)

    def test_probabilities_of_first_and_second_views(self, machine: Machine) -> None:
        config = ViewsConfig(
            flip_probability=0.3, grayscale_probability=0.1, jitter_probability=0.8,
            blur_probability=0.9, second_blur_probability=0.2, solarize_probability=0.05, second_solarize_probability=0.4,
        )  # fmt: skip
        half = self.count // 2
        table = drawn(
            machine.views(config, 32, normalization=PLAIN), stream(machine), self.count, firsts=half
        )
        kept = (table[:, FACTORS] == 1).all(1)
        assert torch.equal(kept, table[:, HUE] == 0)
        for flags, first, second in (
            (table[:, FLIP], 0.3, 0.3),
            (table[:, GRAYSCALE], 0.1, 0.1),
            (~kept, 0.8, 0.8),
            (table[:, BLUR], 0.9, 0.2),
            (table[:, SOLARIZE], 0.05, 0.4),
        ):
            for part, probability in zip(flags.split(half), (first, second), strict=True):
                assert stats.binomtest(int(part.sum()), half, probability).pvalue > 1e-4

    def test_parameters_do_not_depend_on_each_other(self, machine: Machine) -> None:
        config = ViewsConfig(jitter_probability=1.0, blur_probability=0.5, solarize_probability=0.5)
        table = drawn(machine.views(config, 32, normalization=PLAIN), stream(machine), self.count).numpy()
        columns = [0, 1, FLIP, 5, 6, 7, HUE, 9, GRAYSCALE, BLUR, SIGMA_AT, SOLARIZE]
        correlations = np.corrcoef(table[:, columns].T) - np.eye(len(columns))
        # Left and top are drawn in what the size of the crop leaves: both are small for large crops.
        correlations[0, 1] = correlations[1, 0] = 0
        assert np.abs(correlations).max() < 4.5 / np.sqrt(self.count)


class TestLaunches:
    @pytest.mark.parametrize("config", [ViewsConfig(), EVERYTHING], ids=["no blur", "blur"])
    def test_a_pair_is_two_launches_and_waits_for_nothing(
        self, machine: Machine, config: ViewsConfig
    ) -> None:
        ours = machine.views(config, 32, normalization=ZSCORE, dtype=torch.bfloat16, channels_last=True)
        images, source = random_images(64, 32).to(machine.device), ours.stream(0, "views")
        ours.pair(images, source)
        before = machine.launcher.launches
        with machine.no_waiting(), Operations() as operations:
            made = ours.pair(images, source)
        assert machine.launcher.launches == before + 1
        assert operations.names == ["add_"]
        assert torch.isfinite(made).all()
        assert source.get_state()[1] == 2

    @pytest.mark.parametrize("size", [32, 160])
    def test_a_graph_makes_new_views_at_each_replay(self, machine: Machine, size: int) -> None:
        ours = machine.views(EVERYTHING, size, normalization=ZSCORE, dtype=torch.bfloat16, channels_last=True)
        images = random_images(8, size).to(machine.device)
        eager, captured = stream(machine), stream(machine)
        expected = [ours.pair(images, eager) for _ in range(5)]
        replay = machine.capture(lambda: ours.pair(images, captured))
        for number in range(1, 4):  # the first was made to warm up
            assert torch.equal(replay(), expected[number])
        captured.set_state(torch.tensor([SEED, 0]))
        assert torch.equal(replay(), expected[0])
        images.copy_(images.flip(0))
        assert not torch.equal(replay(), expected[1])

    def test_generators_of_torch_draw_whole_batches_as_without_the_kernel(self, machine: Machine) -> None:
        images = random_images(20, 16).to(machine.device)
        ours = machine.views(ALL, 16, normalization=PLAIN)
        without = Views(ALL, 16, tuple(part.to(machine.device) for part in PLAIN))
        without._kernel = None
        source, other = (torch.Generator(machine.device).manual_seed(4) for _ in range(2))
        before = machine.launcher.launches
        for _ in range(2):
            assert torch.equal(ours.pair(images, source), without.pair(images, other))
        assert machine.launcher.launches == before
        with pytest.raises(ValueError, match="have no kernel for a Philox"):
            without.pair(images, stream(machine))

    @pytest.mark.parametrize("size", [8, 32, 48, 64, 96, 112, 224, 512])
    @pytest.mark.parametrize("blurs", [False, True])
    @pytest.mark.parametrize("shared", [100_000, host.SHARED_PER_BLOCK])
    def test_shapes_of_launches(
        self, monkeypatch: pytest.MonkeyPatch, size: int, blurs: bool, shared: int
    ) -> None:
        seen = []

        class Launcher:
            shared_bytes, processors = shared, 132

            def launch(self, arguments: Arguments, tensors: dict[str, Tensor], *shape: int) -> None:
                seen.append((arguments, tensors, shape))

        monkeypatch.setattr(views, "KERNEL_ON", ("cpu",))
        monkeypatch.setattr(cuda_views, "load", lambda _: Launcher())
        config = replace_probability(ViewsConfig(), blur_probability=0.5 if blurs else 0.0)
        ours, source = Views(config, size, ZSCORE), Philox(1, torch.device("cpu"))
        images = torch.zeros(512, 3, 1, 1, dtype=torch.uint8).expand(512, 3, size, size)
        monkeypatch.setattr(Tensor, "contiguous", lambda self: self)
        out = ours.pair(images, source)
        ((arguments, tensors, (blocks, threads, dynamic)),) = seen
        assert (arguments.image_count, arguments.views, arguments.firsts) == (512, 1024, 512)
        assert arguments.size == size
        assert arguments.blur_half == (kernel_size(size) // 2 if blurs else 0)
        assert tensors["out"] is out
        assert tensors["at"] is source.at
        assert tensors["images"] is images
        assert not tensors.keys() & {"given", "record"}
        assert threads in (256, 512, 1024)
        values = (4 if blurs else 3) * size * size
        if 4 * values <= shared:
            assert (blocks, dynamic) == (1024, 4 * values)
            assert "scratch" not in tensors
        else:
            assert dynamic == 0
            assert 132 <= blocks <= 1024
            assert tensors["scratch"].shape == (blocks, values)
            assert tensors["scratch"].numel() <= cuda_views.SCRATCH_VALUES
        for column, name in enumerate(("scale", "shift")):
            expected = ((1 / ZSCORE[1]), (-ZSCORE[0] / ZSCORE[1]))[column]
            assert torch.equal(tensors[name], expected)
            assert tensors[name].dtype == torch.float32

    def test_what_a_driver_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of 100 views with blur: a block each, and its pixels in shared memory."""
        machine = host.install(monkeypatch)
        machine.views(EVERYTHING, 64, normalization=PLAIN).pair(random_images(50, 64), stream(machine))
        assert host.launched(host.library())[1:] == (100, 512, 4 * 4 * 64 * 64)
        machine.views(EVERYTHING, 160, normalization=PLAIN).pair(random_images(6, 160), stream(machine))
        assert host.launched(host.library())[1:] == (4, 1024, 0)

    def test_fake_tensors_need_no_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        launches = []

        class Launcher:
            shared_bytes, processors = host.SHARED_PER_BLOCK, 132

            def launch(self, *args: object) -> None:
                launches.append(args)

        monkeypatch.setattr(cuda_views, "load", lambda _: Launcher())
        device = torch.device("cuda", 0)
        with FakeTensorMode():
            normalization = torch.zeros(3, device=device), torch.ones(3, device=device)
            ours = Views(EVERYTHING, 160, normalization, dtype=torch.bfloat16, channels_last=True)
            source = ours.stream(1, "views")
            images = torch.empty(6, 3, 160, 160, dtype=torch.uint8, device=device)
            with Operations() as operations:
                made = ours.pair(images, source)
        assert ours.stream_kind == "cuda-philox"
        assert (made.shape, made.dtype, made.device) == ((12, 3, 160, 160), torch.bfloat16, device)
        assert made.is_contiguous(memory_format=torch.channels_last)
        assert len(launches) == 1
        assert operations.names == ["add_"]

    def test_a_thread_that_never_used_the_device_gets_its_context(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        machine = host.install(monkeypatch)
        ours, made = machine.views(ALL, 8, normalization=PLAIN), []
        images = random_images(6, 8)
        thread = threading.Thread(target=lambda: made.append(ours.pair(images, stream(machine))))
        thread.start()
        thread.join()
        assert torch.equal(made[0], ours.pair(images, stream(machine)))

    def test_what_the_driver_refuses_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = host.install(monkeypatch)
        with pytest.raises(RuntimeError, match=r"CUDA error: refused \(1\)"):
            machine.launcher.launch(Arguments(), {}, 1, 4096, 0)


class TestSource:
    def test_arguments_are_those_of_the_source_in_order_and_type(self) -> None:
        (body,) = re.findall(r"struct Arguments \{(.*?)\};", cuda_views.source(), re.DOTALL)
        declared = []
        for line in re.sub(r"//.*", "", body).split(";"):
            if line.strip():
                kind, names = re.fullmatch(r"\s*(.*?)(\w+(?:, \w+)*)", line.strip(), re.DOTALL).groups()
                declared += [(name, kind.strip()) for name in names.split(", ")]
        types = {"int": ctypes.c_int, "float": ctypes.c_float}
        assert [
            (name, ctypes.c_void_p if kind.endswith("*") else types[kind]) for name, kind in declared
        ] == list(Arguments._fields_)
        assert host.library().host_sizes(0) == ctypes.sizeof(Arguments)

    def test_pointers_lead_to_what_the_source_takes_them_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = host.install(monkeypatch)
        real, seen = machine.launcher.launcher.launch, []

        def launch(arguments: Arguments, tensors: dict[str, Tensor], *shape: int) -> None:
            seen.append({name: tensor.dtype for name, tensor in tensors.items()})
            assert all(tensor.is_contiguous() for name, tensor in tensors.items() if name != "out")
            real(arguments, tensors, *shape)

        monkeypatch.setattr(machine.launcher.launcher, "launch", launch)
        kinds = {"const unsigned char*": torch.uint8, "const long long*": torch.int64}
        kinds |= dict.fromkeys(("const float*", "float*"), torch.float32)
        source = dict(
            reversed(pair) for pair in re.findall(r"(const .*?\*|float\*) (\w+);", cuda_views.source())
        )
        ours = machine.views(EVERYTHING, 160, normalization=ZSCORE)
        table = drawn(ours, stream(machine), 4)
        ours._kernel.apply(random_images(6, 160), table)
        ours.pair(random_images(6, 160), stream(machine))
        told = {name: dtype for tensors in seen for name, dtype in tensors.items()}
        assert told.pop("out") == torch.float32
        assert told == {name: kinds[source[name]] for name in told}
        assert told.keys() | {"out"} == set(cuda_views.POINTERS)

    def test_columns_are_those_of_the_source(self) -> None:
        assert host.library().host_sizes(1) == COLUMNS

    def test_a_table_has_each_views_parameters_in_its_row(self) -> None:
        draws = Views(EVERYTHING, 32, PLAIN).draw(96, generator(1))
        table = draws.table()
        for row, view in enumerate(draws.view.tolist()):
            got = table[view]
            assert torch.equal(got[BOX], draws.box[row])
            assert torch.equal(got[FACTORS], draws.factors[row])
            order = draws.order[row].tolist()
            order.insert(row % 4, 3)
            assert got[ORDER].tolist() == order
            for column, name in (
                (FLIP, "flip"), (HUE, "hue"), (GRAYSCALE, "grayscale"), (BLUR, "blur"), (SIGMA_AT, "sigma"),
                (SOLARIZE, "solarize"),
            ):  # fmt: skip
                assert got[column] == getattr(draws, name)[row]

    @pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
    def test_nvrtc_compiles_it(self, architecture: str) -> None:
        try:
            cuda_driver.nvrtc()
        except OSError as error:
            pytest.skip(str(error))
        code = cuda_driver.compile_source(cuda_views.source(), architecture, cuda_views.definitions())
        assert code.startswith(b"\x7fELF")
        assert b"make_views" in code

    def test_nvrtc_says_what_is_wrong(self) -> None:
        try:
            cuda_driver.nvrtc()
        except OSError as error:
            pytest.skip(str(error))
        with pytest.raises(
            RuntimeError, match=r'kernel.cu\(\d+\): error: identifier "ATTEMPTS" is undefined'
        ):
            cuda_driver.compile_source(cuda_views.source(), "sm_90", {})


@pytest.fixture
def kernel_of_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views on the CPU look for the kernel as they do on CUDA; nothing of it is there."""
    monkeypatch.setattr(views, "KERNEL_ON", ("cpu",))
    cuda_views._loaded.cache_clear()
    cuda_views.supported.cache_clear()
    yield
    cuda_views._loaded.cache_clear()
    cuda_views.supported.cache_clear()


@pytest.mark.usefixtures("kernel_of_cpu")
class TestFallback:
    @pytest.mark.parametrize(
        "error",
        [
            OSError("libcuda.so.1: cannot open"),
            AttributeError("no cuLaunchKernel"),
            RuntimeError("NVRTC: kernel.cu(3): error\nmore"),
        ],
    )
    def test_without_a_kernel_views_are_made_by_whole_batches(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
    ) -> None:
        def fail() -> None:
            raise error

        monkeypatch.setattr(cuda_driver, "driver", fail)
        images, normalization = random_images(8, 16), ZSCORE
        for _ in range(2):
            ours = Views(ALL, 16, normalization)
            assert ours.stream_kind == "cpu"
            source = ours.stream(1, "views", 2)
            assert isinstance(source, torch.Generator)
            assert source.initial_seed() == derive_seed(1, "views", 2)
            assert ours.pair(images, source).shape == (16, 3, 16, 16)
        (record,) = caplog.records
        reason = str(error).splitlines()[0]
        assert (
            record.getMessage()
            == f"views on cpu:0 are made without the fused kernel, which is slower: {reason}"
        )
        assert record.levelname == "WARNING"

    def test_images_that_are_too_large_are_said_once(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        machine = host.install(monkeypatch)
        for _ in range(2):
            assert Views(ALL, 1280, PLAIN).stream_kind == "cpu"
        assert [record.getMessage() for record in caplog.records] == [
            "views of 1280 pixels are made without the fused kernel, which is slower"
        ]
        assert machine.views(ALL, 1279, normalization=PLAIN).stream_kind == "cuda-philox"
        assert machine.views(ViewsConfig(), 1280, normalization=PLAIN).stream_kind == "cuda-philox"

    def test_other_dtypes_are_made_by_whole_batches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        host.install(monkeypatch)
        assert Views(ALL, 16, PLAIN, dtype=torch.float16).stream_kind == "cpu"

    def test_preparing_compiles(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []
        monkeypatch.setattr(cuda_views, "load", asked.append)
        monkeypatch.setattr(views, "KERNEL_ON", ("cuda",))
        views.prepare(torch.device("cuda", 1))
        assert asked == [torch.device("cuda", 1)]


def test_on_cpus_streams_are_torchs_generators() -> None:
    ours = Views(ALL, 16, PLAIN)
    assert ours.stream_kind == "cpu"
    source = ours.stream(1, "views", 2)
    assert isinstance(source, torch.Generator)
    expected = torch.Generator().manual_seed(derive_seed(1, "views", 2))
    assert torch.equal(ours.draw(8, source).box, ours.draw(8, expected).box)
    assert torch.rand(1, generator=source).equal(torch.rand(1, generator=expected))
    assert NUMBERS > 0


class TestThreads:
    """The host's threads stand for a block's; see `views_on_host.cpp`."""

    @pytest.mark.parametrize("shared", [host.SHARED_PER_BLOCK, 8_000], ids=["shared", "scratch"])
    @pytest.mark.parametrize("order", [host.FREE, host.ASCENDING, host.DESCENDING])
    @pytest.mark.parametrize("threads", [1, 2, 8])
    def test_any_number_of_threads_makes_the_same_views(
        self, monkeypatch: pytest.MonkeyPatch, threads: int, order: int, shared: int
    ) -> None:
        assert_right_views(host.install(monkeypatch, threads=threads, order=order, shared=shared))
        _, blocks, _, dynamic = host.launched(host.library())
        assert (blocks, dynamic) == ((4, 0) if shared < host.SHARED_PER_BLOCK else (20, 4 * 4 * 24 * 24))

    @pytest.mark.slow
    @pytest.mark.parametrize("number", range(9))
    def test_a_missing_barrier_shows(self, tmp_path: Path, number: int) -> None:
        parts = cuda_views.source().split("__syncthreads();")
        assert len(parts) == 10
        parts[number : number + 2] = [parts[number] + parts[number + 1]]
        broken = "__syncthreads();".join(parts)
        program = host.build(tmp_path, "-fsanitize=thread", "-g", "-DPROGRAM", source=broken)
        done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=100)
        # A race, or threads that read different parameters and so wait at different barriers.
        assert done.returncode != 0
        assert "ThreadSanitizer" in done.stderr or "never came" in done.stderr

    @pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
    def test_sanitizers_find_nothing(self, tmp_path: Path, sanitizer: str) -> None:
        flags = (f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-g", "-DPROGRAM")
        done = subprocess.run([host.build(tmp_path, *flags)], capture_output=True, text=True, check=False)
        if "unexpected memory mapping" in done.stderr:
            pytest.skip("this kernel lays out memory as the sanitizer cannot bear")
        assert done.returncode == 0, done.stdout + done.stderr


def assert_right_views(machine: Machine) -> None:
    """Compare views of all kinds with the CPU's, of more views than the host's GPU has blocks of scratch."""
    images = random_images(10, 24)
    ours = machine.views(EVERYTHING, 24, normalization=PLAIN)
    table = drawn(ours, stream(machine), 20, firsts=10)
    expected = numpy_table(EVERYTHING, 24, SEED, 0, 20, 10)
    np.testing.assert_allclose(table.numpy(), expected, rtol=0, atol=3e-7)
    made = from_cpu(images, table, EVERYTHING, PLAIN)
    assert_close(ours.pair(images, stream(machine)), made, threshold=1e-4)
    assert_close(ours._kernel.apply(images, table), made, threshold=1e-4)
