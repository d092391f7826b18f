"""``gpuorch report``: the report of a run, as one HTML file."""

from __future__ import annotations

from pathlib import Path

import click

from lightning_gpuorch.cli.parameters import LocalPath, OutputDirectory
from lightning_gpuorch.errors import GPUOrchError
from lightning_gpuorch.paths import Location
from lightning_gpuorch.predictions.storage.stores import store_of
from lightning_gpuorch.predictions.storage.working_copy import working_copy


@click.command(name="report")
@click.argument("directory", type=OutputDirectory(exists=True))
@click.option("--output", type=LocalPath(), default=None, help="Default: report.html in the run's folder.")
def report(directory: Location, output: Path | None) -> None:
    """Write the report of a run, also of one that was killed.

    DIRECTORY is a run's folder, or a job's output directory: then its latest run is taken.
    """
    from lightning_gpuorch.telemetry.report.report import write_report

    try:
        run, store = directory, store_of(directory)
        if "events" not in store.folders(directory, "events"):
            runs = [name for name in store.folders(directory / "runs", "") if _has_events(directory / "runs" / name)]
            if not runs:
                raise click.ClickException(f"{directory} holds no recorded run: there is no events folder in it.")
            run = directory / "runs" / runs[-1]
        with working_copy(run) as copy:
            written = write_report(copy, output or copy / "report.html")
        click.echo(output or run / written.name)
    except (GPUOrchError, OSError) as error:
        raise click.ClickException(str(error)) from None


def _has_events(run: Location) -> bool:
    return "events" in store_of(run).folders(run, "events")
