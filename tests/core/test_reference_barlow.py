"""Barlow Twins against the loops and by hand, and which factor each objective's convention needs.

Tolerance: fp32 against float64. A standardised value is off by about 1e-7 times its column's mean over
its deviation, C too, and the loss is a sum of squares of it.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from references_bottleneck import (
    barlow_twins as reference,
)
from references_bottleneck import (
    barlow_twins_gradient,
    fresh,
    nt_xent_both_ways,
    nt_xent_of_anchors,
    single,
    slope,
    standardise,
)

from headsearch.core.objectives import barlow_twins, nt_xent


def barlow(z, redundancy_weight: float, scale: float) -> float:
    value = barlow_twins(torch.tensor(np.asarray(z), dtype=torch.float32), redundancy_weight, scale)
    assert value.shape == ()
    return float(value)


def contrast(z, temperature: float, *scale: float) -> float:
    return float(nt_xent(torch.tensor(z, dtype=torch.float32), temperature, *scale))


@pytest.mark.parametrize("images", [2, 3, 10])
@pytest.mark.parametrize("dim", [1, 2, 7])
@pytest.mark.parametrize(("weight", "scale"), [(0.0051, 0.024), (0.7, 1.0), (0.0, 3.0)])
def test_value_and_gradient(images, dim, weight, scale):
    seed, rng = fresh()
    message = f"seed {seed}"
    # columns of deviations about 0.002 to 3, where eps counts and where it does not
    columns = np.exp(rng.uniform(math.log(2e-3), math.log(3.0), size=dim))
    shared = rng.normal(size=(images, dim))
    # of each view, so that no column is nearly constant beside its mean, which fp32 could not resolve
    views = [standardise(shared + 0.5 * rng.normal(size=(images, dim)), eps=0.0)[0] for _ in range(2)]
    z, exact = single((np.concatenate(views) + rng.normal(size=dim)) * columns)
    value = barlow_twins(z, weight, scale)
    assert value.shape == (), message
    assert value.dtype == torch.float32, message
    # absolute: a squared C - 1 of about 0 in one dimension
    want = reference(exact, weight, scale)
    assert value.item() == pytest.approx(want, rel=1e-5, abs=1e-6 * scale), message
    value.backward()
    assert z.grad is not None
    # the columns' deviations taken out, an entry is a difference of slopes of up to 4 scale / N
    gradient = barlow_twins_gradient(exact, weight, scale) * columns
    np.testing.assert_allclose(
        z.grad.numpy() * columns, gradient, rtol=1e-4, atol=4e-6 * scale / images, err_msg=message
    )


def test_the_reference_gradient_is_the_slope_of_the_reference():
    seed, rng = fresh()
    z = rng.normal(size=(10, 3)) * [1.0, 0.1, 0.01]
    # central differences of 1e-7 in float64; a column's deviation is 0.01, so truncation is about 1e-9
    # of the slope and rounding is 1e-16 / 1e-7
    got, want = barlow_twins_gradient(z, 0.3, 0.5), slope(lambda x: reference(x, 0.3, 0.5), z, step=1e-7)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6, err_msg=f"seed {seed}")


def test_the_reference_is_solo_learns_formula():
    """vturrisi/solo-learn, losses/barlow.py, in float64."""
    seed, rng = fresh()
    z1, z2 = (torch.tensor(x) for x in rng.normal(size=(2, 9, 4)) + 1.0)
    norm = torch.nn.BatchNorm1d(4, affine=False).double()
    corr = torch.einsum("bi, bj -> ij", norm(z1), norm(z2)) / 9
    diagonal = torch.eye(4, dtype=torch.bool)
    cdif = (corr - torch.eye(4)).pow(2)
    cdif[~diagonal] *= 5e-3
    want = float(0.025 * cdif.sum())
    # float64 on both sides
    assert reference(torch.cat([z1, z2]).numpy(), 5e-3, 0.025) == pytest.approx(want, rel=1e-10), (
        f"seed {seed}"
    )
    assert barlow(torch.cat([z1, z2]), 5e-3, 0.025) == pytest.approx(want, rel=1e-5), f"seed {seed}"


@pytest.mark.parametrize("deviation", [1e-3, 3e-3, 1e-2, 1.0])
@pytest.mark.parametrize("images", [4, 1000])
def test_identical_views_leave_what_eps_takes(deviation, images):
    """C_ii = var / (var + eps), with the population's variance whatever N is."""
    seed, rng = fresh()
    view = np.float32(rng.normal(size=(images, 1)) * deviation).astype(np.float64)
    variance = float(((view - view.mean()) ** 2).mean())
    want = (variance / (variance + 1e-5) - 1) ** 2
    # C is off by a few 1e-6, a sum over N, which is all there is where eps does not count
    error = 1e-5 * math.sqrt(want) + 2.5e-11
    got = barlow(np.concatenate([view, view]), 0.5, 1.0)
    assert got == pytest.approx(want, rel=1e-5, abs=error), f"seed {seed}"


