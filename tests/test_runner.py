"""A test with several processes that fails shows what each of them did."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

from tests.conftest import Runner

HANGING = """
import os, sys, threading

def the_launcher_waits():
    os.wait()

def a_rank_hangs():
    print("ready", flush=True)
    threading.Event().wait()

if "child" in sys.argv:
    a_rank_hangs()
else:
    import subprocess
    subprocess.Popen([sys.executable, __file__, "child"], env={**os.environ, "RANK": "3"}, start_new_session=True)
    the_launcher_waits()
"""


def test_report_has_the_log_and_the_stacks_of_all_processes(tmp_path):
    script = tmp_path / "hanging.py"
    script.write_text(HANGING)
    runner = Runner(tmp_path)
    try:
        process = runner.start(str(script))
        deadline = time.monotonic() + 30
        while "ready" not in runner.log_of(process):
            assert time.monotonic() < deadline, runner.log_of(process)
            time.sleep(0.02)
        started = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        text = runner.report()
    finally:
        runner.close()
    assert "was still running" in text
    assert "ready" in text
    assert "the_launcher_waits" in text
    assert "a_rank_hangs" in text.split("--- rank 3, process ")[1]
    assert len(started) == 2
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in started)


@pytest.mark.slow
def test_a_failing_test_prints_it(tmp_path):
    """By way of the real fixture and hook: pytest runs a test that fails, with the conftest of all tests."""
    script = tmp_path / "script.py"
    script.write_text("print('what the script said')")
    test = tmp_path / "test_it.py"
    test.write_text(f"def test_it(runner):\n    runner.run({str(script)!r}, code=3)\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider", "-p", "no:xdist",
               "--confcutdir", str(tmp_path), "--rootdir", str(tmp_path), "-c", "/dev/null", str(test)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stdout
    assert "ended with 0, expected 3" in done.stdout
    assert "what the script said" in done.stdout
