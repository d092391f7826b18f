"""What a user gives as a directory, wherever one is taken."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from lightning_gpuorch import MultiGPUOrchestrator, OrchestratorConfig, read_predictions
from lightning_gpuorch.callbacks import DurablePredictionWriter, PrometheusMetrics
from lightning_gpuorch.cli import gpuorch
from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.paths import ObjectPath, local_path, location, options_of
from lightning_gpuorch.predictions import PartStore, check_writable, export_predictions
from lightning_gpuorch.pytorch import GPUOrchStrategy
from lightning_gpuorch.worker import session

IN_STORES = [
    "s3://bucket/predictions",
    "s3:/bucket/predictions",  # what is left of it after os.path.normpath
    "gs://bucket/x",
    "memory://x",
    "az://container/x",
    "abfss://container@account.dfs.core.windows.net/x",
    "S3://Bucket/x",
    Path("gs://bucket/x"),
]
ELSEWHERE = [
    "hdfs://host:9000/x",
    "dbfs:/mnt/x",
    "hf://datasets/x",
    "https://host/x",
    "simplecache::s3://bucket/x",
    "file::s3://bucket/x",
    "s3:\\bucket\\x",
]


class Double(LightningModule):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch * 2


def predict(output_dir: Any, root: Any) -> Any:
    session.leave()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        strategy=GPUOrchStrategy(output_dir=output_dir),
        default_root_dir=root,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    return trainer.predict(Double(), DataLoader(torch.arange(6.0), batch_size=4))


@pytest.fixture(autouse=True)
def _in_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def is_refused(take: Any, given_path: Any, tmp_path: Path) -> None:
    scheme = str(given_path).split("::")[-1].split(":")[0].lower()
    with pytest.raises(ConfigurationError, match=rf"=.* is on {scheme}: storage"):
        take()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given_path", ELSEWHERE)
def test_other_storage_is_refused_by_name_wherever_predictions_are_kept(given_path: Any, tmp_path: Path) -> None:
    for take in (
        lambda: GPUOrchStrategy(output_dir=given_path),
        lambda: MultiGPUOrchestrator(output_dir=given_path),
        lambda: read_predictions(given_path),
        lambda: DurablePredictionWriter(given_path),
        lambda: PartStore(given_path),
        lambda: check_writable(given_path),
    ):
        is_refused(take, given_path, tmp_path)


@pytest.mark.parametrize("given_path", ELSEWHERE + IN_STORES)
def test_every_other_storage_is_refused_by_name_where_a_file_of_this_machine_is_needed(
    given_path: Any, tmp_path: Path
) -> None:
    for take in (
        lambda: export_predictions(tmp_path, given_path, "jsonl"),
        lambda: PrometheusMetrics(directory=given_path),
        lambda: OrchestratorConfig(plan_cache=str(given_path)),
        lambda: OrchestratorConfig(baseline_file=str(given_path)),
    ):
        is_refused(take, given_path, tmp_path)


@pytest.mark.parametrize(
    ("given_path", "shown"),
    [
        ("s3://bucket/predictions", "s3://bucket/predictions"),
        ("s3:/bucket//predictions/", "s3://bucket/predictions"),
        ("S3://Bucket/x", "s3://Bucket/x"),
        (Path("gs://bucket/a b/%20#?"), "gs://bucket/a b/%20#?"),
        ("abfss://container@account.dfs.core.windows.net/x", "abfss://container@account.dfs.core.windows.net/x"),
        ("s3://bucket", "s3://bucket/"),
    ],
)
def test_urls_of_object_stores_are_paths_in_them(given_path: Any, shown: str) -> None:
    found = location(given_path, "output_dir", {"endpoint": "secret", "allow_http": True})  # type: ignore[dict-item]
    assert isinstance(found, ObjectPath)
    assert str(found) == shown
    assert str(found / "a" / "b") == shown.rstrip("/") + "/a/b"
    assert (found / "a").parent == found
    assert (found / "a").with_name("c").name == "c"
    assert location(str(found), "output_dir", options_of(found)) == found
    assert options_of(found) == {"endpoint": "secret", "allow_http": "true"}
    assert "secret" not in repr(found)


@pytest.mark.parametrize(
    ("given_path", "message"),
    [
        ("s3://", "names no bucket"),
        ("s3:/", "names no bucket"),
        ("gs:// /x", "names no bucket"),
        ("s3://bucket/a/../b", "a part that no key may have"),
        ("s3://bucket/a\nb", "a part that no key may have"),
        ("s3://bucket/" + "x" * 1000, "longer than the 900 bytes"),
    ],
)
def test_what_is_no_place_in_a_store_is_refused(given_path: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        GPUOrchStrategy(output_dir=given_path)


def test_memory_serves_a_job_in_one_process() -> None:
    predicted = predict("memory://here/x", ".")
    assert [batch.tolist() for batch in predicted] == [[0.0, 2.0, 4.0, 6.0], [8.0, 10.0]]
    assert len(read_predictions("memory://here/x")) == 2
    with pytest.raises(ConfigurationError, match="holds no predictions"):
        read_predictions("memory://there/x")
    assert len(predict(None, "memory://here/root")) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["predictions", "verify", "hdfs://b/x"],
        ["predictions", "show", "hdfs://b/x"],
        ["predictions", "export", ".", "s3://b/x.jsonl"],
        ["report", "hdfs://b/x"],
        ["report", ".", "--output", "s3://b/x.html"],
        ["doctor", "--output-dir", "hdfs://b/x"],
        ["top", "hdfs://b/x"],
        ["calibrate", "--output", "s3://b/x", __file__],
    ],
)
def test_the_command_line_refuses_other_storage(arguments: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(gpuorch, arguments)
    assert done.exit_code != 0
    assert re.search("is on (s3|hdfs): storage", " ".join(done.output.replace("│", " ").split()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("root", ["hdfs://host/root", "hf://root", "simplecache::s3://b"])
def test_a_root_directory_elsewhere_is_refused_before_anything_is_made(root: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="default_root_dir='.*' is on"):
        predict(None, root)
    assert not list(tmp_path.iterdir())


def test_a_root_directory_elsewhere_does_not_matter_with_an_output_directory(tmp_path: Path) -> None:
    predict(tmp_path / "out", "hdfs://root")
    assert len(read_predictions(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("given_path", "place"),
    [
        ("~/out", "home/out"),
        (Path("~/out"), "home/out"),
        ("~/a:b", "home/a:b"),
        ("file://{}/out", "out"),
        ("file:{}/out", "out"),
        ("file://localhost{}/out", "out"),
        ("FILE://{}/out", "out"),
        ("file://{}/a%20b", "a b"),
        ("file://{}/a#b?c", "a#b?c"),
        ("out ü 日本", "out ü 日本"),
        ("./s3:/out", "s3:/out"),
        ("run:1/out", "run:1/out"),
        ("12:30/out", "12:30/out"),
    ],
)
def test_local_paths_are_where_they_say(given_path: Any, place: str, tmp_path: Path) -> None:
    if isinstance(given_path, str):
        given_path = given_path.replace("{}", str(tmp_path))
    predict(given_path, tmp_path)
    assert (tmp_path / place / "manifest.json").is_file()
    assert len(read_predictions(given_path)) == 2
    assert CliRunner().invoke(gpuorch, ["predictions", "verify", str(given_path)]).exit_code == 0


def test_a_root_directory_as_url_or_in_the_home(tmp_path: Path) -> None:
    for root, place in (("~/root", tmp_path / "home/root"), (f"file://{tmp_path}/root", tmp_path / "root")):
        assert len(predict(None, root)) == 2
        assert (place / "gpuorch").is_dir()
    assert not (tmp_path / "file:").exists()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("given_path", "message"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("a\0b", "null character"),
        (b"out", "is a bytes"),
        (7, "is a int; expected a path"),
        ("~nobody-of-this-name/x", "home of a user that this machine does not know"),
        ("file://server/share", "not an absolute path of this machine"),
        ("file:out", "not an absolute path of this machine"),
        ("file://", "not an absolute path of this machine"),
    ],
)
def test_what_is_no_path_of_this_machine_is_refused(given_path: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        GPUOrchStrategy(output_dir=given_path)


def test_a_path_object_of_a_cloud_library_is_its_url_although_it_has_a_local_copy(tmp_path: Path) -> None:
    class CloudPath(os.PathLike[str]):
        def __str__(self) -> str:
            return "s3://bucket/x"

        def __fspath__(self) -> str:
            return str(tmp_path / "cache")

    assert str(location(CloudPath(), "output_dir")) == "s3://bucket/x"
    with pytest.raises(ConfigurationError, match="is on s3: storage"):
        local_path(CloudPath(), "target")


def test_the_environment_is_held_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUORCH_PLAN_CACHE", "s3://bucket/plans")
    with pytest.raises(ConfigurationError, match="plan_cache='s3://bucket/plans' is on s3: storage"):
        OrchestratorConfig.resolve()


@pytest.mark.skipif(sys.platform == "win32", reason="paths of Windows have other rules")
@given(
    st.lists(st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1), min_size=1).map(
        lambda names: Path("/", *(name for name in names if name not in (".", "..")))
    )
)
def test_every_absolute_path_is_itself_also_as_its_url(path: Path) -> None:
    assert local_path(path, "it") == path
    assert local_path(path.as_uri(), "it") == path
