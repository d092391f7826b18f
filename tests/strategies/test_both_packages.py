"""The stand-alone packages, which many projects import: the same strategy behind other doors."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_gpuorch import callbacks
from lightning_gpuorch.predictions import read_predictions

PACKAGES = ["lightning.pytorch", "pytorch_lightning"]
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}
DATA = torch.arange(20.0).reshape(10, 2)


def package(name: str) -> Any:
    warnings.simplefilter("ignore")
    return pytest.importorskip(name)


def door(name: str) -> Any:
    return importlib.import_module(f"lightning_gpuorch.{name.rpartition('.')[2]}").GPUOrchStrategy


def model(pl: Any) -> Any:
    class Double(pl.LightningModule):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return batch * 2

    return Double()


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("by_name", [True, False])
def test_predict_under_both_packages(tmp_path: Path, name: str, by_name: bool) -> None:
    pl = package(name)
    strategy = "gpuorch" if by_name else door(name)(output_dir=tmp_path / "out")
    trainer = pl.Trainer(strategy=strategy, default_root_dir=tmp_path, **QUIET)
    predictions = trainer.predict(model(pl), DataLoader(DATA, batch_size=3))
    assert torch.equal(torch.cat(list(predictions)), DATA * 2)
    assert isinstance(trainer.strategy, pl.strategies.DDPStrategy)


@pytest.mark.parametrize("name", PACKAGES)
def test_outputs_are_replayed_to_callbacks_by_a_name_alone(tmp_path: Path, name: str) -> None:
    pl = package(name)
    seen: list[Any] = []

    class Collect(pl.Callback):
        def on_predict_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(outputs)

    class Counting(pl.LightningModule):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            assert not seen, "callbacks wait until the job is complete"
            return batch * 2

    trainer = pl.Trainer(strategy="gpuorch_replay_outputs", callbacks=[Collect()], default_root_dir=tmp_path, **QUIET)
    trainer.predict(Counting(), DataLoader(DATA, batch_size=3))
    assert torch.equal(torch.cat(seen), DATA * 2)


@pytest.mark.parametrize("name", PACKAGES)
def test_our_callbacks_and_a_prediction_writer_under_both_packages(tmp_path: Path, name: str) -> None:
    pl = package(name)
    written = []

    class Writer(pl.callbacks.BasePredictionWriter):
        def write_on_batch_end(self, trainer: Any, module: Any, prediction: Any, indices: Any, *rest: Any) -> None:
            written.append((indices, rest[1]))

    ours = [callbacks.OOMBatchHalving(), callbacks.JobProgressBar(), callbacks.HeartbeatMonitor(), Writer("batch")]
    trainer = pl.Trainer(
        strategy=door(name)(output_dir=tmp_path / "out"), callbacks=ours, **{**QUIET, "enable_progress_bar": True}
    )
    trainer.predict(model(pl), DataLoader(DATA, batch_size=4), return_predictions=False)
    assert written == [([0, 1, 2, 3], 0), ([4, 5, 6, 7], 1), ([8, 9], 2)]
    assert len(read_predictions(tmp_path / "out")) == 3


@pytest.mark.parametrize("name", PACKAGES)
def test_the_durable_writer_under_another_strategy_of_both_packages(tmp_path: Path, name: str) -> None:
    pl = package(name)
    writer = callbacks.DurablePredictionWriter(tmp_path / "out")
    trainer = pl.Trainer(callbacks=[writer], **QUIET)
    trainer.predict(model(pl), DataLoader(DATA, batch_size=4), return_predictions=False)
    assert torch.equal(torch.cat(list(read_predictions(tmp_path / "out"))), DATA * 2)


@pytest.mark.parametrize("name", PACKAGES)
def test_fit_validate_and_test_under_both_packages(tmp_path: Path, name: str) -> None:
    pl = package(name)
    boring = importlib.import_module(f"{name}.demos.boring_classes").BoringModel()
    options = {**QUIET, "limit_val_batches": 1, "limit_test_batches": 1, "default_root_dir": tmp_path}
    trainer = pl.Trainer(strategy="gpuorch", max_steps=2, **options)
    trainer.fit(boring)
    assert trainer.global_step == 2
    trainer.validate(boring, verbose=False)
    trainer.test(boring, verbose=False)


@pytest.mark.parametrize("name", ["lightning.fabric", "lightning_fabric"])
@pytest.mark.parametrize("launched", [True, False])
def test_fabric_of_both_packages(tmp_path: Path, name: str, launched: bool) -> None:
    from lightning_gpuorch import MultiGPUOrchestrator

    fabric = package(name).Fabric(accelerator="cpu", devices=1, strategy="gpuorch" if launched else door(name)())
    if launched:
        fabric.launch()
    orchestrator = MultiGPUOrchestrator(fabric=fabric, output_dir=tmp_path / "out")
    orchestrator.initialize()
    loaded = orchestrator.load_distributed_model(torch.nn.Identity())
    assert len(list(orchestrator.predict(loaded, DataLoader(DATA, batch_size=5)))) == 2


@pytest.mark.parametrize("name", ["lightning.fabric", "lightning_fabric"])
def test_on_one_device_fabric_needs_no_launch(name: str) -> None:
    fabric = package(name).Fabric(accelerator="cpu", devices=1, strategy="gpuorch")
    assert isinstance(fabric.strategy, door(name))
    loader = fabric.setup_dataloaders(DataLoader(DATA, batch_size=3))
    model = fabric.setup(torch.nn.Identity())
    fabric.barrier()
    assert torch.equal(torch.cat([model(batch) for batch in loader]), DATA)
    assert fabric.broadcast("all") == "all"
    fabric.launch()
    assert fabric.setup_module(torch.nn.Identity()) is not None
    with pytest.raises(RuntimeError, match="launch"):
        package(name).Fabric(accelerator="cpu", devices=2, strategy="gpuorch").setup(torch.nn.Identity())


@pytest.mark.parametrize(
    ("name", "wanted"), [("lightning.pytorch", "pytorch_lightning"), ("pytorch_lightning", "pytorch")]
)
def test_a_strategy_for_the_other_package_is_refused_with_the_import_of_the_right_one(name: str, wanted: str) -> None:
    other = PACKAGES[1 - PACKAGES.index(name)]
    package(name)
    with pytest.raises(ValueError, match=rf"lightning_gpuorch\.{wanted}\.GPUOrchStrategy"):
        package(other).Trainer(strategy=door(name)(), **QUIET)
