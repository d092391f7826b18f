"""Runs jobs under faults in simulation, and replays one that was found wrong.

``python -m lightning_gpuorch.testing.simulate --help`` is the command.
"""

from __future__ import annotations

import logging
import sys
import time

import click

from lightning_gpuorch.testing.simulation.job import Scenario, Simulation


def simulate(scenario: Scenario) -> Simulation:
    """Run one job to its end; its history tells what was wrong."""
    simulation = Simulation(scenario)
    simulation.run()
    return simulation


def _nodes(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    fewest, _, most = value.partition(":")
    try:
        nodes = int(fewest), int(most or fewest)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number nor MIN:MAX") from None
    if not 1 <= nodes[0] <= nodes[1]:
        raise click.BadParameter(f"{value!r}: give the fewest nodes first, at least 1, then the most")
    return nodes


@click.command()
@click.option("--seed", type=int, default=0, show_default=True, help="Of the first job; the others follow.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="How many jobs are run.")
@click.option("--faults", type=click.IntRange(0), default=10, show_default=True, help="Faults of each job.")
@click.option("--nodes", callback=_nodes, metavar="MIN:MAX", help="Nodes of each job; drawn by default.")
@click.option("--replicas", type=click.IntRange(1), help="Replicas of each node; drawn by default.")
@click.option("--chunks", type=click.IntRange(1), help="Chunks of each job, about; drawn by default.")
@click.option("--trace", is_flag=True, help="Print what has happened in each job, also where nothing was wrong.")
def main(
    seed: int,
    jobs: int,
    faults: int,
    nodes: tuple[int, int] | None,
    replicas: int | None,
    chunks: int | None,
    trace: bool,
) -> None:
    """Run jobs on a virtual clock, under faults drawn from their seeds, and judge what happened."""
    logging.getLogger("lightning_gpuorch").setLevel(logging.DEBUG if trace else logging.CRITICAL)
    began, virtual_seconds, leases = time.process_time(), 0.0, 0
    wrong: list[int] = []
    for number in range(seed, seed + jobs):
        scenario = Scenario(number, faults, nodes, replicas, chunks)
        simulation = simulate(scenario)
        history = simulation.history
        virtual_seconds += simulation.time.now
        leases += history.num_leases
        if trace or (history.problems and not wrong):
            click.echo("\n".join(history.lines))
        if history.problems:
            wrong.append(number)
            click.echo(f"seed {number}: {history.problems[0]}\n  {scenario.command}")
    seconds, hours = time.process_time() - began, virtual_seconds / 3600
    click.echo(
        f"{jobs} jobs with {faults} faults each, {len(wrong)} wrong: {leases} leases in {hours:.1f} virtual hours "
        f"and {seconds:.1f} CPU seconds, {hours / max(seconds, 1e-9):.1f} virtual hours per CPU second"
    )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
