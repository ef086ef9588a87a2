"""Encoder, head and what trains them: everything of a training that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from headsearch.config import AlternatingScheme, AutoencoderHead, TrialConfig
from headsearch.core.autoencoder import pretrained_embedding
from headsearch.core.compiling import CompiledEncoder
from headsearch.core.encoders import build_encoder
from headsearch.core.heads import build_head
from headsearch.core.images import ImageSet
from headsearch.core.optimizers import build_optimizer, load_state, state_of
from headsearch.core.randomness import initialisation

if TYPE_CHECKING:
    from headsearch.core.graphs import GraphedStep


@dataclass
class Learner:
    """The networks of one trial with their optimizers."""

    config: TrialConfig
    encoder: nn.Module
    encode: Callable[[Tensor], Tensor]
    """The encoder as training calls it: itself, or compiled."""
    head: nn.Module
    embedding: nn.Linear | None
    """Of the head's autoencoder, kept for a head that is drawn anew."""
    autoencoder: str | None
    """Its cache key."""
    online: nn.Linear | None
    """Probe that is trained along on detached features; only protocol `ouyang2025` has one."""
    optimizer: Optimizer
    """Of the encoder and the online probe, and of the head in the joint scheme."""
    head_optimizer: Optimizer | None
    """Of the head in the alternating scheme."""
    graphed: GraphedStep | None = None
    """The step as a CUDA graph, once one was made."""
    partly_labelled: bool = False
    """Some of the images that it is trained on have no label (-1)."""

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.encoder.parameters()).device

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        networks = {name: network.state_dict() for name, network in self._networks().items()}
        return networks | {name: state_of(one) for name, one in self._optimizers().items()}

    def load(self, state: dict[str, Any]) -> None:
        """Take up a state of the same configuration."""
        for name, network in self._networks().items():
            network.load_state_dict(state[name])
        for name, optimizer in self._optimizers().items():
            load_state(optimizer, state[name])

    def _networks(self) -> dict[str, nn.Module]:
        networks = {"encoder": self.encoder, "head": self.head, "online": self.online}
        return {name: network for name, network in networks.items() if network is not None}

    def _optimizers(self) -> dict[str, Optimizer]:
        optimizers = {"optimizer": self.optimizer, "head_optimizer": self.head_optimizer}
        return {name: one for name, one in optimizers.items() if one is not None}

    def redraw_head(self, times: int) -> None:
        """Initialise the head for the `times`-th time, in place, and forget its optimizer's momenta."""
        with initialisation(self.config.seed, "head", times):
            fresh = build_head(self.config.head, feature_dim_of(self.encoder), self.embedding)
        self.head.load_state_dict(fresh.state_dict())
        if self.head_optimizer is not None:
            self.head_optimizer.state.clear()


def feature_dim_of(encoder: nn.Module) -> int:
    """Count the features of a built encoder."""
    return int(encoder.feature_dim)  # type: ignore[arg-type]


def build_learner(config: TrialConfig, images: ImageSet, device: torch.device, home: Path) -> Learner:
    """Build encoder and head on `device`, initialised from the seed, and their optimizers.

    Drawn on the CPU, each from its own stream: the same weights on every device, and the same encoder
    whatever the head is. A pretrained autoencoder comes from the cache in `home`.
    """
    with initialisation(config.seed, "encoder"):
        encoder = build_encoder(config.encoder, images.image_size)
    embedding, key = None, None
    if isinstance(config.head, AutoencoderHead) and config.head.first_layer == "pretrained":
        embedding, key = pretrained_embedding(config, images, encoder.feature_dim, device=device, home=home)
    with initialisation(config.seed, "head"):
        head = build_head(config.head, encoder.feature_dim, embedding)
    online = None
    if config.protocol == "ouyang2025":
        with initialisation(config.seed, "online probe"):
            online = nn.Linear(encoder.feature_dim, len(images.classes)).to(device)
    layout = torch.channels_last if config.training.channels_last else torch.contiguous_format
    encoder, head = encoder.to(device).to(memory_format=layout), head.to(device)

    scheme, probe = config.scheme, (online, config.probe) if online else None
    head_optimizer = None
    if isinstance(scheme, AlternatingScheme):
        optimizer = build_optimizer(config.optimizer, encoder, online=probe)
        head_optimizer = build_optimizer(scheme.head_optimizer or config.optimizer, head)
    else:
        optimizer = build_optimizer(config.optimizer, encoder, head, online=probe)
    mode = config.training.compile_encoder
    encode = encoder if mode == "off" else CompiledEncoder(encoder, mode)
    return Learner(
        config,
        encoder,
        encode,
        head,
        embedding,
        key,
        online,
        optimizer,
        head_optimizer,
        partly_labelled=images.unlabelled > 0,
    )
