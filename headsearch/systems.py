"""Heads with their objectives and schemes by name, from papers and libraries.

A system is what is compared under one recipe and one protocol; what is around it is in `recipes`. Sources:
Chen et al. 2020, Zbontar et al. 2021, Gupta et al. 2022, Schliebitz et al. 2024 (simclr-ae), Xue et al. 2024,
Ouyang et al. 2025 (Projector_Theory), google-research/simclr, solo-learn, lightly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Tree = dict[str, Any]


@dataclass(frozen=True)
class System:
    """A named head, objective and scheme."""

    source: str
    """Paper or library."""
    what: str
    """In a few words, with what is ours."""
    tree: Tree
    """Part of a trial's configuration."""


_SCHLIEBITZ, _GUPTA, _OUYANG = "Schliebitz et al. 2024", "Gupta et al. 2022", "Ouyang et al. 2025"
_SIMCLR_HEAD: Tree = {"kind": "mlp", "depth": 2, "width": 2048, "projection_dim": 256}
_BARLOW_HEAD: Tree = {"kind": "mlp", "depth": 3, "width": 2048, "batch_norm": True, "projection_dim": 2048}
_CONTRASTIVE: Tree = {"kind": "nt-xent", "temperature": 0.2}
_BARLOW: Tree = {"kind": "barlow-twins", "redundancy_weight": 0.0051, "scale": 0.1}
_PENALTY: Tree = {"bottleneck_weight": 1e-4}
_SPARSE: Tree = {"kind": "sparse", "latents": 100_000}
_AE: Tree = {"kind": "autoencoder", "embedding_dim": 128, "projection_dim": 128}
_GOOGLE: Tree = {
    "kind": "mlp",
    "width": "features",
    "batch_norm": True,
    "output_norm": "batch_norm_no_offset",
    "weight_std": 0.01,
    "projection_dim": 128,
}
LIGHTLY_HEAD: Tree = {
    "kind": "mlp",
    "width": "features",
    "batch_norm": True,
    "output_norm": "batch_norm",
    "projection_dim": 128,
}
_PLAIN: Tree = {"kind": "mlp", "width": "features", "projection_dim": 128}


def _alternating(**fields: Any) -> Tree:
    return {"head": _PLAIN, "scheme": {"kind": "alternating", **fields}}


SYSTEMS: Mapping[str, System] = {
    "none": System("Chen et al. 2020", "no head", {"head": {"kind": "none"}}),
    "linear": System(
        "Chen et al. 2020", "one linear layer", {"head": {"kind": "linear", "projection_dim": 128}}
    ),
    "simclr": System("Chen et al. 2020", "two layers, hidden width that of the features", {"head": _PLAIN}),
    "google-research-2": System(
        "google-research/simclr",
        "two layers, batch norm, also at the output",
        {"head": {**_GOOGLE, "depth": 2}},
    ),
    "google-research-3": System(
        "google-research/simclr", "three layers, as SimCLRv2", {"head": {**_GOOGLE, "depth": 3}}
    ),
    "solo-learn": System("solo-learn", "two layers without batch norm", {"head": _SIMCLR_HEAD}),
    "lightly": System("lightly", "two layers, batch norm after each", {"head": LIGHTLY_HEAD}),
    "barlow-twins": System(
        "Zbontar et al. 2021",
        "three layers with batch norm, as solo-learn on CIFAR",
        {"head": _BARLOW_HEAD, "objective": _BARLOW},
    ),
    "schliebitz2024-mlp": System(
        _SCHLIEBITZ, "its default head: E = 512, ReLU", {"head": {**_PLAIN, "width": 512}}
    ),
    "schliebitz2024-frozen": System(
        _SCHLIEBITZ,
        "autoencoder's embedding, frozen; its best head on CIFAR-10",
        {"head": {**_AE, "frozen": True, "activation": "tanh"}},
    ),
    "schliebitz2024-trainable": System(
        _SCHLIEBITZ,
        "autoencoder's embedding, trained on; its ablation",
        {"head": {**_AE, "frozen": False, "activation": "sigmoid"}},
    ),
    "random-frozen-layer": System(
        "ours, control",
        "the frozen head with a random first layer",
        {"head": {**_AE, "frozen": True, "activation": "tanh", "first_layer": "random"}},
    ),
    "narrow": System("ours, control", "two layers, 16 hidden units", {"head": {**_PLAIN, "width": 16}}),
    "dropout": System(
        "ours, control", "two layers, half of the hidden units dropped", {"head": {**_PLAIN, "dropout": 0.5}}
    ),
    "gupta2022-frozen-head": System(
        _GUPTA, "random head that is never trained", {"head": {**_PLAIN, "frozen": True}}
    ),
    "gupta2022-alternating": System(
        _GUPTA, "our reconstruction: one head step, then one of the encoder", _alternating(head_steps=1)
    ),
    "gupta2022-alternating-fresh": System(
        _GUPTA,
        "our reconstruction: each step on a batch of its own",
        _alternating(head_steps=1, batches="fresh"),
    ),
    "gupta2022-joint-matched": System(
        _GUPTA,
        "control: both in two steps on each batch",
        {"head": _PLAIN, "scheme": {"kind": "joint", "steps_per_batch": 2}},
    ),
    "xue2024-reweight": System("Xue et al. 2024", "fixed weights kappa^-i", {"head": {"kind": "reweight"}}),
    "ouyang2025-simclr": System(
        _OUYANG, "its SimCLR baseline", {"head": _SIMCLR_HEAD, "objective": _CONTRASTIVE}
    ),
    "ouyang2025-simclr-regularised": System(
        _OUYANG,
        "+ mutual-information penalty",
        {"head": _SIMCLR_HEAD, "objective": {**_CONTRASTIVE, **_PENALTY}},
    ),
    "ouyang2025-simclr-discretised": System(
        _OUYANG,
        "+ projections in 30 levels",
        {"head": {**_SIMCLR_HEAD, "levels": 30}, "objective": _CONTRASTIVE},
    ),
    "ouyang2025-simclr-sparse": System(
        _OUYANG,
        "top-k autoencoder as head, k = 0.001 d",
        {"head": {**_SPARSE, "k": 100}, "objective": _CONTRASTIVE},
    ),
    "ouyang2025-barlow-regularised": System(
        _OUYANG,
        "Barlow Twins + mutual-information penalty",
        {"head": _BARLOW_HEAD, "objective": {**_BARLOW, **_PENALTY}},
    ),
    "ouyang2025-barlow-discretised": System(
        _OUYANG,
        "Barlow Twins, projections in 3 levels",
        {"head": {**_BARLOW_HEAD, "levels": 3}, "objective": _BARLOW},
    ),
    "ouyang2025-barlow-sparse": System(
        _OUYANG,
        "Barlow Twins, first block, then the top-k autoencoder, k = 0.2 d",
        {"head": {**_SPARSE, "k": 20_000, "block_width": 2048}, "objective": _BARLOW},
    ),
}
