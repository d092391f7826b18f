"""Supervises ``slow_predict.py`` on devices that exist on paper: which of them are bad stands in a file.

``job_with_devices.py BAD_FILE DEVICES SPARES WORKERS_ARGUMENTS...``; DEVICES and SPARES are lists such as ``0,1`` or ``-``.
"""

import sys
from pathlib import Path

from lightning_gpuorch.config import OrchestratorConfig
from lightning_gpuorch.devices import preflight
from lightning_gpuorch.devices.pool import DevicePool
from lightning_gpuorch.supervisor.spawn import script_spawner
from lightning_gpuorch.supervisor.supervisor import Supervisor
from lightning_gpuorch.telemetry.logs import configure_logging

CHECK = """
import json, sys
bad = open(sys.argv[1]).read().split()
print(json.dumps({"ok": sys.argv[2] not in bad, "evidence": "a matrix product is wrong", "uuid": "GPU-" + sys.argv[2]}))
"""


def main():
    bad_file, devices, spares, *arguments = sys.argv[1:]
    preflight.COMMAND = (sys.executable, "-c", CHECK, bad_file)
    configure_logging("INFO", rank=None, replica=0)
    pool = DevicePool.of_indices(_numbers(devices), _numbers(spares))
    script = str(Path(__file__).with_name("slow_predict.py"))
    spawner = script_spawner(["script", script, "--devices", str(len(pool.holders)), *arguments], warm_start=True)
    sys.exit(Supervisor(spawner, len(pool.holders), OrchestratorConfig.resolve(), devices=pool).run())


def _numbers(text):
    return [int(part) for part in text.split(",") if part != "-"]


if __name__ == "__main__":
    main()
