"""The autoencoder against NumPy: layers, error, training steps, plateau, and which epoch is kept."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from references import (
    Plateau,
    adamw_step,
    autoencoder_forward,
    autoencoder_gradients,
    autoencoder_parameters,
    fresh_generator,
)

from headsearch.config import AutoencoderConfig
from headsearch.core import autoencoder
from headsearch.core.autoencoder import Autoencoder, train_autoencoder
from headsearch.core.images import ImageSet, Split
from headsearch.core.randomness import generator, initialisation

CPU = torch.device("cpu")
SIDE, HIDDEN, EMBEDDING = 4, 7, 3
PIXELS = 3 * SIDE * SIDE


def layers(model: torch.nn.Module) -> list[tuple[np.ndarray, np.ndarray]]:
    found = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    return [
        (m.weight.detach().double().numpy().copy(), m.bias.detach().double().numpy().copy()) for m in found
    ]


def image_set(train: int = 23, validation: int = 9) -> ImageSet:
    rng = fresh_generator()

    def split(count: int) -> Split:
        pixels = rng.integers(0, 256, size=(count, 3, SIDE, SIDE), dtype=np.uint8)
        return Split(torch.from_numpy(pixels), torch.zeros(count, dtype=torch.int64))

    return ImageSet("test", ("a",), split(train), split(validation), split(2), "fingerprint")


def flat(split: Split) -> np.ndarray:
    return split.images.double().numpy().reshape(len(split.images), -1) / 255


def test_forward():
    model = Autoencoder(PIXELS, HIDDEN, EMBEDDING)
    torch.nn.init.constant_(model.embedding.bias, -1.0)
    x = fresh_generator().uniform(size=(5, PIXELS))
    embedding, output = autoencoder_forward(x, layers(model))
    given = torch.tensor(x, dtype=torch.float32)
    np.testing.assert_allclose(model(given).detach().numpy(), output, rtol=1e-5, atol=1e-6)
    assert embedding.shape == (5, EMBEDDING)
    assert (embedding < 0).any(), "an activation behind the embedding would show"


@pytest.mark.parametrize("embedding", [128, 256, 512])
@pytest.mark.parametrize("pixels", [192, 3072])
def test_parameters(pixels, embedding):
    with torch.device("meta"):
        model = Autoencoder(pixels, 512, embedding)
    assert sum(p.numel() for p in model.parameters()) == autoencoder_parameters(pixels, 512, embedding)
    shapes = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert shapes == [(512, pixels), (embedding, 512), (512, embedding), (pixels, 512)]


def initial(config: AutoencoderConfig) -> Autoencoder:
    with initialisation(config.seed, "autoencoder"):
        return Autoencoder(PIXELS, HIDDEN, EMBEDDING)


def test_the_reference_gradients_are_slopes():
    """So that the training below is not checked against a shared mistake."""
    parts = layers(Autoencoder(PIXELS, HIDDEN, EMBEDDING))
    x = fresh_generator().uniform(size=(4, PIXELS))
    _, gradients = autoencoder_gradients(x, parts)
    for (weight, bias), (weight_gradient, bias_gradient) in zip(parts, gradients, strict=True):
        for values, gradient, index in ((weight, weight_gradient, (1, 2)), (bias, bias_gradient, (0,))):
            kept = values[index]
            losses = []
            for shift in (1e-6, -1e-6):
                values[index] = kept + shift
                losses.append(autoencoder_gradients(x, parts)[0])
            values[index] = kept
            assert gradient[index] == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-3, abs=1e-9)


def test_training_is_adam_on_the_mean_squared_error_of_raw_pixels():
    """Two epochs of uneven batches; the last, smaller batch counts too."""
    images = image_set()
    config = AutoencoderConfig(epochs=2, batch_size=10, learning_rate=0.01)
    parts = layers(initial(config))
    moments = [[[np.zeros_like(v), np.zeros_like(v)] for v in part] for part in parts]
    x, validation, step, errors, snapshots = flat(images.train), flat(images.validation), 0, [], []
    for epoch in (1, 2):
        order = torch.randperm(len(x), generator=generator(CPU, config.seed, "autoencoder", epoch)).numpy()
        for rows in (order[:10], order[10:20], order[20:]):
            step += 1
            _, gradients = autoencoder_gradients(x[rows], parts)
            for part, layer in enumerate(parts):
                changed = []
                for slot in (0, 1):
                    w, *moments[part][slot] = adamw_step(
                        layer[slot], gradients[part][slot], *moments[part][slot],
                        step=step, rate=0.01, decay=0.0,
                    )  # fmt: skip
                    changed.append(w)
                parts[part] = (changed[0], changed[1])
        _, output = autoencoder_forward(validation, parts)
        errors.append(float(((output - validation) ** 2).mean()))
        snapshots.append(list(parts))
    best = int(np.argmin(errors))
    model, error, epoch = train_autoencoder(config, images, HIDDEN, EMBEDDING, CPU)
    assert (error, epoch) == (pytest.approx(errors[best], rel=1e-4), best + 1)
    for (weight, bias), (want_weight, want_bias) in zip(layers(model), snapshots[best], strict=True):
        np.testing.assert_allclose(weight, want_weight, rtol=1e-3, atol=3e-4)
        np.testing.assert_allclose(bias, want_bias, rtol=1e-3, atol=3e-4)


@pytest.mark.parametrize("patience", [0, 2, 3])
def test_the_rate_halves_on_a_plateau_and_the_best_epoch_is_kept(monkeypatch, patience):
    """Validation losses are given, so that every branch of the schedule is taken."""
    losses = [5.0, 4.0, 4.1, 3.9999, 4.2, 4.3, 3.0, 3.5, 3.4, 3.3, 3.2, 3.1, 3.05, 2.0, 2.5, 2.5]
    given = iter(losses)
    rates: list[float] = []
    states: list[torch.Tensor] = []

    def prescribed(model, _images):
        states.append(model.embedding.weight.detach().clone())
        return next(given)

    class Watched(torch.optim.Adam):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(autoencoder, "_reconstruction_error", prescribed)
    monkeypatch.setattr(torch.optim, "Adam", Watched)
    config = AutoencoderConfig(
        epochs=len(losses), batch_size=23, learning_rate=0.02, plateau_patience=patience
    )
    model, error, epoch = train_autoencoder(config, image_set(), HIDDEN, EMBEDDING, CPU)
    plateau = Plateau(0.02, patience)
    assert rates == pytest.approx([0.02] + [plateau.step(loss) for loss in losses[:-1]], rel=1e-12)
    assert rates[-1] < 0.02
    assert math.log2(0.02 / rates[-1]) == pytest.approx(round(math.log2(0.02 / rates[-1])))
    assert (error, epoch) == (2.0, 14)
    assert torch.equal(model.embedding.weight, states[13])


def test_default_recipe_is_the_papers():
    config = AutoencoderConfig()
    assert (config.epochs, config.batch_size, config.learning_rate, config.plateau_patience) == (
        100,
        100,
        1e-4,
        10,
    )
