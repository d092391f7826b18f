from __future__ import annotations

import importlib.metadata
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_gpuorch.devices import doctor
from lightning_gpuorch.devices.doctor import Check, CheckStatus, describe, examine, exit_code
from tests.support.nvml import FakeNVML


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_a_machine_with_four_gpus_one_of_them_sick(gpus: FakeNVML, tmp_path: Path) -> None:
    gpus.set(1, remap_pending=1)
    gpus.set(2, lost=1)
    gpus.set_key(3, "field:230", 4)
    checks = examine(tmp_path)
    found = by_name(checks)
    assert [found[f"GPU {i}"].outcome for i in range(4)] == [
        CheckStatus.GOOD,
        CheckStatus.WARNING,
        CheckStatus.BAD,
        CheckStatus.BAD,
    ]
    assert found["GPU 0"].seen == "Fake-GPU, 61.0 of 79.6 GiB free, healthy"
    assert found["GPU 1"].advice == "row_remap_pending: a row waits to be remapped"
    assert found["GPU 3"].advice == "recovery_action: the driver asks to drain, then reset (4)"
    assert found["driver"].seen == "570.86.15"
    assert exit_code(checks) == os.EX_CONFIG
    text = describe(checks)
    assert "BAD   GPU 2" in text
    assert "-> row_remap_pending" in text


def test_this_machine_is_examined_without_a_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import pynvml

    def no_library(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(pynvml, "CDLL", no_library)
    monkeypatch.setattr(pynvml, "nvmlLib", None)
    found = by_name(examine(tmp_path / "not" / "there" / "yet"))
    assert found["GPUs"].outcome is CheckStatus.WARNING
    assert found["torch"].seen == importlib.metadata.version("torch")
    assert found["disk"].outcome is not CheckStatus.BAD
    assert str(tmp_path) in found["disk"].seen
    assert {"python", "lightning", "shared memory", "file descriptors", "clock"} <= found.keys()


def test_what_is_too_small_is_said_with_advice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import resource

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**26, used=0, free=2**26))
    monkeypatch.setattr(resource, "getrlimit", lambda what: (1024, 4096))
    memory, files, disk = doctor.check_shared_memory(), doctor.check_file_descriptors(), doctor.check_disk(tmp_path)
    assert [check.outcome for check in (memory, files, disk)] == [CheckStatus.WARNING] * 3
    assert "--shm-size" in memory.advice
    assert "ulimit -n 4096" in files.advice
    assert exit_code([memory, files, disk]) == 0


def test_an_output_directory_that_is_a_file_is_bad(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert doctor.check_disk(tmp_path / "file" / "results").outcome is CheckStatus.BAD


def test_a_withdrawn_lightning_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.6.2" if name == "lightning" else real(name))
    assert by_name(doctor.check_versions())["lightning"].outcome is CheckStatus.BAD


@pytest.mark.parametrize(("synchronised", "outcome"), [(True, "good"), (False, "warning"), (None, "warning")])
def test_the_clock(monkeypatch: pytest.MonkeyPatch, synchronised: bool | None, outcome: str) -> None:
    monkeypatch.setattr(doctor, "_clock_is_synchronised", lambda: synchronised)
    assert doctor.check_clock().outcome.value == outcome


def test_a_check_that_fails_itself_hides_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def explode(*args: Any) -> None:
        raise RuntimeError("no such call")

    monkeypatch.setattr(doctor, "check_gpus", explode)
    monkeypatch.setattr(doctor, "check_versions", explode)
    found = by_name(examine(tmp_path))
    assert found["GPUs"].seen == "could not be checked: RuntimeError: no such call"
    assert "disk" in found
