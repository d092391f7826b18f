"""Outputs nobody asked for: of any type, a marker is durable in their place, and readers say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch.utils.data import DataLoader, Dataset

from lightning_gpuorch import MultiGPUOrchestrator, read_predictions
from lightning_gpuorch.cli import gpuorch
from lightning_gpuorch.errors import (
    ConfigurationError,
    CorruptPartError,
    JobMismatchError,
    OutputsNotKeptError,
    UnsupportedPredictionError,
)
from lightning_gpuorch.pytorch import GPUOrchStrategy
from lightning_gpuorch.worker import session

NUM_SAMPLES = 10


class Result:
    """A class of the user, with nothing that could be stored."""

    def __init__(self, total: Any):
        self.total, self.lock = total, open


class Numbers(Dataset[Any]):
    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.ones(index % 4 + 1)


class Model(LightningModule):
    def __init__(self, dies_at: int | None = None):
        super().__init__()
        self.dies_at, self.computed = dies_at, 0

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == self.dies_at:
            raise RuntimeError("the step fails")
        self.computed += 1
        return Result(batch.sum())


class Writer(BasePredictionWriter):
    def __init__(self) -> None:
        super().__init__("batch")
        self.written: list[int] = []

    def write_on_batch_end(
        self, trainer: Any, m: Any, prediction: Any, indices: Any, batch: Any, i: int, loader: int = 0
    ) -> None:
        assert isinstance(prediction, Result)
        self.written += indices


def predict(directory: Path, model: Model | None = None, wanted: bool | None = False, **options: Any) -> Any:
    session.leave()
    writer = Writer()
    trainer = Trainer(
        accelerator="cpu", devices=1, strategy=GPUOrchStrategy(chunk_size=1, **options), default_root_dir=directory,
        callbacks=[writer], logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    data = DataLoader(
        Numbers(), batch_size=2, collate_fn=lambda samples: torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)
    )
    return trainer.predict(model or Model(), data, return_predictions=wanted), writer, trainer


def test_nothing_is_asked_for_and_nothing_is_refused(tmp_path: Path) -> None:
    result, writer, trainer = predict(tmp_path)
    assert result is None
    assert writer.written == list(range(NUM_SAMPLES))
    found = read_predictions(trainer.strategy.runtime.job.directory)
    assert not found.missing
    assert (len(found), found.verify(), found.keeps_outputs) == (5, NUM_SAMPLES, False)


def test_dynamic_batches_keep_markers_too(tmp_path: Path) -> None:
    _, writer, _ = predict(tmp_path, enable_dynamic_batching=True, keep_outputs=False, output_dir=tmp_path / "out")
    found = read_predictions(tmp_path / "out")
    assert sorted(writer.written) == list(range(NUM_SAMPLES))
    assert (found.verify(), list(found.indices)) == (NUM_SAMPLES, list(range(NUM_SAMPLES)))


@pytest.mark.parametrize("given_by", ["argument", "environment"])
def test_an_interrupted_run_goes_on_and_is_not_recomputed(
    tmp_path: Path, given_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"output_dir": tmp_path / "out"}
    if given_by == "environment":
        monkeypatch.setenv("GPUORCH_KEEP_OUTPUTS", "false")
    else:
        options["keep_outputs"] = False
    with pytest.raises(RuntimeError, match="the step fails"):
        predict(tmp_path, Model(dies_at=3), **options)
    assert list(read_predictions(tmp_path / "out", allow_missing=True).missing) == [6, 7, 8, 9]
    model = Model()
    _, writer, _ = predict(tmp_path, model, **options)
    assert model.computed == 2
    assert writer.written == [6, 7, 8, 9]
    assert not read_predictions(tmp_path / "out").missing


def test_readers_say_that_outputs_were_not_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict(tmp_path, output_dir=out, keep_outputs=False)
    found = read_predictions(out)
    reads = (
        lambda: found[0],
        lambda: list(found),
        lambda: found[1:][0],
        lambda: next(found.samples()),
        lambda: repr(found),
    )
    for read in (*reads, lambda: next(found.stored_batches()), lambda: torch.cat(found), found.read_all):
        with pytest.raises(
            OutputsNotKeptError, match=rf"outputs were not kept.*[45] batches.*{out}.*keep_outputs=True"
        ):
            read()
    assert list(found.indices) == list(range(NUM_SAMPLES))
    run = CliRunner().invoke
    verified = run(gpuorch, ["predictions", "verify", str(out)])
    assert verified.exit_code == 0
    assert "10 samples read and intact; outputs were not kept" in verified.output
    for command in (["show", str(out)], ["export", str(out), str(tmp_path / "x.jsonl")]):
        refused = run(gpuorch, ["predictions", *command])
        assert refused.exit_code != 0
        assert "outputs were not kept" in refused.output
    assert not (tmp_path / "x.jsonl").exists()


def test_damage_is_found_all_the_same(tmp_path: Path) -> None:
    predict(tmp_path, output_dir=tmp_path / "out", keep_outputs=False)
    part = tmp_path / "out/dataloader_0/part-000000002.gpq"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptPartError, match="part-000000002"):
        read_predictions(tmp_path / "out").verify()
    assert CliRunner().invoke(gpuorch, ["predictions", "verify", str(tmp_path / "out")]).exit_code == 1


def test_with_an_output_directory_outputs_are_kept_and_the_error_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedPredictionError, match=r"Result, which cannot be stored.*keep_outputs=False"):
        predict(tmp_path, output_dir=tmp_path / "out")


@pytest.mark.parametrize("wanted", [None, True])
def test_outputs_that_are_returned_are_kept(tmp_path: Path, wanted: bool | None) -> None:
    with pytest.raises(UnsupportedPredictionError, match="Result"):
        predict(tmp_path, wanted=wanted)
    with pytest.raises(ConfigurationError, match="keep_outputs=False keeps no outputs.*return_predictions=False"):
        predict(tmp_path, wanted=wanted, keep_outputs=False)


def test_keeping_can_be_asked_for_without_a_directory(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedPredictionError, match="Result"):
        predict(tmp_path, keep_outputs=True)


@pytest.mark.parametrize("kept_first", [True, False])
def test_a_directory_does_not_mix_outputs_and_markers(tmp_path: Path, kept_first: bool) -> None:
    out = tmp_path / "out"

    class Plain(Model):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return torch.zeros(len(batch))

    def run(keep: bool) -> None:
        session.leave()
        strategy = GPUOrchStrategy(output_dir=out, keep_outputs=keep)
        trainer = Trainer(
            accelerator="cpu", devices=1, strategy=strategy, logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.predict(Plain(), DataLoader(torch.arange(4.0)), return_predictions=False)

    run(kept_first)
    with pytest.raises(
        JobMismatchError, match=r"outputs are kept (there|here) and not kept (there|here) \(keep_outputs\)"
    ):
        run(not kept_first)


def test_a_plain_loop_over_outputs_that_are_not_kept(tmp_path: Path) -> None:
    session.leave()
    orchestrator = MultiGPUOrchestrator(output_dir=tmp_path / "out", keep_outputs=False)
    orchestrator.initialize()
    data = DataLoader(torch.arange(6.0).reshape(6, 1), batch_size=2)
    outputs = list(orchestrator.predict(torch.nn.Linear(1, 1), data, step=lambda batch: Result(batch)))
    assert len(outputs) == 3
    with pytest.raises(OutputsNotKeptError):
        orchestrator.predictions[0]
    session.leave()
