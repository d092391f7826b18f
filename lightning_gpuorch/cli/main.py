"""The commands themselves; each one hands over to the module that does the work."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from typing import Any

import click

from lightning_gpuorch._version import __version__
from lightning_gpuorch.cli.calibrate import calibrate
from lightning_gpuorch.cli.doctor import doctor
from lightning_gpuorch.cli.predictions import predictions
from lightning_gpuorch.cli.report import report
from lightning_gpuorch.cli.run import run
from lightning_gpuorch.cli.stop import stop
from lightning_gpuorch.cli.submit import submit
from lightning_gpuorch.cli.top import top
from lightning_gpuorch.testing.chaos import chaos


@click.group(name="gpuorch")
@click.version_option(__version__)
def gpuorch() -> None:
    """Orchestrated multi-GPU inference: every prediction exactly once, whatever dies on the way."""


gpuorch.add_command(run)
gpuorch.add_command(stop)
gpuorch.add_command(submit)
gpuorch.add_command(chaos)
gpuorch.add_command(predictions)
gpuorch.add_command(report)
gpuorch.add_command(top)
gpuorch.add_command(doctor)
gpuorch.add_command(calibrate)


class _LightningGroup(click.Group):
    """Passes what is not ours to the command line of lightning-sdk, whose name this script has taken."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and self.get_command(ctx, args[0]) is None and importlib.util.find_spec("lightning_sdk") is not None:
            for entry in importlib.metadata.distribution("lightning_sdk").entry_points:
                if entry.group == "console_scripts" and entry.name == "lightning":
                    entry.load()()
                    ctx.exit(0)
        return super().resolve_command(ctx, args)


@click.group(name="lightning", cls=_LightningGroup)
@click.version_option(__version__)
def lightning() -> None:
    """Run Lightning scripts under orchestration. Other subcommands are those of lightning-sdk, if it is installed."""


class _RunModel(click.Command):
    """``lightning run``: accepts the older form ``lightning run model SCRIPT`` as well."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] == "model" and not os.path.exists("model"):
            args = args[1:]
        return super().parse_args(ctx, args)


def _as_lightning_run() -> click.Command:
    fields: dict[str, Any] = {
        "name": "run",
        "callback": run.callback,
        "params": run.params,
        "help": run.help,
        "context_settings": run.context_settings,
    }
    return _RunModel(**fields)


lightning.add_command(_as_lightning_run())

if __name__ == "__main__":
    sys.exit(gpuorch())
