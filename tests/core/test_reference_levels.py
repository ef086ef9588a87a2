"""Discretised projections against the scalar formula and against the sets of values it may give.

Tolerance: fp32 against float64. What is rounded is off by a few 1e-7 times the number of levels, so
entries that are within 1e-3 of a boundary between two levels are left out of a comparison of values.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from references_bottleneck import discretise as reference
from references_bottleneck import discretise_slope, fresh, single, squeezed

from headsearch.core.levels import discretise

VALUES = {
    2: [-1.0, 0.0],
    3: [-1.0, 0.0, 1.0],
    4: [-1.0, -0.5, 0.0, 0.5],
    5: [-1.0, -0.5, 0.0, 0.5, 1.0],
    8: [-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75],
    30: [k / 15 for k in range(-15, 15)],
}


def away_from_boundaries(z, levels: int):
    """The entries whose squeezed value is not about half-way between two integers."""
    distance = [abs(squeezed(float(v), levels) % 1.0 - 0.5) for v in z]
    return z[np.array(distance) > 1e-3]


@pytest.mark.parametrize("levels", VALUES)
def test_the_values_are_the_levels_and_every_one_is_reached(levels):
    out = discretise(torch.linspace(-12.0, 12.0, 20001), levels)
    assert out.dtype == torch.float32
    distinct = np.unique(out.numpy())
    # the count is exact; an fp32 quotient is off by one rounding of a number of at most 1
    assert len(distinct) == levels
    np.testing.assert_allclose(distinct, VALUES[levels], rtol=0, atol=1e-7)
    # and in order
    assert (out.diff() >= 0).all()


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 6, 7, 8, 16, 30, 31])
def test_value_and_gradient(levels):
    seed, rng = fresh()
    message = f"seed {seed}"
    _, exact = single(np.concatenate([rng.normal(size=200), rng.uniform(-6, 6, size=200)]))
    z, exact = single(away_from_boundaries(exact, levels))
    assert len(exact) > 300, message
    out = discretise(z, levels)
    assert out.shape == z.shape, message
    # one rounding of a quotient of at most 1
    np.testing.assert_allclose(
        out.detach().numpy(), [reference(v, levels) for v in exact], rtol=0, atol=1e-7, err_msg=message
    )
    incoming = rng.normal(size=len(exact))
    out.backward(torch.tensor(incoming, dtype=torch.float32))
    want = np.array([discretise_slope(v, levels) for v in exact])
    assert z.grad is not None
    # 1 - tanh^2 is off by about 1e-7 where tanh is about 1
    np.testing.assert_allclose(
        z.grad.numpy(), np.float32(incoming) * want, rtol=1e-5, atol=2e-6, err_msg=message
    )


@pytest.mark.parametrize("levels", [2, 3, 4, 30])
def test_the_reference_slope_is_that_of_what_is_rounded(levels):
    seed, rng = fresh()
    for v in rng.uniform(-5, 5, size=50):
        difference = (squeezed(v + 1e-5, levels) - squeezed(v - 1e-5, levels)) / 2e-5 / (levels // 2)
        # central differences in float64 of a function of at most 15
        assert discretise_slope(v, levels) == pytest.approx(difference, rel=1e-6, abs=1e-8), f"seed {seed}"


@pytest.mark.parametrize("levels", VALUES)
def test_the_gradient_is_smooth_across_a_boundary(levels):
    """Straight through: no spikes, nowhere 0 in the middle, no matter which side an entry falls on."""
    z = torch.linspace(-3.0, 3.0, 4001, requires_grad=True)
    discretise(z, levels).sum().backward()
    assert z.grad is not None
    assert (z.grad > 0).all()
    # the slope changes by at most half * |sech^2|' / floor(L / 2) < 1 per unit of z, and a step is 0.0015
    assert float(z.grad.diff().abs().max()) < 0.002


@pytest.mark.parametrize("levels", VALUES)
def test_far_out_is_the_outermost_level_without_slope(levels):
    z = torch.tensor([-1e4, -50.0, 50.0, 1e4], requires_grad=True)
    out = discretise(z, levels)
    low, high = VALUES[levels][0], VALUES[levels][-1]
    # as above
    np.testing.assert_allclose(out.detach().numpy(), [low, low, high, high], rtol=0, atol=1e-7)
    out.sum().backward()
    assert z.grad is not None
    assert z.grad.tolist() == [0.0] * 4


def test_zero_is_the_middle_of_an_odd_number_of_levels_and_within_one_of_an_even_one():
    for levels, want in ((3, 0.0), (5, 0.0), (31, 0.0), (2, 0.0), (4, 0.0), (30, 0.0)):
        assert reference(0.0, levels) == want
        assert float(discretise(torch.zeros(1), levels)) == want
    # odd numbers of levels are symmetric
    z = torch.linspace(-4.0, 4.0, 777)
    assert torch.equal(discretise(-z, 5), -discretise(z, 5))


def test_each_entry_for_itself():
    seed, rng = fresh()
    z = torch.tensor(rng.normal(size=(4, 3, 5)), dtype=torch.float32)
    before = z.clone()
    out = discretise(z, 8)
    assert out.shape == z.shape, f"seed {seed}"
    assert torch.equal(z, before), f"seed {seed}"
    for index in np.ndindex(*z.shape):
        assert float(out[index]) == float(discretise(z[index], 8)), f"seed {seed}"


@pytest.mark.parametrize("levels", [1, 0, -3])
def test_fewer_than_two_levels_are_an_error(levels):
    with pytest.raises(ValueError, match=r"\S"):
        discretise(torch.zeros(2), levels)


def test_bf16_projections_are_told_apart_as_in_fp32():
    seed, rng = fresh()
    z = torch.tensor(rng.uniform(-3, 3, size=2000)).bfloat16()
    exact = away_from_boundaries(z.double().numpy(), 30)
    rounded = torch.tensor(exact).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = discretise(rounded, 30)
    assert out.dtype == torch.float32, f"seed {seed}"
    # as in fp32: what's bf16 is the projections alone
    np.testing.assert_allclose(
        out.detach().numpy(), [reference(v, 30) for v in exact], rtol=0, atol=1e-7, err_msg=f"seed {seed}"
    )
    out.sum().backward()
    assert rounded.grad is not None
    # a gradient in bf16 has 8 bits
    want = [discretise_slope(v, 30) for v in exact]
    np.testing.assert_allclose(
        rounded.grad.float().numpy(), want, rtol=4e-3, atol=2e-6, err_msg=f"seed {seed}"
    )


def test_two_levels_have_no_gradient_in_the_sources_formula() -> None:
    """Through F.normalize and NT-Xent as solo-learn writes it, from a head at torch's initialisation."""
    torch.manual_seed(0)
    features = torch.randn(16, 32).abs()
    for levels, moves in ((2, False), (30, True)):
        head = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
        quantised = discretise(head(features), levels)
        assert bool(quantised.any()) == moves
        z = torch.nn.functional.normalize(quantised)
        similarities = (z @ z.T / 0.2).exp() * (1 - torch.eye(16))
        positive = similarities[torch.arange(16), torch.arange(16).roll(8)]
        (similarities.sum(1) / positive).log().mean().backward()
        assert bool(head[0].weight.grad.any()) == moves
