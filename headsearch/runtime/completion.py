"""What a trial that was trained to its end says: its values and the facts beside them."""

from __future__ import annotations

import socket

from headsearch.core.evaluation import Evaluation
from headsearch.core.hardware import software
from headsearch.core.pretrain import Pretrained
from headsearch.search.outcomes import Outcome
from headsearch.spec import StudySpec


def completed(spec: StudySpec, pretrained: Pretrained, measured: Evaluation, fingerprint: str) -> Outcome:
    """The outcome of a complete trial; `fingerprint` is that of its images."""
    objectives = {
        "probe_accuracy": measured.probe_accuracy,
        "projection_dim": float(pretrained.projection_dim),
        "head_parameters": float(pretrained.head_parameters),
        "train_seconds": pretrained.train_seconds,
    }
    return Outcome(
        "complete",
        values=tuple(objectives[name] for name in spec.objectives),
        facts={
            **{name: value for name, value in vars(measured).items() if name != "details"},
            **measured.details,
            **software(next(pretrained.encoder.parameters()).device),
            "measures": pretrained.measures,
            "kept_epoch": pretrained.kept_epoch,
            "head_flops": pretrained.head_flops,
            "protocol": spec.protocol,
            "trained_on": spec.train_on,
            "host": socket.gethostname(),
            "precision": pretrained.precision,
            "feature_dim": pretrained.feature_dim,
            "trainable_head_parameters": pretrained.trainable_head_parameters,
            "autoencoder": pretrained.autoencoder,
            "data_fingerprint": fingerprint,
        },
    )
