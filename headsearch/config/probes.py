"""How the autoencoder is trained and how accuracy is measured."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from headsearch.config.part import Config

Protocol = Literal["holdout", "schliebitz2024", "ouyang2025"]


class AutoencoderConfig(Config):
    """How the autoencoder of head kind `autoencoder` is trained (Schliebitz et al. 2024).

    Linear(pixels, hidden)-ReLU-Linear(hidden, E) and back with a sigmoid at the end, mean squared error,
    Adam, learning rate halved on a plateau of the validation loss, best validation checkpoint kept.
    """

    epochs: int = Field(default=100, ge=1)
    """Passes over the training images."""
    batch_size: int = Field(default=100, ge=1)
    """Images a step."""
    learning_rate: float = Field(default=1e-4, gt=0.0)
    """Of Adam, at the start."""
    plateau_patience: int = Field(default=10, ge=0)
    """Epochs without a better validation loss before the learning rate is halved."""
    seed: int = Field(default=0, ge=0)
    """Own seed, so that all trials share one autoencoder whatever theirs is."""


class ProbeConfig(Config):
    """Linear probe on frozen features: L2-penalised logistic regression, unless the protocol has its own."""

    penalties: tuple[Annotated[float, Field(gt=0.0)], ...] = Field(
        default=(1e-5, 1e-4, 1e-3, 1e-2, 1e-1), min_length=1
    )
    """L2 penalties that the final probe tries; the validation split chooses."""
    iterations: int = Field(default=200, ge=1)
    """L-BFGS iterations of the final probe, at most."""
    report_images: int = Field(default=2048, ge=2)
    """Training images, and at most as many validation images, that the per-epoch report's probe uses."""
    report_iterations: int = Field(default=30, ge=1)
    """L-BFGS iterations of the report's probe."""
    report_penalty: float = Field(default=1e-3, gt=0.0)
    """L2 penalty of the report's probe."""
    layers: bool = False
    """Also probe every layer of the head: the features, hidden layers and projections."""
    measures: bool = True
    """Report alignment, uniformity, kNN accuracy, inactive head units and bounds on information too."""
    online_learning_rate: float = Field(default=0.1, gt=0.0)
    """Per 256 images (as it stands for `adamw`), of the probe that protocol `ouyang2025` trains along with
    the encoder: on detached features, without decay, one step a batch whatever the scheme."""
    online_warmup_start: Literal["scaled", "same"] = "scaled"
    """That probe's rate at the first step of a warm-up: `optimizer.warmup_start` itself, `same`, as in
    solo-learn, whose scheduler starts every group there; or, `scaled`, as large a share of it as the probe's
    peak is of the optimizer's."""
    offline: Literal["lars", "sgd", "lars-without-warmup"] = "lars"
    """How protocol `ouyang2025` trains its second probe, on the frozen encoder. `lars`: clipped LARS, weight
    decay 1e-4, 10 epochs of warm-up (a fifth of a training of less than 50), then a cosine
    (Projector_Theory, scripts/linear/cifar). `sgd`: momentum 0.9, no decay, a tenth of the rate from 60 % and
    again from 80 % of the epochs (scripts/linear/imagenet-100). `lars-without-warmup`: neither clip, decay
    nor warm-up, as studies of edition 1 had it."""
    offline_learning_rate: float = Field(default=0.3, gt=0.0)
    """Per 256 images, of that probe."""
    offline_batch_size: int = Field(default=256, ge=2)
    """Images a step of that probe."""
    offline_epochs: int = Field(default=50, ge=1)
    """Passes of that probe over the training images, cropped and flipped."""
    knn_neighbours: int = Field(default=20, ge=1)
    """k of the kNN classifier; lightly's is 200."""
    knn_temperature: float = Field(default=0.07, gt=0.0)
    """Divides cosine similarities, whose exponentials are the neighbours' votes; lightly's is 0.1."""
    knn_train: Literal["report", "all"] = "report"
    """Whose neighbours: of the report's training images, or of the whole training split, as lightly's. `all`
    encodes that split after every epoch, and also scores kNN on all validation and test images at the end; on
    the latter, validation images are neighbours, too, where `data.train_on` has them trained on."""
