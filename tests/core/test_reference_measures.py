"""Alignment, uniformity, nearest neighbours, dead and saturated units against the loops and by hand.

Tolerance: fp32 against float64 for distances, of about 1e-7 in absolute terms; shares and accuracies
are exact but for their quotient. Cases that a rounding could decide are kept out of the random inputs.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from references_bottleneck import alignment as reference_alignment
from references_bottleneck import dead_units as reference_dead
from references_bottleneck import fresh, knn_votes, single
from references_bottleneck import knn_accuracy as reference_accuracy
from references_bottleneck import saturated_units as reference_saturated
from references_bottleneck import uniformity as reference_uniformity
from torch.utils._python_dispatch import TorchDispatchMode

from headsearch.core.measures import alignment, dead_units, knn_accuracy, saturated_units, uniformity


def tensor(x) -> torch.Tensor:
    return torch.tensor(np.asarray(x), dtype=torch.float32)


def whole(x) -> torch.Tensor:
    return torch.tensor(np.asarray(x), dtype=torch.int64)


E = np.eye(4)


# Alignment and uniformity


@pytest.mark.parametrize(("rows", "dim"), [(1, 3), (2, 1), (9, 2), (40, 17)])
@pytest.mark.parametrize("noise", [1e-2, 1.0, 10.0])
def test_alignment(rows, dim, noise):
    seed, rng = fresh()
    first = rng.normal(size=(rows, dim))
    second = (first + noise * rng.normal(size=(rows, dim))) * rng.uniform(0.1, 10, size=(rows, 1))
    (x, x64), (y, y64) = single(first), single(second)
    value = alignment(x.detach(), y.detach())
    assert isinstance(value, float)
    # absolute: a squared distance of about 0, if from a cosine, is off by a few 1e-7
    assert value == pytest.approx(reference_alignment(x64, y64), rel=1e-5, abs=1e-6), f"seed {seed}"
    assert alignment(y.detach(), x.detach()) == pytest.approx(value, rel=1e-5, abs=1e-6), f"seed {seed}"


def test_alignment_by_hand():
    # exact but for a rounding
    assert alignment(tensor(E), tensor(3 * E)) == pytest.approx(0.0, abs=1e-6)
    assert alignment(tensor(E), tensor(-0.2 * E)) == pytest.approx(4.0, rel=1e-6)
    assert alignment(tensor(E), tensor(5 * np.roll(E, 1, axis=0))) == pytest.approx(2.0, rel=1e-6)
    # squared, not the distance: one row opposite, three equal
    assert alignment(tensor(E), tensor(E * [[-1], [1], [1], [1]])) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize(("rows", "dim"), [(2, 3), (3, 1), (9, 2), (40, 17)])
def test_uniformity(rows, dim):
    seed, rng = fresh()
    x, exact = single(rng.normal(size=(rows, dim)) * rng.uniform(0.1, 10, size=(rows, 1)) + 0.3)
    value = uniformity(x.detach())
    assert isinstance(value, float)
    # absolute: a squared distance is off by a few 1e-7, and its weight is 2
    assert value == pytest.approx(reference_uniformity(exact), rel=1e-5, abs=3e-6), f"seed {seed}"


def test_uniformity_by_hand():
    # exact but for roundings of squared distances of at most 4
    assert uniformity(tensor(E)) == pytest.approx(-4.0, rel=1e-5)
    assert uniformity(tensor(np.ones((5, 3)) * np.arange(1, 6)[:, None])) == pytest.approx(0.0, abs=3e-6)
    assert uniformity(tensor([[2.0, 0.0], [-3.0, 0.0]])) == pytest.approx(-8.0, rel=1e-5)
    # two pairs of equal rows: of six pairs two are at distance 0 and four at sqrt 2
    want = math.log((2 + 4 * math.exp(-4)) / 6)
    assert uniformity(tensor(E[[0, 0, 1, 1]])) == pytest.approx(want, rel=1e-5)
    # near rows: a squared distance of 1e-6 from unit rows is known to 1e-7
    near = tensor([[1.0, 0.0], [1.0, 1e-3], [1.0, -1e-3]])
    assert uniformity(near) == pytest.approx(-2 * (1 + 1 + 4) * 1e-6 / 3, abs=1e-6)


def test_bf16_rows_lose_nothing():
    seed, rng = fresh()
    first, second = (torch.tensor(x).bfloat16() for x in rng.normal(size=(2, 20, 6)))
    x, y = first.double().numpy(), second.double().numpy()
    # as in fp32: what's bf16 is the rows alone
    assert alignment(first, second) == pytest.approx(reference_alignment(x, y), rel=1e-5), f"seed {seed}"
    assert uniformity(first) == pytest.approx(reference_uniformity(x), rel=1e-5), f"seed {seed}"


# Nearest neighbours


def clear_queries(rng, train, train_labels, count: int, *, k: int, temperature: float, classes: int):
    """Queries whose k nearest rows and whose winning class no rounding in fp32 can change."""
    queries = []
    while len(queries) < count:
        query = np.float32(rng.normal(size=train.shape[1])).astype(np.float64)
        votes, gap = knn_votes(train, train_labels, query, k=k, temperature=temperature, classes=classes)
        *_, second, best = sorted(votes)
        if gap > 1e-5 and second < best * (1 - 1e-4):
            queries.append(query)
    return np.stack(queries)


@pytest.mark.parametrize(("rows", "k"), [(60, 1), (60, 5), (60, 20), (60, 60), (12, 20), (1, 20)])
@pytest.mark.parametrize("temperature", [0.02, 0.07, 1.0])
@pytest.mark.parametrize("dim", [2, 8])
def test_accuracy(rows, k, temperature, dim):
    seed, rng = fresh()
    classes = 4
    train = np.float32(rng.normal(size=(rows, dim)) * rng.uniform(0.1, 10, size=(rows, 1))).astype(np.float64)
    train_labels = rng.integers(classes, size=rows)
    options = {"k": k, "temperature": temperature, "classes": classes}
    queries = clear_queries(rng, train, train_labels, 50, **options)
    labels = rng.integers(classes, size=50)
    # half of them right, so that an accuracy says which class each query got
    for m in range(0, 50, 2):
        votes, _ = knn_votes(train, train_labels, queries[m], **options)
        labels[m] = votes.index(max(votes))
    value = knn_accuracy(tensor(train), whole(train_labels), tensor(queries), whole(labels), **options)
    assert isinstance(value, float)
    want = reference_accuracy(train, train_labels, queries, labels, **options)
    # a share of 50 in fp32
    assert value == pytest.approx(want, abs=1e-6), f"seed {seed}"


def test_accuracy_of_each_query():
    """One query at a time, with every class asked: which class won is compared, not a share."""
    seed, rng = fresh()
    train = np.float32(rng.normal(size=(30, 3))).astype(np.float64)
    train_labels = rng.integers(3, size=30)
    options = {"k": 7, "temperature": 0.3, "classes": 3}
    for query in clear_queries(rng, train, train_labels, 20, **options):
        votes, _ = knn_votes(train, train_labels, query, **options)
        for label in range(3):
            got = knn_accuracy(
                tensor(train), whole(train_labels), tensor(query[None]), whole([label]), **options
            )
            # 0 or 1
            assert got == float(label == votes.index(max(votes))), f"seed {seed}"


def test_the_defaults_are_twenty_neighbours_at_0_07():
    seed, rng = fresh()
    train = np.float32(rng.normal(size=(200, 2))).astype(np.float64)
    # labels by angle but for a third, so that k and the temperature count
    sectors = np.floor((np.arctan2(train[:, 1], train[:, 0]) + math.pi) / (2 * math.pi) * 12).astype(int) % 3
    train_labels = np.where(rng.random(200) < 0.35, rng.integers(3, size=200), sectors)
    options = {"k": 20, "temperature": 0.07, "classes": 3}
    queries = clear_queries(rng, train, train_labels, 100, **options)
    votes = [knn_votes(train, train_labels, query, **options)[0] for query in queries]
    labels = [vote.index(max(vote)) for vote in votes]
    got = knn_accuracy(tensor(train), whole(train_labels), tensor(queries), whole(labels), classes=3)
    # the reference's own answers, all of them right
    assert got == pytest.approx(1.0, abs=1e-6), f"seed {seed}"


def test_accuracy_by_hand():
    def at(*cosines: float) -> torch.Tensor:
        return tensor([[c, math.sqrt(1 - c**2)] for c in cosines])

    query, here = at(1.0), {"classes": 2}
    train, labels = at(0.99, 0.5, 0.45), whole([0, 1, 1])
    # the nearest one outweighs two: exp(0.49 / 0.07) = 1097; at a high temperature the majority wins
    assert knn_accuracy(train, labels, query, whole([0]), k=3, temperature=0.07, **here) == 1.0
    assert knn_accuracy(train, labels, query, whole([1]), k=3, temperature=10.0, **here) == 1.0
    assert knn_accuracy(train, labels, query, whole([0]), k=1, temperature=10.0, **here) == 1.0
    # more neighbours than rows
    assert knn_accuracy(train, labels, query, whole([1]), k=1000, temperature=10.0, **here) == 1.0
    # weights like exp(1 / 0.001) are compared, not overflown
    assert knn_accuracy(train, labels, query, whole([0]), k=3, temperature=0.001, **here) == 1.0
    assert knn_accuracy(train, 1 - labels, query, whole([1]), k=3, temperature=0.001, **here) == 1.0
    # a similarity is the cosine, not the dot product and not the distance
    longer = train * tensor([[0.01], [7.0], [100.0]])
    assert knn_accuracy(longer, labels, 50 * query, whole([0]), k=1, **here) == 1.0
    # opposite rows vote too, by little: exp(-1 / t) each
    opposite = at(-1.0, -0.9, -0.8)
    assert knn_accuracy(opposite, labels, query, whole([1]), k=3, temperature=1.0, **here) == 1.0
    assert knn_accuracy(opposite, labels, query, whole([1]), k=1, temperature=1.0, **here) == 1.0
    # a class without rows never wins, and two of four queries are right
    queries = tensor([[1.0, 0.1], [0.1, 1.0], [1.0, -0.1], [0.1, 1.0]])
    axes = tensor([[1.0, 0.0], [0.0, 1.0]])
    got = knn_accuracy(axes, whole([3, 1]), queries, whole([3, 3, 0, 1]), k=1, classes=5)
    assert got == 0.5


class Scattered(TorchDispatchMode):
    """Within: notes what `scatter_add_` is given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "scatter_add_":
            sums, _, index, values = args
            self.calls.append((sums, index, values))
        return func(*args, **(kwargs or {}))


