"""The Trainer and Fabric as people use them: fit, test runners, launchers that made too few processes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

import lightning_gpuorch  # noqa: F401 - registers the strategy
from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.predictions.samples.tensors import fingerprint_weights

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


class Double(pl.LightningModule):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch * 2


def trainer(tmp_path: Path, **options: Any) -> pl.Trainer:
    warnings.simplefilter("ignore")
    return pl.Trainer(strategy="gpuorch", default_root_dir=tmp_path, **{**QUIET, **options})


@pytest.mark.parametrize("sync_batchnorm", [False, True])
def test_fit_on_one_device_and_predict_after_it(tmp_path: Path, sync_batchnorm: bool) -> None:
    fitting = trainer(tmp_path, devices=1, max_steps=2, limit_val_batches=1, sync_batchnorm=sync_batchnorm)
    model = BoringModel()
    before = model.layer.weight.clone()
    fitting.fit(model)
    assert fitting.global_step == 2
    assert not torch.equal(model.layer.weight, before)
    predictions = trainer(tmp_path, devices=1).predict(model, DataLoader(torch.ones(6, 32), batch_size=2))
    assert len(predictions) == 3


def test_weights_that_were_read_and_then_trained_are_another_model(tmp_path: Path) -> None:
    model, loader = BoringModel(), DataLoader(torch.ones(6, 32), batch_size=2)
    torch.save(BoringModel().state_dict(), tmp_path / "weights.bin")
    trainer(tmp_path, devices=1).predict(model, loader, ckpt_path=str(tmp_path / "weights.bin"))
    trainer(tmp_path, devices=1, max_steps=1, limit_val_batches=0).fit(model)
    predicting = trainer(tmp_path, devices=1)
    predicting.predict(model, loader)
    found = predicting.strategy.model_setup.fingerprint(model)
    assert found == fingerprint_weights(model)


@pytest.mark.job
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_test_runner_gets_its_predictions_and_goes_on(tmp_path: Path) -> None:
    data = torch.arange(16.0).reshape(8, 2)
    for devices in (1, 2):  # one after the other in one process
        predictions = trainer(tmp_path, devices=devices).predict(Double(), DataLoader(data, batch_size=2))
        assert torch.equal(torch.cat(list(predictions)), data * 2)


def test_fabric_without_a_function_is_refused_in_a_test_runner() -> None:
    with pytest.raises(ConfigurationError, match=r"fabric\.launch\(function\)"):
        Fabric(accelerator="cpu", devices=2, strategy="gpuorch").launch()


def test_more_nodes_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"num_nodes=2 .* gpuorch run SCRIPT --num-nodes 2"):
        trainer(tmp_path, devices=1, num_nodes=2).predict(Double(), DataLoader(torch.ones(4, 2)))


def test_more_devices_than_tasks_of_a_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = {"JOB_ID": "7", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_NAME": "predict"}
    for name, value in tasks.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(ConfigurationError, match=r"devices=2 are asked for, and SLURMEnvironment has 1 processes"):
        trainer(tmp_path, devices=2).predict(Double(), DataLoader(torch.ones(4, 2)))


def test_the_trainers_dataloaders_have_what_the_users_have(tmp_path: Path) -> None:
    seen = {}

    class Look(pl.Callback):
        def on_predict_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            loader = trainer.predict_dataloaders
            seen.update(
                sampler=loader.sampler, batch_size=loader.batch_size, dataset=loader.dataset, length=len(loader)
            )

    loader = DataLoader(torch.ones(7, 2), batch_size=2)
    trainer(tmp_path, devices=1, callbacks=[Look()]).predict(Double(), loader)
    assert seen == {"sampler": loader.sampler, "batch_size": 2, "dataset": loader.dataset, "length": 4}


def test_a_reduction_over_the_batch_is_refused_under_dynamic_batching(tmp_path: Path) -> None:
    from lightning_gpuorch.errors import EXIT_CONFIGURATION, GPUOrchError
    from lightning_gpuorch.pytorch import GPUOrchStrategy

    class Mean(pl.LightningModule):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return batch.mean()

    warnings.simplefilter("ignore")
    strategy = GPUOrchStrategy(enable_dynamic_batching=True, length_fn=len, max_batch_tokens=8)
    with pytest.raises(GPUOrchError, match="enable_dynamic_batching=False") as raised:
        pl.Trainer(strategy=strategy, devices=1, default_root_dir=tmp_path, **QUIET).predict(
            Mean(), DataLoader(torch.ones(9, 2), batch_size=3)
        )
    assert raised.value.exit_code == EXIT_CONFIGURATION
