"""TrialConfig: everything that determines one training, as one tree of frozen values."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from headsearch.config.heads import HeadConfig, LinearHead, MlpHead
from headsearch.config.images import DataConfig, ViewsConfig
from headsearch.config.part import Config
from headsearch.config.probes import AutoencoderConfig, ProbeConfig, Protocol
from headsearch.config.training import (
    EncoderConfig,
    JointScheme,
    NtXentObjective,
    ObjectiveConfig,
    OptimizerConfig,
    SchemeConfig,
    TrainingConfig,
)
from headsearch.recipes import EDITION, RECIPES, expanded, unknown
from headsearch.systems import SYSTEMS


class TrialConfig(Config):
    """One point of a space at one seed: all that determines a training."""

    recipe: str | None = Field(default=None, json_schema_extra={"enum": [None, *RECIPES]})
    """A published recipe by name (`headsearch heads`): views, encoder, head, loss, optimizer and batch as its
    authors have them. What else is given overrides it."""
    system: str | None = Field(default=None, json_schema_extra={"enum": [None, *SYSTEMS]})
    """A head with its objective and scheme by name (`headsearch heads`). Overrides the recipe; what else is
    given overrides it."""
    edition: Literal[1, 2, 3] = EDITION
    """Recipes and protocol `ouyang2025`'s second probe are as their sources have them from 2 on, and as
    headsearch had them before in 1. In 3 the online probe's warm-up starts where solo-learn's does, and small
    square images at another size than they are stored at are cropped first; in 1 and 2 they have
    `data.resize_first`. A study that depends on it writes it down when it is made; one without it is from
    before."""
    data: DataConfig = DataConfig()
    """Images and splits."""
    views: ViewsConfig = ViewsConfig()
    """Augmentation."""
    encoder: EncoderConfig = EncoderConfig()
    """The network that is kept."""
    head: HeadConfig = MlpHead()
    """The projection head, thrown away after pretraining."""
    objective: ObjectiveConfig = NtXentObjective()
    """The loss."""
    scheme: SchemeConfig = JointScheme()
    """How encoder and head take turns."""
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

    @model_validator(mode="before")
    @classmethod
    def _presets(cls, raw: Any) -> Any:
        return expanded(raw) if isinstance(raw, dict) else raw

    @field_validator("recipe", "system")
    @classmethod
    def _known(cls, name: str | None, info: Any) -> str | None:
        if name is not None and (problem := unknown(info.field_name, name)):
            raise ValueError(problem)
        return name

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        own = getattr(self.scheme, "head_optimizer", None)
        paths = {"optimizer": self.optimizer} | ({"scheme.head_optimizer": own} if own else {})
        for path, optimizer in paths.items():
            if self.training.epochs and optimizer.warmup_epochs >= self.training.epochs:
                from_recipe = f" (recipe {self.recipe})" if self.recipe and path == "optimizer" else ""
                raise ValueError(
                    f"{path}.warmup_epochs: {optimizer.warmup_epochs:g}{from_recipe} is not below the "
                    f"{self.training.epochs} epochs of the training; set it lower, or more epochs"
                )
        return self

    @model_validator(mode="after")
    def _validation_is_held_out(self) -> Self:
        if not self.data.trains_on_validation:
            return self
        if self.training.keep == "best_validation_loss":
            raise ValueError(
                "data.train_on: 'training+validation' leaves no images by whose loss the best epoch could be "
                "chosen; set training.keep = 'last', or data.train_on = 'training'"
            )
        if self.protocol == "schliebitz2024":
            raise ValueError(
                "data.train_on: protocol 'schliebitz2024' has validation images held out, as its paper; set "
                "data.train_on = 'training'"
            )
        return self

    @model_validator(mode="after")
    def _head_has_steps(self) -> Self:
        still = self.head.kind in ("none", "reweight") or (
            isinstance(self.head, MlpHead | LinearHead) and self.head.frozen
        )
        if self.scheme.kind == "alternating" and still:
            raise ValueError(
                "scheme.kind: 'alternating' trains the head in steps of its own, but this one has none"
            )
        return self
