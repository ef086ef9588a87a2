"""The command launch: workers on this machine, on Slurm, on Kubernetes."""

from __future__ import annotations

from typing import Annotated

import typer

from headsearch.cli.options import NoCheck, Overrides, Threads

_SLURM, _KUBERNETES, _BOTH = "Slurm", "Kubernetes", "Slurm, Kubernetes"


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(launch)


def launch(
    study: Annotated[
        str,
        typer.Argument(
            metavar="STUDY", help="Study in the database, a study file, or a bundled one by name."
        ),
    ],
    on: Annotated[str, typer.Option(metavar="ENGINE", help="local, slurm or kubernetes.")],
    workers: Annotated[
        int | None, typer.Option(min=1, help="How many; needed but for local, where run's default is taken.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="local, Slurm: auto, cpu, cuda or cuda:<index>.")
    ] = None,
    threads: Threads = None,
    overrides: Overrides = None,
    no_check: NoCheck = False,
    cpus: Annotated[int | None, typer.Option(min=1, help=f"{_BOTH}: CPUs of each worker.")] = None,
    memory_gb: Annotated[float | None, typer.Option(min=0.1, help=f"{_BOTH}: memory of each worker.")] = None,
    gpus: Annotated[
        int | None, typer.Option(min=0, max=1, help=f"{_SLURM}: GPUs of each worker, which trains on one.")
    ] = None,
    minutes: Annotated[
        int | None, typer.Option(min=1, help=f"{_SLURM}: time limit, by default 240; it is requeued then.")
    ] = None,
    partition: Annotated[str | None, typer.Option(metavar="NAME", help=f"{_SLURM}: where.")] = None,
    account: Annotated[str | None, typer.Option(metavar="NAME", help=f"{_SLURM}: on whose account.")] = None,
    slurm: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help=f"{_SLURM}: any other option of sbatch, such as qos=high."),
    ] = None,
    overlay: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"{_KUBERNETES}: cpu (default), gpu or spot.")
    ] = None,
    image: Annotated[str | None, typer.Option(metavar="NAME:TAG", help=f"{_KUBERNETES}: of workers.")] = None,
    namespace: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"{_KUBERNETES}: the context's by default.")
    ] = None,
    claim: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"{_KUBERNETES}: PersistentVolumeClaim that all pods share."),
    ] = None,
) -> None:
    """Start workers of a study here in the background, as a Slurm job array, or as pods.

    Says what it will do before it does it. A study file is made into a study first, or resumed.
    """
    from headsearch.runtime.launching.engines import Wanted
    from headsearch.runtime.launching.launch import launch as start

    wanted = Wanted(
        workers=workers,
        device=device,
        threads=threads,
        cpus=cpus,
        gpus=gpus,
        memory_gb=memory_gb,
        minutes=minutes,
        partition=partition,
        account=account,
        slurm=tuple(slurm or ()),
        image=image,
        namespace=namespace,
        overlay=overlay,
        claim=claim,
    )
    start(
        study,
        overrides or [],
        on,
        wanted,
        data_check=not no_check,
        dry_run=dry_run,
        say=lambda line: typer.echo(line),
    )
