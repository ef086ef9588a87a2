"""Slow references in NumPy float64, written from the formulas and not from the code they check.

Loops over anchors and pixels on purpose: nothing here is batched, fused or shared with headsearch.
Shapes: N images (2N anchors), D features, E embedding, W width, P projection, H x W pixels.
"""

from __future__ import annotations

import colorsys
import logging
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf

Array = NDArray[np.float64]


def fresh_generator() -> np.random.Generator:
    """Other numbers in every run; the log, which pytest shows when a test fails, has the seed."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    logging.getLogger(__name__).warning("seed %d", seed)
    return np.random.default_rng(seed)


def unit(vector: Array) -> Array:
    return vector / math.sqrt(float(np.dot(vector, vector)))


def nt_xent(a: Array, b: Array, temperature: float) -> float:
    """Chen et al. 2020, eq. 1: mean over the 2N anchors of -log softmax of the positive.

    `a`, `b`: the two views' projections (N, P). An anchor is never its own negative.
    """
    u = [unit(row) for row in (*a, *b)]
    anchors, images = len(u), len(a)
    total = 0.0
    for i in range(anchors):
        positive = (i + images) % anchors
        others = [math.exp(float(u[i] @ u[k]) / temperature) for k in range(anchors) if k != i]
        total -= math.log(math.exp(float(u[i] @ u[positive]) / temperature) / math.fsum(others))
    return total / anchors


def nt_xent_gradient(a: Array, b: Array, temperature: float) -> tuple[Array, Array]:
    """d nt_xent / d a and d b, anchor by anchor, through the normalisation."""
    z = np.concatenate([a, b])
    u = np.stack([unit(row) for row in z])
    anchors, images = len(z), len(a)
    du = np.zeros_like(z)
    for i in range(anchors):
        weights = [0.0 if k == i else math.exp(float(u[i] @ u[k]) / temperature) for k in range(anchors)]
        for k in range(anchors):
            slope = weights[k] / math.fsum(weights) - (k == (i + images) % anchors)
            du[i] += slope * u[k] / (temperature * anchors)
            du[k] += slope * u[i] / (temperature * anchors)
    for i in range(anchors):
        du[i] = (du[i] - (du[i] @ u[i]) * u[i]) / np.linalg.norm(z[i])
    return du[:images], du[images:]


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "identity": lambda x: x,
    "relu": lambda x: np.where(x > 0, x, 0.0),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0.0))),
    "gelu": lambda x: x * 0.5 * (1.0 + erf(x / math.sqrt(2.0))),
    "silu": lambda x: x / (1.0 + np.exp(-x)),
    "sigmoid": lambda x: 1.0 / (1.0 + np.exp(-x)),
    "tanh": np.tanh,
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
}


def linear(x: Array, weight: Array, bias: Array | None) -> Array:
    """Weight is (out, in)."""
    y = np.array([[float(row @ unit_weights) for unit_weights in weight] for row in x])
    return y if bias is None else y + bias


def batch_norm(x: Array, scale: Array, shift: Array, *, eps: float = 1e-5) -> Array:
    """Ioffe & Szegedy 2015, training mode: biased variance over the batch."""
    centred = x - x.mean(axis=0)
    return scale * centred / np.sqrt((centred**2).mean(axis=0) + eps) + shift


def mlp_parameters(features: int, depth: int, width: int, projection: int, *, batch_norm: bool) -> int:
    """Closed form. With batch norm a hidden layer has scale and shift in place of its bias."""
    per_unit = 2 if batch_norm else 1
    hidden = width * (features + per_unit) + (depth - 2) * width * (width + per_unit)
    return hidden + projection * (width + 1)


def autoencoder_forward(x: Array, layers: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Embedding (N, E) and reconstruction (N, 3HW) of flat images (N, 3HW).

    Linear(3HW, H) - ReLU - Linear(H, E) - Linear(E, H) - ReLU - Linear(H, 3HW) - sigmoid.
    """
    relu, sigmoid = ACTIVATIONS["relu"], ACTIVATIONS["sigmoid"]
    enter, embed, widen, leave = layers
    embedding = linear(relu(linear(x, *enter)), *embed)
    return embedding, sigmoid(linear(relu(linear(embedding, *widen)), *leave))


def autoencoder_gradients(
    x: Array, layers: Sequence[tuple[Array, Array]]
) -> tuple[float, list[tuple[Array, Array]]]:
    """Mean squared error over all N x 3HW elements, and its gradients by back-propagation."""
    enter, _, widen, _ = layers
    embedding, output = autoencoder_forward(x, layers)
    before, middle = linear(x, *enter), linear(embedding, *widen)
    inputs = [x, np.maximum(before, 0), embedding, np.maximum(middle, 0)]
    delta = 2 * (output - x) / x.size * output * (1 - output)
    gates = [None, before > 0, None, middle > 0]
    gradients: list[tuple[Array, Array]] = []
    for (weight, _), entering, gate in zip(layers[::-1], inputs[::-1], gates[::-1], strict=True):
        gradients.insert(0, (delta.T @ entering, delta.sum(axis=0)))
        delta = delta @ weight if gate is None else (delta @ weight) * gate
    return float(((output - x) ** 2).mean()), gradients


