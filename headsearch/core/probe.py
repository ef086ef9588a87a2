"""What an encoder's accuracy is: the final probe of each protocol, and the holdout protocol's own.

Only this module and those of the two papers' protocols read ``images.test``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch

from headsearch.config import Protocol, TrialConfig
from headsearch.core.evaluation import Evaluation, Labelled, fitted_on, knn_details
from headsearch.core.features import build_views, extract_features
from headsearch.core.heads import head_layers
from headsearch.core.images import ImageSet, Split
from headsearch.core.logistic import LinearProbe, fit_probe
from headsearch.core.pretrain import Pretrained
from headsearch.core.probe_ouyang2025 import evaluate_ouyang2025
from headsearch.core.probe_schliebitz2024 import evaluate_schliebitz2024
from headsearch.errors import DataError

__all__ = ["Evaluation", "evaluate"]


def evaluate(
    pretrained: Pretrained, images: ImageSet, config: TrialConfig, *, device: torch.device
) -> Evaluation:
    """Measure a pretrained encoder as `config.protocol` says. Raises DataError without test images."""
    if not len(images.test):
        raise DataError(f"data: {images.name} has no test images to score the final probe on")
    return PROTOCOLS[config.protocol](pretrained, images, config, device)


def evaluate_holdout(
    pretrained: Pretrained, images: ImageSet, config: TrialConfig, device: torch.device
) -> Evaluation:
    """Fit the final probe, whose penalty the validation split chooses, and score it once on the test split.

    It is fitted on the training split or, where `data.train_on` says so, on both (`select`).
    With `config.probe.layers`, the outputs of the head's layers are probed likewise; with `probe.knn_train`
    ``all``, kNN is scored on both splits too.
    """
    views = build_views(config, images, device)
    encoder = pretrained.encoder.to(device)

    def featurise(split: Split) -> Labelled:
        features = extract_features(encoder, split.images, views, pretrained.precision)
        return features, split.labels.to(device)

    splits = [featurise(split) for split in (images.train, images.validation, images.test)]
    accuracies, penalty = select(splits, len(images.classes), config)
    details: dict[str, Any] = {"penalty": penalty}
    if config.probe.knn_train == "all":
        train, validation, test = splits
        details |= knn_details(train, validation, test, len(images.classes), config)
    if config.probe.layers:
        head = pretrained.head.to(device)
        layers = [head_layers(head, features)[0] for features, _ in splits]
        details["layers"] = {}
        for name in list(layers[0])[1:]:
            rows = [(outputs[name], labels) for outputs, (_, labels) in zip(layers, splits, strict=True)]
            (selected, scored), _ = select(rows, len(images.classes), config)
            details["layers"][name] = {"validation": selected, "test": scored}
    return Evaluation(
        probe_accuracy=accuracies[0],
        test_accuracy=accuracies[1],
        train_images=len(images.labelled),
        validation_images=len(images.validation),
        test_images=len(images.test),
        details=details,
    )


def select(
    splits: Sequence[Labelled], classes: int, config: TrialConfig
) -> tuple[tuple[float, float], float]:
    """Fit on the first split, choose the penalty on the second, score on the third.

    Returns the accuracies on the last two, and the penalty: of equals the largest. Penalties are tried from
    the largest down, each starting at the solution of the one before. Where `data.train_on` names both
    splits, the probe that is scored on the third is fitted on the first two, with the penalty that was chosen
    before; the accuracy on the second is still that of the probe that was fitted on the first alone.
    """
    train, validation, test = splits
    probe: LinearProbe | None = None
    best: tuple[float, float, LinearProbe] | None = None
    for penalty in sorted(config.probe.penalties, reverse=True):
        probe = fit_probe(*train, classes, penalty=penalty, iterations=config.probe.iterations, start=probe)
        accuracy = probe.accuracy(*validation)
        if best is None or accuracy > best[0]:
            best = accuracy, penalty, probe
    assert best is not None  # noqa: S101
    accuracy, penalty, probe = best
    if config.data.trains_on_validation:
        both = fitted_on(train, validation, config)
        probe = fit_probe(*both, classes, penalty=penalty, iterations=config.probe.iterations, start=probe)
    return (accuracy, probe.accuracy(*test)), penalty


PROTOCOLS: Final[
    Mapping[Protocol, Callable[[Pretrained, ImageSet, TrialConfig, torch.device], Evaluation]]
] = {
    "holdout": evaluate_holdout,
    "schliebitz2024": evaluate_schliebitz2024,
    "ouyang2025": evaluate_ouyang2025,
}
