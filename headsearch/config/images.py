"""Images and the views that are drawn of them."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from headsearch.config.part import Config, Fraction
from headsearch.recipes import has_another_side

DatasetName = Literal[
    "digits", "cifar10", "cifar100", "stl10", "fashion-mnist", "imagenette", "fgvc-aircraft", "folder"
]
TrainOn = Literal["training", "training+validation"]
Normalization = Literal["none", "zscore", "zscore-schliebitz2024", "imagenet", "solo-learn"]


class DataConfig(Config):
    """Which images, at which size, and how they are split."""

    name: DatasetName = "digits"
    """`digits` needs no download; `folder` reads `train/<class>/**` and `test/<class>/**` under `root`, and
    `unlabelled/**` beside `train` or in place of it."""
    root: str | None = None
    """Folder that holds the data. A relative path is looked up under $HEADSEARCH_DATA, else under the
    working directory. Without one, torchvision's data sets are kept in the headsearch home."""
    classes: Literal["all", "imagenet-100"] = "all"
    """Class folders of `folder` that are used: `imagenet-100` takes that list's 100 (Tian et al. 2020) out of
    ImageNet's 1,000, whose `val` may stand for `test`."""
    download: bool = False
    """Fetch a torchvision data set that is not under `root` yet."""
    image_size: int | None = Field(default=None, ge=4, le=1024)
    """Side in pixels of views and plain images; none takes the data set's own size (a folder's is its first
    image's shorter side). Views are cropped from the stored image and then resized."""
    resize_first: bool = False
    """For small square images (cifar10, stl10, ...) at another size than they are stored at: resize them when
    they are decoded, and crop views from those. No source does so; studies of editions 1 and 2 do."""
    stored_side: int = Field(default=512, ge=16, le=4096)
    """Photos (a folder's, imagenette, fgvc-aircraft) are kept whole, in their own proportions, with a shorter
    side of at most this. What is larger is shrunk, and crops of less than `image_size` of it are blurred."""
    resize: Literal["crop", "squeeze"] = "crop"
    """What a photo becomes where it is not cropped at random, as for probes: `crop` its centre, `squeeze` all
    of it, its proportions lost (Schliebitz et al. 2024)."""
    center_share: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of a photo's shorter side that its centre has: 1 for torchvision's Resize(S) and CenterCrop(S),
    0.875 for Resize(256) and CenterCrop(224)."""
    limit: int | None = Field(default=None, ge=2)
    """Use at most this many training images, drawn evenly from the classes and the same for every trial, and
    at most as many unlabelled ones."""
    unlabelled: bool = True
    """Pretrain on images without labels, too, where the data set has them (stl10's 100,000, a folder's
    `unlabelled/**`). Probes use labelled ones only."""
    validation_fraction: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Share of the training data that is held out, stratified by class, to steer the search. Fixed by
    the data set, not by a trial's seed."""
    train_on: TrainOn = "training"
    """Images that encoder and final probe are trained on. `training+validation` adds the held-out images, as
    papers do that train on the whole training data: the training split, after `limit`, and the validation
    split together. Accuracy on validation images is then no estimate of accuracy on new ones, so that nothing
    may be chosen by it: only for mode 'grid' or 'points', without budget.rungs. The L2 penalty of protocol
    `holdout` is still chosen by a probe that was fitted on the training split alone; the probe is then fitted
    again, with that penalty, on both splits, and the test split is scored once. `headsearch study confirm
    --all-images` makes such a study of a front."""
    normalization: Normalization = "none"
    """`none` keeps pixels in [0, 1]; `zscore` subtracts each channel's mean and divides by its standard
    deviation, both taken from the training images; `zscore-schliebitz2024` takes means over images of each
    image's own two figures, validation images included, as that paper does; `imagenet` has ImageNet's
    constants (lightly); `solo-learn` has that library's constants for CIFAR and STL-10, else ImageNet's."""
    max_unreadable_fraction: Fraction = 0.01
    """A folder with a larger share of unreadable images is refused; fewer are left out and named."""

    @property
    def trains_on_validation(self) -> bool:
        """Whether validation images are trained on, too."""
        return self.train_on == "training+validation"

    @model_serializer(mode="wrap")
    def _as_before_train_on(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave `train_on` out where it is the default.

        Checkpoints and the images of a study are found by a hash of the configuration: those of before this
        field was there must be found still.
        """
        tree: dict[str, Any] = handler(self)
        if self.train_on == "training":
            tree.pop("train_on", None)
        return tree

    @model_validator(mode="after")
    def _folder_has_root(self) -> Self:
        if self.name == "folder" and self.root is None:
            raise ValueError("data.root: name the folder that holds train/<class>/* and test/<class>/*")
        if self.name != "folder" and self.classes != "all":
            raise ValueError(f"data.classes: {self.classes!r} is for data.name = 'folder'")
        return self

    @property
    def has_another_side(self) -> bool:
        """Whether the images are stored as squares of one side and are asked for at another."""
        return has_another_side(self.name, self.image_size)


class ViewsConfig(Config):
    """How two views of an image are drawn (SimCLR, Chen et al. 2020, appendix A)."""

    crop_scale_min: float = Field(default=0.2, gt=0.0, le=1.0)
    """Smallest share of the image's area that a crop covers (largest: 1). Aspect ratio 3/4 to 4/3."""
    flip_probability: Fraction = 0.5
    """Probability of a horizontal flip."""
    jitter_strength: float = Field(default=0.5, ge=0.0, le=2.0)
    """s of SimCLR: multiplies the four ranges below."""
    brightness: float = Field(default=0.8, ge=0.0, le=2.0)
    """Factors are drawn from 1 - b to 1 + b, where b is this times `jitter_strength`."""
    contrast: float = Field(default=0.8, ge=0.0, le=2.0)
    """Likewise."""
    saturation: float = Field(default=0.8, ge=0.0, le=2.0)
    """Likewise; solo-learn's Barlow Twins has half of the others'."""
    hue: float = Field(default=0.2, ge=0.0, le=0.5)
    """Turns of the colour wheel, up to this times `jitter_strength` to either side. The four operations
    come in random order."""
    jitter_probability: Fraction = 0.8
    """Probability that a view's colours are jittered at all."""
    grayscale_probability: Fraction = 0.2
    """Probability that a view loses its colour."""
    blur_probability: Fraction = 0.0
    """Probability of a Gaussian blur with sigma drawn from U(0.1, 2)."""
    blur_kernel: Literal["tenth", "pil"] = "tenth"
    """`tenth`: as many taps as a tenth of the image (google-research/simclr, simclr-ae), 3 at 32 pixels: they
    blur by a sigma of 0.8 at most; edges reflected. `pil`: Pillow's GaussianBlur (solo-learn, lightly), three
    extended box filters of the whole sigma; edges repeated."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How crops are resampled. `bicubic` is Pillow's and torchvision's (a = -0.5), clipped to [0, 1]."""
    solarize_probability: Fraction = 0.0
    """Probability that pixels of at least half the brightness are inverted."""
    second_blur_probability: Fraction | None = None
    """`blur_probability` of the second view; none: that of the first."""
    second_solarize_probability: Fraction | None = None
    """`solarize_probability` of the second view; none: that of the first."""
