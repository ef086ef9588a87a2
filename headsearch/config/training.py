"""Encoder, loss, optimizers and schemes of a pretraining."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from headsearch.config.part import Config, Fraction

EncoderName = Literal["small-resnet", "resnet18", "resnet34", "resnet50"]
LarsForm = Literal["you2017", "google-research", "solo-learn"]


class EncoderConfig(Config):
    """The network whose features are probed."""

    name: EncoderName = "small-resnet"
    """`small-resnet` suits CPUs; the others are torchvision's."""
    width: int = Field(default=16, ge=4, le=256)
    """Channels of `small-resnet`'s first stage; its feature dim is eight times that. Others ignore it."""
    stem: Literal["auto", "cifar", "cifar-pad2", "imagenet"] = "auto"
    """`cifar` is a 3x3 convolution without pooling, `cifar-pad2` the same with padding 2 (solo-learn),
    `imagenet` 7x7 stride 2 with pooling; `auto` takes `cifar` up to 64 pixels. `small-resnet` always has a
    3x3 stem."""
    pretrained: bool = False
    """Start from torchvision's ImageNet weights (not for `small-resnet`; needs the ImageNet stem)."""
    initialisation: Literal["fan-out", "fan-out-but-stem", "torch", "fan-in-truncated"] = "fan-out"
    """Of the convolutions, but for `small-resnet`, which has torch's own. `fan-out` is torchvision's
    (Kaiming normal); `fan-out-but-stem` leaves a CIFAR stem at torch's own, as solo-learn does; `torch`
    leaves all at it (lightly's ResNet); `fan-in-truncated` is a truncated normal of variance 1 / fan-in
    (google-research/simclr)."""
    zero_last_norm: bool = False
    """Scale of each residual block's last norm starts at 0, so that blocks start as identities
    (google-research/simclr)."""
    first_shortcut: Literal["identity", "projection"] = "identity"
    """Shortcut of the first block of the first stage of the basic ResNets, where shapes fit as they are:
    google-research/simclr puts a 1x1 convolution and a norm there, as at the head of every stage."""

    @model_validator(mode="after")
    def _pretrained_fits(self) -> Self:
        if self.pretrained and (self.name == "small-resnet" or self.stem != "imagenet"):
            raise ValueError(
                "encoder.pretrained: needs encoder.name = resnet18, resnet34 or resnet50 "
                'and encoder.stem = "imagenet"'
            )
        changed = self.initialisation != "fan-out" or self.zero_last_norm
        if self.pretrained and (changed or self.first_shortcut != "identity"):
            raise ValueError(
                "encoder.pretrained: weights come from ImageNet; leave encoder.initialisation, "
                "encoder.zero_last_norm and encoder.first_shortcut at their defaults"
            )
        return self


class Objective(Config):
    """What all objectives share."""

    bottleneck_weight: float = Field(default=0.0, ge=0.0)
    """lambda: adds lambda times the mutual information of features and projections, by matrix-based Renyi
    entropies of order 2 (Ouyang et al. 2025: 1e-4 on CIFAR, 1e-2 on ImageNet-100); 0 leaves it out."""


class NtXentObjective(Objective):
    """Normalised temperature-scaled cross entropy (Chen et al. 2020)."""

    kind: Literal["nt-xent"] = "nt-xent"
    """Mean over all 2N anchors."""
    temperature: float = Field(default=0.5, gt=0.0, le=100.0)
    """Divides the cosine similarities."""
    scale: float = Field(default=1.0, gt=0.0)
    """Multiplies the loss: 1 is the mean of solo-learn, lightly and simclr-ae, 2 google-research/simclr's sum
    of two means."""


class BarlowTwinsObjective(Objective):
    """Cross-correlation of the two views close to the identity (Zbontar et al. 2021)."""

    kind: Literal["barlow-twins"] = "barlow-twins"
    """Redundancy reduction."""
    redundancy_weight: float = Field(default=0.0051, ge=0.0)
    """Of the squared off-diagonal correlations."""
    scale: float = Field(default=0.1, gt=0.0)
    """Multiplies the loss (solo-learn's scale_loss)."""


ObjectiveConfig = Annotated[NtXentObjective | BarlowTwinsObjective, Field(discriminator="kind")]