def test_votes_are_added_in_the_neighbours_order_and_never_two_at_a_time():
    """What one call adds to one place comes in any order on CUDA; the sums are those of a single call on a CPU."""
    draw = torch.Generator().manual_seed(0)
    train, queries = (torch.randn(count, 6, generator=draw) for count in (300, 90))
    train_labels, labels = (torch.randint(4, (count,), generator=draw) for count in (300, 90))
    with Scattered() as seen:
        knn_accuracy(train, train_labels, queries, labels, classes=4)
    indices, weights = ([call[place] for call in seen.calls] for place in (1, 2))
    assert [tuple(index.shape) for index in indices] == [(90, 1)] * 20
    at_once = torch.zeros(90, 4, dtype=torch.float64)
    at_once.scatter_add_(1, torch.cat(indices, 1), torch.cat(weights, 1))
    assert torch.equal(seen.calls[-1][0], at_once)
    assert (at_once > 0).sum() > 90  # places that several neighbours voted for, and several places a row


def test_accuracy_of_many_queries():
    """More rows than a batch of anything is likely to hold; two blobs that nothing confuses."""
    seed, rng = fresh()
    labels, train_labels = rng.integers(2, size=5003), rng.integers(2, size=301)
    centres = np.array([[5.0, 0.0, 0.0], [0.0, 5.0, 0.0]])
    queries = centres[labels] + 0.1 * rng.normal(size=(5003, 3))
    train = centres[train_labels] + 0.1 * rng.normal(size=(301, 3))
    wrong = labels.copy()
    wrong[:7] = 1 - wrong[:7]
    wrong[-6:] = 1 - wrong[-6:]
    got = knn_accuracy(tensor(train), whole(train_labels), tensor(queries), whole(wrong), classes=2)
    # a share in fp32 at worst
    assert got == pytest.approx((5003 - 13) / 5003, abs=1e-6), f"seed {seed}"


