"""Spaces: order, conditions, points, corners."""

from __future__ import annotations

import random

import pytest
from pydantic import TypeAdapter

from headsearch import space as spaces
from headsearch.space import Space

ADAPTER: TypeAdapter[Space] = TypeAdapter(Space)


def make(**parameters):
    return spaces.in_order(
        ADAPTER.validate_python({key.replace("__", "."): value for key, value in parameters.items()})
    )


def test_conditions_come_before_what_depends_on_them():
    space = make(
        c={"choices": [1, 2], "when": {"b": True}},
        b={"choices": [True, False], "when": {"a": "x"}},
        a=["x", "y"],
    )
    assert list(space) == ["a", "b", "c"]


def test_a_condition_on_an_inactive_parameter_does_not_hold():
    space = make(
        a=["x", "y"], b={"choices": [True, False], "when": {"a": "x"}}, c={"value": 5, "when": {"b": False}}
    )
    assert list(spaces.points(space)) == [
        {"a": "x", "b": True},
        {"a": "x", "b": False, "c": 5},
        {"a": "y"},
    ]
    assert spaces.size(space) == 3


def test_integer_ranges_are_counted_and_float_ranges_need_a_step():
    assert list(spaces.points(make(a={"low": 1, "high": 3}))) == [{"a": 1}, {"a": 2}, {"a": 3}]
    stepped = [point["a"] for point in spaces.points(make(a={"low": 0.0, "high": 0.3, "step": 0.1}))]
    assert stepped == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert spaces.size(make(a={"low": 0.0, "high": 1.0})) is None
    with pytest.raises(ValueError, match=r"space\.a\.step: needed"):
        list(spaces.points(make(a={"low": 0.0, "high": 1.0})))


def test_draw_asks_only_for_active_parameters_in_order():
    space = make(
        kind=["mlp", "linear"], width={"low": 8, "high": 64, "log": True, "when": {"kind": "mlp"}}, fixed=3
    )
    asked = []

    def choose(path, parameter):
        asked.append(path)
        return parameter.choices[1] if path == "kind" else 16

    assert spaces.draw(space, choose) == {"kind": "linear", "fixed": 3}
    assert asked == ["kind"]


def test_corners_show_every_value_at_every_setting_of_the_controls():
    space = make(
        kind=["mlp", "linear", "none"],
        width={"low": 8, "high": 64, "when": {"kind": "mlp"}},
        dim={"choices": [2, 4, 8], "when": {"kind": ["mlp", "linear"]}},
    )
    shown = list(spaces.corners(space))
    assert {(point["kind"], point.get("width")) for point in shown} >= {
        ("mlp", 8),
        ("mlp", 64),
        ("none", None),
    }
    assert {(point["kind"], point.get("dim")) for point in shown} >= {
        (kind, dim) for kind in ("mlp", "linear") for dim in (2, 4, 8)
    }
    assert all("width" not in point for point in shown if point["kind"] != "mlp")


def test_corners_agree_with_points_about_conditions():
    rng = random.Random(0)
    for _ in range(50):
        names = ["a", "b", "c", "d"]
        parameters = {}
        for index, name in enumerate(names):
            parameters[name] = {"choices": list(range(rng.randint(1, 3)))}
            if index and rng.random() < 0.6:
                parameters[name]["when"] = {rng.choice(names[:index]): rng.randint(0, 2)}
        space = make(**parameters)
        everything = list(spaces.points(space))
        for corner in spaces.corners(space):
            assert corner in everything


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"a": {"choices": [1, 1]}}, "each value once"),
        ({"a": {"choices": [2, 2.0]}}, "each value once, 2.0 equals another"),
        ({"a": [True, 1]}, "each value once, 1 equals another"),
        ({"a": {"low": 3, "high": 3}}, "not below high"),
        ({"a": {"low": 0, "high": 3, "log": True}}, "must be above 0"),
        ({"a": {"low": 1, "high": 3, "log": True, "step": 1}}, "not together with log"),
        ({"a": {"low": 1, "high": 3, "step": 0.5}}, "must be whole"),
        ({"a": {"choices": [1], "when": {"z": 1}}}, "z is not a parameter"),
        ({"a": {"choices": [1], "when": {"b": 1}}, "b": {"choices": [1], "when": {"a": 1}}}, "circle"),
    ],
)
def test_what_a_space_refuses(parameters, message):
    with pytest.raises(ValueError, match=message):
        make(**parameters)
