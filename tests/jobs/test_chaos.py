"""The chaos tool itself, and a part of the campaign: ``tests/benchmarks/chaos_campaign.py`` runs all of it."""

import itertools
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.testing.chaos import Chaos
from lightning_gpuorch.testing.faults import FaultPlan
from tests.benchmarks import chaos_campaign
from tests.conftest import SCRIPTS, gpuorch_run

SCRIPT = str(SCRIPTS / "chaos_predict.py")


@pytest.fixture(autouse=True)
def _tight_limits(monkeypatch):
    for name, value in chaos_campaign.LIMITS.items():
        monkeypatch.setenv(name, value)


def _run_some_cells(setup, seed, runs):
    processes, tp = chaos_campaign.SETUPS[setup]
    rng = random.Random(seed)
    wanted = chaos_campaign.cells(processes, tp)
    rng.shuffle(wanted)
    chaos = chaos_campaign.chaos_for(setup)
    plans = itertools.islice(chaos_campaign.plans(processes, tp, wanted, 6, rng), runs)
    outcomes = [chaos.run(plan) for _, plan in plans]
    chaos.close()
    return outcomes


@pytest.mark.timeout(300)
def test_thirty_faults_change_no_bit_and_leave_nothing_behind():
    with ThreadPoolExecutor(2) as pool:  # they wait for limits most of the time
        some = [("2x1", 1, 3), ("4x2", 2, 2), ("2x1-dynamic", 3, 1), ("2x1-dynamic-stream", 4, 1)]
        outcomes = [*pool.map(lambda job: _run_some_cells(*job), some)]
    outcomes = list(itertools.chain(*outcomes))
    problems = [f"{problem}\n  --plan '{o.plan}' in {o.directory}" for o in outcomes for problem in o.problems]
    assert not problems, "\n".join(problems)
    assert sum(len(outcome.happened) for outcome in outcomes) >= 20, [str(o) for o in outcomes]


def test_the_supervisor_too_may_die_and_a_script_that_is_careless_is_caught(tmp_path):
    command = [*gpuorch_run(), SCRIPT, "--output", "{output}", "--careless", "--step", "0.02"]
    chaos = Chaos(command, tmp_path / "chaos", limit_seconds=120)
    killed = chaos.run(FaultPlan.parse("kill-supervisor@20%/rank0; kill-supervisor@commit 50%/rank1"))
    assert killed.problems == ()
    assert killed.launches == 1 + len(killed.happened) > 1
    caught = chaos.run(FaultPlan.parse("kill@20%/rank1; term-supervisor@60%/rank0"))
    assert caught.exit_code == 0
    assert any("differs" in problem for problem in caught.problems)
    assert FaultPlan.parse(str(caught.plan)) == caught.plan
    assert (caught.directory / "log.txt").exists()


def test_the_command_says_what_it_wants(tmp_path):
    command = [str(Path(sys.executable).with_name("gpuorch")), "chaos", "--plan", "kill@40%/rank1"]
    refused = subprocess.run([*command, SCRIPT], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1
    assert "no argument contains {output}" in refused.stderr
    refused = subprocess.run([*command[:-1], "kill", SCRIPT, "{output}"], capture_output=True, text=True, timeout=60)
    assert "'kill' is no fault; expected KIND@MOMENT/rankN" in refused.stderr
    with pytest.raises(ConfigurationError, match="undisturbed run of .* is not in order: it ended with exit code 2"):
        Chaos([SCRIPT, "--no-such-option", "{output}"], tmp_path / "chaos")
