"""``gpuorch doctor``: checks that this machine is fit to run a job, and that a model fits on it."""

from __future__ import annotations

import re
import sys

import click

from lightning_gpuorch.cli.parameters import OutputDirectory
from lightning_gpuorch.errors import GPUOrchError
from lightning_gpuorch.paths import Location

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_bytes(text: str) -> int:
    """A size such as ``24GiB``, ``80GB`` or ``1000000`` in bytes.

    Raises:
        ValueError: It is no size, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", text, re.IGNORECASE)
    number = float(match[1]) * _UNITS[(match[2] or "").upper()] if match else 0.0
    if number < 1:
        raise ValueError(f"{text!r} is no size in bytes; write for example 24GiB, 80GB or 1000000.")
    return int(number)


def _read_bytes(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    try:
        return None if value is None else parse_bytes(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from None


@click.command(name="doctor")
@click.option(
    "--output-dir", type=OutputDirectory(), default=".", show_default=True, help="Where predictions would be written."
)
@click.option("--model", "spec", default=None, metavar="SPEC", help="Say also how this model would be cut and whether it "
              "fits: module:factory, or a directory with a transformers config.json.")  # fmt: skip
@click.option("--tensor-parallel-size", type=click.IntRange(min=1), default=None, help="Ranks that share the model.")
@click.option(
    "--memory-budget",
    callback=_read_bytes,
    default=None,
    metavar="SIZE",
    help="Memory of one device, for example 24GiB.",
)
def doctor(output_dir: Location, spec: str | None, tensor_parallel_size: int | None, memory_budget: int | None) -> None:
    """Look at versions, GPUs and how they are connected, shared memory, file descriptors, disk and clock.

    What is wrong is said with what to do about it. The exit code is 0 if a job can run here, and 78 if not.
    """
    from lightning_gpuorch.devices.doctor import describe, examine, exit_code

    if spec is None and (tensor_parallel_size is not None or memory_budget is not None):
        raise click.UsageError("--tensor-parallel-size and --memory-budget are about a model: name it with --model.")
    checks = examine(output_dir)
    click.echo(describe(checks))
    code = exit_code(checks)
    if spec is not None:
        from lightning_gpuorch.parallel.tensor_parallel.model_report import model_report

        click.echo()
        sys.path.insert(0, "")  # a factory in the user's own module, as `python -m` would find it
        try:
            click.echo(model_report(spec, tensor_parallel_size, memory_budget))
        except GPUOrchError as error:
            click.echo(f"BAD   {error}")
            code = error.exit_code
    sys.exit(code)
