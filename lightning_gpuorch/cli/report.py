"""``gpuorch report``: the report of a run, as one HTML file."""

from __future__ import annotations

from pathlib import Path

import click

from lightning_gpuorch.cli.parameters import LocalPath
from lightning_gpuorch.errors import GPUOrchError


@click.command(name="report")
@click.argument("directory", type=LocalPath(exists=True, file_okay=False))
@click.option("--output", type=LocalPath(), default=None, help="Default: report.html in the run's folder.")
def report(directory: Path, output: Path | None) -> None:
    """Write the report of a run, also of one that was killed.

    DIRECTORY is a run's folder, or a job's output directory: then its latest run is taken.
    """
    from lightning_gpuorch.telemetry.report.report import write_report

    run = directory
    if not (directory / "events").is_dir():
        runs = sorted((directory / "runs").glob("*/events"))
        if not runs:
            raise click.ClickException(f"{directory} holds no recorded run: there is no events folder in it.")
        run = runs[-1].parent
    try:
        click.echo(write_report(run, output or run / "report.html"))
    except (GPUOrchError, OSError) as error:
        raise click.ClickException(str(error)) from None
