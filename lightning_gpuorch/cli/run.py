"""``gpuorch run SCRIPT``: supervise a script's workers; takes the options of ``fabric run``."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from lightning_gpuorch.cli.parameters import NodeCount
from lightning_gpuorch.config import OrchestratorConfig
from lightning_gpuorch.devices.discovery import choose_devices, device_pool
from lightning_gpuorch.errors import ConfigurationError, GPUOrchError

if TYPE_CHECKING:
    from lightning_gpuorch.control.client import NodePlace
    from lightning_gpuorch.supervisor.slurm import SlurmStep

_PRECISIONS = (
    "transformer-engine", "transformer-engine-float16", "16-true", "16-mixed", "bf16-true", "bf16-mixed", "32-true",
    "64-true", "64", "32", "16", "bf16",
)  # fmt: skip


@click.command(name="run", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": True})
@click.argument("script", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--accelerator", type=click.Choice(["cpu", "gpu", "cuda", "auto"]), default=None, help="Hardware to run on."
)
@click.option("--strategy", default="gpuorch", show_default=True, help="Other strategies are handed to `fabric run`.")
@click.option("--devices", default="1", show_default=True, help="How many devices, which (0,2), or 'auto'.")
@click.option(
    "--num-nodes",
    "--num_nodes",
    type=NodeCount(),
    default=1,
    show_default=True,
    help="Machines that take part; 1:8 begins with one, and others join and leave as they come and go.",
)
@click.option("--node-rank", "--node_rank", type=int, default=0, show_default=True, help="Which machine this is.")
@click.option(
    "--main-address", "--main_address", default="127.0.0.1", show_default=True, help="Host of the coordinator."
)
@click.option("--main-port", "--main_port", type=int, default=29400, show_default=True, help="Port of the coordinator.")
@click.option(
    "--cluster", type=click.Choice(["ray"]), default=None, help="Run on the nodes of a cluster, started from one place."
)
@click.option("--address", default=None, help="Address of the cluster; default that of this machine's, or RAY_ADDRESS.")
@click.option("--precision", type=click.Choice(_PRECISIONS), default=None, help="Numeric precision.")
@click.argument("script_args", nargs=-1, type=click.UNPROCESSED)
def run(script: str, script_args: tuple[str, ...], **options: Any) -> None:
    """Run SCRIPT once per device, under a supervisor that restarts what dies.

    SCRIPT_ARGS are passed to the script.
    """
    try:
        code = _run(script, list(script_args), **options)
    except GPUOrchError as error:
        click.echo(f"Error: {error}", err=True)
        code = error.exit_code
    sys.stdout.flush()
    sys.exit(code)


def _run(script: str, script_args: list[str], **options: Any) -> int:
    if options["cluster"] is not None or options["address"] is not None:
        return _ray_run(script, script_args, options)
    if options["strategy"] != "gpuorch":
        return _fabric_run(script, script_args, options)
    from lightning_gpuorch.supervisor.slurm import SlurmStep
    from lightning_gpuorch.telemetry.logs import configure_logging

    config = OrchestratorConfig.resolve()
    configure_logging(config.log_level, rank=None, replica=0)
    step = SlurmStep.read()
    place = _place(options, step)
    with contextlib.ExitStack() as stack:
        if step is not None and place.num_nodes > 1 and not config.token:
            token = stack.enter_context(step.shared_token(config.start_timeout_sec))
            config = dataclasses.replace(config, token=token)
        return _supervise(["script", os.path.abspath(script), *script_args], place, config, options)


def _place(options: dict[str, Any], step: SlurmStep | None) -> NodePlace:
    """Which node this is: what is given counts, then what SLURM says."""
    from lightning_gpuorch.control.client import NodePlace

    min_nodes, num_nodes = options["num_nodes"]
    given = NodePlace(num_nodes, options["node_rank"], options["main_address"], options["main_port"], min_nodes)
    if step is None:
        return given
    context = click.get_current_context()
    is_default = {name for name in options if context.get_parameter_source(name) is ParameterSource.DEFAULT}
    found = step.place
    return NodePlace(
        found.num_nodes if "num_nodes" in is_default else num_nodes,
        found.node_rank if "node_rank" in is_default else given.node_rank,
        found.main_address if "main_address" in is_default else given.main_address,
        found.main_port if "main_port" in is_default else given.main_port,
        0 if "num_nodes" in is_default else min_nodes,
    )


def _supervise(target: list[str], place: NodePlace, config: OrchestratorConfig, options: dict[str, Any]) -> int:
    # The supervisor is light: neither torch nor Lightning is imported in this process.
    from lightning_gpuorch.supervisor.spawn import script_spawner
    from lightning_gpuorch.supervisor.supervisor import Supervisor

    accelerator, count, indices = choose_devices(options["accelerator"], options["devices"])
    environment = {
        "LT_CLI_USED": "1",
        "LT_ACCELERATOR": accelerator,
        "LT_STRATEGY": "gpuorch",
        "LT_DEVICES": str(count),
        "LT_NUM_NODES": str(place.num_nodes),
    }
    if options["precision"] is not None:
        environment["LT_PRECISION"] = options["precision"]
    spawner = script_spawner(target, config.enable_warm_start)
    gpus = (indices or list(range(count))) if accelerator == "cuda" else []
    pool = device_pool(gpus, config.spare_devices)
    return Supervisor(spawner, count, config, devices=pool, environment=environment, place=place).run()


def _ray_run(script: str, script_args: list[str], options: dict[str, Any]) -> int:
    from lightning_gpuorch.cli.ray_cluster import RayDriver
    from lightning_gpuorch.telemetry.logs import configure_logging

    if options["cluster"] is None:
        raise ConfigurationError("--address goes with --cluster ray; options of the script go behind `--`.")
    if options["strategy"] != "gpuorch":
        raise ConfigurationError(f"--cluster ray needs strategy gpuorch, not {options['strategy']}.")
    context = click.get_current_context()
    for name in ("node_rank", "main_address", "main_port"):
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise ConfigurationError(f"--{name.replace('_', '-')} is chosen by --cluster ray; leave it out.")
    try:
        num_devices = int(options["devices"])
    except ValueError:
        num_devices = 0
    if num_devices < 1:
        raise ConfigurationError(
            f"--devices {options['devices']}: with --cluster ray, give the number of devices of each node; Ray chooses which."
        )
    config = OrchestratorConfig.resolve()
    configure_logging(config.log_level, rank=None, replica=0)
    arguments = ["--precision", options["precision"]] if options["precision"] is not None else []
    return RayDriver(
        [os.path.abspath(script), *script_args], arguments, options["num_nodes"], options["accelerator"] or "auto",
        num_devices, config, options["address"] or "auto",
    ).run()  # fmt: skip


def _fabric_run(script: str, script_args: list[str], options: dict[str, Any]) -> int:
    from argparse import Namespace

    from lightning.fabric.cli import main

    del options["cluster"], options["address"]
    min_nodes, options["num_nodes"] = options["num_nodes"]
    if min_nodes != options["num_nodes"]:
        raise ConfigurationError(f"--num-nodes {min_nodes}:{options['num_nodes']} needs strategy gpuorch.")

    main(args=Namespace(script=script, **options), script_args=script_args)
    return 0
