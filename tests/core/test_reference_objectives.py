"""NT-Xent against the per-anchor loop and against values worked out by hand.

Tolerance: fp32 against float64. A cosine is off by about 1e-7, hence a logit by 1e-7 / temperature.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from references import fresh_generator, nt_xent_gradient
from references import nt_xent as reference

from headsearch.core.objectives import nt_xent


def loss(a, b, temperature: float) -> float:
    return float(nt_xent(torch.tensor(np.concatenate([a, b]), dtype=torch.float32), temperature))


E = np.eye(4)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize(
    ("first", "second", "by_hand"),
    [
        # images orthogonal, views equal: positive exp(1/t) against two negatives of exp(0)
        (E[:2], E[:2], lambda t: math.log(1 + 2 * math.exp(-1 / t))),
        # all four rows orthogonal: three equal logits
        (E[:2], E[2:], lambda t: math.log(3)),
        # views opposite
        (E[:2], -E[:2], lambda t: math.log(1 + 2 * math.exp(1 / t))),
        # everything in one direction, lengths unequal: 2N - 1 equal logits
        (E[:1] * [[2.0], [3.0]], E[:1] * [[5.0], [0.5]], lambda t: math.log(3)),
        # views swapped between the images: the positive is orthogonal, one negative identical
        (E[:2], E[[1, 0]], lambda t: math.log(2 + math.exp(1 / t))),
    ],
    ids=["aligned", "orthogonal", "opposite", "collapsed", "swapped"],
)
def test_two_images_by_hand(first, second, by_hand, temperature):
    # absolute: the aligned loss is the small difference of logits that fp32 rounds at 1e-6
    assert loss(first, second, temperature) == pytest.approx(by_hand(temperature), rel=1e-5, abs=1e-6)
    assert reference(first, second, temperature) == pytest.approx(by_hand(temperature), rel=1e-12)


@pytest.mark.parametrize("images", [2, 3, 7, 16])
@pytest.mark.parametrize("dim", [1, 3, 32])
@pytest.mark.parametrize("temperature", [0.05, 0.5, 2.0])
def test_value_and_gradient(images, dim, temperature):
    rng = fresh_generator()
    a, b = rng.normal(size=(2, images, dim)) * rng.uniform(0.1, 10, size=(2, images, 1))
    z = torch.tensor(np.concatenate([a, b]), dtype=torch.float32, requires_grad=True)
    exact = z.detach().double().numpy()
    value = nt_xent(z, temperature)
    value.backward()
    assert value.dtype == torch.float32
    # absolute too: a positive that beats every negative leaves a loss of about 0
    want = reference(exact[:images], exact[images:], temperature)
    assert value.item() == pytest.approx(want, rel=1e-5, abs=2e-6 / temperature)
    gradient = np.concatenate(nt_xent_gradient(exact[:images], exact[images:], temperature))
    lengths = np.linalg.norm(exact, axis=1, keepdims=True)
    assert z.grad is not None
    np.testing.assert_allclose(
        z.grad.numpy() * lengths, gradient * lengths, rtol=1e-4, atol=1e-6 / temperature**2
    )


@pytest.mark.parametrize("temperature", [0.003, 0.01])
def test_chances_too_small_for_fp32(temperature):
    """Opposite views beside equal images: a positive's chance is exp(-2 / temperature) of the others'."""
    first = E[[0, 0, 1, 1]]
    z = torch.tensor(np.concatenate([first, -first]), dtype=torch.float32, requires_grad=True)
    value = nt_xent(z, temperature)
    value.backward()
    assert value.item() == pytest.approx(reference(first, -first, temperature), rel=1e-6)
    gradient = np.concatenate(nt_xent_gradient(first, -first, temperature))
    assert z.grad is not None
    np.testing.assert_allclose(z.grad.numpy(), gradient, atol=1e-5 / temperature)


def test_the_reference_gradient_is_the_slope_of_the_reference_loss():
    rng = fresh_generator()
    views = rng.normal(size=(2, 4, 3))
    gradient = np.stack(nt_xent_gradient(*views, 0.3))
    for index in np.ndindex(views.shape):
        up, down = views.copy(), views.copy()
        up[index] += 1e-5
        down[index] -= 1e-5
        slope = (reference(*up, 0.3) - reference(*down, 0.3)) / 2e-5
        assert gradient[index] == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_the_scale_is_the_mean_over_both_directions():
    """google-research/simclr adds the means of the two directions; ours is half of that."""
    a, b = fresh_generator().normal(size=(2, 6, 5))
    u, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    total = 0.0
    for own, other in ((u, v), (v, u)):
        masked = own @ own.T / 0.2 - 1e9 * np.eye(6)
        logits = np.concatenate([own @ other.T / 0.2, masked], axis=1)
        total += float(np.mean(np.log(np.exp(logits).sum(axis=1)) - np.diag(logits)))
    assert loss(a, b, 0.2) == pytest.approx(total / 2, rel=1e-5)


def test_order_of_images_views_and_lengths_do_not_matter():
    rng = fresh_generator()
    a, b = rng.normal(size=(2, 9, 6))
    value = loss(a, b, 0.4)
    order = rng.permutation(9)
    turn, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    assert loss(a[order], b[order], 0.4) == pytest.approx(value, rel=1e-5)
    assert loss(b, a, 0.4) == pytest.approx(value, rel=1e-5)
    assert loss(a * rng.uniform(0.1, 9, size=(9, 1)), b, 0.4) == pytest.approx(value, rel=1e-5)
    assert loss(a @ turn, b @ turn, 0.4) == pytest.approx(value, rel=1e-5)
    # which second view belongs to which image does matter
    assert loss(a, np.roll(b, 1, axis=0), 0.4) != pytest.approx(value, rel=1e-3)


def test_bf16_projections_lose_nothing_after_the_head():
    a, b = fresh_generator().normal(size=(2, 8, 16))
    z = torch.tensor(np.concatenate([a, b])).bfloat16()
    exact = z.double().numpy()
    with torch.autocast("cpu", torch.bfloat16):
        value = nt_xent(z, 0.1)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(reference(exact[:8], exact[8:], 0.1), rel=1e-5, abs=1e-5)
