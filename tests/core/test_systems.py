"""Every named system: built at three widths, its size by hand, what learns and what stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from networks import CPU, finish, start, tiny_images
from torch import nn

from headsearch.config import TrialConfig
from headsearch.core.heads import build_head, describe_head
from headsearch.core.learner import Learner, build_learner
from headsearch.recipes import RECIPES
from headsearch.systems import SYSTEMS

IMAGES = tiny_images()
WIDTHS = (4, 8, 16)
SMALL_LATENTS = 300
# Written from the papers' descriptions: weights and biases of each layer for F features. `L` stands for the
# latents of a sparse head, which tests make smaller.
EMBEDDED = "F*128 + 128 + 128*128 + 128"
PARAMETERS = {
    "none": "0",
    "linear": "F*128 + 128",
    "simclr": "F*F + F + F*128 + 128",
    "google-research-2": "F*F + 2*F + F*128 + 128",
    "google-research-3": "2*(F*F + 2*F) + F*128 + 128",
    "solo-learn": "F*2048 + 2048 + 2048*256 + 256",
    "lightly": "F*F + 2*F + F*128 + 2*128",
    "barlow-twins": "F*2048 + 2*2048 + 2048*2048 + 2*2048 + 2048*2048 + 2048",
    "schliebitz2024-mlp": "F*512 + 512 + 512*128 + 128",
    "schliebitz2024-frozen": EMBEDDED,
    "schliebitz2024-trainable": EMBEDDED,
    "random-frozen-layer": EMBEDDED,
    "narrow": "F*16 + 16 + 16*128 + 128",
    "dropout": "F*F + F + F*128 + 128",
    "gupta2022-frozen-head": "F*F + F + F*128 + 128",
    "gupta2022-alternating": "F*F + F + F*128 + 128",
    "gupta2022-alternating-fresh": "F*F + F + F*128 + 128",
    "gupta2022-joint-matched": "F*F + F + F*128 + 128",
    "xue2024-reweight": "0",
    "ouyang2025-simclr": "F*2048 + 2048 + 2048*256 + 256",
    "ouyang2025-simclr-regularised": "F*2048 + 2048 + 2048*256 + 256",
    "ouyang2025-simclr-discretised": "F*2048 + 2048 + 2048*256 + 256",
    "ouyang2025-simclr-sparse": "2*F*L + L + 2*F",
    "ouyang2025-barlow-regularised": "F*2048 + 2*2048 + 2048*2048 + 2*2048 + 2048*2048 + 2048",
    "ouyang2025-barlow-discretised": "F*2048 + 2*2048 + 2048*2048 + 2*2048 + 2048*2048 + 2048",
    "ouyang2025-barlow-sparse": "F*2048 + 2048 + 2*2048 + 2*2048*L + L + 2*2048",
}
OUTPUT = {
    "none": "F", "xue2024-reweight": "F", "ouyang2025-simclr-sparse": "F", "ouyang2025-barlow-sparse": "2048",
    "solo-learn": "256", "ouyang2025-simclr": "256", "ouyang2025-simclr-regularised": "256",
    "ouyang2025-simclr-discretised": "256", "barlow-twins": "2048", "ouyang2025-barlow-regularised": "2048",
    "ouyang2025-barlow-discretised": "2048",
}  # fmt: skip
FROZEN = {"gupta2022-frozen-head": {"0", "2"}, "schliebitz2024-frozen": {"0"}, "random-frozen-layer": {"0"}}
"""Layers by their place in the head."""


def of_system(name: str, width: int, **parts: Any) -> TrialConfig:
    tree: dict[str, Any] = {
        "system": name,
        "encoder": {"width": width},
        "optimizer": {"learning_rate": 0.1},
        "autoencoder": {"epochs": 1, "batch_size": 32},
        "probe": {"report_images": 32, "report_iterations": 3},
        "training": {"epochs": 1, "batch_size": 32},
    }
    if SYSTEMS[name].tree["head"]["kind"] == "sparse":
        tree["head"] = {"latents": SMALL_LATENTS, "k": 30}
    return TrialConfig.model_validate(tree | parts)


def by_hand(formula: str, features: int, latents: int = SMALL_LATENTS) -> int:
    return int(eval(formula, {"F": features, "L": latents}))


def weights_of(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in learner.head.named_parameters()}


def test_every_system_is_listed_here() -> None:
    assert PARAMETERS.keys() == SYSTEMS.keys()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", SYSTEMS)
def test_shape_and_size(name: str, width: int) -> None:
    config = of_system(name, width)
    features = 8 * width
    head = build_head(config.head, features, nn.Linear(features, 128))
    assert sum(parameter.numel() for parameter in head.parameters()) == by_hand(PARAMETERS[name], features)
    facts = describe_head(config)
    assert facts.head_parameters == by_hand(PARAMETERS[name], features)
    projections = head(torch.randn(6, features))
    assert projections.shape == (6, by_hand(OUTPUT.get(name, "128"), features))
    assert facts.projection_dim == projections.shape[1]


@pytest.mark.parametrize("name", SYSTEMS)
def test_full_size_needs_no_memory(name: str) -> None:
    """As `headsearch heads` shows it, the paper's 100,000 latents included."""
    facts = describe_head(TrialConfig.model_validate({"system": name, "encoder": {"name": "resnet18"}}))
    assert facts.head_parameters == by_hand(PARAMETERS[name], 512, 100_000)


