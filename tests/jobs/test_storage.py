"""Disks that fill up, directories that vanish, parts that rot: in whole runs."""

import os
import shutil
import subprocess
import time

import pytest

from lightning_gpuorch import read_predictions
from lightning_gpuorch.errors import CorruptPartError
from tests.conftest import gpuorch_run

SLOW = "slow_predict.py"


def _parts(output):
    return {path.name: path.stat().st_mtime_ns for path in (output / "dataloader_0").glob("part-*.gpq")}


def _batches(tmp_path):
    return len((tmp_path / "notes.txt").read_text().splitlines())


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a file system")
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", directory], capture_output=True, text=True, timeout=60
    )
    if mounted.returncode != 0:
        pytest.skip(f"mount is not permitted: {mounted.stderr.strip()}")
    yield directory
    subprocess.run(["umount", "--lazy", directory], check=True, timeout=60)


@pytest.mark.root
def test_a_full_disk_stops_the_job_and_costs_nothing_that_was_written(runner, tmp_path, small_disk):
    # 8 chunks of 1.3 MB each.
    command = (SLOW, "--output", "disk/out", "--samples", 64, "--padding", 40_000, "--step", 0.01)
    finished = runner.run(*command, launcher=gpuorch_run(), code=74, timeout=120)
    assert "no space is left in" in finished.output
    assert "make room and run the same command again" in finished.output
    assert "restarting replica" not in finished.output, "a full disk burns no restarts"
    assert not list(small_disk.glob("**/.tmp-*"))
    before = _parts(small_disk / "out")
    assert 1 <= len(before) < 8
    kept = read_predictions(small_disk / "out", allow_missing=True)
    assert len(kept.missing) == 64 - 8 * len(before)
    assert all((batch[:, 0] % 2 == 0).all() for batch in kept if batch is not None), "what is there is whole"
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True, timeout=60)
    assert runner.run(*command, launcher=gpuorch_run()).result["right"]
    assert before.items() <= _parts(small_disk / "out").items(), "what was written is not written again"


def test_a_directory_that_is_removed_under_way_ends_the_job_with_a_clear_error(runner, tmp_path):
    process = runner.start(SLOW, "--output", "out", "--samples", 4000, launcher=gpuorch_run())
    deadline = time.monotonic() + 90
    while len(_parts(tmp_path / "out")) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    # At one moment: a writer that is at work must not find half of it.
    (tmp_path / "out").rename(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    code = runner.wait(process, 60)
    assert code == 74
    assert "has vanished" in runner.log_of(process)


def test_damaged_parts_are_named_and_computed_again(runner, tmp_path):
    command = (SLOW, "--output", "out", "--samples", 80, "--step", 0)
    assert runner.run(*command, launcher=gpuorch_run()).result["right"]
    computed = _batches(tmp_path)
    flipped, cut = (tmp_path / "out" / "dataloader_0" / f"part-00000000{chunk}.gpq" for chunk in (3, 7))
    raw = bytearray(flipped.read_bytes())
    raw[len(raw) // 2] ^= 1
    flipped.write_bytes(raw)
    os.truncate(cut, cut.stat().st_size - 1)
    with pytest.raises(CorruptPartError, match=flipped.name):
        list(read_predictions(tmp_path / "out")[6:8])
    finished = runner.run(*command, launcher=gpuorch_run())
    assert finished.result["right"]
    for path in (flipped, cut):
        assert f"{path} is damaged" in finished.output
        assert path.with_name(f"{path.name}.damaged").exists()
    assert _batches(tmp_path) == computed + 2 * 2, "the two chunks, and nothing else"


def test_an_output_directory_that_is_a_file_is_a_storage_failure_on_two_ranks_too(runner, tmp_path):
    (tmp_path / "out").touch()
    finished = runner.run(SLOW, "--output", "out", launcher=gpuorch_run(), code=74)
    assert "cannot be accessed: Not a directory" in finished.output
    assert "the same command goes on" not in finished.output


def test_two_runs_of_one_command_share_a_directory_and_the_end_of_one_does_not_harm_the_other(runner, tmp_path):
    command = (SLOW, "--output", "out", "--samples", 480)
    stopped, other = (runner.start(*command, launcher=gpuorch_run()) for _ in range(2))
    deadline = time.monotonic() + 120
    while not (tmp_path / "notes.txt").exists() or _batches(tmp_path) < 16:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    stopped.terminate()
    assert runner.wait(stopped) in (75, 0), "0 where the other one was quicker with all of it"
    assert runner.wait(other) == 0
    assert read_predictions(tmp_path / "out").verify() == 480
