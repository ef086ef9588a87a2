"""Tables and lines that say what `headsearch bench` measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from headsearch.core.benchmark import Benchmark
from headsearch.core.stages import Measure
from headsearch.core.together import Together
from headsearch.report.tables import Table, duration

REPORT_ALLOWANCE, CHECKPOINT_ALLOWANCE = 0.05, 0.01
"""Shares of an epoch above which the reading names what would lower them."""

PAYS = 1.05
"""Ratio of speeds from which compiling is worth its start, bf16 its rounding, a shared device its memory."""


def bench_table(results: Sequence[Benchmark]) -> Table:
    """One row for each encoder and batch size."""
    columns = (
        "encoder", "batch", "precision", "compiled", "training views/s", "encoder alone", "share", "views",
        "head and loss", "optimizer", "report", "checkpoint", "probe", "peak memory",
    )  # fmt: skip
    return Table(columns, tuple(_row(one) for one in results))


def _row(one: Benchmark) -> tuple[str, ...]:
    share = stage_shares(one)
    return (
        one.encoder,
        str(one.batch_size),
        one.precision,
        one.compiled,
        _speed(one.training),
        _speed(one.limit),
        f"{one.share.median:.1%}",
        *(f"{share[name]:.1%}" for name in ("views", "head and loss", "optimizer")),
        f"{one.report_seconds / one.epoch_seconds:.1%}",
        f"{one.checkpoint_seconds / one.epoch_seconds:.2%}",
        duration(one.probe_seconds) or "-",
        f"{one.peak_bytes / 2**30:.2f} GiB" if one.peak_bytes else "-",
    )


def _speed(measure: Measure) -> str:
    return f"{measure.median:,.0f} ({measure.low:,.0f}-{measure.high:,.0f})"


def stage_shares(one: Benchmark) -> dict[str, float]:
    """What share of a step each stage takes, measured by itself."""
    return {name: seconds / one.step_seconds for name, seconds in one.stages.items()}


def reading(one: Benchmark) -> str:
    """One line: how near the limit, where the rest goes, and what may be done about it."""
    share = stage_shares(one)
    rest = ", ".join(f"{name} {share[name]:.1%}" for name in ("views", "head and loss", "optimizer"))
    line = (
        f"{one.encoder}, batch {one.batch_size}: {one.share.median:.0%} of the limit, which is the encoder's "
        f"own speed; of a step, {rest}"
    )
    report = one.report_seconds / one.epoch_seconds
    if report > REPORT_ALLOWANCE:
        line += (
            f"; a report takes {report:.0%} of an epoch of {one.train_images:,} images: fewer "
            "probe.report_images make it cheaper"
        )
    save = one.checkpoint_seconds / one.epoch_seconds
    if save > CHECKPOINT_ALLOWANCE:
        line += (
            f"; a checkpoint takes {save:.1%} of such an epoch, in a thread beside the training: with "
            "worker.checkpoint_epochs it is written less often"
        )
    if one.trial:
        line += (
            f"; a trial's epoch with report and checkpoint has {one.trial.share:.0%} of the encoder's speed, "
            f"and those two take {one.trial.rest_share:.1%} of the encoder's time"
        )
    return line


def precision_lines(results: Sequence[Benchmark]) -> list[str]:
    """What bf16 brings, for what was measured in fp32 too."""
    return _ratios(results, "precision", "fp32", "training.precision")


def compile_lines(results: Sequence[Benchmark]) -> list[str]:
    """What torch.compile brings, for what was measured with and without it."""
    plain = [one for one in results if one.compiled != "cuda-graph"]
    return _ratios(plain, "compiled", "off", "training.compile_encoder")


def graph_lines(results: Sequence[Benchmark]) -> list[str]:
    """What a CUDA graph brings, for what was measured with and without it."""
    plain = [
        replace(one, compiled="true" if one.compiled == "cuda-graph" else one.compiled)
        for one in results
        if one.compiled in ("off", "cuda-graph")
    ]
    return _ratios(plain, "compiled", "off", "training.cuda_graph")


def _ratios(results: Sequence[Benchmark], field: str, usual: str, path: str) -> list[str]:
    """One line for each result that differs in `field` alone from one where that is `usual`."""

    def rest(one: Benchmark) -> tuple[object, ...]:
        named = ("encoder", "batch_size", "precision", "compiled")
        return tuple(getattr(one, name) for name in named if name != field)

    plain = {rest(one): one.training.median for one in results if getattr(one, field) == usual}
    lines = []
    for one in results:
        value, before = getattr(one, field), plain.get(rest(one))
        if value != usual and before:
            ratio = one.training.median / before
            advice = "worth setting" if ratio > PAYS else "does not pay"
            lines.append(
                f"{one.encoder}, batch {one.batch_size}: {path}={value} makes training {ratio:.2f} x "
                f"as fast: {advice} here"
            )
    return lines


def together_lines(results: Sequence[Benchmark]) -> list[str]:
    """What several trainings at once make, and how to have as many."""
    lines = []
    for one in results:
        for several in one.together[1:]:
            threads = f"{several.threads} thread{'s' if several.threads > 1 else ''}"
            each = f", {threads} each," if one.device == "cpu" else ""
            lines.append(
                f"{one.encoder}, batch {one.batch_size}: {several.trainings} trainings at once{each} make "
                f"{_speed(several.total)} views/s together, {several.gain.median:.2f} x one alone"
            )
        if one.together:
            best = max(one.together, key=lambda several: several.gain.median)
            lines.append(f"{one.encoder}, batch {one.batch_size}: {_advice(best, one.device)}")
    return lines


def _advice(best: Together, device: str) -> str:
    if best.gain.median <= PAYS:
        return "one training at a time is as fast here"
    if device == "cpu":
        return f"headsearch run --workers {best.trainings} is fastest here"
    return f"HEADSEARCH_GPU_SLOTS={best.trainings} is fastest here, if nothing larger has to fit on the GPU"


def hardware_line(one: Benchmark) -> str:
    """What it was measured with."""
    return (
        f"{one.model}, {one.threads} threads, torch {one.torch}"
        if one.device == "cpu"
        else (f"{one.model}, torch {one.torch}")
    )
