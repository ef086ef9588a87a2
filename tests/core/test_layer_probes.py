"""Probes of a head's layers in protocol `holdout`, and the operations that a head is said to take.

Layers are run here one by one from the head's own parameters, in evaluation mode and from the formulas;
probes are fitted by the library's `fit_probe`, which test_reference_probe.py checks, and selected here.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import CPU, finish, start, tiny_config, tiny_images
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from headsearch.config import TrialConfig
from headsearch.core.features import build_views, extract_features
from headsearch.core.heads import build_head, describe_head, head_layers
from headsearch.core.images import Split
from headsearch.core.logistic import LinearProbe, fit_probe
from headsearch.core.pretrain import Pretrained
from headsearch.core.probe import evaluate

IMAGES = tiny_images()
SPLITS = ("train", "validation", "test")

LAYERS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    # head; how many modules of the sequence come before each output
    "mlp": ({"kind": "mlp", "width": 8, "projection_dim": 4}, {"hidden1": 2, "z": 3}),
    "deep": (
        {"kind": "mlp", "depth": 4, "width": 8, "projection_dim": 4, "activation": "tanh"},
        {"hidden1": 2, "hidden2": 4, "hidden3": 6, "z": 7},
    ),
    "identity": (
        {"kind": "mlp", "depth": 3, "width": 8, "projection_dim": 4, "activation": "identity"},
        {"hidden1": 2, "hidden2": 4, "z": 5},
    ),
    "batch norm": (
        {"kind": "mlp", "depth": 3, "width": 8, "projection_dim": 4, "batch_norm": True},
        {"hidden1": 3, "hidden2": 6, "z": 7},
    ),
    "output norm": (
        {"kind": "mlp", "width": 8, "projection_dim": 4, "output_norm": "batch_norm_no_offset",
         "normalize_input": True},
        {"hidden1": 3, "z": 5},
    ),
    "dropout": (
        {"kind": "mlp", "depth": 3, "width": 8, "projection_dim": 4, "dropout": 0.5, "batch_norm": True},
        {"hidden1": 3, "hidden2": 7, "z": 9},
    ),
    "even levels": ({"kind": "mlp", "width": 8, "projection_dim": 4, "levels": 2000}, {"hidden1": 2, "z": 4}),
    "odd levels": ({"kind": "mlp", "width": 8, "projection_dim": 4, "levels": 2001}, {"hidden1": 2, "z": 4}),
    "frozen": ({"kind": "mlp", "width": 8, "projection_dim": 4, "frozen": True}, {"hidden1": 2, "z": 3}),
    "autoencoder": (
        {"kind": "autoencoder", "embedding_dim": 8, "projection_dim": 4, "activation": "sigmoid"},
        {"hidden1": 2, "z": 3},
    ),
    "sparse": ({"kind": "sparse", "latents": 40, "k": 5}, {"z": 1}),
    "sparse block": ({"kind": "sparse", "latents": 40, "k": 5, "block_width": 12}, {"hidden1": 3, "z": 4}),
    "linear": ({"kind": "linear", "projection_dim": 4}, {"z": 1}),
    "reweight": ({"kind": "reweight", "kappa": 1.5}, {"z": 1}),
    "none": ({"kind": "none"}, {"z": 0}),
}  # fmt: skip


def by_hand(layer: nn.Module, rows: Tensor) -> Tensor:
    """One layer in evaluation mode, from its parameters where it has any."""
    if isinstance(layer, nn.Linear):
        out = rows @ layer.weight.T
        return out if layer.bias is None else out + layer.bias
    if isinstance(layer, nn.BatchNorm1d):
        rows = (rows - layer.running_mean) / (layer.running_var + layer.eps).sqrt() * layer.weight
        return rows if layer.bias is None else rows + layer.bias
    if isinstance(layer, nn.Dropout):
        return rows
    kind = type(layer).__name__
    if kind == "UnitLength":
        return rows / rows.square().sum(1, keepdim=True).sqrt()
    if kind == "Reweighting":
        return rows * torch.tensor([1.5**-i for i in range(rows.shape[1])])
    if kind == "TopKAutoencoder":
        hidden = F.relu((rows - layer.pre_bias) @ layer.encoder_weight.T + layer.encoder_bias)
        weakest = hidden.sort(1, descending=True).values[:, 4:5]
        hidden = hidden * (hidden >= weakest)
        return hidden @ layer.decoder_weight + layer.decoder_bias + layer.pre_bias
    if kind == "Levels":
        half = (layer.levels - 1) * (1 - 1e-3) / 2
        offset = 0.5 if layer.levels % 2 == 0 else 0.0
        bounded = torch.tanh(rows.double() + math.tan(offset / half)) * half - offset
        return (bounded.round() / (layer.levels // 2)).float()
    return layer(rows)  # an activation


def features_of(pretrained: Pretrained, split: Split) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(pretrained.encoder).eval()(split.images.float() / 255)


def chosen(rows: dict[str, Tensor], config: TrialConfig) -> tuple[float, float]:
    """Accuracy on validation and test images of the probe that does best on the former.

    From the strongest penalty down, each fit from the one before; among equals the strongest penalty.
    """
    best, probe = (-1.0, -1.0), None
    for penalty in sorted(config.probe.penalties)[::-1]:
        probe = fit_probe(
            rows["train"], IMAGES.train.labels, 3, penalty=penalty, iterations=config.probe.iterations,
            start=probe,
        )  # fmt: skip
        scores = [share_right(probe, rows[name], getattr(IMAGES, name)) for name in ("validation", "test")]
        if scores[0] > best[0]:
            best = scores[0], scores[1]
    return best


def share_right(probe: LinearProbe, rows: Tensor, split: Split) -> float:
    logits = ((rows.double() - probe.mean) / probe.scale) @ probe.weight.T + probe.bias
    return sum(
        int(row.argmax()) == int(label) for row, label in zip(logits, split.labels, strict=True)
    ) / len(split)


def trained(head: dict[str, Any], home: Path, **probe: Any) -> tuple[TrialConfig, Pretrained]:
    probe = {"iterations": 20, "report_iterations": 2, "measures": False, **probe}
    config = tiny_config(head=head, probe=probe, training={"epochs": 2, "batch_size": 32})
    return config, finish(start(config, IMAGES, home))[1]


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_is_probed_as_the_features_are(name: str, tmp_path: Path) -> None:
    head, stops = LAYERS[name]
    config, pretrained = trained(head, tmp_path, layers=True)
    pretrained.head.train()  # dropout must not act, nor the statistics of a batch
    state = copy.deepcopy(pretrained.head.state_dict())
    found = evaluate(pretrained, IMAGES, config, device=CPU)
    assert all(torch.equal(value, pretrained.head.state_dict()[key]) for key, value in state.items())
    assert list(found.details["layers"]) == list(stops), "in order, the features not among them"

    # The library's own features, once they are seen to be right: a fit that stops after 20 iterations makes
    # another prediction of what is rounded otherwise.
    views, features = build_views(config, IMAGES, CPU), {}
    for split in SPLITS:
        part = getattr(IMAGES, split)
        features[split] = extract_features(pretrained.encoder, part.images, views, pretrained.precision)
        torch.testing.assert_close(features[split], features_of(pretrained, part), rtol=1e-4, atol=1e-5)
    assert (found.probe_accuracy, found.test_accuracy) == chosen(features, config)
    sequence = copy.deepcopy(pretrained.head).eval()
    for layer, stop in stops.items():
        with torch.no_grad():
            rows = {split: sequence[:stop](values) for split, values in features.items()}
        validation, test = chosen(rows, config)
        assert found.details["layers"][layer] == {"validation": validation, "test": test}, layer
    if name == "none":
        assert found.details["layers"]["z"]["validation"] == found.probe_accuracy
        assert found.details["layers"]["z"]["test"] == found.test_accuracy
    assert stops["z"] == len(sequence)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_outputs_are_those_by_hand(name: str, tmp_path: Path) -> None:
    head, stops = LAYERS[name]
    _, pretrained = trained(head, tmp_path)
    pretrained.head.train()
    features = features_of(pretrained, IMAGES.validation)
    outputs, hidden = head_layers(pretrained.head, features)
    assert list(outputs) == ["h", *stops]
    assert outputs["h"] is features
    assert [
        torch.equal(layer.values, outputs[f"hidden{at}"]) for at, layer in enumerate(hidden, start=1)
    ] == [True] * (len(stops) - 1)
    rows, at = features, 0
    for layer, stop in stops.items():
        with torch.no_grad():
            for module in list(pretrained.head)[at:stop]:
                rows = by_hand(module, rows)
        at = stop
        close = torch.isclose(outputs[layer], rows, rtol=1e-4, atol=1e-5)
        if layer == "z" and "levels" in head:  # where rounding here and there is to neighbouring levels
            close |= (outputs[layer] - rows).abs() < 1.01 / (head["levels"] // 2)
            assert torch.isclose(outputs[layer], rows, atol=1e-5).double().mean() > 0.95
        assert close.all(), layer
        rows = outputs[layer]


def test_layers_are_probed_only_where_asked(tmp_path: Path) -> None:
    config, pretrained = trained(LAYERS["mlp"][0], tmp_path)
    plain = evaluate(pretrained, IMAGES, config, device=CPU)
    assert set(plain.details) == {"penalty"}
    asked = config.model_copy(update={"probe": config.probe.model_copy(update={"layers": True})})
    probed = evaluate(pretrained, IMAGES, asked, device=CPU)
    assert (probed.probe_accuracy, probed.test_accuracy) == (plain.probe_accuracy, plain.test_accuracy)
    assert probed.details["penalty"] == plain.details["penalty"]


FLOPS = [  # of 128 features: two for each weight that is used
    ({"kind": "mlp", "width": 10, "projection_dim": 3}, 2 * (128 * 10 + 10 * 3)),
    ({"kind": "mlp", "width": "features", "projection_dim": 3}, 2 * (128 * 128 + 128 * 3)),
    ({"kind": "mlp", "depth": 4, "width": 10, "projection_dim": 3}, 2 * (1280 + 100 + 100 + 30)),
    ({"kind": "mlp", "width": 10, "projection_dim": 3, "batch_norm": True, "output_norm": "batch_norm"}, 2620),
    ({"kind": "mlp", "width": 10, "projection_dim": 3, "dropout": 0.5, "normalize_input": True}, 2620),
    ({"kind": "mlp", "width": 10, "projection_dim": 3, "frozen": True, "levels": 4}, 2620),
    ({"kind": "linear", "projection_dim": 7}, 1792),
    ({"kind": "none"}, 0),
    ({"kind": "none", "levels": 3}, 0),
    ({"kind": "autoencoder", "embedding_dim": 9, "projection_dim": 5}, 2 * (128 * 9 + 9 * 5)),
    ({"kind": "autoencoder", "embedding_dim": 9, "projection_dim": 5, "first_layer": "random"}, 2394),
    ({"kind": "reweight"}, 128),  # one product for each feature
    ({"kind": "sparse", "latents": 1000, "k": 10}, 2 * 1000 * 128 + 2 * 10 * 128),
    ({"kind": "sparse", "latents": 1000, "k": 10, "block_width": 32}, 2 * 128 * 32 + 2 * 1010 * 32),
    ({"kind": "sparse", "latents": 50, "k": 50}, 4 * 50 * 128),
]  # fmt: skip


@pytest.mark.parametrize(("head", "flops"), FLOPS, ids=str)
def test_operations_of_a_head(head: dict[str, Any], flops: int) -> None:
    config = TrialConfig.model_validate({"head": head})
    facts = describe_head(config)
    assert facts.head_flops == flops
    if head["kind"] in ("mlp", "linear", "autoencoder", "none"):
        built = build_head(config.head, 128, nn.Linear(128, 9)).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            built(torch.rand(6, 128))
        assert counter.get_total_flops() == 6 * flops, "as torch counts six rows"


def test_operations_at_the_papers_sizes() -> None:
    """2 F W + 2 W P of Ouyang et al.'s SimCLR head, and of the sparse one that decodes 100 of 100,000."""
    for system, flops in (
        ("ouyang2025-simclr", 2 * (512 * 2048 + 2048 * 256)),
        ("ouyang2025-simclr-sparse", 2 * 512 * (100_000 + 100)),
        ("xue2024-reweight", 512),
    ):
        config = TrialConfig.model_validate({"system": system, "encoder": {"name": "resnet18"}})
        assert describe_head(config).head_flops == flops
