"""Effective rank against NumPy's SVD and against known values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from references import fresh_generator, rank_me

from headsearch.core.ranks import effective_rank


def rank(z: np.ndarray) -> float:
    return effective_rank(torch.tensor(z, dtype=torch.float32))


@pytest.mark.parametrize("dim", [1, 2, 16, 100])
def test_orthonormal_columns_have_full_rank(dim):
    q, _ = np.linalg.qr(fresh_generator().normal(size=(120, dim)))
    assert rank(q) == pytest.approx(dim, rel=1e-5)
    assert rank(7.5 * q) == pytest.approx(dim, rel=1e-5)


def test_rank_one():
    rng = fresh_generator()
    z = np.outer(rng.normal(size=50), rng.normal(size=20)).astype(np.float32)
    assert rank(z) == pytest.approx(1.0, abs=1e-3)
    assert rank(np.ones((50, 20))) == pytest.approx(1.0, abs=1e-5)


def test_two_directions_by_hand():
    """Singular values 3 and 1: shares 3/4 and 1/4."""
    z = np.diag([3.0, 1.0, 0.0, 0.0])
    assert rank(z) == pytest.approx(4 / 3**0.75, rel=1e-6)
    assert rank(np.diag([1.0] * 5 + [0.0] * 3)) == pytest.approx(5.0, rel=1e-6)


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (200, 33), (5, 1)])
def test_random_matrices(shape):
    rng = fresh_generator()
    z = (rng.normal(size=shape) @ np.diag(rng.uniform(0, 1, size=shape[1]) ** 3)).astype(np.float32)
    assert rank(z) == pytest.approx(rank_me(z.astype(np.float64), eps=0), rel=1e-6)
    assert rank(z) == pytest.approx(rank_me(z.astype(np.float64)), rel=1e-4)
    assert 1 <= rank(z) <= min(shape) * (1 + 1e-9)


def test_rows_and_rotations_do_not_matter():
    rng = fresh_generator()
    z = rng.normal(size=(40, 8)) * np.arange(1, 9)
    turn, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    assert rank(z[rng.permutation(40)]) == pytest.approx(rank(z), rel=1e-5)
    assert rank(z @ turn) == pytest.approx(rank(z), rel=1e-5)


def test_bf16_and_zero_rows():
    assert effective_rank(torch.eye(6, dtype=torch.bfloat16)) == pytest.approx(6.0)
    assert math.isfinite(effective_rank(torch.zeros(5, 3)))
