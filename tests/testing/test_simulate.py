"""Jobs in simulation: seeds that have found something, others, and broken product code, which is found."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("obstore")

from lightning_gpuorch.control.coordinator import Coordinator
from lightning_gpuorch.control.leases import LeaseQueue
from lightning_gpuorch.control.messages.leases import Stop
from lightning_gpuorch.control.node_registry import NodeRegistry
from lightning_gpuorch.predictions.storage.object_store import ObjectStore
from lightning_gpuorch.testing.simulate import simulate
from lightning_gpuorch.testing.simulation.job import Scenario

FOUND = {
    Scenario(514): "a supervisor that took a place over, lost the answer and asked again was told generation 0",
    Scenario(96, 20, (2, 3), 3, 100): "ranks of a generation before the one that was ended were given leases",
}


def problems(seed: int, num_faults: int = 10) -> list[str]:
    return simulate(Scenario(seed, num_faults)).history.problems


@pytest.mark.parametrize("scenario", FOUND, ids=lambda scenario: str(scenario.seed))
def test_what_a_seed_has_found_stays_right(scenario: Scenario) -> None:
    assert simulate(scenario).history.problems == [], FOUND[scenario]


def test_jobs_under_faults_keep_every_promise() -> None:
    wrong = {seed: found for seed in range(100) if (found := problems(seed))}
    assert wrong == {}, f"replay with {Scenario(min(wrong)).command} --trace"


def test_a_seed_gives_the_same_history() -> None:
    histories = [simulate(Scenario(7)).history.lines for _ in range(2)]
    assert histories[0] == histories[1]
    assert len(histories[0]) > 20


@pytest.mark.parametrize(
    ("owner", "name", "broken", "found"),
    [
        (LeaseQueue, "_decide", lambda self, *arguments: Stop(), "was told that all is durable, without chunks"),
        (LeaseQueue, "revoke", lambda self, *arguments: [], "has not ended"),
        (NodeRegistry, "check_terms", lambda self: [], "has not ended"),
        (Coordinator, "readmit", lambda self, replica: None, "exit code 75 though all is durable"),
        (ObjectStore, "_compare", lambda self, path, buffers: True, "was won by"),
        (ObjectStore, "_compare", lambda self, path, buffers: False, "no writer knows"),
    ],
    ids=["stop at once", "keep leases of the dead", "no terms", "no return", "all win", "none wins"],
)  # fmt: skip
def test_what_is_broken_is_found(
    owner: type, name: str, broken: Any, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, broken)
    all_problems = (problem for seed in range(60) for problem in problems(seed))
    assert any(found in problem for problem in all_problems)


def test_the_command_tells_what_it_ran() -> None:
    command = [
        sys.executable,
        "-m",
        "lightning_gpuorch.testing.simulate",
        "--seed",
        "3",
        "--jobs",
        "2",
        "--nodes",
        "1:2",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "2 jobs with 10 faults each, 0 wrong" in ended.stdout
