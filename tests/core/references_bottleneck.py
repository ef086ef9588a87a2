"""Slow float64 references of the objectives, the information bottleneck, the levels and the measures.

Loops over anchors, pairs and units, from the papers' formulas and not from the code they check.
Shapes: N images, 2N rows (the first views, then the second ones), F features, P projection, U units.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from references import Array, unit


def fresh() -> tuple[int, np.random.Generator]:
    """A seed from the operating system, for the assertion's message, and its generator."""
    seed = int.from_bytes(os.urandom(6), "big")
    return seed, np.random.default_rng(seed)


def single(x: Array) -> tuple[torch.Tensor, Array]:
    """A float32 leaf with a gradient, and exactly its values in float64."""
    leaf = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    return leaf, leaf.detach().double().numpy()


def slope(function: Callable[[Array], float], x: Array, *, step: float = 1e-5) -> Array:
    """Gradient of a scalar function by central differences, entry by entry."""
    out = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        out[index] = (function(up) - function(down)) / (2 * step)
    return out


def through_length(z: Array, slopes: Array) -> Array:
    """d loss / d z where `slopes` is d loss / d u and u are the rows of z divided by their lengths."""
    out = np.zeros_like(z)
    for i, row in enumerate(z):
        direction = unit(row)
        radial = float(slopes[i] @ direction)
        out[i] = (slopes[i] - radial * direction) / math.sqrt(float(row @ row))
    return out


# Contrast


def minus_log_softmax(logits: Sequence[float], target: int) -> float:
    top = max(logits)
    return top + math.log(math.fsum(math.exp(v - top) for v in logits)) - logits[target]


def nt_xent_of_anchors(z: Array, temperature: float) -> list[float]:
    """Chen et al. 2020, eq. 1, of each of the 2N rows: one positive, 2N - 2 negatives, itself left out."""
    u = [unit(row) for row in z]
    images = len(u) // 2
    losses = []
    for i in range(2 * images):
        candidates = [k for k in range(2 * images) if k != i]
        logits = [float(u[i] @ u[k]) / temperature for k in candidates]
        losses.append(minus_log_softmax(logits, candidates.index((i + images) % (2 * images))))
    return losses


def nt_xent_both_ways(z: Array, temperature: float) -> float:
    """google-research/simclr, objective.py: the mean cross entropy from a to b plus the one from b to a.

    The logits of an image are those to the N other views, then those to the N own views, and its own
    one among these is lowered by 1e9.
    """
    images = len(z) // 2
    a, b = [unit(row) for row in z[:images]], [unit(row) for row in z[images:]]
    loss = 0.0
    for own, other in ((a, b), (b, a)):
        direction = 0.0
        for i in range(images):
            logits = [float(own[i] @ v) / temperature for v in other]
            logits += [float(own[i] @ v) / temperature - (1e9 if k == i else 0.0) for k, v in enumerate(own)]
            direction += minus_log_softmax(logits, i)
        loss += direction / images
    return loss


# Redundancy reduction


def standardise(view: Array, eps: float = 1e-5) -> tuple[Array, Array]:
    """Each column to mean 0 and, but for eps, population variance 1; and what each was divided by."""
    rows, columns = view.shape
    out, deviations = np.zeros_like(view), np.zeros(columns)
    for j in range(columns):
        mean = math.fsum(view[:, j]) / rows
        variance = math.fsum((v - mean) ** 2 for v in view[:, j]) / rows
        deviations[j] = math.sqrt(variance + eps)
        out[:, j] = (view[:, j] - mean) / deviations[j]
    return out, deviations


def cross_correlation(z: Array) -> Array:
    """C of Zbontar et al. 2021, eq. 2, over the N images."""
    images = len(z) // 2
    a, b = standardise(z[:images])[0], standardise(z[images:])[0]
    columns = z.shape[1]
    c = np.zeros((columns, columns))
    for i in range(columns):
        for j in range(columns):
            c[i, j] = math.fsum(a[n, i] * b[n, j] for n in range(images)) / images
    return c


def barlow_twins(z: Array, redundancy_weight: float, scale: float) -> float:
    """Zbontar et al. 2021, eq. 1, times `scale` as in solo-learn."""
    c = cross_correlation(z)
    invariance, redundancy = 0.0, 0.0
    for i in range(len(c)):
        for j in range(len(c)):
            if i == j:
                invariance += (c[i, i] - 1) ** 2
            else:
                redundancy += c[i, j] ** 2
    return scale * (invariance + redundancy_weight * redundancy)


def barlow_twins_gradient(z: Array, redundancy_weight: float, scale: float) -> Array:
    """By hand: through C, through both views, through each column's mean and variance."""
    images, columns = len(z) // 2, z.shape[1]
    c = cross_correlation(z)
    dc = np.zeros_like(c)
    for i in range(columns):
        for j in range(columns):
            dc[i, j] = 2 * scale * (c[i, j] - 1 if i == j else redundancy_weight * c[i, j])
    (a, a_deviation), (b, b_deviation) = standardise(z[:images]), standardise(z[images:])
    gradients = []
    for own, other, deviation, slopes in ((a, b, a_deviation, dc), (b, a, b_deviation, dc.T)):
        dx = np.zeros_like(own)
        for i in range(columns):
            d = [float(slopes[i] @ other[n]) / images for n in range(images)]
            mean = math.fsum(d) / images
            along = math.fsum(d[n] * own[n, i] for n in range(images)) / images
            for n in range(images):
                dx[n, i] = (d[n] - mean - own[n, i] * along) / deviation[i]
        gradients.append(dx)
    return np.concatenate(gradients)


# Information


def cosine_gram(z: Array) -> Array:
    u = [unit(row) for row in z]
    return np.array([[float(p @ q) for q in u] for p in u])