class OptimizerConfig(Config):
    """How encoder and head are trained."""

    name: Literal["sgd", "lars", "adamw"] = "sgd"
    """SGD with momentum, LARS (You et al. 2017; no adaptation or decay on biases and norms), or AdamW."""
    learning_rate: float = Field(default=0.3, gt=0.0, le=1e4)
    """Per 256 images for `sgd` and `lars` (scaled by batch size / 256); as it stands for `adamw`."""
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Of `sgd` and `lars`."""
    weight_decay: float = Field(default=1e-4, ge=0.0)
    """L2 for `sgd` and `lars`, decoupled for `adamw`."""
    decay_all: bool = False
    """Decay biases and norms too."""
    trust_coefficient: float = Field(default=1e-3, gt=0.0)
    """Of `lars`: eta. solo-learn's is 0.02."""
    clip: bool = False
    """Of `lars`: a layer's rate is at most the learning rate (solo-learn's clip_lr, LARC)."""
    lars_form: LarsForm = "you2017"
    """Of `lars`: whose update. `you2017` is the paper's algorithm 1; `google-research` takes the norm of the
    decayed gradient; `solo-learn` (and lightly) applies the learning rate after the momentum."""
    warmup_epochs: float = Field(default=0.0, ge=0.0)
    """Linear warm-up, then a cosine to `final_learning_rate_ratio`."""
    warmup_start: float = Field(default=0.0, ge=0.0)
    """Learning rate at the first step of the warm-up, not scaled by the batch size."""
    warmup_peak: Literal["next_step", "last_step"] = "next_step"
    """Where the warm-up is at its peak: at the first step after it, or at its last (solo-learn)."""
    final_learning_rate_ratio: Fraction = 0.0
    """Learning rate at the end, as a share of its peak."""
    schedule: Literal["step", "epoch"] = "step"
    """Whether the learning rate changes at every step or only between epochs."""


class JointScheme(Config):
    """Encoder and head take each step together: the usual training, and the control of the other scheme."""

    kind: Literal["joint"] = "joint"
    """One loss, one optimizer."""
    steps_per_batch: int = Field(default=1, ge=1, le=100)
    """Gradient steps on each batch; K + 1 of them match `alternating` with K head steps on the same batch."""


class AlternatingScheme(Config):
    """The head as part of the objective: it follows the encoder in steps of its own.

    Our reconstruction of an idea of Gupta et al. (2022), whose algorithm is not public: the inner problem
    is argmin over head parameters of the loss at fixed features, approached by K steps with detached
    features; the outer step moves the encoder with the head held fixed.
    """

    kind: Literal["alternating"] = "alternating"
    """K steps of the head, then one of the encoder."""
    head_steps: int = Field(default=1, ge=1, le=100)
    """K."""
    batches: Literal["same", "fresh"] = "same"
    """`same`: the head's steps and the encoder's are on one batch, whose features are computed once. `fresh`:
    each takes a batch of its own, so that an epoch has as many gradient steps as a joint one."""
    encoder_uses: Literal["updated", "previous"] = "updated"
    """Which head the encoder's step sees with `same` batches: after the head's steps, or before."""
    head_optimizer: OptimizerConfig | None = None
    """The head's own optimizer and schedule; none: the encoder's settings once more."""
    reset_steps: int = Field(default=0, ge=0)
    """Draw the head anew after this many encoder steps; 0 never does."""


SchemeConfig = Annotated[JointScheme | AlternatingScheme, Field(discriminator="kind")]


class TrainingConfig(Config):
    """Length, batch and arithmetic of pretraining."""

    epochs: int = Field(default=12, ge=0)
    """Passes over the training images. 0 measures the untrained encoder. A study sets it: budget.epochs."""
    batch_size: int = Field(default=256, ge=2)
    """Images a step (two views each). The last, smaller batch of an epoch is dropped."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the encoder and head; losses are always fp32. `auto` is bf16 on GPUs that have it, else fp32; each
    trial records which. `headsearch bench --precision bf16` says what it brings on a CPU."""
    channels_last: bool = True
    """Memory layout of images and convolutions."""
    compile_encoder: Literal["off", "default", "reduce-overhead", "max-autotune-no-cudagraphs"] = "off"
    """torch.compile of the encoder's passes, by mode; `reduce-overhead` uses CUDA graphs. Whether it pays on
    a machine, `headsearch bench --compile` says. A trial begins half a minute later; where compiling fails,
    the encoder stays as it is."""
    cuda_graph: bool = True
    """On a GPU, record a whole step (views, both passes, optimizer) once as a CUDA graph and replay it: the
    GPU waits for no launches, and the training is the same to the bit. `headsearch bench --cuda-graph`
    measures both. In the joint scheme only, and not with `compile_encoder`; photos, a CPU, and what cannot be
    recorded do without it."""
    encode_views: Literal["together", "apart"] = "together"
    """Whether both views of a batch go through encoder and head at once, and share the statistics of batch
    norms (google-research/simclr), or one after the other (solo-learn, lightly)."""
    keep: Literal["last", "best_validation_loss"] = "last"
    """Which epoch's encoder is probed. `best_validation_loss` takes the one with the smallest loss on the
    validation images, un-augmented, both views alike (Schliebitz et al. 2024)."""
