"""The linear probe against scikit-learn on raw pixels of the digits, and who chooses the penalty."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from references import cross_entropy
from remote_device import REMOTE, RemoteDevice
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

from headsearch.config import DataConfig, ProbeConfig, TrialConfig
from headsearch.core.images import ImageSet, load_images
from headsearch.core.logistic import fit_probe
from headsearch.core.pretrain import Pretrained
from headsearch.core.probe import evaluate

CPU = torch.device("cpu")
PENALTIES = (1e-3, 1e-2, 1e-1)


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> ImageSet:
    return load_images(DataConfig(), home=tmp_path_factory.mktemp("home"))


def pixels(split) -> np.ndarray:
    """Raw pixels (N, 192); three equal channels, as an encoder that only flattens would see them."""
    return split.images.flatten(1).double().numpy() / 255


def standardised(split, train) -> np.ndarray:
    mean, std = pixels(train).mean(axis=0), pixels(train).std(axis=0)
    return (pixels(split) - mean) / np.where(std > 1e-12, std, 1.0)


@functools.cache
def scikit(digits: ImageSet, penalty: float) -> LogisticRegression:
    x, y = standardised(digits.train, digits.train), digits.train.labels.numpy()
    return LogisticRegression(C=1 / (penalty * len(x)), tol=1e-8, max_iter=20_000).fit(x, y)


def objective(x, labels, weight, bias, penalty: float) -> float:
    return cross_entropy(x, labels, weight, bias) + penalty / 2 * float((weight**2).sum())


@pytest.mark.parametrize("penalty", [1e-4, *PENALTIES])
def test_objective_and_accuracy_are_scikit_learns(digits, penalty):
    features = digits.train.images.flatten(1).float() / 255
    probe = fit_probe(features, digits.train.labels, 10, penalty=penalty, iterations=200)
    oracle = scikit(digits, penalty)
    x, labels = standardised(digits.train, digits.train), digits.train.labels.numpy()
    ours = objective(x, labels, probe.weight.numpy(), probe.bias.numpy(), penalty)
    theirs = objective(x, labels, oracle.coef_, oracle.intercept_, penalty)
    assert ours == pytest.approx(theirs, rel=1e-4)
    spread = pixels(digits.train).std(axis=0)
    np.testing.assert_allclose(probe.scale.numpy(), np.where(spread > 1e-12, spread, 1.0), rtol=1e-6)
    for split in (digits.train, digits.validation, digits.test):
        accuracy = probe.accuracy(split.images.flatten(1).float() / 255, split.labels)
        assert accuracy == oracle.score(standardised(split, digits.train), split.labels.numpy())


def test_the_bias_is_not_penalised(digits):
    """Under a huge penalty the weights vanish and the bias still learns the class frequencies."""
    rows = digits.train.labels < 2
    rows[torch.nonzero(digits.train.labels == 1)[30:, 0]] = False
    features, labels = digits.train.images[rows].flatten(1).float(), digits.train.labels[rows]
    probe = fit_probe(features, labels, 2, penalty=1e6, iterations=200)
    odds = np.log(float((labels == 1).sum()) / float((labels == 0).sum()))
    assert float(probe.bias[1] - probe.bias[0]) == pytest.approx(odds, rel=1e-3)
    assert float(probe.weight.abs().max()) < 1e-4


def test_shifted_scaled_and_constant_features_change_nothing(digits):
    features = digits.train.images[:, 0].flatten(1).double() / 255
    labels = digits.train.labels
    rng = np.random.default_rng(3)
    scale, shift = torch.tensor(rng.uniform(0.1, 50, size=64)), torch.tensor(rng.normal(size=64) * 5)
    moved = torch.cat([features * scale + shift, torch.full((len(labels), 2), 3.3)], dim=1)
    plain = fit_probe(features, labels, 10, penalty=1e-2, iterations=200)
    other = fit_probe(moved, labels, 10, penalty=1e-2, iterations=200)
    np.testing.assert_allclose(other.weight[:, :64].numpy(), plain.weight.numpy(), atol=1e-3)
    assert (plain.predict(features) == other.predict(moved)).double().mean() > 0.999
    assert other.weight.isfinite().all()


def by_torch_alone(features, labels, classes: int, penalty: float, iterations: int, start=None):
    """Weight and bias as torch's L-BFGS leaves them, both of them leaves that `backward` fills."""
    rows = features.double()
    mean, scale = rows.mean(0), rows.std(0, correction=0)
    rows = (rows - mean) / torch.where(scale > 1e-6 * mean.abs(), scale, 1.0)
    weight = rows.new_zeros(classes, rows.shape[1]) if start is None else start[0].detach().clone()
    bias = rows.new_zeros(classes) if start is None else start[1].detach().clone()
    optimizer = torch.optim.LBFGS(
        [weight.requires_grad_(), bias.requires_grad_()],
        max_iter=iterations,
        max_eval=2 * iterations + 10,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(rows, weight, bias), labels) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight, bias