def autoencoder_parameters(pixels: int, hidden: int, embedding: int) -> int:
    """Weights of the four layers, then their biases; `pixels` is 3HW."""
    return 2 * pixels * hidden + 2 * hidden * embedding + 2 * hidden + embedding + pixels


class Plateau:
    """Learning rate that halves when the best loss is older than `patience` epochs.

    An epoch is better if it beats the best by a relative 1e-4, as in torch's ReduceLROnPlateau.
    """

    def __init__(self, learning_rate: float, patience: int) -> None:
        self.learning_rate, self.patience = learning_rate, patience
        self.best, self.bad = math.inf, 0

    def step(self, loss: float) -> float:
        if loss < self.best * (1 - 1e-4):
            self.best, self.bad = loss, 0
        else:
            self.bad += 1
        if self.bad > self.patience:
            self.learning_rate, self.bad = self.learning_rate * 0.5, 0
        return self.learning_rate


def rank_me(z: Array, *, eps: float = 1e-7) -> float:
    """Garrido et al. 2023, eq. 1: exp of the entropy of the normalised singular values; z is (N, D).

    `eps` 0 is Roy & Vetterli 2007.
    """
    sigma = np.linalg.svd(z, compute_uv=False)
    total = math.fsum(sigma)
    p = [float(s) / total + eps for s in sigma]
    return math.exp(-math.fsum(q * math.log(q) for q in p if q > 0))


def sgd_step(
    w: Array, g: Array, v: Array | None, *, rate: float, momentum: float, decay: float
) -> tuple[Array, Array]:
    """Sutskever et al. 2013 in torch's form: v = m v + (g + decay w); w = w - rate v."""
    g = g + decay * w
    v = g if v is None else momentum * v + g
    return w - rate * v, v


def lars_step(
    w: Array, g: Array, v: Array | None, *, rate: float, momentum: float, decay: float,
    eta: float = 1e-3, adapt: bool = True,
) -> tuple[Array, Array]:  # fmt: skip
    """You et al. 2017, algorithm 1: v = m v + rate * local * (g + decay w); w = w - v,
    local = eta |w| / (|g| + decay |w|), and 1 where that is 0 / 0 or w is 0 or not adapted."""
    if not adapt:
        decay, local = 0.0, 1.0
    else:
        w_norm, g_norm = math.sqrt(float((w**2).sum())), math.sqrt(float((g**2).sum()))
        scale = g_norm + decay * w_norm
        local = eta * w_norm / scale if w_norm > 0 and scale > 0 else 1.0
    scaled = rate * local * (g + decay * w)
    v = scaled if v is None else momentum * v + scaled
    return w - v, v


def adamw_step(
    w: Array, g: Array, m: Array, s: Array, *, step: int, rate: float, decay: float
) -> tuple[Array, Array, Array]:
    """Loshchilov & Hutter 2019, algorithm 2, beta 0.9 and 0.999, eps 1e-8; `step` counts from 1."""
    w = w * (1 - rate * decay)
    m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g**2
    m_hat, s_hat = m / (1 - 0.9**step), s / (1 - 0.999**step)
    return w - rate * m_hat / (np.sqrt(s_hat) + 1e-8), m, s


def warmup_cosine(step: float, *, peak: float, warmup: float, total: float, final_ratio: float) -> float:
    """Linear from 0 to `peak` over `warmup` steps, then half a cosine to `final_ratio * peak` at `total`."""
    if step < warmup:
        return peak * step / warmup
    share = (step - warmup) / (total - warmup)
    return peak * (final_ratio + (1 - final_ratio) * (1 + math.cos(math.pi * share)) / 2)


def cross_entropy(x: Array, labels: NDArray[np.int64], weight: Array, bias: Array) -> float:
    """Mean over rows; x (N, D), weight (C, D)."""
    total = 0.0
    for row, label in zip(x, labels, strict=True):
        logits = weight @ row + bias
        top = float(logits.max())
        total += top + math.log(math.fsum(np.exp(logits - top))) - float(logits[label])
    return total / len(x)