@pytest.mark.parametrize("name", SYSTEMS)
def test_what_must_learn_learns_and_what_is_frozen_stays(name: str, tmp_path: Path) -> None:
    config = of_system(name, 4)
    before = build_learner(config, IMAGES, CPU, tmp_path)
    head, encoder = weights_of(before), next(iter(before.encoder.parameters())).detach().clone()
    reports, trained = finish(start(config, IMAGES, tmp_path))
    assert len(reports) == 1
    assert not torch.equal(next(iter(trained.encoder.parameters())), encoder)
    for path, parameter in trained.head.named_parameters():
        frozen = path.split(".")[0] in FROZEN.get(name, set())
        assert parameter.requires_grad is not frozen, path
        assert torch.equal(parameter, head[path]) is frozen, path


@pytest.mark.parametrize("name", SYSTEMS)
def test_saved_and_loaded_it_is_the_same(name: str, tmp_path: Path) -> None:
    config = of_system(name, 4)
    _, trained = finish(start(config, IMAGES, tmp_path))
    torch.save(trained.head.state_dict(), tmp_path / "head.pt")
    again = build_head(config.head, 32, nn.Linear(32, 128))
    again.load_state_dict(torch.load(tmp_path / "head.pt", weights_only=True))
    features = torch.randn(5, 32)
    assert torch.equal(again.eval()(features), trained.head.eval()(features))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_pin_what_differs_between_libraries(name: str) -> None:
    tree = RECIPES[name].tree
    assert {"crop_scale_min", "jitter_strength", "blur_probability"} <= tree["views"].keys()
    assert {"kind", "scale"} & tree["objective"].keys()
    assert {"name", "learning_rate", "weight_decay"} <= tree["optimizer"].keys()
    assert tree["head"]["kind"] == "mlp"
    assert tree["training"]["batch_size"] > 1
    config = TrialConfig.model_validate({"recipe": name, "training": {"epochs": RECIPES[name].epochs}})
    assert TrialConfig.model_validate(config.model_dump(mode="json")) == config


# (learning rate, batch, warm-up, temperature, loss scale, jitter, blur), from SEEDS of each library and paper.
PUBLISHED = {
    "schliebitz2024": (0.3, 1280, 0, 0.5, 1, 1.0, 0.5),
    "ouyang2025-simclr-cifar": (0.4, 256, 10, 0.2, 1, 1.0, 0.5),
    "ouyang2025-simclr-imagenet100": (0.3, 256, 10, 0.2, 1, 1.0, 0.5),
    "google-research-cifar10": (1.0, 512, 10, 0.5, 2, 0.5, 0.0),
    "solo-learn-cifar": (0.4, 256, 10, 0.2, 1, 1.0, 0.5),
    "lightly-cifar10": (0.12, 128, 0, 0.5, 1, 0.5, 0.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_are_the_published_ones(name: str) -> None:
    config = TrialConfig.model_validate({"recipe": name, "training": {"epochs": 200}})
    objective, views = config.objective, config.views
    assert (
        config.optimizer.learning_rate, config.training.batch_size, config.optimizer.warmup_epochs,
        objective.temperature, objective.scale, views.jitter_strength, views.blur_probability,
    ) == PUBLISHED[name]  # fmt: skip


def test_barlow_recipe_is_solo_learns() -> None:
    config = TrialConfig.model_validate({"recipe": "ouyang2025-barlow-cifar", "training": {"epochs": 200}})
    views, strength = config.views, config.views.jitter_strength
    jitter = [strength * part for part in (views.brightness, views.contrast, views.saturation, views.hue)]
    assert jitter == [0.4, 0.4, 0.2, 0.1]
    assert (views.blur_probability, views.solarize_probability, views.second_solarize_probability) == (
        0,
        0,
        0.2,
    )
    assert (config.objective.redundancy_weight, config.objective.scale) == (0.0051, 0.1)
    assert (config.optimizer.trust_coefficient, config.optimizer.clip) == (0.02, True)
    assert config.probe.online_learning_rate == 0.15
