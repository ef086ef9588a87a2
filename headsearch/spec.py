"""StudySpec: one question, written as TOML, checked whole, stored with its hash.

Workers read the spec from the database, never the file, so every trial of a study answers the same
question. Everything a study leaves to its defaults is written out before it is hashed: a later
version with other defaults is another spec, and says so.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, ValidationError, ValidationInfo, model_validator

from headsearch import space as spaces
from headsearch.config import Config, Protocol, TrainOn, TrialConfig, flatten, set_path
from headsearch.fields import explain, fields_at
from headsearch.recipes import edition_of_stored
from headsearch.resilience import Lease, WorkerSpec
from headsearch.space import Params, Space

Objective = Literal["probe_accuracy", "projection_dim", "head_parameters", "train_seconds"]
MAXIMIZED: frozenset[Objective] = frozenset({"probe_accuracy"})

SET_ELSEWHERE = {
    "training.epochs": "budget.epochs sets it",
    "seed": "seeds sets it",
    "protocol": "the study's own protocol sets it",
}
CHECKED_POINTS = 5000
SCORES_TEST: frozenset[Protocol] = frozenset({"schliebitz2024"})
"""Protocols whose selection split is made of test images."""
VARIABLE_DATA_FIELDS = ("data.normalization", "data.image_size")


class Budget(Config):
    """How much is trained."""

    trials: int | None = Field(default=None, ge=1, le=100_000)
    """Exact number of trials, whatever becomes of them; a multiple of the number of seeds. A grid or a
    list of points has as many as it has cells times seeds."""
    epochs: int = Field(ge=1, le=100_000)
    """Length of a whole training."""
    rungs: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Epochs at which a trial pauses and must earn its next ones. None: every trial is trained whole."""

    @model_validator(mode="after")
    def _rungs_rise(self) -> Self:
        if any(low >= high for low, high in itertools.pairwise(self.rungs)):
            raise ValueError(f"budget.rungs: {list(self.rungs)} must rise")
        if self.rungs and self.rungs[-1] >= self.epochs:
            raise ValueError(f"budget.rungs: {self.rungs[-1]} is not below budget.epochs = {self.epochs}")
        return self


class Pruning(Config):
    """What a rung does with a trial that reaches it."""

    rule: Literal["promote", "stop", "none"] = "promote"
    """`promote` pauses every trial and takes the best on, later if need be; `stop` ends a trial for
    good that is not among the best when it arrives; `none` ignores rungs. With several seeds it is the
    point that is judged, once all of them are there."""
    eta: int = Field(default=2, ge=2, le=16)
    """The best 1/eta of a rung go on."""


