"""``gpuorch top``: what a running job does right now."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.paths import Location, location

if TYPE_CHECKING:
    from lightning_gpuorch.telemetry.run_directory import Run


@click.command(name="top")
@click.argument("target", required=False)
@click.option(
    "--refresh", type=click.FloatRange(min=0.1), default=1.0, show_default=True, help="Seconds between looks."
)
@click.option("--once", is_flag=True, help="Show the present state once.")
def top(target: str | None, refresh: float, once: bool) -> None:
    """Show replicas, ranks, rates, time left, device health and what happened lately.

    Without TARGET the newest running job of yours on this node is shown. TARGET is a job's output directory, a run id, or
    a folder with a run's records; a run that is over is shown as it ended.
    """
    from lightning_gpuorch.telemetry.report.live import EventTail, LiveView, watch
    from lightning_gpuorch.telemetry.run_directory import find_runs

    runs = find_runs()
    try:
        run, records = _find(target, runs)
    except OSError as error:
        raise click.ClickException(str(error)) from None
    alive = run is not None and run.alive
    others = [other.run_id for other in runs if other.alive and other != run]
    if target is None and others:
        click.echo(f"also running: {', '.join(others)} (gpuorch top RUN_ID)")
    if once or not alive:
        from rich.console import Console

        view = LiveView()
        view.add(EventTail(records / "events").poll())
        console = Console()
        console.print(view.render(time.time(), console.height if console.is_terminal else None))
        return
    assert run is not None
    watched = run

    def is_over() -> bool:
        return not any(now.alive for now in find_runs() if now.run_id == watched.run_id)

    try:
        watch(records, refresh_seconds=refresh, is_over=is_over)
    except KeyboardInterrupt:
        return
    click.echo(f"{watched.run_id} is over")


def _find(target: str | None, runs: list[Run]) -> tuple[Run | None, Path]:
    """The run that is meant, if its process is known, and the folder of its records."""
    if target is None:
        alive = [run for run in runs if run.alive]
        if alive:
            return alive[0], alive[0].directory
        killed = f" The last one was killed; its records: {runs[0].directory}." if runs else ""
        raise click.ClickException(
            f"no job of yours is running on this node.{killed} To see another, name its directory."
        )
    try:
        path = location(target, "target")
    except ConfigurationError as error:
        raise click.ClickException(str(error)) from None
    for run in runs:
        if target == run.run_id or path == run.directory:
            return run, run.directory
    for run in runs:
        if run.alive and _resolved(path) in [_resolved(location(text, "directory")) for text in run.job_directories()]:
            return run, run.directory
    if isinstance(path, Path):
        if (path / "events").is_dir():
            return None, path
        kept = sorted((path / "runs").glob("*/events"))
        if kept:
            return None, kept[-1].parent
    known = f" Running now: {', '.join(run.run_id for run in runs if run.alive)}." if runs else ""
    raise click.ClickException(
        f"{target} is no run's id, records or output directory, as far as can be seen here.{known}"
    )


def _resolved(path: Location) -> Location:
    return path.resolve() if isinstance(path, Path) else path