# Units


def test_dead_units():
    seed, rng = fresh()
    for rows in (2, 9, 50):
        hidden = rng.normal(size=(rows, 24))
        hidden[1] = hidden[0] + 1
        hidden *= 10.0 ** rng.integers(-3, 4, size=24)
        stopped = rng.random(24) < 0.4
        hidden[:, stopped] = hidden[:1, stopped]
        x, exact = single(hidden)
        value = dead_units(x.detach())
        assert isinstance(value, float)
        # a share of 24
        assert value == pytest.approx(reference_dead(exact), abs=1e-7), f"seed {seed}"
        assert reference_dead(exact) == pytest.approx(stopped.mean(), abs=1e-12), f"seed {seed}"


@pytest.mark.parametrize(
    ("column", "dead"),
    [
        ([0.0, 0.0, 0.0], True),
        ([0.3, 0.3, 0.3], True),
        ([0.0, 0.0, 0.1], False),
        # the range below and above 1e-6, of values below 1
        ([0.0, 5e-7, 0.0], True),
        ([0.0, 2e-6, 0.0], False),
        ([1e-4, 1e-4 + 9e-7, 1e-4], True),
        ([1e-4, 1e-4 + 2e-6, 1e-4], False),
        # relative to the largest absolute value above 1, of either sign
        ([200.0, 200.0001, 200.0], True),
        ([200.0, 200.001, 200.0], False),
        ([-200.0, -200.0001, -200.0], True),
        ([-200.0, -200.001, -200.0], False),
        # a row alone
        ([4.0], True),
    ],
)
def test_dead_units_by_hand(column, dead):
    # exact
    assert dead_units(tensor(column)[:, None]) == float(dead)
    assert reference_dead(tensor(column)[:, None].double().numpy()) == float(dead)
    # beside units of other sizes it is still its own values that count
    if len(column) > 1:
        huge, alive = np.linspace(1e5, 2e6, len(column)), np.linspace(-1, 1, len(column))
        hidden = tensor(np.stack([huge, column, alive, -huge], axis=1))
        assert dead_units(hidden) == dead / 4


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (-3.0, 2.0), (0.0, 6.0)])
def test_saturated_units(low, high):
    seed, rng = fresh()
    for rows in (1, 20, 33, 40, 100):
        # a distance from a bound in shares of the range, with nothing about 1 %; about 95 % near it
        near = rng.random((rows, 24)) < rng.choice([0.5, 0.93, 0.95, 0.97, 1.0], size=24)
        share = np.where(
            near, rng.uniform(0, 0.0099, size=(rows, 24)), rng.uniform(0.0101, 0.4, size=(rows, 24))
        )
        below = rng.random((rows, 24)) < rng.choice([0.0, 0.5, 1.0], size=24)
        hidden = np.where(below, low + share * (high - low), high - share * (high - low))
        x, exact = single(hidden)
        value = saturated_units(x.detach(), low, high)
        assert isinstance(value, float)
        # a share of 24
        assert value == pytest.approx(reference_saturated(exact, low, high), abs=1e-7), f"seed {seed}"


