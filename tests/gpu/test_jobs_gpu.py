"""Whole jobs of two ranks on one GPU: replicas, groups on NCCL, and what kills them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lightning_gpuorch.testing.chaos import Chaos
from lightning_gpuorch.testing.faults import FaultPlan
from tests.benchmarks import chaos_campaign
from tests.conftest import SCRIPTS, Runner

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.fixture(autouse=True)
def _share_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARE_GPU", "1")
    monkeypatch.setenv("GPUORCH_MEMORY_FRACTION", "0.2")


@pytest.mark.parametrize("kind", ["device", "kill"])
def test_a_replica_that_dies_is_restarted_on_its_gpu(runner: Runner, kind: str) -> None:
    done = runner.run("slow_predict.py", "--samples", 400, "--harm", kind, "--victim", 1, "--at", 5)
    assert done.result["right"]
    assert "restarting replica 1" in done.output
    assert "restarting replica 0" not in done.output


def test_outputs_of_every_kind_come_back_from_the_gpu(runner: Runner) -> None:
    verdicts = runner.run("output_types.py").result
    assert all(verdicts.values()), verdicts


def test_a_model_is_cut_by_itself_under_trainer_and_fabric(runner: Runner) -> None:
    result = runner.run("tp_auto.py", "--tp", 2).result
    assert result["local_rows"] == 32
    assert result["trainer"] < 1e-4
    assert result["fabric"] < 1e-4


def test_generation_gives_the_same_tokens_on_both_ranks(runner: Runner, tmp_path: Path) -> None:
    environment = {"CHECKPOINTS": str(tmp_path), "BACKEND": "aot_eager"}
    result = runner.run("tp_generate.py", "--tp", 2, environment=environment).result
    assert result["greedy"]
    assert result["sampling"]
    assert result["beam"]
    assert result["bfloat16"][1] < 0.03
    assert result["compiled"] < 1e-4
    assert result["sharded"]


def test_faults_in_a_group_are_mended_in_place(runner: Runner, tmp_path: Path) -> None:
    faults = ["memory:8:1", "connection:16:2", "memory:48:2"]
    done = runner.run("tp_faults.py", "--tp", 2, "--timeout", 10, "--faults", *faults, "--output", tmp_path / "out")
    assert done.result["difference"] < 1e-4
    assert done.result["order"]
    first, second = done.result["ranks"]
    assert first == second
    assert first["generation"] == 0, done.output
    assert first["ooms"] == 3
    assert first["recoveries"] == 5


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("tp", "plan"),
    [
        (1, "kill@20%/rank1; exception@40%/rank0; stop@50%/rank1; exit0@70%/rank0; hang@80%/rank1"),
        (
            2,
            "kill@20%/rank1; skip-collective@40%/rank0; stop@50%/rank1; block-collective@70%/rank0; gil-hang@80%/rank1",
        ),
    ],
    ids=["replicas", "group"],
)
def test_faults_on_a_gpu_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tp: int, plan: str) -> None:
    for name, value in {**chaos_campaign.LIMITS, "GPUORCH_START_TIMEOUT_SEC": "40"}.items():
        monkeypatch.setenv(name, value)
    script = [sys.executable, str(SCRIPTS / "chaos_predict.py"), "--output", "{output}", "--tp", str(tp)]
    chaos = Chaos([*script, "--samples", "800", "--step", "0.02"], tmp_path / "chaos", limit_seconds=180)
    outcome = chaos.run(FaultPlan.parse(plan))
    assert outcome.problems == (), outcome.directory and (outcome.directory / "log.txt").read_text()[-6000:]
    assert len(outcome.happened) >= 4, str(outcome)