def channel_statistics(images: NDArray[np.uint8]) -> tuple[Array, Array]:
    """Mean and population standard deviation of each channel in [0, 1]; images (N, C, H, W)."""
    channels = [images[:, c].astype(np.float64).ravel() / 255.0 for c in range(images.shape[1])]
    means = [math.fsum(c) / c.size for c in channels]
    deviations = [
        math.sqrt(math.fsum((c - mean) ** 2) / c.size) for c, mean in zip(channels, means, strict=True)
    ]
    return np.array(means), np.array(deviations)


def crop_boxes(
    rng: np.random.Generator, size: int, count: int, scale_min: float
) -> Iterator[tuple[int, int, int, int]]:
    """(top, left, height, width) as torchvision's RandomResizedCrop draws them on a square image:
    area share U(scale_min, 1), log aspect U(log 3/4, log 4/3), ten tries, else the whole image."""
    for _ in range(count):
        for _ in range(10):
            area = size * size * rng.uniform(scale_min, 1.0)
            aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < width <= size and 0 < height <= size:
                top, left = rng.integers(size - height + 1), rng.integers(size - width + 1)
                yield int(top), int(left), height, width
                break
        else:
            yield 0, 0, size, size


def resample(image: Array, box: tuple[float, float, float, float], *, flip: bool) -> Array:
    """Bilinear resampling of the box (top, left, height, width) of one (C, H, W) image to H x W,
    pixel centres at halves, coordinates clamped to the box: as if it were cut out first."""
    channels, rows, columns = image.shape
    top, left, height, width = box
    out = np.zeros_like(image)
    for r in range(rows):
        for c in range(columns):
            y = top + min(max((r + 0.5) * height / rows - 0.5, 0.0), height - 1.0)
            x = left + min(max((c + 0.5) * width / columns - 0.5, 0.0), width - 1.0)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, rows - 1), min(x0 + 1, columns - 1)
            fy, fx = y - y0, x - x0
            for k in range(channels):
                upper = image[k, y0, x0] * (1 - fx) + image[k, y0, x1] * fx
                lower = image[k, y1, x0] * (1 - fx) + image[k, y1, x1] * fx
                out[k, r, columns - 1 - c if flip else c] = upper * (1 - fy) + lower * fy
    return out


LUMA = (0.2989, 0.587, 0.114)
"""ITU-R BT.601, red as torchvision rounds it."""


def each_pixel(image: Array, change: Callable[[tuple[float, float, float]], Sequence[float]]) -> Array:
    """`change` applied to every (r, g, b) of a (3, H, W) image."""
    out = np.zeros_like(image)
    for r in range(image.shape[1]):
        for c in range(image.shape[2]):
            red, green, blue = (float(v) for v in image[:, r, c])
            out[:, r, c] = change((red, green, blue))
    return out


def luma(rgb: Sequence[float]) -> float:
    return sum(weight * value for weight, value in zip(LUMA, rgb, strict=True))


def grayscale(image: Array) -> Array:
    return each_pixel(image, lambda rgb: [luma(rgb)] * 3)


def clamp(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def brightness(image: Array, factor: float) -> Array:
    """Blend with black."""
    return each_pixel(image, lambda rgb: [clamp(factor * v) for v in rgb])


def contrast(image: Array, factor: float) -> Array:
    """Blend with the image's mean grey."""
    mean = float(np.mean(grayscale(image)[0]))
    return each_pixel(image, lambda rgb: [clamp(factor * v + (1 - factor) * mean) for v in rgb])


def saturation(image: Array, factor: float) -> Array:
    """Blend with the pixel's own grey."""
    return each_pixel(image, lambda rgb: [clamp(factor * v + (1 - factor) * luma(rgb)) for v in rgb])


def hue(image: Array, shift: float) -> Array:
    """Turn the hue of every pixel by `shift` of the full circle."""

    def turn(rgb: tuple[float, float, float]) -> Sequence[float]:
        h, s, v = colorsys.rgb_to_hsv(*rgb)
        return colorsys.hsv_to_rgb((h + shift) % 1.0, s, v)

    return each_pixel(image, turn)


def gaussian_kernel(size: int, sigma: float) -> list[float]:
    raw = [math.exp(-0.5 * ((i - (size - 1) / 2) / sigma) ** 2) for i in range(size)]
    return [value / math.fsum(raw) for value in raw]


def blur(image: Array, size: int, sigma: float) -> Array:
    """Direct two-dimensional sum, edges reflected without repeating the edge pixel."""
    kernel, half = gaussian_kernel(size, sigma), size // 2
    out = np.zeros_like(image)
    _, rows, columns = image.shape

    def inside(i: int, length: int) -> int:
        i = abs(i)
        return 2 * (length - 1) - i if i >= length else i

    for r in range(rows):
        for c in range(columns):
            for dy in range(size):
                for dx in range(size):
                    source = image[:, inside(r + dy - half, rows), inside(c + dx - half, columns)]
                    out[:, r, c] += kernel[dy] * kernel[dx] * source
    return out
