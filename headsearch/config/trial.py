"""TrialConfig: everything that determines one training, as one tree of frozen values.

A study's space addresses it by dotted path (``head.width``, ``data.normalization``). Unknown keys
are refused, units stand in names, and what does not fit together is refused at construction, before
a trial exists. Kinds that have different fields (the projection heads) are separate classes chosen
by ``kind``, so that a field which means nothing for a head cannot be set for it.

The text under a field is its documentation: it goes into the JSON schema that
``headsearch study schema`` prints.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Activation = Literal["identity", "relu", "leaky_relu", "elu", "gelu", "silu", "sigmoid", "tanh", "mish"]
Protocol = Literal["holdout"]
DatasetName = Literal[
    "digits", "cifar10", "cifar100", "stl10", "fashion-mnist", "imagenette", "fgvc-aircraft", "folder"
]
EncoderName = Literal["small-resnet", "resnet18", "resnet34", "resnet50"]

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Dim = Annotated[int, Field(ge=1, le=1_000_000)]


class Config(BaseModel):
    """A frozen part of the tree that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class DataConfig(Config):
    """Which images, at which size, and how they are split."""

    name: DatasetName = "digits"
    """`digits` needs no download; `folder` reads `train/<class>/*` and `test/<class>/*` under `root`."""
    root: str | None = None
    """Folder that holds the data. A relative path is looked up under $HEADSEARCH_DATA, else under the
    working directory. Without one, torchvision's data sets are kept in the headsearch home."""
    download: bool = False
    """Fetch a torchvision data set that is not under `root` yet."""
    image_size: int | None = Field(default=None, ge=4, le=1024)
    """Side in pixels that images are resized to when decoded; none keeps the data set's own size
    (a folder's is the size of its first image's shorter side)."""
    limit: int | None = Field(default=None, ge=2)
    """Use at most this many training images, drawn evenly from the classes and the same for every trial."""
    validation_fraction: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Share of the training data that is held out, stratified by class, to steer the search. Fixed by
    the data set, not by a trial's seed."""
    normalization: Literal["none", "zscore"] = "none"
    """`none` keeps pixels in [0, 1]; `zscore` subtracts each channel's mean and divides by its standard
    deviation, both taken from the training images."""
    max_unreadable_fraction: Fraction = 0.01
    """A folder with a larger share of unreadable images is refused; fewer are left out and named."""

    @model_validator(mode="after")
    def _folder_has_root(self) -> Self:
        if self.name == "folder" and self.root is None:
            raise ValueError("data.root: name the folder that holds train/<class>/* and test/<class>/*")
        return self


class ViewsConfig(Config):
    """How two views of an image are drawn (SimCLR, Chen et al. 2020, appendix A)."""

    crop_scale_min: float = Field(default=0.2, gt=0.0, le=1.0)
    """Smallest share of the image's area that a crop covers (largest: 1). Aspect ratio 3/4 to 4/3."""
    flip_probability: Fraction = 0.5
    """Probability of a horizontal flip."""
    jitter_strength: float = Field(default=0.5, ge=0.0, le=2.0)
    """s of SimCLR: brightness, contrast and saturation 0.8 s, hue 0.2 s, in random order."""
    jitter_probability: Fraction = 0.8
    """Probability that a view's colours are jittered at all."""
    grayscale_probability: Fraction = 0.2
    """Probability that a view loses its colour."""
    blur_probability: Fraction = 0.0
    """Probability of a Gaussian blur with sigma drawn from U(0.1, 2) and a kernel of a tenth of the image."""


class EncoderConfig(Config):
    """The network whose features are probed."""

    name: EncoderName = "small-resnet"
    """`small-resnet` suits CPUs; the others are torchvision's."""
    width: int = Field(default=16, ge=4, le=256)
    """Channels of `small-resnet`'s first stage; its feature dim is eight times that. Others ignore it."""
    stem: Literal["auto", "cifar", "imagenet"] = "auto"
    """`cifar` is a 3x3 convolution without pooling, `imagenet` 7x7 stride 2 with pooling; `auto` takes
    `cifar` up to 64 pixels. `small-resnet` always has a 3x3 stem."""
    pretrained: bool = False
    """Start from torchvision's ImageNet weights (not for `small-resnet`; needs the ImageNet stem)."""

    @model_validator(mode="after")
    def _pretrained_fits(self) -> Self:
        if self.pretrained and (self.name == "small-resnet" or self.stem != "imagenet"):
            raise ValueError(
                "encoder.pretrained: needs encoder.name = resnet18, resnet34 or resnet50 "
                'and encoder.stem = "imagenet"'
            )
        return self


class MlpHead(Config):
    """Linear layers with an activation between them; SimCLR's head at depth 2."""

    kind: Literal["mlp"] = "mlp"
    """Multi-layer perceptron."""
    depth: int = Field(default=2, ge=2, le=8)
    """Number of linear layers; a head of one layer is kind `linear`."""
    width: Dim = 128
    """Units of each hidden layer (projector width)."""
    activation: Activation = "relu"
    """Between layers, never after the last."""
    batch_norm: bool = False
    """Batch normalisation after each hidden layer, whose bias is then left out."""
    projection_dim: Dim = 64
    """Output size."""


