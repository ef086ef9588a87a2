"""Encoders: images (B, 3, H, W) in, pooled features (B, feature_dim) out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from torch import Tensor, nn
from torch.nn import functional as F

from headsearch.config import EncoderConfig
from headsearch.errors import StorageError

FEATURE_DIMS: Final = {"resnet18": 512, "resnet34": 512, "resnet50": 2048}
CIFAR_STEM_PIXELS: Final = 64
SMALL_STRIDE_PIXELS: Final = 32
TRUNCATION: Final = 1 / 0.87962566103423978
"""One over the deviation of a standard normal that is cut at 2, by which TensorFlow corrects."""


def _torch_default_(weight: Tensor) -> None:
    """Draw a convolution's weights as torch.nn.Conv2d does."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


def _fan_in_truncated_(weight: Tensor) -> None:
    """Draw weights as TensorFlow's variance_scaling_initializer does: variance 1 / fan-in, cut at 2 sigma."""
    deviation = TRUNCATION / math.sqrt(weight[0].numel())
    nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation)


REDRAWN: Final[dict[str, Callable[[Tensor], None]]] = {
    "torch": _torch_default_,
    "fan-in-truncated": _fan_in_truncated_,
}
"""Initialisations that are drawn after torchvision's own."""


class Encoder(nn.Module):
    """A network that ends at its pooled features, and how many there are."""

    def __init__(self, network: nn.Module, feature_dim: int) -> None:
        super().__init__()
        self.network = network
        self.feature_dim = feature_dim

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, feature_dim) of images (B, 3, H, W)."""
        features: Tensor = self.network(images)
        return features


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016, section 3.3).

    (B, C, H, W) -> (B, D, H / stride, W / stride); a 1x1 projection shortcut where the shape changes.
    """

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """ReLU of the residual sum."""
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x), inplace=True)


def small_resnet(width: int, image_size: int) -> nn.Sequential:
    """Build a ResNet for CPUs: 3x3 stem, four stages of one block with w, 2w, 4w, 8w channels, mean pool.

    Stages after the first halve the side. From 32 pixels the stem halves it too: the stem's resolution is
    where the time goes (one core of a 2023 server, width 16, 32 pixels, forward and backward: 3,000 views/s
    with stride 2 against 600 with stride 1).
    """
    stride = 2 if image_size >= SMALL_STRIDE_PIXELS else 1
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        BasicBlock(width, width, stride=1),
    ]
    layers += [BasicBlock(width << stage, width << (stage + 1), stride=2) for stage in range(3)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def feature_dim(config: EncoderConfig) -> int:
    """Count the features of the encoder of `config`."""
    return 8 * config.width if config.name == "small-resnet" else FEATURE_DIMS[config.name]


def build_encoder(config: EncoderConfig, image_size: int) -> Encoder:
    """Build the encoder of `config` for square images of `image_size` pixels, on the CPU, in fp32.

    Weights come from the default generator (see `randomness.initialisation`), drawn as
    `config.initialisation` says, or from ImageNet. The ``cifar``
    stem is SimCLR's for small images: a 3x3 convolution of stride 1 and no pooling (Chen et al. 2020,
    appendix B.9); ``cifar-pad2`` pads by 2 (solo-learn, backbones/resnet). Raises StorageError if the
    ImageNet weights cannot be fetched.
    """
    if config.name == "small-resnet":
        return Encoder(small_resnet(config.width, image_size), feature_dim(config))
    import torchvision.models  # seconds, which small-resnet need not wait for

    build = getattr(torchvision.models, config.name)
    try:
        network = build(weights="DEFAULT" if config.pretrained else None, progress=False)
    except (OSError, RuntimeError) as error:  # RuntimeError: a download whose hash is wrong
        reason = str(error).strip() or type(error).__name__
        raise StorageError(
            f"encoder.pretrained: torchvision's ImageNet weights of {config.name} could not be fetched "
            f"({reason.splitlines()[0]}); put them into $TORCH_HOME/hub/checkpoints or set it to false"
        ) from error
    small = config.stem == "auto" and image_size <= CIFAR_STEM_PIXELS
    if small or config.stem in ("cifar", "cifar-pad2"):
        network.conv1 = nn.Conv2d(3, 64, 3, padding=2 if config.stem == "cifar-pad2" else 1, bias=False)
        if config.initialisation != "fan-out-but-stem":
            nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    network.fc = nn.Identity()
    if config.first_shortcut == "projection" and network.layer1[0].downsample is None:
        projection = nn.Conv2d(64, 64, 1, bias=False)
        nn.init.kaiming_normal_(projection.weight, mode="fan_out", nonlinearity="relu")
        network.layer1[0].downsample = nn.Sequential(projection, nn.BatchNorm2d(64))
    if config.initialisation in REDRAWN:
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                REDRAWN[config.initialisation](module.weight)
    if config.zero_last_norm:
        for block in (block for stage in range(1, 5) for block in getattr(network, f"layer{stage}")):
            nn.init.zeros_((block.bn3 if hasattr(block, "bn3") else block.bn2).weight)
    return Encoder(network, feature_dim(config))
