"""``gpuorch calibrate SCRIPT``: what one device does, for ``distributed_scaling_efficiency_percent``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click

from lightning_gpuorch.cli.parameters import LocalPath
from lightning_gpuorch.telemetry.metrics.efficiency import CALIBRATION


@click.command(name="calibrate", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "--seconds", type=click.FloatRange(min=1.0), default=30.0, show_default=True, help="Time to measure after warm-up."
)
@click.option(
    "--output", type=LocalPath(dir_okay=False), default=Path("gpuorch-baseline.json"),
    show_default=True, help="The baseline.",
)  # fmt: skip
@click.option("--accelerator", type=click.Choice(["cpu", "gpu", "cuda", "auto"]), default="auto", show_default=True,
              help="For Fabric scripts that leave it open.")  # fmt: skip
@click.argument("script", type=click.Path(exists=True, dir_okay=False))
@click.argument("script_args", nargs=-1, type=click.UNPROCESSED)
def calibrate(script: str, script_args: tuple[str, ...], seconds: float, output: Path, accelerator: str) -> None:
    """Run SCRIPT on one device for a while, whatever it asks for, and write its throughput to a file.

    Nothing is written to the script's output directory. The file counts for runs with the same model, precision, kind of
    device, batch size and versions, and is refused for others: give it to PrometheusMetrics(baseline=FILE), or set
    GPUORCH_BASELINE_FILE.
    """
    import json

    output = output.absolute()
    output.unlink(missing_ok=True)  # an old one must not be taken for the result of a run that failed
    environment = {
        **os.environ,
        CALIBRATION: f"{seconds} {output}",
        "LT_CLI_USED": "1",
        "LT_ACCELERATOR": accelerator,
        "LT_STRATEGY": "gpuorch",
        "LT_DEVICES": "1",
        "LT_NUM_NODES": "1",
    }
    done = subprocess.run([sys.executable, script, *script_args], env=environment, check=False)
    if done.returncode != 0:
        raise click.ClickException(f"{script} ended with exit code {done.returncode}; there is no baseline.")
    if not output.exists():
        raise click.ClickException(
            f"{script} made no predict call with strategy='gpuorch', so nothing was measured; there is no baseline."
        )
    found = json.loads(output.read_text(encoding="utf-8"))
    click.echo(
        f"{found['samples_per_second']:,.1f} samples per second on one device, over {found['num_samples']:,} samples; "
        f"written to {output}"
    )
