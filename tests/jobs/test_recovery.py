"""Real faults on real processes: nothing lost, nothing twice, nothing left behind."""

import collections
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from lightning_gpuorch import read_predictions
from lightning_gpuorch.errors import MissingPredictionsError
from tests.conftest import free_port, gpuorch_run

LIMITS = {"GPUORCH_HEARTBEAT_TIMEOUT_SEC": "2.5", "GPUORCH_STEP_TIMEOUT_SEC": "4", "GPUORCH_EXIT_TIMEOUT_SEC": "20"}
SLOW = "slow_predict.py"


def _notes(tmp_path):
    path = tmp_path / "notes.txt"
    if not path.exists():
        return []
    return [line.split() for line in path.read_text().splitlines() if line.count(" ") == 3]


def _wait_for_notes(process, tmp_path, count, timeout=90):
    deadline = time.monotonic() + timeout
    while len(_notes(tmp_path)) < count:
        assert process.poll() is None, "the job ended too early"
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.02)


def _recomputed(tmp_path):
    counts = collections.Counter(note[3] for note in _notes(tmp_path))
    return sum(count - 1 for count in counts.values())


@pytest.mark.parametrize(
    ("harm", "victim", "tp", "devices"),
    [
        ("kill", 0, 1, 2),
        ("stop", 1, 1, 2),
        ("gil", 0, 1, 2),
        ("kill", 1, 2, 2),
        ("hang", 3, 2, 4),
    ],
)
def test_a_fault_costs_at_most_a_chunk(runner, tmp_path, harm, victim, tp, devices):
    finished = runner.run(
        SLOW, "--output", "out", "--harm", harm, "--victim", victim, "--tp", tp, "--devices", devices, "--at", 2,
        "--samples", 400, "--late", 3 if (harm, tp) == ("kill", 2) else 0,
        environment=LIMITS, timeout=170, launcher=gpuorch_run(devices),
    )  # fmt: skip
    assert finished.result["right"]
    assert finished.output.count("restarting replica") == 1, "the first restart works, also with a rank that comes late"
    # Chunks of 2 batches; each of the tp ranks notes every batch of its replica.
    twice_per_batch = tp - 1
    batches = 100
    assert len(_notes(tmp_path)) <= batches * (1 + twice_per_batch) + 2 * tp * 2
    assert not list(tmp_path.glob("out/**/.tmp-*"))
    if harm in ("hang", "gil"):
        assert f"rank {victim} is stuck" in finished.output
        assert "in _harm" in finished.output, "the culprit's line is shown"


def test_a_stuck_follower_is_found_though_the_model_has_no_collectives(runner):
    finished = runner.run(
        SLOW, "--output", "out", "--harm", "hang", "--victim", 1, "--tp", 2, "--at", 2, "--no-collectives",
        environment=LIMITS, timeout=170, launcher=gpuorch_run(),
    )  # fmt: skip
    assert finished.result["right"]
    assert "rank 1 is stuck" in finished.output
    assert "restarting replica 0" in finished.output


def test_the_other_replica_does_not_notice(runner, tmp_path):
    runner.run(
        SLOW, "--output", "out", "--harm", "kill", "--victim", 1, "--at", 2, "--samples", 800, timeout=170,
        launcher=gpuorch_run(),
    )  # fmt: skip
    notes = _notes(tmp_path)
    other = [(int(pid), float(when)) for rank, pid, when, _ in notes if rank == "0"]
    assert len({pid for pid, _ in other}) == 1, "rank 0 was restarted too"
    gaps = [b - a for (_, a), (_, b) in itertools.pairwise(other)]
    assert max(gaps) < 0.05 + 0.5, f"rank 0 paused for {max(gaps):.2f} s"
    assert len({pid for rank, pid, _, _ in notes if rank == "1"}) == 2, "rank 1 came back and worked on"


def test_a_stopped_fork_server_is_continued(runner, tmp_path):
    process = runner.start(SLOW, "--output", "out", "--samples", 800, launcher=gpuorch_run())
    _wait_for_notes(process, tmp_path, 10)
    [server] = [p for p in psutil.Process(process.pid).children() if "fork_server" in " ".join(p.cmdline())]
    victim = server.children()[0]
    server.send_signal(signal.SIGSTOP)
    victim.kill()
    assert runner.wait(process, 120) == 0
    assert "complete after 1 restarts" in runner.log_of(process)


