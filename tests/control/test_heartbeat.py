"""The judge, with a clock and process states of our own; the table with real processes."""

import contextlib
import random
import subprocess

import pytest

from lightning_gpuorch.control.heartbeat import (
    HeartbeatTable,
    Judge,
    Limits,
    Phase,
    create_table,
    sweep_tables,
    waits_for_others,
)

LIMITS = Limits(alive=2.0, start=100.0, step=4.0, commit=30.0, exit=10.0)
PID = 4242


class Scene:
    def __init__(self, tmp_path, ranks=1):
        self.now = 1_000_000_000_000
        self.state = dict.fromkeys(range(ranks), "R")
        self.table = HeartbeatTable(str(tmp_path / "table"), ranks, create=True)
        self.judge = Judge(self.table, LIMITS, lambda: self.now, lambda pid: self.state[pid - PID])
        self.pids = {rank: PID + rank for rank in range(ranks)}
        self.started = dict.fromkeys(range(ranks), self.now)
        self.progress = [0] * ranks

    def beat(self, rank=0, phase=None, step=False):
        values = {"pid": PID + rank, "alive_ns": self.now}
        if phase is not None:
            values |= {"phase": phase, "phase_ns": self.now, "progress_ns": self.now}
        if step:
            self.progress[rank] += 1
            values |= {"progress": self.progress[rank], "progress_ns": self.now}
        self.table.write(rank, **values)

    def pass_time(self, seconds, beating=()):
        for _ in range(max(1, int(seconds * 10))):
            self.now += int(seconds * 1e9 / max(1, int(seconds * 10)))
            for rank in beating:
                self.beat(rank)
        return self.judge.check(self.pids, self.started)


def test_a_slow_start_is_no_alarm_but_no_start_is(tmp_path):
    scene = Scene(tmp_path)
    assert scene.pass_time(99) is None
    assert "no sign of life 1" in scene.pass_time(2).reason


def test_imports_may_hold_the_gil(tmp_path):
    scene = Scene(tmp_path)
    scene.beat(phase=Phase.STARTING)
    assert scene.pass_time(60) is None


def test_a_silent_rank_is_found_once_it_runs(tmp_path):
    scene = Scene(tmp_path)
    scene.beat(phase=Phase.RUN, step=True)
    assert scene.pass_time(1.9) is None
    assert "holds the GIL" in scene.pass_time(0.3).reason


@pytest.mark.parametrize("phase", list(Phase))
def test_a_stopped_process_is_found_in_every_phase(tmp_path, phase):
    scene = Scene(tmp_path)
    scene.beat(phase=phase)
    scene.state[0] = "T"
    assert scene.judge.check(scene.pids, scene.started) is None
    assert "stopped for" in scene.pass_time(2.5).reason


def test_a_hang_is_found_although_the_thread_beats(tmp_path):
    scene = Scene(tmp_path)
    scene.beat(phase=Phase.RUN, step=True)
    assert scene.pass_time(3.9, beating=[0]) is None
    assert "no progress for 4." in scene.pass_time(0.2, beating=[0]).reason


def test_waiting_for_work_has_no_limit(tmp_path):
    scene = Scene(tmp_path)
    scene.beat(phase=Phase.WAIT)
    assert scene.pass_time(500, beating=[0]) is None


def test_leaving_has_a_limit(tmp_path):
    scene = Scene(tmp_path)
    scene.beat(phase=Phase.DONE)
    assert scene.pass_time(9) is None
    assert "has not left" in scene.pass_time(2).reason


def test_the_culprit_is_the_one_without_life_then_the_one_furthest_behind(tmp_path):
    scene = Scene(tmp_path, ranks=3)
    for rank, steps in enumerate((5, 3, 5)):
        for _ in range(steps):
            scene.beat(rank, phase=Phase.RUN, step=True)
    assert scene.pass_time(4.5, beating=[0, 1, 2]).rank == 1
    (tmp_path / "again").mkdir()
    scene = Scene(tmp_path / "again", ranks=3)
    for rank, steps in enumerate((5, 3, 5)):
        for _ in range(steps):
            scene.beat(rank, phase=Phase.RUN, step=True)
    assert scene.pass_time(4.5, beating=[0, 1]).rank == 2


def test_100_000_jittered_steps_and_a_slow_first_one_raise_no_alarm(tmp_path):
    scene = Scene(tmp_path)
    rng = random.Random(7)
    scene.beat(phase=Phase.WARMUP)
    assert scene.pass_time(90, beating=[0]) is None
    scene.beat(phase=Phase.RUN, step=True)
    for _ in range(100_000):
        scene.now += int(min(rng.lognormvariate(-2, 1.0), 3.5) * 1e9)
        scene.beat(step=True)
        assert scene.judge.check(scene.pids, scene.started) is None


