"""The search space: which fields of TrialConfig vary, over what, and when.

A parameter is addressed by the dotted path of the field it sets. It is active when every condition
under `when` holds, and a condition on an inactive parameter does not hold. Parameters are visited in
an order in which conditions come before what depends on them; that order is part of a space, because
samplers draw in it.

Only facts of the study file live here; samplers are in `headsearch.search`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Self

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    Tag,
    model_validator,
)

from headsearch.config import Config

Scalar = StrictBool | StrictInt | StrictFloat | StrictStr
Params = dict[str, Any]
"""Values of the active parameters by path, in the space's order."""

PARAMETER_KEYS = frozenset({"choices", "low", "high", "step", "log", "value", "when"})


def _same(left: Any, right: Any) -> bool:
    """Equality that keeps true apart from 1, as TOML does."""
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)


class Parameter(Config):
    """What all kinds of parameters share."""

    when: dict[str, Scalar | tuple[Scalar, ...]] = {}
    """Other parameters' paths and the value, or list of values, that makes this one active."""

    def is_active(self, params: Mapping[str, Any]) -> bool:
        """Whether `params`, values of the parameters before this one, make it active."""
        for path, wanted in self.when.items():
            allowed = wanted if isinstance(wanted, tuple) else (wanted,)
            if path not in params or not any(_same(params[path], value) for value in allowed):
                return False
        return True


class Choices(Parameter):
    """One of a list; also written as a bare list."""

    choices: tuple[Scalar, ...] = Field(min_length=1)
    """The values, all different."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        for place, value in enumerate(self.choices):
            if (
                value in self.choices[:place]
            ):  # 2 and 2.0, true and 1 are equal, and would be one configuration
                raise ValueError(f"choices: each value once, {value!r} equals another")
        return self

    @property
    def values(self) -> tuple[Any, ...]:
        """All values, in the study file's order."""
        return self.choices


class Range(Parameter):
    """A number from `low` to `high`, both included; whole when both are whole."""

    low: StrictInt | StrictFloat
    """Smallest value."""
    high: StrictInt | StrictFloat
    """Largest value."""
    step: StrictInt | StrictFloat | None = Field(default=None, gt=0)
    """Distance of values from `low` on; needed for a grid, not with `log`."""
    log: bool = False
    """Draw evenly in the logarithm."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low: {self.low} is not below high = {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low: {self.low} must be above 0 with log = true")
        if self.log and self.step is not None:
            raise ValueError("step: not together with log = true")
        if self.is_integer and isinstance(self.step, float):
            raise ValueError("step: must be whole, as low and high are")
        return self

    @property
    def is_integer(self) -> bool:
        """Whether values are whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def values(self) -> tuple[Any, ...] | None:
        """All values, or None where they cannot be counted."""
        step = self.step or (1 if self.is_integer else None)
        if step is None:
            return None
        count = math.floor((self.high - self.low) / step + 1e-9) + 1
        return tuple(self.low + index * step for index in range(count))


class Value(Parameter):
    """A fixed value for some kinds only; also written as a bare value."""

    value: Scalar
    """The value."""

    @property
    def values(self) -> tuple[Any, ...]:
        """The one value."""
        return (self.value,)


def _kind(raw: Any) -> str | None:
    keys = raw if isinstance(raw, Mapping) else type(raw).model_fields if isinstance(raw, Config) else ()
    tags = (("choices", "<choices>"), ("low", "<range>"), ("high", "<range>"), ("value", "<value>"))
    return next((tag for key, tag in tags if key in keys), None)


def _from_shorthand(raw: Any) -> Any:
    if isinstance(raw, list | tuple):
        return {"choices": raw}
    if isinstance(raw, bool | int | float | str):
        return {"value": raw}
    return raw


AnyParameter = Annotated[
    Annotated[
        Annotated[Choices, Tag("<choices>")]
        | Annotated[Range, Tag("<range>")]
        | Annotated[Value, Tag("<value>")],
        Discriminator(_kind),
    ],
    BeforeValidator(_from_shorthand, json_schema_input_type=Choices | Range | Value | list[Scalar] | Scalar),
]
Space = dict[str, AnyParameter]


def in_order(space: Space) -> Space:
    """The same parameters with every one after those its conditions name, else in the given order.

    Raises:
        ValueError: A condition names a path that is not in the space, or conditions form a circle.
    """
    ordered: Space = {}
    waiting = dict(space)
    for path, parameter in space.items():
        for condition in parameter.when:
            if condition not in space:
                known = ", ".join(space)
                raise ValueError(
                    f"space.{path}.when: {condition} is not a parameter of the space; it has {known}"
                )
    while waiting:
        ready = next((path for path, p in waiting.items() if all(c in ordered for c in p.when)), None)
        if ready is None:
            raise ValueError(f"space.{next(iter(waiting))}.when: the conditions form a circle")
        ordered[ready] = waiting.pop(ready)
    return ordered


def draw(space: Space, choose: Callable[[str, Choices | Range], Any]) -> Params:
    """One point: `choose` is asked for each active parameter, in order; fixed values are filled in."""
    params: Params = {}
    for path, parameter in space.items():
        if parameter.is_active(params):
            params[path] = parameter.value if isinstance(parameter, Value) else choose(path, parameter)
    return params


def points(space: Space) -> Iterator[Params]:
    """All points of a countable space, the last parameter varying fastest.

    Raises:
        ValueError: A range has neither whole bounds nor a step.
    """

    def extend(rest: list[tuple[str, Any]], params: Params) -> Iterator[Params]:
        if not rest:
            yield params
            return
        (path, parameter), *later = rest
        if not parameter.is_active(params):
            yield from extend(later, params)
            return
        if parameter.values is None:
            raise ValueError(f"space.{path}.step: needed, since a grid cannot list this range")
        for value in parameter.values:
            yield from extend(later, {**params, path: value})

    yield from extend(list(space.items()), {})


def size(space: Space, *, at_most: int = 1_000_000) -> int | None:
    """Number of points, or None where there are more than `at_most` or they cannot be counted."""
    try:
        count = sum(1 for _ in itertools.islice(points(space), at_most + 1))
    except ValueError:
        return None
    return count if count <= at_most else None


def corners(space: Space) -> Iterator[Params]:
    """Few points that together show every value at every setting of what conditions depend on.

    A range shows its ends. Used to check a study file whole before its first trial.
    """
    controls = {condition for parameter in space.values() for condition in parameter.when}

    def ends(parameter: AnyParameter) -> tuple[Any, ...]:
        return (parameter.low, parameter.high) if isinstance(parameter, Range) else parameter.values

    steering: Space = {
        path: Choices(choices=ends(space[path]), when=space[path].when) for path in space if path in controls
    }
    for setting in points(steering):
        first: Params = {}
        for path, parameter in space.items():
            if path in setting:
                first[path] = setting[path]
            elif path not in controls and parameter.is_active(first):
                first[path] = ends(parameter)[0]
        yield first
        for path in first:
            if path not in controls:
                for value in ends(space[path])[1:]:
                    yield {**first, path: value}
