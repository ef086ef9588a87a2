"""Recipes by name, and how names become parts of a trial's configuration.

A recipe is everything around a head as its authors have it: views, encoder, loss scale, temperature,
optimizer, batch, and their own head. Libraries differ in loss scale, batch norm in the head, temperature,
jitter strength and blur, so that every recipe of theirs pins all five; in whether both views share a batch;
and in what surrounds them: pixels, crops, initialisation, LARS. studies/README.md has every field beside its
source's, with the differences that stay.

In a configuration the recipe comes first, the system over it, and what is given beside them over both. A
table of another ``kind`` replaces one whole.

Recipes were mended twice. Studies from before are of edition 1 or 2, and mean what they meant. In edition 3
solo-learn's recipes have another start of the online probe's warm-up, and small square images at another size
than they are stored at are cropped before they are resized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from headsearch.fields import guess
from headsearch.systems import LIGHTLY_HEAD, SYSTEMS, Tree

EDITION: Final = 3
"""Of what stands here."""
STORED_SIDES: Final = {"digits": 8, "cifar10": 32, "cifar100": 32, "stl10": 96, "fashion-mnist": 28}
"""Side in pixels of the images of data sets that are stored as one array."""
KIND_DEFAULTS: Final = {"head": "mlp", "objective": "nt-xent", "scheme": "joint"}
"""Kinds of tables that come in several, where none is given."""


@dataclass(frozen=True)
class Recipe:
    """A published way of pretraining."""

    source: str
    epochs: int
    """What its authors train; a study's budget decides."""
    what: str
    tree: Tree


_FULL_VIEWS: Tree = {
    "crop_scale_min": 0.08,
    "flip_probability": 0.5,
    "jitter_strength": 1.0,
    "jitter_probability": 0.8,
    "grayscale_probability": 0.2,
    "blur_probability": 0.5,
}
_PIL: Tree = {"blur_kernel": "pil", "interpolation": "bicubic"}
_HALF_VIEWS: Tree = {**_FULL_VIEWS, "jitter_strength": 0.5, "blur_probability": 0.0}
_BARLOW_VIEWS: Tree = {**_HALF_VIEWS, "saturation": 0.4}
_SOLO_LARS: Tree = {
    "name": "lars",
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "lars_form": "solo-learn",
    "trust_coefficient": 0.02,
    "clip": True,
    "warmup_epochs": 10,
    "warmup_peak": "last_step",
    "warmup_start": 3e-5,
    "final_learning_rate_ratio": 0.0,
}


_CIFAR_PROBE: Tree = {
    "offline": "lars",
    "offline_learning_rate": 0.3,
    "offline_batch_size": 256,
    "offline_epochs": 50,
}
_IMAGENET_PROBE: Tree = {"offline": "sgd", "offline_epochs": 100}


def _solo(rate: float, views: Tree, system: str, *, batch: int, probe: Tree, stem: str, **head: Any) -> Tree:
    tree = SYSTEMS[system].tree
    # solo-learn puts a convolution of torch's own initialisation into torchvision's network
    initialisation = "fan-out" if stem == "imagenet" else "fan-out-but-stem"
    return {
        "data": {"normalization": "solo-learn"},
        "views": {**views, **_PIL},
        "encoder": {"name": "resnet18", "stem": stem, "initialisation": initialisation},
        "head": {**tree["head"], **head},
        "objective": tree["objective"],
        "optimizer": {**_SOLO_LARS, "learning_rate": rate},
        "training": {"batch_size": batch, "encode_views": "apart"},
        "probe": {"online_warmup_start": "same", **probe},
    }