def test_slow_steps_raise_the_limit_and_it_decays(tmp_path):
    scene = Scene(tmp_path)
    scene.beat(phase=Phase.RUN, step=True)
    scene.judge.check(scene.pids, scene.started)
    scene.now += int(3e9)
    scene.beat(step=True)
    scene.judge.check(scene.pids, scene.started)
    assert scene.judge.step_limit(0) == pytest.approx(30.0)
    for _ in range(300):
        scene.now += int(1e7)
        scene.beat(step=True)
        scene.judge.check(scene.pids, scene.started)
    assert scene.judge.step_limit(0) == LIMITS.step


def test_a_restarted_rank_is_judged_afresh(tmp_path):
    scene = Scene(tmp_path)
    scene.beat(phase=Phase.RUN, step=True)
    scene.table.clear(0)
    scene.judge.forget(0)
    scene.started[0] = scene.now
    assert scene.pass_time(50) is None


def test_who_stands_in_a_collective_waits_for_others():
    waiting = (
        '  File "/env/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py", line 3000 in all_reduce\n'
        '  File "/env/lib/python3.11/site-packages/torch/distributed/c10d_logger.py", line 83 in wrapper\n'
        '  File "/home/me/predict.py", line 29 in predict_step'
    )
    hanging = (
        '  File "/home/me/predict.py", line 30 in predict_step\n' + '  File "/env/a.py", line 1 in f\n' * 3 + waiting
    )
    assert waits_for_others(waiting)
    assert not waits_for_others(hanging)
    assert not waits_for_others("")


def test_only_an_idle_rank_may_be_waiting_for_another(tmp_path):
    scene = Scene(tmp_path)
    scene.beat(phase=Phase.RUN, step=True)
    assert scene.pass_time(4.2, beating=[0]).sure is False
    scene.state[0] = "T"
    scene.judge.check(scene.pids, scene.started)
    assert scene.pass_time(2.5).sure is True


def test_a_disk_that_takes_no_part_is_found_whatever_the_loop_does(tmp_path):
    scene = Scene(tmp_path)
    scene.beat(phase=Phase.WAIT)
    scene.table.write(0, commit_ns=scene.now)
    assert scene.pass_time(29, beating=[0]) is None
    verdict = scene.pass_time(2, beating=[0])
    assert "the disk has not taken a part for 31.0 s" in verdict.reason
    assert verdict.in_step is False, "no sample is to blame"


@pytest.fixture
def small_disk(tmp_path):
    directory = tmp_path / "shm"
    directory.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", directory], capture_output=True, text=True, timeout=30
    )
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    yield directory
    subprocess.run(["umount", "--lazy", directory], check=True, timeout=30)


@pytest.mark.root
def test_a_full_shared_memory_is_named_and_the_disk_is_used(small_disk, tmp_path, caplog):
    """Docker gives /dev/shm 64 MB. The first write to a page that is not there would end the process with SIGBUS."""
    filler = small_disk / "other jobs"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    table = create_table("gpuorch-run-0", 2, tmp_path, shared_memory=small_disk)
    table.clear(0)
    table.write(1, pid=7)
    assert table.row(1).pid == 7
    assert table.path == str(tmp_path / "gpuorch-run-0")
    assert "No space left on device" in caplog.text
    assert [path.name for path in small_disk.iterdir()] == [filler.name]
    table.close()


def test_without_shared_memory_the_disk_is_used(tmp_path):
    table = create_table("gpuorch-run-0", 1, tmp_path, shared_memory=tmp_path / "nowhere")
    assert table.path == str(tmp_path / "gpuorch-run-0")
    table.close()


def test_what_others_have_put_in_the_place_of_a_table_is_not_taken(tmp_path, caplog):
    (tmp_path / "fallback").mkdir()
    (tmp_path / "elsewhere").write_bytes(b"theirs")
    (tmp_path / "table").symlink_to(tmp_path / "elsewhere")
    table = create_table("table", 2, tmp_path / "fallback", shared_memory=tmp_path)
    assert table.path == str(tmp_path / "fallback" / "table")
    assert (tmp_path / "elsewhere").read_bytes() == b"theirs"
    assert "File exists" in caplog.text
    with pytest.raises(OSError, match="symbolic links"):
        HeartbeatTable(str(tmp_path / "table"), 2)
    table.close()


def test_who_stands_in_a_group_of_ours_waits_for_others():
    from lightning_gpuorch.parallel.groups import recoverable_group

    assert waits_for_others(f'  File "{recoverable_group.__file__}", line 7 in wait')


def test_tables_of_killed_supervisors_are_removed_and_those_of_living_ones_stay(tmp_path):
    living = create_table("gpuorch-living", 1, tmp_path, shared_memory=tmp_path)
    for name in ("gpuorch-dead", "another-program"):
        create_table(name, 1, tmp_path, shared_memory=tmp_path).close()
    (tmp_path / "gpuorch-link").symlink_to(tmp_path / "another-program")
    sweep_tables(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "another-program", "gpuorch-link", "gpuorch-living",
    ]  # fmt: skip
    living.close()
    sweep_tables(tmp_path)
    assert not (tmp_path / "gpuorch-living").exists()