class SamplerSpec(Config):
    """Who proposes points in mode `search`."""

    name: Literal["tpe", "random", "nsga2", "gp", "qmc"] = "tpe"
    """`tpe` learns from complete and pruned trials and from conditions; `nsga2`, `gp` and `qmc` are
    Optuna's; `random` is the control."""
    startup_trials: int = Field(default=16, ge=1)
    """Trials that have reported, or failed by their configuration, before `tpe` or `gp` begin to model."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """The same seed and the same history give the same proposals."""


class StudySpec(Config):
    """One question about projection heads."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    """Of the study, everywhere. Lower-case letters, digits, dots, dashes, underscores."""
    question: str = ""
    """What the study asks, in a sentence; shown on its page."""
    mode: Literal["search", "grid", "points"] = "search"
    """`search` samples the space, `grid` trains all of it, `points` trains those listed."""
    objectives: tuple[Objective, ...] = Field(default=("probe_accuracy", "projection_dim"), min_length=1)
    """What the front is made of. Accuracy is maximised, the others minimised."""
    protocol: Protocol = "holdout"
    """How accuracy is measured: `holdout` steers by a validation split of the training data and scores
    the test split once, at a trial's end. `ouyang2025` does so with that paper's probe, trained along with
    the encoder. `schliebitz2024` trains, selects and scores that paper's probe on 70, 10 and 20 % of the test
    split, so it cannot steer a search."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field(default=(0,), min_length=1)
    """Every point is trained once with each; its trials pause, go on and are pruned together, judged by their
    mean."""
    budget: Budget
    """Trials and epochs."""
    pruning: Pruning = Pruning()
    """Rungs' rule."""
    sampler: SamplerSpec = SamplerSpec()
    """Who proposes points."""
    lease: Lease = Lease()
    """Patience with silent workers."""
    worker: WorkerSpec = WorkerSpec()
    """Checkpoints, signals, limits."""
    base: dict[str, Any] = {}
    """Fields of the trial configuration that are the same for every trial."""
    space: Space = {}
    """Fields that vary, by dotted path."""
    points: tuple[dict[str, spaces.Scalar], ...] = ()
    """Points of mode `points`: dotted paths and values."""

    @model_validator(mode="before")
    @classmethod
    def _flat_paths(cls, raw: Any) -> Any:
        """Accept dotted keys with and without quotes: ``head.width`` is a table in a table to TOML."""
        if not isinstance(raw, dict):
            return raw
        flat = dict(raw)
        if isinstance(raw.get("space"), dict):
            flat["space"] = _flat_space(raw["space"])
        if isinstance(raw.get("points"), list):
            flat["points"] = [flatten(point) if isinstance(point, dict) else point for point in raw["points"]]
        if isinstance(raw.get("base"), dict):
            nested: dict[str, Any] = {}
            for path, value in flatten(raw["base"]).items():
                set_path(nested, path, value)
            flat["base"] = nested
        return flat

    @model_validator(mode="after")
    def _fits_together(self, info: ValidationInfo) -> Self:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: {list(self.seeds)} must all differ")
        if "probe_accuracy" not in self.objectives or len(set(self.objectives)) != len(self.objectives):
            raise ValueError("objectives: each once, and probe_accuracy among them")
        for path in (*flatten(self.base), *self.space, *(path for point in self.points for path in point)):
            if path in SET_ELSEWHERE:
                raise ValueError(f"{path}: not here; {SET_ELSEWHERE[path]}")
        # The validated model is frozen; order and resolved counts belong to what is hashed.
        object.__setattr__(self, "space", spaces.in_order(self.space))
        self._check_mode()
        self._check_paths()
        checked = CHECKED_POINTS if (info.context or {}).get("check_points", True) else 0
        for params in itertools.islice(self._samples(), checked):
            try:
                self.trial_config(params, self.seeds[0])
            except ValidationError as error:
                raise ValueError(f"{explain(error, TrialConfig)}{self._where(params)}") from None
        self._check_budget()
        return self

    def _check_mode(self) -> None:
        if self.mode == "points" and (not self.points or self.space):
            raise ValueError("points: mode 'points' lists them under points and has no space")
        if self.mode != "points" and self.points:
            raise ValueError(f"points: only with mode = 'points', not {self.mode!r}")
        if self.protocol in SCORES_TEST and (self.mode == "search" or self.rungs):
            raise ValueError(
                f"protocol: {self.protocol!r} selects on images of the test split, which must not steer: use "
                "mode 'grid' or 'points', without budget.rungs"
            )
        if self.trains_on_validation and (self.mode == "search" or self.rungs):
            raise ValueError(
                f"data.train_on: {self.train_on!r} trains on the validation images, whose accuracy must then "
                "not steer: use mode 'grid' or 'points', without budget.rungs"
            )
        if self.mode != "points" and not self.space:
            raise ValueError(f"space: mode {self.mode!r} needs at least one parameter")

    def _check_paths(self) -> None:
        if any("data.train_on" in point for point in self.points):
            raise ValueError("data.train_on: trials of a study must be measured alike; set it under base")
        for path in self.space:
            fields_at(TrialConfig, path, under="space")
            fixed = path.startswith("probe.") or (
                path.startswith("data.") and path not in VARIABLE_DATA_FIELDS
            )
            if fixed:
                raise ValueError(f"space.{path}: trials of a study must be measured alike; set it under base")
            if path in flatten(self.base):
                raise ValueError(f"space.{path}: also set under base; keep one of the two")

    def _check_budget(self) -> None:
        if self.mode == "search":
            trials = self.budget.trials
            if trials is None:
                raise ValueError("budget.trials: needed in mode 'search'")
            if trials % len(self.seeds):
                raise ValueError(f"budget.trials: {trials} is not a multiple of the {len(self.seeds)} seeds")
            most = spaces.size(self.space, at_most=trials)
            if most is not None and most * len(self.seeds) < trials:
                raise ValueError(
                    f"budget.trials: {trials}, but the space has {most} points and {len(self.seeds)} seeds; "
                    f"at most {most * len(self.seeds)}"
                )
            return
        cells = len(self.cells())
        if self.budget.trials not in (None, cells):
            raise ValueError(
                f"budget.trials: {self.budget.trials}, but there are {cells} points times seeds; leave it out"
            )
        object.__setattr__(self, "budget", self.budget.model_copy(update={"trials": cells}))

    def _samples(self) -> Iterator[Params]:
        """What is checked before the first trial: all points of a small space, the corners of a large one."""
        if self.points:
            return iter(dict(point) for point in self.points)
        few = spaces.size(self.space, at_most=CHECKED_POINTS) is not None
        return spaces.points(self.space) if few else spaces.corners(self.space)

    def _where(self, params: Params) -> str:
        """The settings that decide which fields there are, for a message about one of them."""
        controls = {path for parameter in self.space.values() for path in parameter.when}
        steering = {p: v for p, v in params.items() if p in controls or p.endswith(".kind")}
        written = ", ".join(f"{path} = {json.dumps(value)}" for path, value in steering.items())
        return f" (at {written})" if written else ""

    @property
    def trials(self) -> int:
        """Exact number of trials of the study."""
        if self.budget.trials is None:  # pragma: no cover - set at construction
            raise ValueError("budget.trials: needed")
        return self.budget.trials

    @property
    def rungs(self) -> tuple[int, ...]:
        """Epochs at which trials are judged; empty where the rule is `none`."""
        return () if self.pruning.rule == "none" else self.budget.rungs

    @property
    def train_on(self) -> TrainOn:
        """Images that all trials are trained on: `data.train_on`."""
        given: TrainOn = flatten(self.base).get("data.train_on", "training")
        return given

    @property
    def trains_on_validation(self) -> bool:
        """Whether accuracy on validation images is of images that were trained on."""
        return self.train_on == "training+validation"

    @property
    def directions(self) -> tuple[Literal["maximize", "minimize"], ...]:
        """Of each objective."""
        return tuple("maximize" if name in MAXIMIZED else "minimize" for name in self.objectives)

    def cells(self) -> list[tuple[Params, int]]:
        """All (point, seed) of a grid or a list of points; every point once before the next seed.

        With rungs all seeds of a point before the next point, since they are judged together.

        Raises:
            ValueError: Mode `search`, which has no list, or a range that cannot be listed.
        """
        if self.mode == "search":
            raise ValueError("mode: a search has no list of points")
        listed = [dict(p) for p in self.points] if self.mode == "points" else list(spaces.points(self.space))
        if self.rungs:
            return [(point, seed) for point in listed for seed in self.seeds]
        return [(point, seed) for seed in self.seeds for point in listed]

    def trial_tree(self, params: Params, seed: int) -> dict[str, Any]:
        """What is given of a trial's configuration: base, then the point, then what the study itself sets.

        A spec that does not say its edition, though it matters, was stored before the next one.
        """
        tree: dict[str, Any] = json.loads(json.dumps(self.base))
        for path, value in params.items():
            set_path(tree, path, value)
        set_path(tree, "training.epochs", self.budget.epochs)
        tree |= {"seed": seed, "protocol": self.protocol}
        edition = edition_of_stored(tree)
        return tree if edition is None else {"edition": edition, **tree}

    def trial_config(self, params: Params, seed: int) -> TrialConfig:
        """The configuration of one trial."""
        return TrialConfig.model_validate(self.trial_tree(params, seed))

    def to_json(self) -> dict[str, Any]:
        """Plain data, defaults written out."""
        return self.model_dump(mode="json")

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON, in hexadecimal."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def differences(old: StudySpec, new: StudySpec) -> list[str]:
    """``path: old -> new`` for each field that differs, in the order of the fields."""
    left, right = _flat_json(old), _flat_json(new)
    paths = dict.fromkeys((*left, *right))
    return [
        f"{path}: {_shown(left, path)} -> {_shown(right, path)}"
        for path in paths
        if left.get(path, ...) != right.get(path, ...)
    ]


def known_objectives() -> tuple[str, ...]:
    """Names that `objectives` accepts."""
    return get_args(Objective)


def _flat_json(spec: StudySpec) -> dict[str, Any]:
    tree = spec.to_json()
    short = {
        path: {key: value for key, value in parameter.items() if value not in (None, {}, False)}
        for path, parameter in tree["space"].items()
    }
    return flatten({**tree, "space": short})


def _shown(flat: dict[str, Any], path: str) -> str:
    return json.dumps(flat[path]) if path in flat else "(none)"


def _flat_space(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict) and value and not spaces.PARAMETER_KEYS & value.keys():
            flat |= _flat_space(value, path)
        elif isinstance(value, dict) and isinstance(value.get("when"), dict):
            flat[path] = {**value, "when": flatten(value["when"])}
        else:
            flat[path] = value
    return flat