RECIPES: Mapping[str, Recipe] = {
    "schliebitz2024": Recipe(
        "Schliebitz et al. 2024",
        150,
        "ResNet-34 from ImageNet weights, SGD; batch 1280 on CIFAR, 500 STL-10, 666 Aircraft, 392 Imagenette",
        {
            "views": _FULL_VIEWS,
            "encoder": {"name": "resnet34", "stem": "imagenet", "pretrained": True},
            "head": SYSTEMS["schliebitz2024-mlp"].tree["head"],
            "objective": {"kind": "nt-xent", "temperature": 0.5, "scale": 1.0},
            "optimizer": {
                "name": "sgd",
                "learning_rate": 0.3,
                "momentum": 0.9,
                "weight_decay": 1e-5,
                "decay_all": True,
                "warmup_epochs": 0.0,
                "final_learning_rate_ratio": 0.02,
                "schedule": "epoch",
            },
            "training": {
                "batch_size": 1280,
                "encode_views": "apart",
                "precision": "fp32",
                "keep": "best_validation_loss",
            },
        },
    ),
    "ouyang2025-simclr-cifar": Recipe(
        "Ouyang et al. 2025",
        200,
        "ResNet-18, LARS with clipping; solo-learn's recipe, which has 1,000 epochs",
        _solo(
            0.4,
            _FULL_VIEWS,
            "ouyang2025-simclr",
            batch=256,
            probe={
                "online_learning_rate": 0.1,
                **_CIFAR_PROBE,
                "offline_learning_rate": 0.4,
                "offline_epochs": 200,
            },
            stem="cifar-pad2",
        ),
    ),
    "ouyang2025-barlow-cifar": Recipe(
        "Ouyang et al. 2025",
        200,
        "ResNet-18, LARS with clipping; solo-learn's recipe, which has 1,000 epochs",
        _solo(
            0.3,
            {**_BARLOW_VIEWS, "second_solarize_probability": 0.2},
            "barlow-twins",
            batch=256,
            probe={"online_learning_rate": 0.15, **_CIFAR_PROBE},
            stem="cifar-pad2",
        ),
    ),
    "ouyang2025-simclr-imagenet100": Recipe(
        "Ouyang et al. 2025",
        100,
        "ResNet-18 at 224 pixels, batch 2 x 128; the two GPUs' batches are one here",
        _solo(
            0.3,
            _FULL_VIEWS,
            "ouyang2025-simclr",
            batch=256,
            probe={
                "online_learning_rate": 0.1,
                "offline_learning_rate": 1.0,
                "offline_batch_size": 512,
                **_IMAGENET_PROBE,
            },
            stem="imagenet",
            width=4096,
            projection_dim=512,
        ),
    ),
    "ouyang2025-barlow-imagenet100": Recipe(
        "Ouyang et al. 2025",
        100,
        "ResNet-18 at 224 pixels, batch 2 x 256; the two GPUs' batches are one here",
        _solo(
            0.3,
            {
                **_BARLOW_VIEWS,
                "blur_probability": 1.0,
                "second_blur_probability": 0.1,
                "second_solarize_probability": 0.2,
            },
            "barlow-twins",
            batch=512,
            probe={
                "online_learning_rate": 0.1,
                "offline_learning_rate": 0.1,
                "offline_batch_size": 256,
                **_IMAGENET_PROBE,
            },
            stem="imagenet",
        ),
    ),
    "google-research-cifar10": Recipe(
        "google-research/simclr",
        1000,
        "ResNet-18, LARS, loss a sum of two means, no blur",
        {
            "data": {"normalization": "none"},
            "views": {**_HALF_VIEWS, "interpolation": "bicubic"},
            "encoder": {
                "name": "resnet18",
                "stem": "cifar",
                "initialisation": "fan-in-truncated",
                "zero_last_norm": True,
                "first_shortcut": "projection",
            },
            "head": SYSTEMS["google-research-3"].tree["head"],
            "objective": {"kind": "nt-xent", "temperature": 0.5, "scale": 2.0},
            "optimizer": {
                "name": "lars",
                "lars_form": "google-research",
                "learning_rate": 1.0,
                "momentum": 0.9,
                "weight_decay": 1e-4,
                "trust_coefficient": 1e-3,
                "warmup_epochs": 10,
            },
            "training": {"batch_size": 512},
        },
    ),
    "solo-learn-cifar": Recipe(
        "solo-learn",
        1000,
        "ResNet-18, LARS with clipping, full jitter and blur",
        _solo(
            0.4,
            _FULL_VIEWS,
            "ouyang2025-simclr",
            batch=256,
            probe={"online_learning_rate": 0.1, **_CIFAR_PROBE},
            stem="cifar-pad2",
        ),
    ),
    "lightly-cifar10": Recipe(
        "lightly",
        200,
        "its CIFAR-10 benchmark: ResNet-18, SGD, half jitter, no blur",
        {
            "data": {"normalization": "imagenet"},
            "views": _HALF_VIEWS,
            "encoder": {"name": "resnet18", "stem": "cifar", "initialisation": "torch"},
            "head": LIGHTLY_HEAD,
            "objective": {"kind": "nt-xent", "temperature": 0.5, "scale": 1.0},
            "optimizer": {
                "name": "sgd",
                "learning_rate": 0.12,
                "momentum": 0.9,
                "weight_decay": 5e-4,
                "decay_all": True,
                "warmup_epochs": 0.0,
                "final_learning_rate_ratio": 0.0,
                "schedule": "epoch",
            },
            "training": {"batch_size": 128, "encode_views": "apart"},
        },
    ),
    "dkobak-cifar10": Recipe(
        "dkobak/simclr-cifar10",
        100,
        "ResNet-18, SGD, half jitter, little grayscale, no blur; its rate for 100 epochs, 0.03 for 1,000",
        {
            "views": {**_HALF_VIEWS, "crop_scale_min": 0.2, "grayscale_probability": 0.1},
            "encoder": {"name": "resnet18", "stem": "cifar", "initialisation": "fan-out-but-stem"},
            "head": {"kind": "mlp", "depth": 2, "width": 1024, "projection_dim": 128},
            "objective": {"kind": "nt-xent", "temperature": 0.5, "scale": 1.0},
            "optimizer": {
                "name": "sgd",
                "learning_rate": 0.06,
                "momentum": 0.9,
                "weight_decay": 5e-4,
                "decay_all": True,
                "warmup_epochs": 0.0,
                "final_learning_rate_ratio": 0.0,
                "schedule": "epoch",
            },
            "training": {"batch_size": 512, "encode_views": "apart"},
        },
    ),
}


