"""A secret for the processes of one user, whose place is told by a source that others can write to."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lightning_gpuorch.control import shared_secret
from lightning_gpuorch.control.shared_secret import CoordinatorPlace, SharedSecret, read_secret
from lightning_gpuorch.errors import ControlPlaneError


def test_processes_of_one_user_share_it_until_it_is_removed() -> None:
    first, second = SharedSecret(), SharedSecret()
    assert read_secret(str(first.directory)) == first.token != second.token
    assert stat.S_IMODE(first.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((first.directory / "token").stat().st_mode) == 0o600
    for secret in (first, second):
        secret.remove()
        with pytest.raises(ControlPlaneError, match="set GPUORCH_TOKEN"):
            read_secret(str(secret.directory))


LEAVES_ONE = """
import os
from lightning_gpuorch.control.shared_secret import SharedSecret
print(SharedSecret().directory, flush=True)
os.kill(os.getpid(), 9)
"""


def test_that_of_a_killed_process_is_removed_by_the_next_one_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(shared_secret, "_NEW_SECONDS", 0)
    here = SharedSecret()
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", LEAVES_ONE], env=environment, capture_output=True, text=True, timeout=60
    )
    left = Path(done.stdout.strip())
    assert read_secret(str(left))
    stranger = tmp_path / "gpuorch-secret-open"
    _open_directory(stranger)
    following = SharedSecret()
    assert not left.exists()
    assert stranger.exists(), "it is not known whose it is"
    assert read_secret(str(here.directory)) == here.token
    for secret in (here, following):
        secret.remove()


def _open_directory(place: Path) -> None:
    place.mkdir(mode=0o755)
    (place / "token").touch(0o600)


def _open_file(place: Path) -> None:
    place.mkdir(mode=0o700)
    (place / "token").touch(0o644)
    (place / "token").chmod(0o644)


def _link_to_a_directory(place: Path) -> None:
    _good(place.with_name("elsewhere"))
    place.symlink_to(place.with_name("elsewhere"))


def _link_to_a_file(place: Path) -> None:
    place.mkdir(mode=0o700)
    place.with_name("file").touch(0o600)
    (place / "token").symlink_to(place.with_name("file"))


def _pipe(place: Path) -> None:
    place.mkdir(mode=0o700)
    os.mkfifo(place / "token", 0o600)
    os.chmod(place / "token", 0o640)


def _good(place: Path) -> None:
    place.mkdir(mode=0o700)
    (place / "token").touch(0o600)


@pytest.mark.parametrize("make", [_open_directory, _open_file, _link_to_a_directory, _link_to_a_file, _pipe])
def test_what_others_could_have_put_there_is_refused(tmp_path: Path, make: object) -> None:
    make(tmp_path / "place")  # type: ignore[operator]
    with pytest.raises(ControlPlaneError):
        read_secret(str(tmp_path / "place"))


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"port": "1"}', b"[" * 100_000, b"\xff"])
def test_what_others_could_have_written_to_the_store_is_refused(data: bytes) -> None:
    with pytest.raises(ControlPlaneError, match="malformed"):
        CoordinatorPlace.read(data)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
def test_another_users_is_refused(tmp_path: Path) -> None:
    _good(tmp_path / "place")
    assert read_secret(str(tmp_path / "place")) == ""
    os.chown(tmp_path / "place" / "token", 12345, 12345)
    with pytest.raises(ControlPlaneError, match="another user's"):
        read_secret(str(tmp_path / "place"))