def test_it_is_torchs_l_bfgs_to_the_bit(digits):
    """Parameters that are moved and gradients that come as one tensor change no number; warm starts included."""
    features, labels = digits.train.images.flatten(1).float() / 255, digits.train.labels
    probe, plain = None, None
    for penalty in (1e-1, 1e-3, 1e-5):
        with torch.no_grad():
            probe = fit_probe(features, labels, 10, penalty=penalty, iterations=40, start=probe)
        plain = by_torch_alone(features, labels, 10, penalty, 40, plain)
        assert torch.equal(probe.weight, plain[0])
        assert torch.equal(probe.bias, plain[1])
        assert not probe.weight.requires_grad


def remote_fit(iterations: int) -> tuple[RemoteDevice, bool]:
    """A fit of noise, which takes all of its iterations, on a device of its own; whether the result is right."""
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(400, 30, generator=draw) @ torch.randn(30, 30, generator=draw).matrix_exp()
    labels = torch.randint(8, (400,), generator=draw)
    here = fit_probe(features, labels, 8, penalty=1e-9, iterations=iterations)
    with RemoteDevice() as device:
        there = fit_probe(device.put(features), device.put(labels), 8, penalty=1e-9, iterations=iterations)
    assert {part.device for part in vars(there).values()} == {REMOTE}
    return device, all(torch.equal(part.held, getattr(here, name)) for name, part in vars(there).items())


def test_an_iteration_reads_the_device_once_or_twice_however_many_it_remembers():
    """Once an evaluation. L-BFGS on the device would read it twice for each earlier step, up to 200 times."""
    for iterations in (10, 60):
        device, right = remote_fit(iterations)
        assert right
        assert iterations < device.reads <= 2 * iterations
        assert device.writes <= 2 * device.reads + 2  # weight and bias


def test_a_device_apart_sees_reads_and_mixed_operands():
    """Of the device that the test above counts on."""
    with RemoteDevice() as device:
        there = device.put(torch.arange(4.0))
        assert float(there.sum() + torch.tensor(2.0)) == 8.0
        assert torch.equal(there.cpu(), torch.arange(4.0))
        there.add_(torch.ones(4).to(there.device))
        assert there.held.tolist() == [1, 2, 3, 4]
        assert (device.reads, device.writes) == (2, 1)
        with pytest.raises(RuntimeError, match="host and device"):
            there + torch.ones(4)


def pretrained() -> Pretrained:
    return Pretrained(nn.Flatten(), nn.Identity(), 192, 192, 0, 0, 0.0, 0.0, None, "fp32")


def evaluation(images: ImageSet, penalties: tuple[float, ...] = PENALTIES):
    config = TrialConfig(probe=ProbeConfig(penalties=penalties, iterations=200))
    return evaluate(pretrained(), images, config, device=CPU)


def test_final_probe_is_scikit_learn_with_the_penalty_that_validation_chose(digits):
    scores = {
        penalty: (
            scikit(digits, penalty).score(
                standardised(digits.validation, digits.train), digits.validation.labels.numpy()
            ),
            penalty,
        )
        for penalty in PENALTIES
    }
    chosen = max(scores, key=lambda penalty: scores[penalty])  # of equals the largest
    found = evaluation(digits)
    assert (found.details["penalty"], found.probe_accuracy) == (chosen, scores[chosen][0])
    oracle = scikit(digits, chosen)
    test = oracle.score(standardised(digits.test, digits.train), digits.test.labels.numpy())
    assert found.test_accuracy == test
    assert (found.train_images, found.validation_images, found.test_images) == tuple(
        len(split.labels) for split in (digits.train, digits.validation, digits.test)
    )


def test_the_test_split_has_no_say(digits):
    """Test labels on which the other penalty would win change the test accuracy and nothing else."""
    penalties = (1e-3, 1e-1)
    found = evaluation(digits, penalties)
    (other,) = set(penalties) - {found.details["penalty"]}
    train, test = (split.images.flatten(1).float() / 255 for split in (digits.train, digits.test))
    rival = fit_probe(train, digits.train.labels, 10, penalty=other, iterations=200)
    again = evaluation(replace(digits, test=replace(digits.test, labels=rival.predict(test))), penalties)
    assert (again.details["penalty"], again.probe_accuracy) == (
        found.details["penalty"],
        found.probe_accuracy,
    )
    assert found.test_accuracy != again.test_accuracy < 1.0


def test_validation_decides(digits):
    """Validation labels made by one penalty's probe choose that penalty."""
    train = digits.train.images.flatten(1).float() / 255
    held = digits.validation.images.flatten(1).float() / 255
    for penalty in (1e-3, 1e-1, 10.0):
        rival = fit_probe(train, digits.train.labels, 10, penalty=penalty, iterations=200)
        rigged = replace(digits, validation=replace(digits.validation, labels=rival.predict(held)))
        found = evaluation(rigged, (1e-3, 1e-1, 10.0))
        assert (found.details["penalty"], found.probe_accuracy) == (penalty, 1.0)


def test_of_equal_penalties_the_largest_is_chosen(digits):
    found = evaluation(digits, (1.0001e-2, 1e-2, 1.0002e-2))
    assert found.details["penalty"] == 1.0002e-2