def test_a_replica_that_always_fails_is_retired(runner):
    finished = runner.run(
        SLOW, "--output", "out", "--harm", "exception", "--victim", 1, "--at", 0, "--every-time", "--samples", 1200,
        "--step", 0.03, environment={"GPUORCH_MAX_RESTART_ATTEMPTS": "1"}, timeout=170, launcher=gpuorch_run(),
    )  # fmt: skip
    assert finished.result["right"]
    assert "replica 1 is retired, 1 workers go on" in finished.output


def test_when_all_replicas_fail_the_cause_is_shown_and_the_work_kept(runner, tmp_path):
    finished = runner.run(
        SLOW, "--output", "out", "--harm", "exception", "--victim", 0, "--at", 5, "--every-time", "--devices", 2, "--tp", 2,
        "--samples", 400, environment={"GPUORCH_ENABLE_AUTO_RESTART": "false"}, code=None, timeout=170,
        launcher=gpuorch_run(),
    )  # fmt: skip
    assert finished.code not in (0, 75)
    assert "first failure: rank 0, generation 0" in finished.output
    assert "RuntimeError: harmed on purpose" in finished.output
    kept = read_predictions(tmp_path / "out", allow_missing=True)
    assert 0 < len(kept.missing) < 400


def test_a_poison_sample_costs_only_itself(runner, tmp_path):
    finished = runner.run(SLOW, "--output", "out", "--poison", 50, code=65, timeout=170, launcher=gpuorch_run())
    assert "no prediction for 1 samples: 50" in finished.output
    found = read_predictions(tmp_path / "out", allow_missing=True)
    assert found.missing == [50]
    values = [float(v) for batch in found if batch is not None for v in batch[:, 0]]
    assert values == [2.0 * i for i in range(120) if i != 50]
    computed = len(_notes(tmp_path))
    mended = runner.run(SLOW, "--output", "out", launcher=gpuorch_run())
    assert mended.result["right"], "the same command tries again what was given up"
    assert len(_notes(tmp_path)) - computed == 2, "and nothing else"


def test_sigkill_of_the_supervisor_leaves_no_orphan_and_the_same_command_resumes(runner, tmp_path):
    command, launcher = (SLOW, "--output", "out", "--samples", 400), gpuorch_run()
    process = runner.start(*command, launcher=launcher)
    _wait_for_notes(process, tmp_path, 20)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(workers, timeout=2)
    assert not [w for w in alive if w.status() != psutil.STATUS_ZOMBIE], "orphans after 2 s"
    runner.wait(process)
    before = len(_notes(tmp_path))
    assert runner.run(*command, launcher=launcher).result["right"]
    assert _recomputed(tmp_path) <= 2 * 2 * 2, "at most the chunks in hand are computed again"
    again = runner.run(*command, launcher=launcher)
    assert again.result["right"]
    assert "nothing to do" in again.output
    assert len(_notes(tmp_path)) < 2 * before + 400


def test_drain_recomputes_nothing(runner, tmp_path):
    command, launcher = (SLOW, "--output", "out", "--samples", 400), gpuorch_run()
    process = runner.start(*command, launcher=launcher)
    _wait_for_notes(process, tmp_path, 20)
    os.kill(process.pid, signal.SIGTERM)
    assert runner.wait(process, 60) == 75
    assert runner.run(*command, launcher=launcher).result["right"]
    assert _recomputed(tmp_path) == 0


def test_ctrl_c_drains_and_another_number_of_devices_and_batch_size_go_on(runner, tmp_path):
    process = runner.start(SLOW, "--output", "out", "--samples", 400)
    _wait_for_notes(process, tmp_path, 20)
    os.kill(process.pid, signal.SIGINT)
    assert runner.wait(process, 60) == 75
    before = len(_notes(tmp_path))
    assert runner.run(SLOW, "--output", "out", "--samples", 400, "--devices", 1, "--batch", 6).result["right"]
    assert len(_notes(tmp_path)) - before < 400 / 4, "only what was missing"


def test_drain_of_a_single_process(runner, tmp_path):
    process = runner.start(SLOW, "--output", "out", "--samples", 400, "--devices", 1)
    _wait_for_notes(process, tmp_path, 20)
    os.kill(process.pid, signal.SIGTERM)
    assert runner.wait(process, 60) == 75
    assert runner.run(SLOW, "--output", "out", "--samples", 400, "--devices", 1).result["right"]
    assert _recomputed(tmp_path) == 0


def _tool(name):
    return str(Path(sys.executable).with_name(name))


def test_torchrun_restarts_the_whole_group_and_nothing_is_lost(runner, tmp_path):
    torchrun = (_tool("torchrun"), "--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    finished = runner.run(
        SLOW, "--output", "out", "--harm", "kill", "--victim", 1, "--at", 4, "--late", 3, launcher=torchrun, timeout=170
    )
    assert finished.result["right"], "on the first attempt, with a rank that comes 3 s late"
    assert _recomputed(tmp_path) <= 2 * 2 * 2


