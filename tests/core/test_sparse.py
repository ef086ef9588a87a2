"""The sparse projector against its formula in loops, and what it saves at d = 100,000.

Run as a script, it measures steps of a whole head: ``test_sparse.py {sparse,dense} [k] [steps] [d] [batch]``.
"""

from __future__ import annotations

import io
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from headsearch.core.sparse import Selection, TopKAutoencoder, decode, encode

FEATURES, LATENTS, BATCH = 512, 100_000, 512
NAMES = ["pre_bias", "encoder_weight", "encoder_bias", "decoder_weight", "decoder_bias"]


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def reference(weights, k, rows, upstream):
    """Projections, gradient of the rows and of all weights, by the formula: row by row, latent by latent."""
    projections, of_rows = np.zeros_like(rows), np.zeros_like(rows)
    gradients = {name: np.zeros_like(weight) for name, weight in weights.items()}
    for position, row in enumerate(rows):
        centred = row - weights["pre_bias"]
        activations = np.maximum(weights["encoder_weight"] @ centred + weights["encoder_bias"], 0)
        projections[position] = weights["decoder_bias"] + weights["pre_bias"]
        gradients["decoder_bias"] += upstream[position]
        gradients["pre_bias"] += upstream[position]
        for latent in np.argsort(-activations)[:k]:
            activation = activations[latent]
            projections[position] += activation * weights["decoder_weight"][latent]
            if activation > 0:
                gradients["decoder_weight"][latent] += activation * upstream[position]
                through = weights["decoder_weight"][latent] @ upstream[position]
                gradients["encoder_weight"][latent] += through * centred
                gradients["encoder_bias"][latent] += through
                of_rows[position] += through * weights["encoder_weight"][latent]
        gradients["pre_bias"] -= of_rows[position]
    return projections, of_rows, gradients


