"""Step 7: a published number. SimCLR as in dkobak/simclr-cifar10, ResNet-18 on CIFAR-10 for 100 epochs.

The recipe `dkobak-cifar10` on the JPEG copy of CIFAR-10, in bf16 on a GPU, with the source's own readout and nearest
neighbours (`readout`). README.md of this folder lists what is not as in the source.

Each epoch is a line of published.jsonl. A checkpoint is written every tenth epoch; a run that was cut goes on from it
when it is started again with the same output folder and number of epochs.
"""

from __future__ import annotations

import json
import shutil
import time
from typing import Any

from setting import ROOT, Clock, LeftOut, Say, Setting

STUDY = ROOT / "studies" / "libraries" / "simclr-cifar10-dkobak.toml"
HELD_OUT = 0.001
"""Of the training images, for the reports after each epoch; the readout trains on them too, as the source's does."""
PUBLISHED = {"linear": 0.856, "knn": 0.832, "minutes": 20.0, "views_per_second": 8_400}
"""Its README for 100 epochs, on an A100; views per second are 100,000 over the 11.9 s an epoch of its first table."""
EVERY = 10
READOUT_EPOCHS, SMOKE_READOUT_EPOCHS = 500, 3


def overrides(setting: Setting) -> list[str]:
    """Of the study file's first point: the images at hand, few measures in reports, toy sizes in a smoke run."""
    given = [
        "data.name=folder",
        f"data.root={setting.data}",
        "data.image_size=32",
        f"data.validation_fraction={0.1 if setting.smoke else HELD_OUT}",
        f"budget.epochs={setting.epochs}",
        "probe.measures=false",
        "probe.report_images=512",
        "probe.report_iterations=5",
        f"training.precision={'bf16' if setting.on_gpu else 'fp32'}",
    ]
    if setting.smoke:
        given += ["encoder.name=small-resnet", "encoder.width=4", "training.batch_size=32"]
    return given


def run(setting: Setting, say: Say, clock: Clock) -> None:
    """Train, with a row every tenth epoch, and measure."""
    import torch

    from headsearch.core.checkpoint import AsyncCheckpoints, CheckpointFolder
    from headsearch.core.control import EveryEpoch
    from headsearch.core.device import pick_device
    from headsearch.core.feed import placed
    from headsearch.core.images import load_images
    from headsearch.core.memory import keep_memory
    from headsearch.core.pretrain import pretrain
    from headsearch.runtime.single import point_of

    class EveryTenth(EveryEpoch):
        def save_after(self, epoch: int) -> bool:
            return epoch % EVERY == 0

    if setting.data is None:
        raise LeftOut("no images of CIFAR-10: --data")
    device = pick_device(setting.device)
    keep_memory()
    config = point_of(STUDY, overrides(setting))
    images = placed(load_images(config.data, home=setting.home), device)
    folder = setting.out / "checkpoint"
    training = pretrain(
        config,
        images,
        device=device,
        home=setting.home,
        checkpoints=AsyncCheckpoints(CheckpointFolder(folder)),
        control=EveryTenth(),
    )
    began, report = time.perf_counter(), None
    with (setting.out / "published.jsonl").open("a") as lines:
        while True:
            try:
                report = next(training)
            except StopIteration as stop:
                pretrained = stop.value
                break
            told = {
                name: getattr(report, name) for name in ("epoch", "loss", "views_per_second", "train_seconds")
            }
            lines.write(json.dumps(told) + "\n")
            lines.flush()
            if report.epoch % EVERY == 0 or report.epoch == 1:
                say(f"published: epoch {report.epoch} of {config.training.epochs}", told)
    assert report is not None, "no epoch was trained"
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    in_this_run = time.perf_counter() - began
    steps = config.training.epochs * (len(images.train) // config.training.batch_size)
    values = {
        "encoder": config.encoder.name,
        "epochs": config.training.epochs,
        "batch": config.training.batch_size,
        "precision": pretrained.precision,
        "train_images": len(images.train),
        "loss": report.loss,
        "training_minutes": report.train_seconds / 60,
        "views_per_second": 2 * config.training.batch_size * steps / report.train_seconds,
        "views_per_second_of_steps": pretrained.views_per_second,
        "seconds_in_this_run": in_this_run,
    }
    say("published: training", values)
    say("published: accuracy", accuracies(setting, config, images, pretrained))
    shutil.rmtree(folder, ignore_errors=True)


def accuracies(setting: Setting, config: Any, images: Any, pretrained: Any) -> dict[str, Any]:
    """Accuracy on the test images, the readout trained on all training images, in fp32 as in the source."""
    import readout
    import torch

    from headsearch.core.features import build_views, extract_features

    device = next(pretrained.encoder.parameters()).device
    views = build_views(config, images, device)
    began = time.perf_counter()

    def featurised(*splits: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [extract_features(pretrained.encoder, split.images, views, "fp32") for split in splits]
        return torch.cat(rows), torch.cat([split.labels.to(device) for split in splits])

    train, test = featurised(images.train, images.validation), featurised(images.test)
    classes = len(images.classes)
    knn = readout.knn_accuracy(train, test, classes=classes)
    epochs = SMOKE_READOUT_EPOCHS if setting.smoke else READOUT_EPOCHS
    linear = readout.linear_accuracy(train, test, classes=classes, epochs=epochs)
    found: dict[str, Any] = {
        "linear": linear,
        "knn": knn,
        "readout_images": len(train[1]),
        "test_images": len(test[1]),
        "seconds": time.perf_counter() - began,
    }
    return found | {f"published_{name}": value for name, value in PUBLISHED.items()}
