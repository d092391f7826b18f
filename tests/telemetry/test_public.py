from __future__ import annotations

import subprocess
import sys

import pytest

import lightning_gpuorch
import lightning_gpuorch.predictions as predictions
import lightning_gpuorch.telemetry as telemetry


@pytest.mark.parametrize("room", [lightning_gpuorch, predictions, telemetry])
def test_the_public_list_is_what_can_be_imported(room: object) -> None:
    assert sorted({*room.__all__} - {"__version__"}) == sorted(room._HOMES)  # type: ignore[attr-defined]
    for name in room.__all__:  # type: ignore[attr-defined]
        assert getattr(room, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        room.nonsense  # type: ignore[attr-defined]  # noqa: B018


def test_recording_needs_neither_torch_nor_prometheus() -> None:
    code = (
        "import sys\n"
        "from lightning_gpuorch.telemetry import EventLog, RankTelemetry, configure_logging, write_report\n"
        "print([m for m in ('torch', 'lightning', 'prometheus_client', 'pynvml', 'torchmetrics') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
