"""DurablePredictionWriter with Lightning's own strategies."""

import json

from lightning_gpuorch import read_predictions


def test_ddp_predictions_become_durable_and_ordered(runner, tmp_path):
    result = runner.run("ddp_writer.py", "--devices", 2, "--output", "out", timeout=150).result
    assert result == {"values": [2.0 * i for i in range(37)], "batches": 10}
    found = read_predictions(tmp_path / "out")
    assert [int(i) for i in found.indices] == list(range(37))


def test_ddp_with_a_rank_that_dies_near_the_end_does_not_end_well(runner, tmp_path):
    finished = runner.run("ddp_writer.py", "--devices", 2, "--output", "out", "--die", code=None, timeout=150)
    assert finished.code != 0
    assert "samples have no prediction" in finished.output or finished.code < 0 or "SIGKILL" in finished.output
    missing = list(read_predictions(tmp_path / "out", allow_missing=True).missing)
    assert missing, json.dumps(finished.output[-2000:])
