"""Mutual information, Renyi entropy and the bounds against the pairwise loops and by hand.

Tolerance: fp32 against float64. An entropy is the log of a mean of n^2 squares, each off by a few
1e-7, so it's off by less than 1e-6; an information adds three. A gradient is compared on the scale of
its largest entry after each row's length is taken out.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from references_bottleneck import (
    bounds as reference_bounds,
)
from references_bottleneck import (
    cosine_gram,
    fresh,
    mutual_information_gradients,
    single,
    slope,
)
from references_bottleneck import (
    mutual_information as reference,
)
from references_bottleneck import (
    renyi_entropy as reference_entropy,
)

from headsearch.core.bottleneck import bounds, mutual_information, renyi_entropy


def tensor(x) -> torch.Tensor:
    return torch.tensor(np.asarray(x), dtype=torch.float32)


def information(z1, z2) -> float:
    value = mutual_information(tensor(z1), tensor(z2))
    assert value.shape == ()
    return float(value)


def same_gradient(leaf, want, rows, message):
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    assert leaf.grad is not None, message
    want = want * lengths
    # an entry is a difference of two sums over n rows, each of about 2 / n, that may nearly cancel
    atol = 2e-5 * np.abs(want).max() + 4e-7 / len(rows)
    np.testing.assert_allclose(leaf.grad.numpy() * lengths, want, rtol=1e-4, atol=atol, err_msg=message)


@pytest.mark.parametrize("images", [1, 2, 5, 12])
@pytest.mark.parametrize(("features", "projection"), [(1, 1), (2, 3), (17, 2), (4, 9), (6, 6)])
def test_information_and_both_gradients(images, features, projection):
    seed, rng = fresh()
    message = f"seed {seed}"
    n = 2 * images
    z1, x1 = single(rng.normal(size=(n, features)) * rng.uniform(0.1, 10, size=(n, 1)))
    z2, x2 = single(rng.normal(size=(n, projection)) * rng.uniform(0.1, 10, size=(n, 1)) + 0.2)
    value = mutual_information(z1, z2)
    assert value.shape == (), message
    assert value.dtype == torch.float32, message
    # absolute: two rows or one dimension can leave an information of about 0
    assert value.item() == pytest.approx(reference(x1, x2), rel=1e-5, abs=3e-6), message
    value.backward()
    g1, g2 = mutual_information_gradients(x1, x2)
    same_gradient(z1, g1, x1, message)
    same_gradient(z2, g2, x2, message)


def test_neither_argument_is_detached():
    seed, rng = fresh()
    z1, z2 = single(rng.normal(size=(8, 5)))[0], single(rng.normal(size=(8, 3)))[0]
    first, second = torch.autograd.grad(mutual_information(z1, z2), (z1, z2))
    # a single argument in both places gets the sum of the two gradients; its entropy's is not left out
    for leaf, gradient in ((z1, first), (z2, second)):
        assert gradient.abs().max() > 1e-3, f"seed {seed}"
        assert leaf.grad is None
    both = torch.autograd.grad(mutual_information(z1, z1), z1)[0]
    x = z1.detach().double().numpy()
    want = np.sum(mutual_information_gradients(x, x), axis=0)
    # as above
    np.testing.assert_allclose(
        both.numpy(), want, rtol=1e-4, atol=2e-5 * np.abs(want).max(), err_msg=f"seed {seed}"
    )


def test_the_reference_gradients_are_the_slopes_of_the_reference():
    seed, rng = fresh()
    x1, x2 = rng.normal(size=(8, 3)), rng.normal(size=(8, 4))
    g1, g2 = mutual_information_gradients(x1, x2)
    # central differences of 1e-5 in float64: truncation and rounding are each about 1e-10
    np.testing.assert_allclose(
        g1, slope(lambda x: reference(x, x2), x1), rtol=1e-6, atol=1e-8, err_msg=f"seed {seed}"
    )
    np.testing.assert_allclose(
        g2, slope(lambda x: reference(x1, x), x2), rtol=1e-6, atol=1e-8, err_msg=f"seed {seed}"
    )


@pytest.mark.parametrize("n", [2, 3, 11])
def test_entropy_of_any_symmetric_matrix_and_its_gradient(n):
    seed, rng = fresh()
    raw = rng.normal(size=(n, n))
    gram, exact = single(raw + raw.T)
    value = renyi_entropy(gram)
    assert value.shape == ()
    # absolute: the squares of a matrix may average to about 1
    assert value.item() == pytest.approx(reference_entropy(exact), rel=1e-5, abs=1e-6), f"seed {seed}"
    value.backward()
    assert gram.grad is not None
    np.testing.assert_allclose(
        gram.grad.numpy(), -2 * exact / (exact**2).sum(), rtol=1e-5, atol=1e-8, err_msg=f"seed {seed}"
    )


@pytest.mark.parametrize("n", [1, 2, 5, 64])
def test_entropy_by_hand(n):
    # exact numbers but for one logarithm in fp32, absolute since log 1 is 0
    assert float(renyi_entropy(torch.eye(n))) == pytest.approx(math.log(n), rel=1e-6, abs=1e-6)
    assert float(renyi_entropy(torch.ones(n, n))) == pytest.approx(0.0, abs=1e-6)
    assert float(renyi_entropy(-torch.ones(n, n))) == pytest.approx(0.0, abs=1e-6)
    # two equal groups of collapsed rows, orthogonal to each other: one bit
    halves = torch.block_diag(torch.ones(n, n), torch.ones(n, n))
    assert float(renyi_entropy(halves)) == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("n", [2, 6, 20])
def test_information_of_orthonormal_rows_with_themselves_is_log_n(n):
    seed, rng = fresh()
    z, _ = np.linalg.qr(rng.normal(size=(n, n)))
    # the rows are orthogonal to 1e-7 in fp32
    assert information(z, z) == pytest.approx(math.log(n), rel=1e-5), f"seed {seed}"
    assert reference(z, z) == pytest.approx(math.log(n), rel=1e-12), f"seed {seed}"


def test_information_of_a_constant_is_zero():
    seed, rng = fresh()
    constant = np.tile(rng.normal(size=(1, 3)), (10, 1)) * rng.uniform(0.5, 2, size=(10, 1))
    z = rng.normal(size=(10, 4))
    # 0 from entropies of about 1 in fp32
    assert information(constant, z) == pytest.approx(0.0, abs=2e-6), f"seed {seed}"
    assert information(z, constant) == pytest.approx(0.0, abs=2e-6), f"seed {seed}"
    assert information(constant, constant) == pytest.approx(0.0, abs=2e-6), f"seed {seed}"


def test_information_of_independent_factors_is_zero_and_of_equal_ones_their_entropy():
    """Rows of a grid: which of 3 rows, which of 4 columns, each one-hot."""
    i, j = np.divmod(np.arange(12), 4)
    row, column = np.eye(3)[i], np.eye(4)[j]
    # exact zeros and ones but for the logarithms in fp32
    assert information(row, column) == pytest.approx(0.0, abs=1e-6)
    assert information(row, row) == pytest.approx(math.log(3), abs=1e-6)
    assert information(column, column) == pytest.approx(math.log(4), abs=1e-6)
    both = np.eye(12)
    assert information(both, row) == pytest.approx(math.log(3), abs=1e-6)
    # an angle of 60 degrees between the two rows: K1 has 1/2 beside its diagonal, K2 has 1
    tilted = [[1.0, 0.0], [0.5, math.sqrt(0.75)]]
    assert information(tilted, tilted) == pytest.approx(
        -2 * math.log(2.5 / 4) + math.log((2 + 2 / 16) / 4), abs=1e-6
    )


def test_information_does_not_see_lengths_order_sides_or_turns():
    seed, rng = fresh()
    message = f"seed {seed}"
    z1, z2 = rng.normal(size=(14, 5)), rng.normal(size=(14, 3))
    value = information(z1, z2)
    order = rng.permutation(14)
    turn, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    signs = rng.choice([-1.0, 1.0], size=(14, 1))
    # fp32 both sides
    assert information(z1 * rng.uniform(0.01, 100, size=(14, 1)), z2) == pytest.approx(value, abs=3e-6), (
        message
    )
    assert information(z1, z2 * rng.uniform(0.01, 100, size=(14, 1))) == pytest.approx(value, abs=3e-6), (
        message
    )
    assert information(z2, z1) == pytest.approx(value, abs=3e-6), message
    assert information(z1[order], z2[order]) == pytest.approx(value, abs=3e-6), message
    assert information(z1 @ turn, z2) == pytest.approx(value, abs=3e-6), message
    # K enters squared
    assert information(z1 * signs, z2) == pytest.approx(value, abs=3e-6), message
    # which row belongs to which does matter
    assert information(z1, z1) != pytest.approx(information(z1, np.roll(z1, 1, axis=0)), rel=1e-3), message


def test_bounds():
    seed, rng = fresh()
    message = f"seed {seed}"
    x1, x2 = tensor(rng.normal(size=(12, 6))), tensor(rng.normal(size=(12, 3)))
    loss = torch.tensor(rng.uniform(0.5, 5.0), dtype=torch.float32)
    lower, upper = bounds(x1, x2, loss)
    want_lower, want_upper = reference_bounds(x1.double().numpy(), x2.double().numpy(), float(loss))
    # as an information
    assert float(lower) == pytest.approx(want_lower, rel=1e-5, abs=3e-6), message
    assert float(upper) == pytest.approx(want_upper, rel=1e-5, abs=3e-6), message


def test_bounds_by_hand():
    row, both = tensor(np.eye(3)[np.arange(12) // 4]), torch.eye(12)
    lower, upper = bounds(both, row, torch.tensor(0.75))
    # exact zeros and ones but for the logarithms in fp32
    assert float(lower) == pytest.approx(-0.75 - math.log(3), abs=2e-6)
    assert float(upper) == pytest.approx(math.log(12) - math.log(3), abs=2e-6)
    # the entropy is the features'
    _, upper = bounds(row, both, torch.tensor(0.75))
    assert float(upper) == pytest.approx(0.0, abs=2e-6)


def test_bf16_lose_nothing():
    seed, rng = fresh()
    message = f"seed {seed}"
    z1, z2 = (
        torch.tensor(rng.normal(size=(16, 9))).bfloat16(),
        torch.tensor(rng.normal(size=(16, 4))).bfloat16(),
    )
    with torch.autocast("cpu", torch.bfloat16):
        value = mutual_information(z1, z2)
        entropy = renyi_entropy(tensor(cosine_gram(z1.double().numpy())))
        lower, upper = bounds(z1, z2, torch.tensor(1.25))
    x1, x2 = z1.double().numpy(), z2.double().numpy()
    want_lower, want_upper = reference_bounds(x1, x2, 1.25)
    # as in fp32: what's bf16 is the rows alone
    assert value.dtype == torch.float32, message
    assert value.item() == pytest.approx(reference(x1, x2), rel=1e-5, abs=3e-6), message
    assert float(entropy) == pytest.approx(reference_entropy(cosine_gram(x1)), rel=1e-5, abs=1e-6), message
    assert float(lower) == pytest.approx(want_lower, rel=1e-5, abs=3e-6), message
    assert float(upper) == pytest.approx(want_upper, rel=1e-5, abs=3e-6), message