def seeded(features, latents, k, rows=0, *, dtype=torch.float64, shift=0.0):
    """A head whose biases are not special, and rows. `shift` moves the activations."""
    generator = torch.Generator().manual_seed(features + latents + k)
    head = TopKAutoencoder(features, latents, k).to(dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        head.encoder_bias.add_(shift)
    return head, torch.randn(rows, features, generator=generator).to(dtype).requires_grad_()


def run(head, rows, upstream):
    """Projections and the gradients of the rows and all weights."""
    head.zero_grad()
    rows.grad = None
    projections = head(rows)
    projections.backward(upstream)
    return [projections.detach(), rows.grad, *(parameter.grad for parameter in head.parameters())]


SHAPES = [  # features, latents, k, rows, shift
    (10, 64, 7, 12, 0.0),
    (10, 64, 1, 12, 0.0),
    (10, 20, 20, 12, 0.0),  # k = d: half of what is kept is zero
    (10, 64, 16, 12, -2.0),  # fewer positives than k in nearly all rows
    (10, 64, 16, 12, -50.0),  # no positives
    (16, 9, 3, 5, 1.0),  # fewer latents than features
    (1, 1, 1, 3, 0.0),
    (6, 300, 10, 600, 0.0),  # more rows than are encoded at once
]


@pytest.mark.parametrize(("features", "latents", "k", "rows", "shift"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_against_the_formula(features, latents, k, rows, shift, dtype):
    """float64 to 1e-10; float32, whose reference computes with the same weights in float64, to 2e-4."""
    head, images = seeded(features, latents, k, rows, dtype=dtype, shift=shift)
    upstream = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights = {name: array(parameter) for name, parameter in head.named_parameters()}
    assert list(weights) == NAMES
    projections, of_rows, gradients = reference(weights, k, array(images), array(upstream))
    got = run(head, images, upstream)
    exact = dtype == torch.float64
    for have, want in zip(got, [projections, of_rows, *gradients.values()], strict=True):
        assert have.dtype == dtype
        assert have.is_contiguous()
        np.testing.assert_allclose(
            array(have), want, rtol=1e-10 if exact else 2e-4, atol=1e-10 if exact else 2e-4
        )


def test_the_shapes_have_rows_with_fewer_positives_than_k():
    positives = []
    for features, latents, k, rows, shift in SHAPES:
        head, images = seeded(features, latents, k, rows, shift=shift)
        activations = (images - head.pre_bias) @ head.encoder_weight.T + head.encoder_bias
        positives.append(((activations > 0).sum(1) < k).float().mean().item())
    assert positives[0] == 0
    assert positives[2] == 1
    assert 0.5 < positives[3] <= 1
    assert positives[4] == 1


@pytest.mark.parametrize(("latents", "k", "shift"), [(12, 4, 0.0), (7, 7, 0.0), (12, 1, 0.0), (12, 8, -1.0)])
def test_gradcheck(latents, k, shift):
    head, rows = seeded(5, latents, k, 6, shift=shift)

    def project(rows, *weights):
        return torch.func.functional_call(head, dict(zip(NAMES, weights, strict=True)), rows)

    assert torch.autograd.gradcheck(project, (rows, *head.parameters()))


def test_the_parts_take_gradients_of_any_layout():
    """A sum hands its gradient down expanded, a transposed batch arrives by columns."""
    head, _ = seeded(6, 30, 4)
    batch = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = batch.T.requires_grad_()
    weights = (head.encoder_weight, head.encoder_bias, head.decoder_weight)

    def dense():
        pre = rows @ weights[0].T + weights[1]
        values, indices = pre.topk(4, dim=1)
        return values, torch.zeros_like(pre).scatter(1, indices, values.relu()) @ weights[2]

    def sparse():
        values, selection = encode(rows, weights[0], weights[1], 4)
        return values, decode(values.relu(), selection, weights[2])

    for part in (0, 1):
        inputs = (rows, *weights[:2], *weights[2:][:part])
        got = torch.autograd.grad(sparse()[part].sum(), inputs)
        for have, want in zip(got, torch.autograd.grad(dense()[part].sum(), inputs), strict=True):
            np.testing.assert_allclose(array(have), array(want), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frozen", [NAMES[:3], NAMES[3:], NAMES])
def test_what_is_frozen_gets_no_gradient_and_passes_it_on(frozen):
    head, rows = seeded(6, 30, 4, 9)
    upstream = torch.ones_like(rows)
    whole = run(head, rows, upstream)[1:]
    for name in frozen:
        head.get_parameter(name).requires_grad_(False)
    got = run(head, rows, upstream)[1:]
    for name, have, want in zip(["rows", *NAMES], got, whole, strict=True):
        assert have is None if name in frozen else torch.equal(have, want)


@pytest.mark.parametrize("k", [1, 40, 700])
def test_repeats_are_bit_identical(k):
    head, rows = seeded(64, 3000, k, 400, dtype=torch.float32)
    upstream = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    first = run(head, rows, upstream)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(head, rows, upstream), strict=True))


def by_index(selection: Selection, values, rows, table):
    """`collect_and_match` by an index that autograd differentiates: what it was before, and is slow on CUDA."""
    latents, order = selection.indices.flatten().sort(stable=True)
    starts = torch.searchsorted(latents, torch.arange(selection.latents))
    values = values.detach().requires_grad_()
    collected = F.embedding_bag(
        order // selection.indices.shape[1],
        rows,
        starts,
        per_sample_weights=values.flatten()[order],
        mode="sum",
    )
    (products,) = torch.autograd.grad(collected, values, table)
    return collected.detach(), products


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("latents", "k", "rows"), [(64, 7, 12), (3000, 40, 300), (20, 20, 9), (1, 1, 3)])
def test_products_are_those_of_an_index_to_the_bit(latents, k, rows, dtype):
    draw = torch.Generator().manual_seed(latents + k)
    indices = torch.stack([torch.randperm(latents, generator=draw)[:k] for _ in range(rows)])
    values = torch.randn(rows, k, generator=draw).to(dtype)
    upstream = torch.randn(rows, 16, generator=draw).to(dtype)
    upstream[0] = 0
    table = torch.randn(latents, 16, generator=draw).to(dtype)
    got = Selection(indices, latents).collect_and_match(values, upstream, table)
    whole = torch.int32 if dtype == torch.float32 else torch.int64
    for have, want in zip(got, by_index(Selection(indices, latents), values, upstream, table), strict=True):
        assert have.shape == want.shape
        assert torch.equal(have.view(whole), want.view(whole))


def test_on_a_cpu_the_largest_come_first():
    """Their order is that in which a row's latents are added up, and so decides the last bits."""
    head, rows = seeded(10, 64, 7, 12)
    kept, _ = encode(rows, head.encoder_weight, head.encoder_bias, 7)
    assert torch.equal(kept, kept.sort(dim=1, descending=True).values)


def test_nothing_in_it_is_listed_as_nondeterministic():
    """torch raises for operations that it knows to be so (the CUDA ones only on CUDA)."""
    head, rows = seeded(8, 50, 5, 10, dtype=torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        run(head, rows, torch.ones_like(rows))
    finally:
        torch.use_deterministic_algorithms(False)


def test_evaluation_gives_the_same_projections():
    head, rows = seeded(8, 50, 5, 10)
    want = head(rows)
    assert want.requires_grad
    with torch.no_grad():
        assert torch.equal(head.eval()(rows), want)
    with torch.inference_mode():
        assert torch.equal(head(rows), want)


def test_single_precision_under_autocast():
    head, rows = seeded(8, 50, 5, 10, dtype=torch.float32)
    want = run(head, rows, torch.ones_like(rows))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(head, rows, torch.ones_like(rows))
        assert head(rows.bfloat16()).dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_state_dict_round_trip():
    head, rows = seeded(8, 50, 5, 10, dtype=torch.float32)
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert {name: tuple(weight.shape) for name, weight in state.items()} == {
        "pre_bias": (8,),
        "encoder_weight": (50, 8),
        "encoder_bias": (50,),
        "decoder_weight": (50, 8),
        "decoder_bias": (8,),
    }
    other = TopKAutoencoder(8, 50, 5)
    assert not torch.equal(other(rows), head(rows))
    other.load_state_dict(state)
    assert torch.equal(other(rows), head(rows))


def test_it_starts_as_two_linear_layers_do():
    head = TopKAutoencoder(16, 4000, 5)
    assert not head.pre_bias.any()
    for name, fan_in in [("encoder", 16), ("decoder", 4000)]:
        weight, bias = head.get_parameter(f"{name}_weight"), head.get_parameter(f"{name}_bias")
        assert fan_in**-0.5 * 0.999 < weight.abs().max() <= fan_in**-0.5
        assert weight.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.02)
        assert 0 < bias.abs().max() <= fan_in**-0.5


def test_built_without_memory():
    with torch.device("meta"):
        head = TopKAutoencoder(512, 100_000, 100)
    assert all(parameter.is_meta for parameter in head.parameters())
    assert sum(parameter.numel() for parameter in head.parameters()) == 2 * 512 * 100_000 + 100_000 + 2 * 512


@pytest.mark.parametrize(("latents", "k"), [(10, 0), (10, -1), (10, 11)])
def test_k_out_of_range(latents, k):
    with pytest.raises(ValueError, match=rf"^k: between 1 and 10 \(the latents\) wanted, {k} given$"):
        TopKAutoencoder(4, latents, k)


def dense_forward(head, rows):
    """The head written down plainly, with (B, d) matrices throughout."""
    activations = F.relu((rows - head.pre_bias) @ head.encoder_weight.T + head.encoder_bias)
    values, indices = activations.topk(head.k, dim=1)
    kept = torch.zeros_like(activations).scatter(1, indices, values)
    return kept @ head.decoder_weight + head.decoder_bias + head.pre_bias


def measure(kind, k=1000, steps=1, latents=LATENTS, batch=BATCH):
    """Seconds of each training step of a head, and the peak memory of this process in MB over what it is."""
    torch.manual_seed(0)
    head = TopKAutoencoder(FEATURES, latents, k)
    rows = torch.randn(batch, FEATURES, requires_grad=True)
    upstream = torch.randn(batch, FEATURES)
    before, seconds = peak_memory(), []
    for _ in range(steps):
        head.zero_grad()
        started = time.perf_counter()
        projections = head(rows) if kind == "sparse" else dense_forward(head, rows)
        projections.backward(upstream)
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "peak": peak_memory(), "before": before}