@pytest.mark.parametrize("rows", [20, 40, 60, 100, 140, 200, 380, 1000])
def test_ninety_five_percent_of_the_rows_are_enough(rows):
    enough = rows * 19 // 20
    for value in (0.001, 0.999):
        column = np.full((rows, 2), value)
        column[enough:] = 0.5
        # exact
        assert saturated_units(tensor(column), 0.0, 1.0) == 1.0
        column[enough - 1, 1] = 0.5
        assert saturated_units(tensor(column), 0.0, 1.0) == 0.5


def test_saturated_units_by_hand():
    # one percent of the range, not of 1 and not of the bound: tanh has a range of 2
    hidden = tensor([[-0.985, -0.975, 0.985, 0.975, 0.0]])
    assert saturated_units(hidden, -1.0, 1.0) == pytest.approx(2 / 5, abs=1e-7)
    hidden = tensor([[0.985, 0.991, 0.015, 0.009, 0.5]])
    assert saturated_units(hidden, 0.0, 1.0) == pytest.approx(2 / 5, abs=1e-7)
    # at the bounds themselves, and now at one and now at the other
    assert saturated_units(tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 1.0]]), 0.0, 1.0) == 1.0


@pytest.mark.parametrize(("low", "high"), [(None, None), (0.0, None), (None, 1.0)])
def test_nothing_saturates_without_bounds(low, high):
    assert saturated_units(torch.zeros(5, 3), low, high) == 0.0
    assert saturated_units(torch.ones(5, 3), low, high) == 0.0


def test_knn_in_parts_is_knn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    train, queries = torch.randn(40, 6, generator=draw), torch.randn(31, 6, generator=draw)
    known, labels = (torch.randint(4, (count,), generator=draw) for count in (40, 31))
    whole_set = knn_accuracy(train, known, queries, labels, classes=4, k=7)
    for values in (1, 40, 250, 1240):
        monkeypatch.setattr("headsearch.core.measures.SIMILARITIES", values)
        assert knn_accuracy(train, known, queries, labels, classes=4, k=7) == whole_set