FORMER_DEFAULTS: Final[Mapping[int, Tree]] = {
    2: {"probe": {"online_warmup_start": "scaled"}},
    1: {
        "data": {"normalization": "none"},
        "views": {"blur_kernel": "tenth", "interpolation": "bilinear"},
        "encoder": {"initialisation": "fan-out", "zero_last_norm": False, "first_shortcut": "identity"},
        "optimizer": {"lars_form": "you2017", "warmup_peak": "next_step"},
        "probe": {
            "offline": "lars-without-warmup",
            "offline_learning_rate": 0.3,
            "offline_batch_size": 256,
            "offline_epochs": 50,
            "online_warmup_start": "scaled",
        },
    },
}
"""What former editions had in every recipe, and in protocol `ouyang2025` without one."""
FORMER: Final[Mapping[str, Tree]] = {
    "schliebitz2024": {"training": {"encode_views": "together"}},
    "lightly-cifar10": {"optimizer": {"schedule": "step"}},
}
"""What else edition 1 had in some."""


def edition_of_stored(tree: Mapping[str, Any]) -> int | None:
    """The edition of a stored study's trial that says none; None where it depends on none.

    It depends on all three if it names a recipe or trains that probe, on 2 and 3 if its images are an array's
    at another size.
    """
    if _name(tree, "recipe") or tree.get("protocol") == "ouyang2025":
        return 1
    return 2 if _resizes_array(tree) else None


def has_another_side(name: object, image_size: object) -> bool:
    """Whether the images called `name` are stored at one side, and `image_size` is another."""
    side = STORED_SIDES.get(name) if isinstance(name, str) else None
    return side is not None and image_size not in (None, side)


def unknown(field: str, name: str) -> str | None:
    """What to say of a system or recipe that there is none of; None where there is."""
    known = SYSTEMS if field == "system" else RECIPES
    return None if name in known else f"{field}: {name!r} is not one of {guess(name, known)}"


def expanded(raw: Mapping[str, Any]) -> Tree:
    """`raw`, part of a trial's configuration, over what its recipe and system set, kinds filled in.

    The recipe is as `edition` had it, and so are arrays that are resized.
    """
    tree: Tree = {}
    name = _name(raw, "recipe")
    recipe, system = RECIPES.get(name), SYSTEMS.get(_name(raw, "system"))
    edition = raw.get("edition")
    former = FORMER_DEFAULTS.get(edition, {}) if isinstance(edition, int) else {}
    own = FORMER.get(name, {}) if edition == 1 else {}
    for part in (recipe.tree if recipe else {}, former, own, system.tree if system else {}, raw):
        tree = _over(tree, part)
    if edition in (1, 2) and _resizes_array(tree):
        tree = _over({"data": {"resize_first": True}}, tree)
    for table, kind in KIND_DEFAULTS.items():
        if isinstance(tree.get(table), dict):
            tree[table] = {"kind": kind, **tree[table]}
    return tree


def _resizes_array(tree: Mapping[str, Any]) -> bool:
    data = tree.get("data", {})
    if not isinstance(data, Mapping):
        return False
    return has_another_side(data.get("name", "digits"), data.get("image_size"))


def _name(raw: Mapping[str, Any], key: str) -> str:
    name = raw.get(key)
    return name if isinstance(name, str) else ""


def _over(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> Tree:
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        merged[key] = value
        if isinstance(below, dict) and isinstance(value, dict):
            kind = below.get("kind")
            if value.get("kind", kind) == kind:
                merged[key] = _over(below, value)
    return merged
