"""The table of systems and that of recipes: what can be asked for by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from headsearch.config import EncoderConfig, EncoderName, TrialConfig
from headsearch.core.pretrain import HeadFacts, describe_head
from headsearch.errors import InputError
from headsearch.fields import guess
from headsearch.recipes import RECIPES
from headsearch.report.tables import Table, value
from headsearch.systems import SYSTEMS


@dataclass(frozen=True)
class CataloguedSystem:
    """A system on one encoder."""

    name: str
    source: str
    what: str
    config: TrialConfig
    facts: HeadFacts


def systems(encoder: str = "resnet18") -> list[CataloguedSystem]:
    """All systems with the sizes of their heads on `encoder`; InputError if there is no such encoder."""
    names = get_args(EncoderName)
    if encoder not in names:
        raise InputError(f"--encoder: {encoder!r} is not one of {guess(encoder, names)}")
    found = []
    for name, system in SYSTEMS.items():
        config = TrialConfig.model_validate({"system": name, "encoder": EncoderConfig(name=encoder)})
        found.append(CataloguedSystem(name, system.source, system.what, config, describe_head(config)))
    return found


def system_table(found: list[CataloguedSystem]) -> Table:
    """Name, source, kinds, projection dim and parameters of each system."""
    rows = tuple(
        (
            one.name,
            one.source,
            one.config.head.kind,
            one.config.objective.kind,
            one.config.scheme.kind,
            value(one.facts.projection_dim),
            f"{one.facts.head_parameters:,}",
            f"{one.facts.trainable_head_parameters:,}",
            one.what,
        )
        for one in found
    )
    columns = ("system", "source", "head", "objective", "scheme", "projection dim", "parameters", "trained")
    return Table((*columns, "what"), rows)


def recipe_table() -> Table:
    """Each recipe with its encoder, optimizer, batch, and what differs between libraries."""
    rows = []
    for name, recipe in RECIPES.items():
        config = TrialConfig.model_validate({"recipe": name, "training": {"epochs": recipe.epochs}})
        loss = config.objective
        norm = getattr(config.head, "batch_norm", False)
        rows.append(
            (
                name,
                recipe.source,
                config.encoder.name,
                config.optimizer.name,
                str(config.training.batch_size),
                str(recipe.epochs),
                f"{loss.scale:g}",
                value(getattr(loss, "temperature", None)),
                "yes" if norm else "no",
                f"{config.views.jitter_strength:g}",
                f"{config.views.blur_probability:g}",
            )
        )
    columns = ("recipe", "source", "encoder", "optimizer", "batch", "epochs", "loss scale", "temperature")
    return Table((*columns, "head norm", "jitter", "blur"), tuple(rows))


def catalogue_json(found: list[CataloguedSystem]) -> dict[str, list[dict[str, object]]]:
    """Both as plain data, each with the part of a configuration that its name stands for."""
    return {
        "systems": [
            {
                "system": one.name,
                "source": one.source,
                "what": one.what,
                **vars(one.facts),
                "tree": SYSTEMS[one.name].tree,
            }
            for one in found
        ],
        "recipes": [{"recipe": name, **vars(recipe)} for name, recipe in RECIPES.items()],
    }
