"""Faults inside of a tensor-parallel group, in jobs of real processes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_gpuorch import read_predictions
from lightning_gpuorch.errors import EXIT_DATA_MISSING, GroupOutOfMemoryError
from lightning_gpuorch.telemetry import read_events
from lightning_gpuorch.telemetry.events.schema import check_event
from tests.benchmarks.group_recovery import KINDS, Rank, campaigns, on_ranks
from tests.conftest import Runner


def test_one_rank_out_of_memory_cut_off_and_late_and_nothing_is_restarted(runner: Runner, tmp_path: Path) -> None:
    faults = ["connection:16:2", "late:40:1"]
    out = tmp_path / "out"
    result = runner.run(
        "tp_faults.py", "--tp", 2, "--budget", "--timeout", 3, "--faults", *faults, "--output", out
    ).result
    assert result["difference"] < 1e-5
    assert result["order"]
    assert result["batches"] == 8
    first, second = result["ranks"]
    assert first == second
    assert first["generation"] == 0
    assert first["ooms"] >= 2
    assert first["splits"] == 8
    assert first["recoveries"] == first["ooms"] + 3
    (run,) = (out / "runs").iterdir()
    events, _ = read_events(run / "events")
    retries = [event for event in events if event["kind"] == "retry"]
    assert len(retries) == 3
    assert [event["attempt"] for event in retries] == [1, 2, 1]
    assert all(event["reason"] and not check_event(event) for event in retries)


def test_a_sample_that_does_not_fit_alone_is_given_up_by_all_ranks_together(runner: Runner, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = runner.run("tp_faults.py", "--tp", 2, "--too-large", 17, "--output", out, code=EXIT_DATA_MISSING)
    assert "no prediction for 1 samples: 17 " in ended.output
    assert "restarting" not in ended.output
    predictions = read_predictions(out, allow_missing=True)
    assert list(predictions.missing) == [17]
    assert [i for batch in predictions for i in batch["index"].tolist()] == [i for i in range(60) if i != 17]


def test_communication_that_fails_again_and_again_restarts_the_replica(runner: Runner) -> None:
    ended = runner.run("tp_faults.py", "--tp", 2, "--faults", "connection:16:3")
    assert ended.result["difference"] < 1e-5
    assert ended.result["order"]
    assert [rank["generation"] for rank in ended.result["ranks"]] == [1, 1]
    assert "2 tries in place did not help" in ended.output


def test_a_bug_on_one_rank_is_not_retried_and_the_other_rank_says_whose_it_is(runner: Runner) -> None:
    ended = runner.run("tp_faults.py", "--tp", 2, "--restarts", 0, "--faults", "bug:16:1", code=1)
    assert "error: rank 1: RuntimeError: shapes do not match" in ended.output
    assert "Traceback" in ended.output
    # The batch before it is done, and durable if the leader has got so far when the group is ended.
    assert re.search(r"44 units missing: 16-59|52 units missing: 8-59", ended.output)


@pytest.mark.parametrize("way", ["drain", "abort"])
def test_a_small_campaign_of_faults_anywhere(way: str) -> None:
    """Its large sister is ``python -m tests.benchmarks.group_recovery campaign``."""
    by_rank = on_ranks(3, campaigns, 8, KINDS, 1, way=way, timeout_seconds=170)
    for results in zip(*by_rank, strict=True):
        for result in results:
            assert result["equal"] == result["injected"] == result["cut"] == 8
            assert result["checksum"] == results[0]["checksum"]
            assert result["recoveries"] == results[0]["recoveries"] >= 8
            assert result["drained"] == results[0]["drained"]
            assert result["drained"] > 0 if way == "drain" else result["drained"] == 0
            assert result["unfinished_works"] == 0
            assert result["end"]["threads"] <= result["start"]["threads"]
            assert result["end"]["descriptors"] <= result["start"]["descriptors"]


def _unforeseen(node: Rank, how: str) -> dict[str, Any]:
    """Rank 1 fails in a step that communicates otherwise than it has learnt, or that stumbles over zeros."""
    usual = 4

    def step(number: int, collectives: int, victim: bool) -> torch.Tensor:
        # As small as what the ranks use to wait for each other: it can be taken for it.
        total = torch.tensor([number], dtype=torch.int32)
        for position in range(collectives):
            if victim and position == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. (injected)")
            part = torch.ones(1, dtype=torch.int32)
            dist.all_reduce(part, group=node.group)
            if how == "stumble" and int(part) != node.size:
                raise IndexError(f"{int(part)} is out of range")
            total += part
        return total

    inputs = torch.zeros(2, 3)
    outputs, ooms = [], 0
    collectives = {"fewer": 2, "more": 7, "stumble": usual, "foreseen": usual}[how]
    for number in range(6):
        unusual = number in (3, 5)
        count = collectives if unusual else usual
        try:
            got = node.recovery.attempt(lambda: step(number, count, unusual and node.rank == 1), inputs)  # noqa: B023
        except GroupOutOfMemoryError:
            ooms += 1
            got = node.recovery.attempt(lambda: step(number, count, False), inputs)  # noqa: B023
        outputs.append(int(got))
    return {
        "right": outputs == [n + node.size * (collectives if n in (3, 5) else usual) for n in range(6)],
        "ooms": ooms,
        "drained": [one.drained for one in node.recoveries],
        "epoch": node.recovery.epochs.number,
        "seconds": max(one.seconds for one in node.recoveries),
    }


@pytest.mark.parametrize("how", ["fewer", "more", "stumble", "foreseen"])
def test_a_step_that_cannot_be_drained_is_aborted_and_never_taken_for_good(how: str) -> None:
    results = on_ranks(2, _unforeseen, how, way="drain", timeout_seconds=120)
    for result in results:
        assert result["right"]
        assert result["ooms"] == 2
        assert result["drained"] == [how == "foreseen"] * 2
        assert result["epoch"] == (0 if how == "foreseen" else 2)
        assert result["seconds"] < 8, "not a whole timeout of 10 s"