def test_by_hand():
    # columns (1, -1, 1, -1) and (1, 1, -1, -1): uncorrelated, variance 1
    first = np.array([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    c = 1 / (1 + 1e-5)
    swapped = first[:, ::-1]
    # fp32: a 1 - C of 1e-5 is known to 1e-7, a C of 1 likewise
    assert barlow(np.concatenate([first, first]), 7.0, 2.0) == pytest.approx(0.0, abs=1e-8)
    assert barlow(np.concatenate([first, -first]), 7.0, 2.0) == pytest.approx(
        2.0 * 2 * (c + 1) ** 2, rel=1e-6
    )
    # each dimension is the other one's view: C is 0 on the diagonal and c beside it
    want = 2.0 * (2 + 7.0 * 2 * c**2)
    assert barlow(np.concatenate([first, swapped]), 7.0, 2.0) == pytest.approx(want, rel=1e-6)
    # one dimension redundant: every C is c
    twice = first[:, [0, 0]]
    want = 2.0 * (2 * (c - 1) ** 2 + 7.0 * 2 * c**2)
    assert barlow(np.concatenate([twice, twice]), 7.0, 2.0) == pytest.approx(want, rel=1e-6)
    # a constant dimension is correlated with nothing, and nothing is divided by 0
    constant = np.concatenate([first[:, :1], np.full((4, 1), 5.0)], axis=1)
    assert barlow(np.concatenate([constant, constant]), 7.0, 2.0) == pytest.approx(2.0, rel=1e-6)


def test_only_one_off_diagonal_entry():
    """C need not be symmetric: a's second column is b's first, and not the other way round."""
    one, two, three = np.array([[1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=float)
    z = np.concatenate([np.stack([one, two], axis=1), np.stack([two, three], axis=1)])
    c = 1 / (1 + 1e-5)
    # as above
    assert barlow(z, 0.25, 1.0) == pytest.approx(2 + 0.25 * c**2, rel=1e-6)


def test_views_columns_shifts_and_images():
    seed, rng = fresh()
    message = f"seed {seed}"
    a, b = rng.normal(size=(2, 11, 5))

    def loss(first, second) -> float:
        return barlow(np.concatenate([first, second]), 0.1, 1.0)

    value = loss(a, b)
    images, columns = rng.permutation(11), rng.permutation(5)
    # fp32 on both sides
    assert loss(b, a) == pytest.approx(value, rel=1e-5), message
    assert loss(a[images], b[images]) == pytest.approx(value, rel=1e-5), message
    assert loss(a[:, columns], b[:, columns]) == pytest.approx(value, rel=1e-5), message
    # each view has its own mean and its own scale, which costs eps alone: 1e-5 / 0.1 at most
    assert loss(a + rng.uniform(-5, 5, size=5), b) == pytest.approx(value, rel=2e-5, abs=1e-5), message
    assert loss(a * rng.uniform(1, 9, size=5), b) == pytest.approx(value, rel=1e-3), message
    # which image belongs to which does matter
    assert loss(a, a) != pytest.approx(loss(a, np.roll(a, 1, axis=0)), rel=1e-3), message


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_scales_of_nt_xent(temperature):
    """1 is the mean over 2N anchors; 2 is google-research/simclr's sum of two directions' means."""
    seed, rng = fresh()
    message = f"seed {seed}"
    z = np.float32(rng.normal(size=(14, 5))).astype(np.float64)
    anchors = nt_xent_of_anchors(z, temperature)
    assert len(anchors) == 14
    mean, both = math.fsum(anchors) / 14, nt_xent_both_ways(z, temperature)
    # the references, float64
    assert both == pytest.approx(2 * mean, rel=1e-12), message
    # fp32: a logit is off by 1e-7 / temperature
    assert contrast(z, temperature) == pytest.approx(mean, rel=1e-5, abs=2e-6 / temperature), message
    assert contrast(z, temperature, 1.0) == pytest.approx(mean, rel=1e-5, abs=2e-6 / temperature), message
    assert contrast(z, temperature, 2.0) == pytest.approx(both, rel=1e-5, abs=4e-6 / temperature), message
    assert contrast(z, temperature, 0.3) == pytest.approx(0.3 * mean, rel=1e-5, abs=1e-6 / temperature), (
        message
    )


def test_the_scale_is_in_the_gradient_of_nt_xent():
    seed, rng = fresh()
    z, exact = single(rng.normal(size=(8, 4)))
    nt_xent(z, 0.4, scale=2.0).backward()
    want = slope(lambda x: nt_xent_both_ways(x, 0.4), exact)
    assert z.grad is not None
    # fp32 against central differences that are good to 1e-9
    np.testing.assert_allclose(
        z.grad.numpy(), want, rtol=1e-4, atol=1e-5 * np.abs(want).max(), err_msg=f"seed {seed}"
    )


def test_bf16_projections_lose_nothing_after_the_head():
    seed, rng = fresh()
    message = f"seed {seed}"
    z = torch.tensor(rng.normal(size=(16, 12))).bfloat16()
    exact = z.double().numpy()
    with torch.autocast("cpu", torch.bfloat16):
        redundancy, contrastive = barlow_twins(z, 0.5, 0.1), nt_xent(z, 0.2, 2.0)
    assert redundancy.dtype == contrastive.dtype == torch.float32, message
    # as in fp32: what's bf16 is the projections alone
    assert redundancy.item() == pytest.approx(reference(exact, 0.5, 0.1), rel=1e-5), message
    assert contrastive.item() == pytest.approx(nt_xent_both_ways(exact, 0.2), rel=1e-5, abs=1e-5), message
