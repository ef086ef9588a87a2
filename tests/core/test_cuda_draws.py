"""The random numbers of the kernel of views, their distributions, and the threads that share its memory.

torchvision and numpy are the references. Where there is no GPU the kernel runs on the host.
"""

from __future__ import annotations

import ctypes
import itertools
import subprocess
from pathlib import Path

import kernel_on_host as host
import numpy as np
import pytest
import torch
from kernel_on_host import Machine
from kernel_reference import (
    BLUR,
    BOX,
    EVERYTHING,
    FACTORS,
    FLIP,
    GRAYSCALE,
    HUE,
    ORDER,
    SECOND,
    SEED,
    SIGMA_AT,
    SOLARIZE,
    assert_close,
    drawn,
    from_cpu,
    numpy_philox,
    numpy_table,
    stream,
)
from scipy import stats
from test_views import ALL, PLAIN, assert_same_distribution, random_images
from torchvision.transforms import ColorJitter, GaussianBlur, RandomResizedCrop

from headsearch.config import ViewsConfig
from headsearch.core import cuda_views
from headsearch.core.randomness import Philox, derive_seed


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
        host.loaded_library().host_philox(words, *map(ctypes.c_uint, key))
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


class TestThreads:
    """The host's threads stand for a block's; see `views_on_host.cpp`."""

    @pytest.mark.parametrize("shared", [host.SHARED_PER_BLOCK, 8_000], ids=["shared", "scratch"])
    @pytest.mark.parametrize("order", [host.FREE, host.ASCENDING, host.DESCENDING])
    @pytest.mark.parametrize("threads", [1, 2, 8])
    def test_any_number_of_threads_makes_the_same_views(
        self, monkeypatch: pytest.MonkeyPatch, threads: int, order: int, shared: int
    ) -> None:
        assert_right_views(host.install(monkeypatch, threads=threads, order=order, shared=shared))
        _, blocks, _, dynamic = host.launched(host.loaded_library())
        assert (blocks, dynamic) == ((4, 0) if shared < host.SHARED_PER_BLOCK else (20, 4 * 4 * 24 * 24))

    @pytest.mark.slow
    @pytest.mark.hostile
    @pytest.mark.parametrize("number", range(9))
    def test_a_missing_barrier_shows(self, tmp_path: Path, number: int) -> None:
        parts = cuda_views.source().split("__syncthreads();")
        assert len(parts) == 10
        parts[number : number + 2] = [parts[number] + parts[number + 1]]
        broken = "__syncthreads();".join(parts)
        program = host.build(tmp_path, "-fsanitize=thread", "-g", "-DPROGRAM", source=broken)
        done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=100)
        # A race that the sanitizer sees, threads that wait at different barriers, or wrong views.
        assert done.returncode != 0
        assert "ThreadSanitizer" in done.stderr or "never came" in done.stderr or "make other" in done.stdout

    @pytest.mark.hostile
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
