"""The benchmark of this machine: which trainings it measures, and on which images."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from headsearch.config import TrialConfig
from headsearch.core.benchmark import Benchmark, measure, noise
from headsearch.core.device import pick_device
from headsearch.core.features import resolve_precision
from headsearch.core.feed import placed
from headsearch.core.hardware import set_threads
from headsearch.core.images import ImageSet, load_images
from headsearch.core.memory import keep_memory
from headsearch.core.together import Job, train_together
from headsearch.errors import InputError
from headsearch.runtime.preflight import check_data
from headsearch.runtime.single import point_of
from headsearch.study_file import configured

ENCODERS = ("small-resnet", "resnet18")
"""Measured where no study says which."""
NOISE_PIXELS = 32
CPU_IMAGES, GPU_IMAGES = 5_000, 45_000
"""Training images of noise. An epoch of few images is so short on a GPU that its beginning and end count."""


def bench(
    study: Path | None,
    overrides: Sequence[str] = (),
    *,
    encoders: Sequence[str] = (),
    batches: Sequence[int] = (),
    precisions: Sequence[str] = (),
    modes: Sequence[str] = (),
    cuda_graph: bool = False,
    image_size: int = NOISE_PIXELS,
    images: int | None = None,
    device: str = "auto",
    threads: int | None = None,
    repeats: int = 5,
    seconds: float = 2.0,
    probe: bool = True,
    trial: bool = False,
    together: Sequence[int] = (),
    home: Path,
) -> Iterator[Benchmark]:
    """Benchmark the first point of a study with each encoder, batch size, precision, compile mode.

    Without a study, SimCLR with its usual head on `images` training images of noise of `image_size` pixels,
    by default `CPU_IMAGES` or `GPU_IMAGES`. `cuda_graph` measures with and without CUDA graphs, which a GPU
    uses by default; `trial` an epoch with its report and checkpoint; `together` has numbers of trainings to
    measure at once.

    Raises:
        InputError: The study, an override, an encoder or the device is not valid, images are missing, or a
            CUDA graph is asked for without a GPU.
        TrialFailure: A training cannot go on.
    """
    set_threads(threads)
    chosen = pick_device(device)
    keep_memory()
    # All of them before the first is measured: a wrong one is heard of at once.
    names: list[str | None] = [*encoders] or ([None] if study else [*ENCODERS])
    sizes: list[int | None] = [*batches] or [None]
    given: list[str | None] = [None, *precisions]
    if cuda_graph and chosen.type != "cuda":
        raise InputError("--cuda-graph: needs a GPU; this machine's device is the CPU")
    compiled: list[tuple[str | None, bool | None]] = [(None, None)]
    if modes or cuda_graph:
        compiled = [("off", False), *((mode, False) for mode in modes)]
        compiled += [("off", True)] if cuda_graph else []
    varied = (
        "encoder.name", "training.batch_size", "training.precision", "training.compile_encoder",
        "training.cuda_graph",
    )  # fmt: skip
    configs: dict[tuple[object, ...], TrialConfig] = {}
    for name, size, precision, made in itertools.product(names, sizes, given, compiled):
        config = _config(study, overrides, dict(zip(varied, (name, size, precision, *made), strict=True)))
        # The study's own precision, or what `auto` is here, may be asked for too: it is measured once.
        configs.setdefault((name, size, resolve_precision(config.training, chosen), made), config)
    count = images or (GPU_IMAGES if chosen.type == "cuda" else CPU_IMAGES)
    loaded: ImageSet | None = None
    for config in configs.values():
        load = partial(load_images, config.data, home=home) if study else partial(noise, count, image_size)
        if loaded is None:
            if study:
                check_data(config.data, config.training.batch_size, home)
            loaded = placed(load(), chosen)
        found = measure(
            config,
            loaded,
            device=chosen,
            home=home,
            repeats=repeats,
            seconds=seconds,
            probe=probe,
            trial=trial,
        )
        if together:
            job = Job(config, load, chosen, home)
            found = replace(found, together=train_together(job, together, repeats=repeats, seconds=seconds))
        yield found


def _config(
    study: Path | None, overrides: Sequence[str], varied: Mapping[str, str | int | bool | None]
) -> TrialConfig:
    # TOML writes true and false in small letters, and names of encoders and modes have no capitals.
    written = (f"{path}={str(value).lower()}" for path, value in varied.items() if value is not None)
    given = [*overrides, *written]
    return point_of(study, given) if study else configured(given)
