"""The shallow autoencoder whose embedding layer becomes a head's first layer, trained once per image set."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headsearch.config import AutoencoderConfig, AutoencoderHead, TrialConfig
from headsearch.core.checkpoint import sync_folder
from headsearch.core.feed import batches
from headsearch.core.images import ImageSet
from headsearch.core.photos import Images, squares
from headsearch.core.randomness import generator, initialisation
from headsearch.errors import StorageError, TrialFailure

logger = logging.getLogger(__name__)

VERSION: Final = 1
"""Counts changes of this module that change the weights; part of the cache key."""
EVALUATION_BATCH: Final = 1024


class Autoencoder(nn.Module):
    """Flattened pixels (B, 3 H W) -> embedding (B, E) -> pixels.

    Linear(3 H W, hidden), ReLU, embedding = Linear(hidden, E) without activation; Linear(E, hidden), ReLU,
    Linear(hidden, 3 H W), sigmoid (Schliebitz et al. 2024, section 3; simclr-ae, models/encoder.py and
    models/decoder.py).
    """

    def __init__(self, pixels: int, hidden: int, embedding_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(pixels, hidden)
        self.embedding = nn.Linear(hidden, embedding_dim)
        self.decoder_hidden = nn.Linear(embedding_dim, hidden)
        self.decoder_output = nn.Linear(hidden, pixels)

    def forward(self, pixels: Tensor) -> Tensor:
        """Reconstruction (B, 3 H W) in (0, 1)."""
        embeddings = self.embedding(F.relu(self.hidden(pixels)))
        return torch.sigmoid(self.decoder_output(F.relu(self.decoder_hidden(embeddings))))


def autoencoder_key(config: TrialConfig, images: ImageSet, hidden_dim: int, device: torch.device) -> str:
    """Hash of all that determines the weights: pixels and split, sizes, the recipe and its code.

    Also the kind of device and its threads, which decide the last bits: a trial must not depend on who
    filled the cache.
    """
    assert isinstance(config.head, AutoencoderHead)  # noqa: S101
    identity = [
        VERSION,
        images.fingerprint,
        images.image_size,
        hidden_dim,
        config.head.embedding_dim,
        config.autoencoder.model_dump(mode="json"),
        device.type,
        torch.get_num_threads() if device.type == "cpu" else None,
        *([images.train_on] if images.trains_on_validation else []),  # the fingerprint is the same
    ]
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()


def pretrained_embedding(
    config: TrialConfig, images: ImageSet, hidden_dim: int, *, device: torch.device, home: Path
) -> tuple[nn.Linear, str]:
    """Return the trained Linear(hidden_dim, E), on the CPU, and its cache key.

    Trained on the un-normalised images of `ImageSet.pretraining` if ``home/cache/autoencoders`` does not hold
    it yet; of several processes that ask at once, one trains and the others wait. Raises StorageError if the
    cache cannot be used and TrialFailure if the training diverges.
    """
    assert isinstance(config.head, AutoencoderHead)  # noqa: S101
    key = autoencoder_key(config, images, hidden_dim, device)
    folder = home / "cache" / "autoencoders"
    layer = nn.Linear(hidden_dim, config.head.embedding_dim, device="meta").to_empty(device="cpu")
    try:
        weights = _read(folder / key, layer)
        if weights is None:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder / f"{key}.lock"):
                weights = _read(folder / key, layer)
                if weights is None:
                    weights = _make(config, images, hidden_dim, device, folder / key)
    except OSError as error:
        raise StorageError(f"autoencoder in {folder}: cannot be kept ({error.strerror})") from error
    layer.load_state_dict(weights)
    return layer, key


def train_autoencoder(
    config: AutoencoderConfig, images: ImageSet, hidden_dim: int, embedding_dim: int, device: torch.device
) -> tuple[Autoencoder, float, int]:
    """Train; return the model at its best validation epoch, that mean squared error, and that epoch.

    Where validation images are trained on, too, that error is a training error.
    """
    train, validation = images.pretraining, images.validation.images
    with initialisation(config.seed, "autoencoder"):
        model = Autoencoder(math.prod(train.images.shape[1:]), hidden_dim, embedding_dim)
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=config.plateau_patience
    )
    best, best_epoch, weights = float("inf"), 0, {}
    for epoch in range(1, config.epochs + 1):
        order = torch.randperm(
            len(train), generator=generator(torch.device("cpu"), config.seed, "autoencoder", epoch)
        )
        for batch, _ in batches(train, order, config.batch_size, device):
            pixels = _pixels(batch)
            loss = F.mse_loss(model(pixels), pixels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        error = _reconstruction_error(model, validation)
        scheduler.step(error)
        if error < best:
            best, best_epoch = error, epoch
            weights = {name: value.clone() for name, value in model.state_dict().items()}
    if not weights:
        raise TrialFailure(
            "non_finite_loss",
            f"autoencoder.learning_rate: {config.learning_rate:g} diverges, no validation loss was finite",
        )
    model.load_state_dict(weights)
    return model, best, best_epoch


@torch.no_grad()
def _reconstruction_error(model: Autoencoder, images: Images) -> float:
    device = model.hidden.weight.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch in images.split(EVALUATION_BATCH):
        pixels = _pixels(batch.to(device))
        total += F.mse_loss(model(pixels), pixels, reduction="sum")
    return float(total / math.prod(images.shape))


def _pixels(images: Images) -> Tensor:
    return squares(images).flatten(1).float() / 255


def _make(
    config: TrialConfig, images: ImageSet, hidden_dim: int, device: torch.device, target: Path
) -> dict[str, Tensor]:
    """Train, then put weights and sidecar at `target` plus suffix, the sidecar last."""
    assert isinstance(config.head, AutoencoderHead)  # noqa: S101
    started = time.monotonic()
    dim = config.head.embedding_dim
    logger.info("training autoencoder %s (embedding dim %d)", target.name, dim)
    model, error, epoch = train_autoencoder(config.autoencoder, images, hidden_dim, dim, device)
    weights = {name: value.cpu() for name, value in model.embedding.state_dict().items()}
    content = safetensors.torch.save(weights)
    facts = {
        "validation_mse": error,
        "best_epoch": epoch,
        "epochs": config.autoencoder.epochs,
        "embedding_dim": dim,
        "hidden_dim": hidden_dim,
        "images": images.fingerprint,
        "device": device.type,
        "seconds": round(time.monotonic() - started, 3),
        "pid": os.getpid(),
        "digest": _digest(content),
    }
    _write(target.with_suffix(".safetensors"), content)
    _write(target.with_suffix(".json"), json.dumps(facts, indent=2).encode())
    return weights


def _read(target: Path, layer: nn.Linear) -> dict[str, Tensor] | None:
    """Weights that fit `layer`, if weights and sidecar are there and whole."""
    try:
        facts = json.loads(target.with_suffix(".json").read_bytes())
        content = target.with_suffix(".safetensors").read_bytes()
        if facts["digest"] == _digest(content):
            weights = safetensors.torch.load(content)
            if {name: w.shape for name, w in weights.items()} == {
                name: w.shape for name, w in layer.state_dict().items()
            }:
                return weights
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, safetensors.SafetensorError):
        pass
    logger.warning("autoencoder %s is damaged and will be trained again", target.with_suffix(".safetensors"))
    return None


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=32).hexdigest()


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Within: no other process is within. The kernel lets go when the holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
