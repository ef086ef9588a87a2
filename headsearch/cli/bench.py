"""The command that measures this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from headsearch.cli.options import Device, Json, Overrides, Threads, emit, emit_lines, note


def add_to(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(bench)


def bench(
    study: Annotated[
        str | None,
        typer.Argument(
            metavar="[STUDY.toml]",
            help="Measure the first point of this study on its images; by default SimCLR on images of noise.",
        ),
    ] = None,
    encoder: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Encoder to measure. May be repeated.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(metavar="N", min=2, help="Batch size to measure. May be repeated.")
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Measure in this precision too: bf16 or fp32. May be repeated."),
    ] = None,
    compiled: Annotated[
        list[str] | None,
        typer.Option(
            "--compile",
            metavar="MODE",
            help="Measure with torch.compile too: default, reduce-overhead or max-autotune-no-cudagraphs. "
            "May be repeated.",
        ),
    ] = None,
    cuda_graph: Annotated[
        bool,
        typer.Option(
            "--cuda-graph",
            help="Measure with and without CUDA graphs, which a GPU uses by default; on GPUs only.",
        ),
    ] = False,
    together: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            min=2,
            max=32,
            help="Measure N trainings at once too, which share the cores or the GPU. May be repeated.",
        ),
    ] = None,
    image_size: Annotated[int, typer.Option(min=4, max=1024, help="Side of the images of noise.")] = 32,
    images: Annotated[
        int | None, typer.Option(min=2, help="Training images of noise: 5000 by default, 45000 on a GPU.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds, of which the median is taken.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.0, help="Of each part in each round, about.")] = 2.0,
    probe: Annotated[bool, typer.Option(help="Measure the final probe too.")] = True,
    trial: Annotated[
        bool, typer.Option("--trial", help="Measure an epoch of a trial too, with its report and checkpoint.")
    ] = False,
    overrides: Overrides = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure how near training comes to the encoder's own speed here, and where the rest goes.

    The limit is the encoder's forward and backward on views that are there already. Training, limit and each
    stage take turns in every round.
    """
    from headsearch.home import home_folder
    from headsearch.report.benchmark import (
        bench_table,
        compile_lines,
        graph_lines,
        hardware_line,
        precision_lines,
        reading,
        together_lines,
    )
    from headsearch.runtime.bench import bench as measured
    from headsearch.runtime.bundled import study_file

    results = []
    for one in measured(
        study_file(study) if study else None,
        overrides or [],
        encoders=encoder or (),
        batches=batch or (),
        precisions=precision or (),
        modes=compiled or (),
        cuda_graph=cuda_graph,
        image_size=image_size,
        images=images,
        device=device,
        threads=threads,
        repeats=repeats,
        seconds=seconds,
        probe=probe,
        trial=trial,
        together=together or (),
        home=home_folder(),
    ):
        results.append(one)
        if not as_json:
            note(reading(one))
    if as_json:
        emit({"hardware": hardware_line(results[0]), "results": [one.to_json() for one in results]})
    else:
        advice = [
            *precision_lines(results),
            *compile_lines(results),
            *graph_lines(results),
            *together_lines(results),
        ]
        emit_lines([hardware_line(results[0]), *bench_table(results).lines(), *advice])