def renyi_entropy(gram: Array) -> float:
    """Order 2, of a Gram matrix with unit diagonal: -log(||K||_F^2 / n^2)."""
    n = len(gram)
    return -math.log(math.fsum(float(gram[i, j]) ** 2 for i in range(n) for j in range(n)) / n**2)


def hadamard(first: Array, second: Array) -> Array:
    n = len(first)
    return np.array([[first[i, j] * second[i, j] for j in range(n)] for i in range(n)])


def mutual_information(features: Array, projections: Array) -> float:
    """Ouyang et al. 2025: H(K1) + H(K2) - H(K1 o K2)."""
    k1, k2 = cosine_gram(features), cosine_gram(projections)
    return renyi_entropy(k1) + renyi_entropy(k2) - renyi_entropy(hadamard(k1, k2))


def mutual_information_gradients(features: Array, projections: Array) -> tuple[Array, Array]:
    """By hand: d/dK of -log sum K^2 is -2 K / sum K^2, and a pair of rows stands in K twice."""
    k1, k2 = cosine_gram(features), cosine_gram(projections)
    n = len(k1)
    joint = math.fsum(float(k1[i, j] * k2[i, j]) ** 2 for i in range(n) for j in range(n))
    gradients = []
    for z, own, other in ((features, k1, k2), (projections, k2, k1)):
        alone = math.fsum(float(own[i, j]) ** 2 for i in range(n) for j in range(n))
        u = np.stack([unit(row) for row in z])
        du = np.zeros_like(u)
        for i in range(n):
            for j in range(n):
                dk = 2 * own[i, j] * other[i, j] ** 2 / joint - 2 * own[i, j] / alone
                du[i] += dk * u[j]
                du[j] += dk * u[i]
        gradients.append(through_length(z, du))
    return gradients[0], gradients[1]


def bounds(features: Array, projections: Array, loss_on_features: float) -> tuple[float, float]:
    """Lower and upper, Ouyang et al. 2025."""
    information = mutual_information(features, projections)
    return -loss_on_features - information, renyi_entropy(cosine_gram(features)) - information


# Levels


def squeezed(z: float, levels: int) -> float:
    """Mentzer et al. 2024, what is rounded to one of `levels` integers."""
    half = (levels - 1) * (1 - 1e-3) / 2
    offset = 0.5 if levels % 2 == 0 else 0.0
    return math.tanh(z + math.tan(offset / half)) * half - offset


def discretise(z: float, levels: int) -> float:
    return round(squeezed(z, levels)) / (levels // 2)


def discretise_slope(z: float, levels: int) -> float:
    """The slope as if nothing had been rounded; d tanh(x) / dx = 1 / cosh(x)^2."""
    half = (levels - 1) * (1 - 1e-3) / 2
    offset = 0.5 if levels % 2 == 0 else 0.0
    x = min(abs(z + math.tan(offset / half)), 300.0)
    return half / math.cosh(x) ** 2 / (levels // 2)


# Measures


def squared_distance(p: Array, q: Array) -> float:
    return math.fsum(float(x - y) ** 2 for x, y in zip(p, q, strict=True))


def alignment(first: Array, second: Array) -> float:
    """Wang & Isola 2020, alpha 2, on the sphere."""
    distances = [squared_distance(unit(p), unit(q)) for p, q in zip(first, second, strict=True)]
    return math.fsum(distances) / len(distances)


def uniformity(rows: Array) -> float:
    """Wang & Isola 2020, t 2, over the pairs i < j."""
    u = [unit(row) for row in rows]
    kernel = [
        math.exp(-2 * squared_distance(u[i], u[j])) for i in range(len(u)) for j in range(i + 1, len(u))
    ]
    return math.log(math.fsum(kernel) / len(kernel))


def knn_votes(
    train: Array, train_labels: Sequence[int], query: Array, *, k: int, temperature: float, classes: int
) -> tuple[list[float], float]:
    """Wu et al. 2018: each class's total of exp(cosine / temperature) over the k nearest training rows.

    And how clear it is who the k nearest are: the cosine of the last one less that of the next.
    """
    cosines = [float(unit(row) @ unit(query)) for row in train]
    order = sorted(range(len(train)), key=lambda i: -cosines[i])
    votes = [0.0] * classes
    for i in order[:k]:
        votes[train_labels[i]] += math.exp(cosines[i] / temperature)
    gap = cosines[order[k - 1]] - cosines[order[k]] if k < len(train) else math.inf
    return votes, gap


def knn_accuracy(
    train: Array, train_labels: Sequence[int], features: Array, labels: Sequence[int], *,
    k: int = 20, temperature: float = 0.07, classes: int,
) -> float:  # fmt: skip
    right = 0
    for query, label in zip(features, labels, strict=True):
        votes, _ = knn_votes(train, train_labels, query, k=k, temperature=temperature, classes=classes)
        right += votes.index(max(votes)) == label
    return right / len(features)


def dead_units(hidden: Array) -> float:
    """A unit's own values decide: max - min <= 1e-6 max(1, max |value|)."""
    dead = 0
    for column in hidden.T:
        values = [float(v) for v in column]
        largest = max(abs(v) for v in values)
        dead += max(values) - min(values) <= 1e-6 * max(1.0, largest)
    return dead / hidden.shape[1]


def saturated_units(hidden: Array, low: float | None, high: float | None) -> float:
    """Each row counts by whichever bound is nearer; 95 % in whole numbers."""
    if low is None or high is None:
        return 0.0
    margin, saturated = 0.01 * (high - low), 0
    for column in hidden.T:
        near = sum(min(abs(float(v) - low), abs(float(v) - high)) <= margin for v in column)
        saturated += 100 * near >= 95 * len(column)
    return saturated / hidden.shape[1]
