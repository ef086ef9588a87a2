"""Effective rank against NumPy's and torch's SVD, against known values, and near the bound of a collapse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from references import fresh_generator, rank_me

from headsearch.core.ranks import effective_rank
from headsearch.core.reporting import COLLAPSED_RANK

ROUNDED = 1 + 5e-6
"""What rows that point in one direction may have, by `effective_rank`."""


def rank(z: np.ndarray) -> float:
    return effective_rank(torch.tensor(z, dtype=torch.float32))


def by_svd(rows: torch.Tensor) -> float:
    """The definition, with all singular values."""
    values = torch.linalg.svdvals(rows.double())
    return float(torch.special.entr(values / values.sum()).sum().exp())


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(int(fresh_generator().integers(1 << 31)))


@pytest.mark.parametrize("dim", [1, 2, 16, 100])
def test_orthonormal_columns_have_full_rank(dim):
    q, _ = np.linalg.qr(fresh_generator().normal(size=(120, dim)))
    assert rank(q) == pytest.approx(dim, rel=1e-5)
    assert rank(7.5 * q) == pytest.approx(dim, rel=1e-5)


def test_rank_one():
    rng = fresh_generator()
    z = np.outer(rng.normal(size=50), rng.normal(size=20)).astype(np.float32)
    assert rank(z) == pytest.approx(1.0, abs=5e-6)
    assert rank(np.ones((50, 20))) == pytest.approx(1.0, abs=5e-6)


def test_two_directions_by_hand():
    """Singular values 3 and 1: shares 3/4 and 1/4."""
    z = np.diag([3.0, 1.0, 0.0, 0.0])
    assert rank(z) == pytest.approx(4 / 3**0.75, rel=1e-12)
    assert rank(np.diag([1.0] * 5 + [0.0] * 3)) == pytest.approx(5.0, rel=1e-12)


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (200, 33), (5, 1), (1, 5), (700, 12)])
def test_random_matrices(shape):
    rng = fresh_generator()
    z = (rng.normal(size=shape) @ np.diag(rng.uniform(0, 1, size=shape[1]) ** 3)).astype(np.float32)
    assert rank(z) == pytest.approx(rank_me(z.astype(np.float64), eps=0), rel=1e-6)
    assert rank(z) == pytest.approx(rank_me(z.astype(np.float64)), rel=1e-4)
    assert 1 <= rank(z) <= min(shape) * (1 + 1e-9)


@pytest.mark.parametrize("shape", [(2048, 128), (600, 64), (300, 512), (64, 16), (2048, 2)])
def test_healthy_rows_have_the_svds_rank(shape):
    """Spread over a factor of ten, as projections are; after a ReLU, as features are; and centred or not."""
    plain = torch.randn(shape, generator=seeded())
    spread = plain * torch.linspace(0.1, 1, shape[1])
    for rows in (plain, spread, plain.relu(), spread + 1.0):
        assert effective_rank(rows) == pytest.approx(by_svd(rows), rel=1e-13)


def test_rows_and_rotations_do_not_matter():
    rng = fresh_generator()
    z = rng.normal(size=(40, 8)) * np.arange(1, 9)
    turn, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    assert rank(z[rng.permutation(40)]) == pytest.approx(rank(z), rel=1e-5)
    assert rank(z @ turn) == pytest.approx(rank(z), rel=1e-5)
    assert effective_rank(torch.tensor(z.T)) == pytest.approx(effective_rank(torch.tensor(z)), rel=1e-12)


def test_bf16_and_zero_rows():
    assert effective_rank(torch.eye(6, dtype=torch.bfloat16)) == pytest.approx(6.0)
    assert effective_rank(torch.zeros(5, 3)) == 1.0
    some = torch.randn(40, 6, generator=seeded())
    assert effective_rank(torch.cat([some, torch.zeros(300, 6)])) == pytest.approx(
        effective_rank(some), rel=1e-12
    )


@pytest.mark.parametrize("scale", [1e-250, 1e-40, 1e-20, 1e20, 1e250])
def test_neither_large_nor_small_rows_are_lost(scale):
    rows = torch.randn(40, 6, dtype=torch.float64, generator=seeded())
    assert effective_rank(scale * rows) == pytest.approx(effective_rank(rows), rel=1e-12)


def test_the_smallest_and_the_largest_numbers_of_fp32():
    for number in (2.0**-149, 3e38):
        assert effective_rank(torch.diag(torch.full((4,), number))) == pytest.approx(4.0, rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(9, 4), (4, 9)])
def test_what_is_not_finite_has_no_rank(value, shape):
    rows = torch.randn(shape, generator=seeded())
    rows[2, 1] = value
    assert math.isnan(effective_rank(rows))


def one_direction(count: int, dim: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Rows that are equal, multiples of one, of one size but for signs, and equal but for fp32's rounding."""
    row = torch.randn(1, dim, generator=generator)
    lengths = torch.rand(count, 1, generator=generator) + 0.1
    return {
        "equal": row.expand(count, dim),
        "multiples": row * lengths,
        "uneven": row * torch.logspace(0, -2, dim) * lengths,
        "signs": 0.3 * row.sign().expand(count, dim),
        "rounded": (
            row.double() * (1 + 1.2e-7 * (torch.rand(count, dim, generator=generator) - 0.5))
        ).float(),
    }


# The smallest split, the usual report, one of many images, and the width of Barlow Twins' projections.
@pytest.mark.parametrize(
    ("count", "dim"),
    [(1, 8), (2, 2), (64, 128), (2048, 2), (2048, 16), (2048, 128), (20_000, 64), (1024, 1024)],
)
def test_one_direction_counts_as_collapsed(count, dim):
    for kind, rows in one_direction(count, dim, seeded()).items():
        assert 1 - 1e-12 <= effective_rank(rows) < ROUNDED < COLLAPSED_RANK, kind


@pytest.mark.parametrize("dim", [2, 16])
@pytest.mark.parametrize("ratio", [0.3, 1e-2, 1e-4, 1e-5, 2e-6, 1e-6, 3e-7, 5e-8, 1e-9])
def test_near_one_direction_the_verdict_is_the_svds(dim, ratio):
    """Two singular values, `ratio` their quotient; 5e-7 is where the rank is at the bound."""
    turn, _ = np.linalg.qr(fresh_generator().normal(size=(400, 2)))
    axes, _ = np.linalg.qr(fresh_generator().normal(size=(dim, 2)))
    rows = torch.tensor(turn @ np.diag([1.0, ratio]) @ axes.T)
    found, wanted = effective_rank(rows), by_svd(rows)
    assert found == pytest.approx(wanted, abs=2e-6)
    assert (found < COLLAPSED_RANK) is (wanted < COLLAPSED_RANK) is (ratio < 5e-7)


def test_a_sigmoid_head_with_two_outputs_has_not_collapsed():
    """As at its first epoch: outputs near 1/2, which differ in the second decimal place."""
    outputs = torch.sigmoid(0.02 * torch.randn(2048, 2, generator=seeded()))
    assert COLLAPSED_RANK + 1e-3 < effective_rank(outputs) == pytest.approx(by_svd(outputs), rel=1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize(("count", "dim"), [(2048, 128), (2048, 512), (20_000, 64), (2048, 2048)])
def test_a_gpu_finds_the_same(count, dim):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for kind, rows in one_direction(count, dim, seeded()).items():
        assert effective_rank(rows.cuda()) < ROUNDED, kind
    healthy = torch.randn(count, dim, generator=seeded()).relu()
    assert effective_rank(healthy.cuda()) == pytest.approx(effective_rank(healthy), rel=1e-12)
