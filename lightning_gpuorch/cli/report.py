"""``gpuorch report``: the report of a run, as one HTML file."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(name="report")
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--output", type=click.Path(path_type=Path), default=None, help="Default: report.html in the run's folder."
)
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
    click.echo(write_report(run, output or run / "report.html"))