def peak_memory():
    """MB. Not ru_maxrss, in which a process starts with the peak of the one that started it."""
    (line,) = [s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.timeout(600)
def test_a_step_at_full_size(record_property):
    """Sparse needs a third of the dense decoder's time or less, and less memory for the whole step."""
    torch.manual_seed(0)
    k = 1000
    table = torch.randn(LATENTS, FEATURES).requires_grad_()
    upstream = torch.randn(BATCH, FEATURES)
    with torch.no_grad():
        kept, selection = encode(torch.randn(BATCH, FEATURES), table, torch.zeros(LATENTS), k)
    values = kept.requires_grad_()

    def dense():
        matrix = torch.zeros(BATCH, LATENTS).scatter(1, selection.indices, values)
        return torch.autograd.grad(matrix @ table, (values, table), upstream)

    def sparse():
        # a new selection each time, as in training: its sorting is part of the backward pass
        fresh = type(selection)(selection.indices, LATENTS)
        return torch.autograd.grad(decode(values, fresh, table), (values, table), upstream)

    seconds = {sparse: [], dense: []}
    for repeat in range(3):
        results = []
        for function, times in seconds.items():
            started = time.perf_counter()
            results.append(function())
            times.append(time.perf_counter() - started)
        if not repeat:
            for have, want in zip(*results, strict=True):
                assert (have - want).norm() < 1e-5 * want.norm()
        del results
    fast, slow = (statistics.median(times) for times in seconds.values())

    steps = {}
    for kind in ("sparse", "dense"):
        done = subprocess.run(
            [sys.executable, __file__, kind, str(k)], capture_output=True, text=True, check=True
        )
        steps[kind] = json.loads(done.stdout)
    figures = {
        "threads": torch.get_num_threads(),
        "decode_ms": [round(1e3 * fast), round(1e3 * slow)],
        "step_ms": [round(1e3 * sum(steps[kind]["seconds"])) for kind in steps],
        "peak_mb": [round(steps[kind]["peak"]) for kind in steps],
        "before_mb": [round(steps[kind]["before"]) for kind in steps],
    }
    record_property("sparse_against_dense", figures)
    sys.stdout.write(f"\n{figures}\n")
    assert slow >= 3 * fast, figures
    assert steps["sparse"]["peak"] < steps["dense"]["peak"], figures
    gradients, matrix = 2 * 4 * LATENTS * FEATURES / 2**20, 4 * BATCH * LATENTS / 2**20
    assert steps["sparse"]["peak"] - steps["sparse"]["before"] < gradients + matrix, (
        "it holds a (B, d) matrix"
    )


if __name__ == "__main__":
    json.dump(measure(sys.argv[1], *(int(argument) for argument in sys.argv[2:])), sys.stdout)
