from __future__ import annotations

import json
import logging
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import CPU, tiny_config, tiny_images
from torch import nn

from headsearch.config import TrialConfig
from headsearch.core import autoencoder
from headsearch.core.autoencoder import Autoencoder, autoencoder_key, pretrained_embedding, train_autoencoder
from headsearch.errors import StorageError, TrialFailure

HIDDEN = 32


def config(**parts: Any) -> TrialConfig:
    return tiny_config(head={"kind": "autoencoder", "embedding_dim": 6, "projection_dim": 4}, **parts)


def embedding(home: Path, trial: TrialConfig | None = None) -> tuple[nn.Linear, str]:
    return pretrained_embedding(trial or config(), tiny_images(), HIDDEN, device=CPU, home=home)


def cached_files(home: Path) -> list[str]:
    return sorted(path.suffix for path in (home / "cache" / "autoencoders").iterdir())


def test_shape_is_the_papers() -> None:
    model = Autoencoder(192, 512, 128)
    assert sum(p.numel() for p in model.embedding.parameters()) == 65_664
    pixels = torch.rand(3, 192)
    output = model(pixels)
    assert output.shape == pixels.shape
    assert ((output > 0) & (output < 1)).all()
    hidden = torch.relu(model.hidden(pixels))
    decoded = model.decoder_output(torch.relu(model.decoder_hidden(model.embedding(hidden))))
    assert torch.equal(output, torch.sigmoid(decoded))


def test_it_learns_to_reconstruct() -> None:
    short = config(autoencoder={"epochs": 1, "learning_rate": 3e-3}).autoencoder
    long = short.model_copy(update={"epochs": 30})
    (_, before, _), (_, after, _) = (
        train_autoencoder(recipe, tiny_images(), HIDDEN, 6, CPU) for recipe in (short, long)
    )
    assert after < 0.6 * before


def test_layer_is_the_trained_one_and_comes_back_from_the_cache(tmp_path: Path) -> None:
    layer, key = embedding(tmp_path)
    trial = config()
    model, error, epoch = train_autoencoder(trial.autoencoder, tiny_images(), HIDDEN, 6, CPU)
    assert torch.equal(layer.weight, model.embedding.weight)
    assert torch.equal(layer.bias, model.embedding.bias)
    again, _ = embedding(tmp_path)
    assert torch.equal(again.weight, layer.weight)
    facts = json.loads((tmp_path / "cache" / "autoencoders" / f"{key}.json").read_text())
    assert facts["validation_mse"] == pytest.approx(error)
    assert (facts["best_epoch"], facts["epochs"]) == (epoch, trial.autoencoder.epochs)
    assert (facts["embedding_dim"], facts["hidden_dim"]) == (6, HIDDEN)
    assert facts["seconds"] >= 0
    assert cached_files(tmp_path) == [".json", ".lock", ".safetensors"]


def test_key_changes_with_what_determines_the_weights_and_with_nothing_else() -> None:
    images = tiny_images()
    key = autoencoder_key(config(), images, HIDDEN, CPU)
    wider = tiny_config(head={"kind": "autoencoder", "embedding_dim": 7})
    others = [
        autoencoder_key(config(), images, HIDDEN + 1, CPU),
        autoencoder_key(config(), tiny_images(train=99), HIDDEN, CPU),
        autoencoder_key(config(autoencoder={"epochs": 3}), images, HIDDEN, CPU),
        autoencoder_key(wider, images, HIDDEN, CPU),
        autoencoder_key(config(), images, HIDDEN, torch.device("cuda")),
    ]
    assert len({key, *others}) == 6
    same = tiny_config(
        head={"kind": "autoencoder", "embedding_dim": 6, "frozen": False, "activation": "tanh"},
        seed=9,
        training={"epochs": 7},
        data={"normalization": "zscore"},
    )
    assert autoencoder_key(same, images, HIDDEN, CPU) == key


def test_trial_seed_and_global_generator_have_no_part_in_it(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first, _ = embedding(tmp_path / "a")
    expected = torch.rand(2)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(2), expected)
    second, _ = embedding(tmp_path / "b", config(seed=5))
    assert torch.equal(first.weight, second.weight)


def ask(home: Path, results: Any) -> None:
    train = autoencoder.train_autoencoder

    def slowly(*args: Any) -> Any:
        with (home / "trainings").open("a") as log:
            log.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        return train(*args)

    autoencoder.train_autoencoder = slowly
    layer, key = embedding(home)
    results.put((key, float(layer.weight.double().sum())))


def test_four_processes_train_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["headsearch.core.pretrain"])
    results = context.Queue()
    processes = [context.Process(target=ask, args=(tmp_path, results)) for _ in range(4)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert len(set(answers)) == 1
    trainings = (tmp_path / "trainings").read_text().split()
    assert len(trainings) == 1
    facts = json.loads(next((tmp_path / "cache" / "autoencoders").glob("*.json")).read_text())
    assert facts["pid"] == int(trainings[0])
    assert cached_files(tmp_path) == [".json", ".lock", ".safetensors"]


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "remove"])
def test_damaged_cache_is_made_again(
    tmp_path: Path, suffix: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    layer, key = embedding(tmp_path)
    path = tmp_path / "cache" / "autoencoders" / f"{key}{suffix}"
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    elif damage == "flip":
        middle = content.index(b'"digest"') + 14 if suffix == ".json" else len(content) - 3
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncate" else b"")
    with caplog.at_level(logging.WARNING):
        again, _ = embedding(tmp_path)
    assert torch.equal(again.weight, layer.weight)
    assert ("damaged" in caplog.text) == (damage != "remove")
    assert json.loads(path.with_suffix(".json").read_bytes())["pid"] > 0


def test_divergence_is_a_trial_failure_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoencoder, "_reconstruction_error", lambda *_: float("nan"))
    with pytest.raises(TrialFailure, match=r"autoencoder\.learning_rate") as caught:
        embedding(tmp_path)
    assert caught.value.reason == "non_finite_loss"
    assert cached_files(tmp_path) == [".lock"]


def test_home_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(StorageError, match="autoencoder in"):
        embedding(tmp_path)