@pytest.mark.parametrize(
    "launcher", [("torchrun", "--standalone", "--nproc-per-node", "2"), ("fabric", "run", "--devices", "2")]
)
def test_a_death_near_the_end_is_no_success_where_nobody_restarts(runner, tmp_path, launcher):
    if launcher[0] == "fabric":
        launcher = (*launcher, "--main-port", str(free_port()))
    finished = runner.run(
        SLOW, "--output", "out", "--harm", "kill", "--victim", 1, "--at", 12,
        launcher=(_tool(launcher[0]), *launcher[1:]), code=None, timeout=120,
    )  # fmt: skip
    assert finished.code != 0
    assert finished.result is None
    assert len(_notes(tmp_path)) >= 12
    with pytest.raises(MissingPredictionsError):
        read_predictions(tmp_path / "out")


def test_two_tasks_of_slurm_of_which_one_dies_and_is_not_restarted(runner, tmp_path):
    slurm = {
        "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "predict", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1", "SLURM_NODELIST": "localhost", "SLURM_NODEID": "0", "MASTER_PORT": str(free_port()),
        "GPUORCH_LEASE_TERM_SEC": "2",
    }  # fmt: skip
    harm = ("--harm", "kill", "--victim", 1, "--at", 3)
    command = (SLOW, "--output", "out", *harm, "--result", tmp_path / "result.json")
    tasks = [
        runner.start(*command, environment={**slurm, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})
        for rank in range(2)
    ]
    assert runner.wait(tasks[1], 90) == -signal.SIGKILL, "so srun's exit code is not 0"
    assert runner.wait(tasks[0], 60) == 0, runner.log_of(tasks[0])
    assert "rank 1 has disconnected" in runner.log_of(tasks[0])
    assert json.loads((tmp_path / "result.json").read_text())["right"]
    assert {note[0] for note in _notes(tmp_path)} == {"0", "1"}, "both have worked"


@pytest.mark.parametrize("moment", [(), ("--late",)], ids=["at-once", "when-the-other-is-done"])
def test_a_replica_lost_in_evaluation_is_never_a_success_though_an_earlier_predict_call_was(runner, tmp_path, moment):
    finished = runner.run(
        "validate_harmed.py", "--output", "out", *moment, code=1, environment={"GPUORCH_MAX_RESTART_ATTEMPTS": "0"}
    )
    assert "exit code 9" in finished.output
    assert "no other replica can do its part" in finished.output
    assert len(read_predictions(tmp_path / "out")) == 10, "what was predicted is kept"


def test_a_death_in_a_long_chunk_costs_seconds_and_a_stop_nothing(runner, tmp_path):
    # Two chunks of 150 batches, each of 7.5 seconds at least.
    command = (SLOW, "--output", "out", "--samples", 1200, "--chunk", 150, "--harm", "kill", "--victim", 0, "--at", 100)
    process = runner.start(*command, launcher=gpuorch_run())
    _wait_for_notes(process, tmp_path, 210)
    process.terminate()
    assert runner.wait(process) == 75
    kept = list((tmp_path / "out").glob("unfinished-*/part-*"))
    assert kept, "what is computed of the chunks is kept"
    assert runner.run(*command, launcher=gpuorch_run()).result["right"]
    # Rank 0 has computed 100 batches when it dies, those of the last 3 seconds in vain; the stop costs nothing.
    assert _recomputed(tmp_path) < 75
    assert not list((tmp_path / "out").glob("unfinished-*"))


def test_chunks_of_a_long_job_grow_and_it_goes_on_with_them_after_a_death(runner, tmp_path):
    command = (
        SLOW, "--output", "out", "--samples", 20_000, "--batch", 2, "--chunk", "auto", "--step", 0, "--harm", "kill",
        "--victim", 1, "--at", 3000,
    )  # fmt: skip
    finished = runner.run(*command, launcher=gpuorch_run(), timeout=170)
    assert finished.result["right"]
    assert "restarting replica" in finished.output
    parts, of_one_size = list((tmp_path / "out").glob("dataloader_0/part-*")), 10_000 // 32
    assert 64 < len(parts) < of_one_size / 2
    assert list((tmp_path / "out").glob("dataloader_0/stretch-*.json"))
    computed = len(_notes(tmp_path))
    assert runner.run(*command, launcher=gpuorch_run()).result["right"]
    assert len(_notes(tmp_path)) == computed, "nothing is left to do"