class AutoencoderHead(Config):
    """Linear(features, E), activation, Linear(E, projection dim), the first layer an autoencoder's.

    The autoencoder is shallow and trained on the raw images (Schliebitz et al. 2024; code: simclr-ae,
    models/simclr/utils.py).
    """

    kind: Literal["autoencoder"] = "autoencoder"
    """Head with an autoencoder's embedding layer."""
    embedding_dim: Dim = 128
    """E, the autoencoder's embedding dim."""
    frozen: bool = True
    """Keep the first layer as it was pretrained; false lets it train with the rest."""
    first_layer: Literal["pretrained", "random"] = "pretrained"
    """`random` is the control that the paper lacks: the same layer at random initialisation."""
    activation: Activation = "relu"
    """Between the two layers."""
    projection_dim: Dim = 64
    """Output size."""


class LinearHead(Config):
    """One linear layer with bias."""

    kind: Literal["linear"] = "linear"
    """Linear projection."""
    projection_dim: Dim = 64
    """Output size."""


class NoHead(Config):
    """The loss sees the features themselves; the projection dim is the feature dim."""

    kind: Literal["none"] = "none"
    """No projection head."""


HeadConfig = Annotated[MlpHead | AutoencoderHead | LinearHead | NoHead, Field(discriminator="kind")]


class ObjectiveConfig(Config):
    """The loss on projections."""

    kind: Literal["nt-xent"] = "nt-xent"
    """Normalised temperature-scaled cross entropy, mean over all 2N anchors."""
    temperature: float = Field(default=0.5, gt=0.0, le=100.0)
    """Divides the cosine similarities."""


class OptimizerConfig(Config):
    """How encoder and head are trained."""

    name: Literal["sgd", "lars", "adamw"] = "sgd"
    """SGD with momentum, LARS (You et al. 2017; no adaptation or decay on biases and norms), or AdamW."""
    learning_rate: float = Field(default=0.3, gt=0.0, le=1e4)
    """Per 256 images for `sgd` and `lars` (scaled by batch size / 256); as it stands for `adamw`."""
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Of `sgd` and `lars`."""
    weight_decay: float = Field(default=1e-4, ge=0.0)
    """L2 for `sgd` and `lars`, decoupled for `adamw`; never on biases and norms."""
    warmup_epochs: float = Field(default=0.0, ge=0.0)
    """Linear warm-up from zero, then a cosine to `final_learning_rate_ratio`."""
    final_learning_rate_ratio: Fraction = 0.0
    """Learning rate at the end, as a share of its peak."""


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
    """Linear probe: L2-penalised logistic regression on frozen, standardised features."""

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


class TrainingConfig(Config):
    """Length, batch and arithmetic of pretraining."""

    epochs: int = Field(default=12, ge=0)
    """Passes over the training images. 0 measures the untrained encoder. A study sets it: budget.epochs."""
    batch_size: int = Field(default=256, ge=2)
    """Images a step (two views each). The last, smaller batch of an epoch is dropped."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the encoder and head; losses are always fp32. `auto` is bf16 on GPUs that have it, else fp32, faster
    than bf16 on CPUs without AMX."""
    channels_last: bool = True
    """Memory layout of images and convolutions."""


class TrialConfig(Config):
    """One point of a space at one seed: all that determines a training."""

    data: DataConfig = DataConfig()
    """Images and splits."""
    views: ViewsConfig = ViewsConfig()
    """Augmentation."""
    encoder: EncoderConfig = EncoderConfig()
    """The network that is kept."""
    head: HeadConfig = MlpHead()
    """The projection head, thrown away after pretraining."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """The loss."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and schedule."""
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    """Pretraining of the head's autoencoder, where it has one."""
    probe: ProbeConfig = ProbeConfig()
    """How accuracy is measured."""
    training: TrainingConfig = TrainingConfig()
    """Length and arithmetic."""
    protocol: Protocol = "holdout"
    """What accuracy means. A study sets it."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of weights, shuffles and views. A study sets it: seeds."""

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.training.epochs and self.optimizer.warmup_epochs >= self.training.epochs:
            raise ValueError(
                f"optimizer.warmup_epochs: {self.optimizer.warmup_epochs:g} is not below the "
                f"{self.training.epochs} epochs of the training"
            )
        return self


def set_path(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set ``tree["a"]["b"]`` for the dotted `path` ``a.b``, making the tables on the way."""
    *tables, leaf = path.split(".")
    for table in tables:
        tree = tree.setdefault(table, {})
    tree[leaf] = value


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted paths of all leaves of nested dictionaries. Lists are leaves."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, dict) and value:
            flat |= flatten(value, path)
        else:
            flat[path] = value
    return flat
