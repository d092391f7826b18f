"""Runs a job in which everything goes wrong and takes the pictures of this page: ``python docs/monitoring/make_pictures.py``.

Four CPU ranks watch GPUs that are not there. Batches do not fit, a rank is killed, a GPU falls off the bus. The report and
``gpuorch top`` are those of that run; the pictures of 64 ranks are made of invented events. Needs a C compiler and chromium.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402

from lightning_gpuorch.telemetry import read_events, write_report  # noqa: E402
from lightning_gpuorch.telemetry.report.live import snapshot  # noqa: E402
from tests.support.nvml import FakeNVML  # noqa: E402
from tests.telemetry.synthetic_run import BEGIN, write_run  # noqa: E402


def run_job(scratch: Path) -> Path:
    """A job with OOMs, a restart and a retirement; returns the folder of its records."""
    gpus = FakeNVML(scratch, num_gpus=4)
    output = scratch / "predictions"
    for name in ("common.py", "observed.py"):  # so that the command line in the pictures is short
        shutil.copy(ROOT / "tests" / "jobs" / "scripts" / name, scratch)
    command = [
        sys.executable, "observed.py", "--devices", "4", "--samples", "6000", "--step", "0.05", "--oom-every", "1900",
        "--output", output.name, "--nvml", str(gpus.library.relative_to(scratch)), gpus.state_file.name,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, cwd=scratch)

    def chunks() -> int:
        return len(list(output.glob("dataloader_0/*.gpq")))

    def wait_for(number: int) -> None:
        while chunks() < number:
            if process.poll() is not None:
                raise SystemExit(f"the job ended too early, with {process.returncode}")
            time.sleep(0.1)

    wait_for(150)
    gpus.set(2, temperature="45..96@6")
    (records,) = (scratch / f"gpuorch-{os.getuid()}").glob("*/events")
    starts = [event for event in read_events(records)[0] if event["kind"] == "start" and event["rank"] == 1]
    os.kill(starts[-1]["pid"], signal.SIGKILL)
    wait_for(350)
    gpus.send_xid(3, 79)
    if process.wait(300) != 0:
        raise SystemExit(f"the job ended with {process.returncode}")
    (kept,) = (output / "runs").iterdir()
    return kept


def photograph(page: Path, target: Path, *, dark: bool, size: str) -> None:
    """Have chromium draw a page."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("chromium is not installed")
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else ["--blink-settings=preferredColorScheme=1"]
    subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={size}", *scheme,
         f"--screenshot={target}", page.as_uri()],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip


def draw_top(events: list[dict], at: float, target: Path, scratch: Path, height: int | None = None) -> None:
    """The terminal view at one moment, as a picture."""
    console = Console(record=True, width=118, file=open(os.devnull, "w"))  # noqa: SIM115 - as long as the process
    console.print(snapshot(events, at, height))
    page = scratch / f"{target.stem}.svg"
    page.write_text(console.export_svg(title="gpuorch top"), encoding="utf-8")
    lines = page.read_text(encoding="utf-8").count("<clipPath")
    photograph(page, target, dark=True, size=f"1500,{110 + 26 * lines}")


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        kept = run_job(scratch)
        for scheme in ("light", "dark"):
            photograph(kept / "report.html", HERE / f"report-{scheme}.png", dark=scheme == "dark", size="1240,2900")
        events, _ = read_events(kept / "events")
        retired = next(event["ts"] for event in events if event["kind"] == "retire")
        draw_top(events, retired + 6, HERE / "top.png", scratch)
        many = write_run(scratch / "many", num_ranks=64)
        page = write_report(many, scratch / "many.html")
        photograph(page, HERE / "report-64-ranks.png", dark=False, size="1240,2600")
        draw_top(read_events(many / "events")[0], BEGIN + 150, HERE / "top-64-ranks.png", scratch, height=40)


if __name__ == "__main__":
    main()
