"""The exit code of whole jobs: what has happened, when, and to how many ranks; the rule is in ``supervisor/outcome.py``."""

from __future__ import annotations

import signal
import time

import pytest

from lightning_gpuorch import read_predictions
from lightning_gpuorch.testing import checks
from tests.conftest import gpuorch_run

TABLE = [
    # cause, moment, devices, tensor-parallel size, exit code, what is said
    ("output is a file", "start", 1, 1, 74, "out"),
    ("output is a file", "start", 2, 2, 74, "out"),
    ("directory vanishes", "middle", 4, 2, 74, "vanished"),
    ("memory", "middle", 2, 1, 65, "41"),
    ("SIGTERM", "start", 2, 2, 75, "SIGTERM: finishing the chunks in hand"),
    ("SIGTERM", "middle", 4, 1, 75, "the same command goes on from here"),
    ("SIGINT", "middle", 1, 1, 75, "the same command goes on from here"),
    ("SIGTERM", "end", 2, 1, 0, "all predictions are in"),
    ("environment", "start", 2, 1, 78, "unknown environment variable GPUORCH_TOKENS"),
    ("configuration", "middle", 2, 2, 78, "this cannot work"),
    ("exception", "end", 2, 2, 1, "a label is unknown"),
    ("terminate", "middle", 2, 2, 0, "all predictions are in"),
    ("kill", "start", 2, 2, 0, "killed by SIGKILL"),
    ("kill", "end", 2, 1, 0, "killed by SIGKILL"),
    ("kill", "others ended", 2, 2, 0, "restarting replica 0"),
]


@pytest.mark.parametrize(
    ("cause", "moment", "devices", "tp", "code", "said"), TABLE, ids=lambda value: str(value).replace(" ", "-")
)
def test_the_exit_code_tells_what_has_happened(runner, tmp_path, cause, moment, devices, tp, code, said):
    launcher = tuple(str(devices) if word == "2" else word for word in gpuorch_run())
    in_script = {"SIGTERM": "signal", "SIGINT": "signal"}.get(cause, cause)
    environment = {"GPUORCH_TOKENS": "x"} if cause == "environment" else {}
    if cause == "output is a file":
        (tmp_path / "out").write_text("")
    process = runner.start(
        "ending.py", "--devices", devices, "--tp", tp, "--output", "out", "--cause", in_script, "--moment", moment,
        launcher=launcher, environment=environment,
    )  # fmt: skip
    if in_script == "signal":
        deadline = time.monotonic() + 90
        while not list(tmp_path.glob("reached-*")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(getattr(signal, cause))
    assert runner.wait(process, 100) == code, runner.log_of(process)
    log = runner.log_of(process)
    assert said in log
    if code == 0:
        values = [float(value) for batch in read_predictions(tmp_path / "out") for value in batch[:, 0]]
        assert values == [2.0 * index for index in range(160)]
    if moment == "others ended":
        assert (tmp_path / "through-1").exists(), "the script has come to its end on the killed rank, too"
    if cause == "terminate":
        assert "restarting" not in log, "one rank alone is not the job"
    if code == 65:
        assert not checks.unnamed_samples(tmp_path / "out", log), "what is missing is named"
