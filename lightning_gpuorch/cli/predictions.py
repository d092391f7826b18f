"""``gpuorch predictions``: look at, check and export what a job has written."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import click

from lightning_gpuorch.cli.parameters import LocalPath, OutputDirectory
from lightning_gpuorch.errors import GPUOrchError
from lightning_gpuorch.paths import Location


@click.group(name="predictions")
def predictions() -> None:
    """Verify, show and export the predictions in a directory."""


def _loaders(directory: Location) -> list[Any]:
    from lightning_gpuorch.predictions import Predictions, read_predictions

    found = read_predictions(directory, allow_missing=True)
    return [found] if isinstance(found, Predictions) else list(found)


@predictions.command()
@click.argument("directory", type=OutputDirectory(exists=True))
def verify(directory: Location) -> None:
    """Read every part and check it; name what is missing or damaged. Exit code 0 means complete and undamaged."""
    bad = False
    try:
        loaders = _loaders(directory)
        kept = not loaders or loaders[0].keeps_outputs
        note = "" if kept else "; outputs were not kept, only that they were computed"
        for number, found in enumerate(loaders):
            samples, missing = found.verify(), found.missing
            errors = len(found.errors)
            with_errors = f", {errors} of them errors in place of predictions" if errors else ""
            click.echo(
                f"dataloader {number}: {len(found)} batches, {samples} samples read and intact{with_errors}{note}"
            )
            if missing:
                bad = True
                click.echo(f"dataloader {number}: {len(missing)} missing: {missing}", err=True)
    except GPUOrchError as error:
        raise click.ClickException(str(error)) from None
    sys.exit(1 if bad else 0)


@predictions.command()
@click.argument("directory", type=OutputDirectory(exists=True))
@click.option("--count", default=5, show_default=True, help="Samples to show.")
def show(directory: Location, count: int) -> None:
    """Print the first samples."""
    try:
        for number, found in enumerate(_loaders(directory)):
            click.echo(f"dataloader {number}: {found.description}")
            rows = zip(found.indices, found.samples(), strict=False)
            for index, sample in itertools.islice(rows, count):
                click.echo(f"  {index}: {sample!r}")
    except GPUOrchError as error:
        raise click.ClickException(str(error)) from None


@predictions.command()
@click.argument("directory", type=OutputDirectory(exists=True))
@click.argument("target", type=LocalPath())
@click.option(
    "--format",
    "kind",
    type=click.Choice(["csv", "hf", "jsonl", "npz", "parquet"]),
    default=None,
    help="Default: by TARGET's name.",
)
def export(directory: Location, target: Path, kind: str | None) -> None:
    """Write all samples to TARGET, one row each: as .parquet, .csv, .jsonl, .npz, or .hf, a Hugging Face dataset on disk."""
    from lightning_gpuorch.predictions.reading.export import export_predictions

    try:
        export_predictions(directory, target, kind)
    except GPUOrchError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"wrote {target}")
