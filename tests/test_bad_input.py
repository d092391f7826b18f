"""Bad input gets a clear error before work starts, and nothing already computed is lost."""

import logging
import os
import stat

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from torch.utils.data import DataLoader, Dataset

from lightning_gpuorch import GPUOrchStrategy as FabricStrategy
from lightning_gpuorch import MultiGPUOrchestrator, OrchestratorConfig, read_predictions
from lightning_gpuorch.errors import (
    ConfigurationError,
    JobMismatchError,
    ModelDoesNotFitError,
    PredictionStorageError,
    UnsupportedPredictionError,
)
from lightning_gpuorch.pytorch import GPUOrchStrategy
from lightning_gpuorch.worker import session

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*LeafSpec.*")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Model(pl.LightningModule):
    def __init__(self, output=lambda batch: batch * 2):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.output = output
        self.steps = 0

    def predict_step(self, batch, batch_idx):
        self.steps += 1
        return self.output(batch)


def predict(model, loader, **options):
    session.leave()  # as in a new process: a second predict of the same one would get a folder of its own
    trainer = pl.Trainer(
        strategy=GPUOrchStrategy(**options), devices=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    return trainer.predict(model, loader)


def rows(count=20, **options):
    return DataLoader(torch.arange(2.0 * count).reshape(count, 2), batch_size=4, **options)


def test_unknown_option():
    with pytest.raises(ConfigurationError, match="unknown argument 'chunksize'; did you mean 'chunk_size'"):
        GPUOrchStrategy(chunksize=3)
    with pytest.raises(ConfigurationError, match="unknown argument 'nonsense'"):
        FabricStrategy(nonsense=1)


def test_a_strategy_of_the_wrong_kind_is_refused_with_the_right_import():
    with pytest.raises(ValueError, match=r"for Trainer, import lightning_gpuorch\.pytorch\.GPUOrchStrategy"):
        pl.Trainer(strategy=FabricStrategy(), accelerator="cpu", devices=1)
    with pytest.raises(ValueError, match=r"for Fabric, import lightning_gpuorch\.GPUOrchStrategy"):
        Fabric(strategy=GPUOrchStrategy(), accelerator="cpu", devices=1)


def test_loaders_whose_samples_cannot_be_batched_anew_are_refused(tmp_path):
    sampler = torch.utils.data.BatchSampler(range(20), 4, False)
    custom = type("Custom", (torch.utils.data.BatchSampler,), {})(range(20), 4, False)
    options = {"output_dir": tmp_path, "enable_dynamic_batching": True, "model_fingerprint": "off"}
    data = torch.arange(40.0).reshape(20, 2)
    for loader, match in (
        (DataLoader(data, batch_sampler=custom), "its batch sampler, Custom, makes its batches"),
        (DataLoader(data, batch_size=None), "batches that the dataset has made"),
        (type("Batches", (), {"__iter__": lambda self: iter([data])})(), "a Batches gives batches"),
        (DataLoader([object()] * 8, batch_size=4, collate_fn=list), "type object is not known.*length_fn"),
    ):
        model = Model()
        with pytest.raises(ConfigurationError, match=match):
            predict(model, loader, **options)
        assert model.steps == 0
        assert list(tmp_path.iterdir()) == []
    got = predict(Model(), DataLoader(data, batch_sampler=sampler), **options)
    assert torch.equal(torch.cat(list(got)), data * 2)
    with pytest.raises(ConfigurationError, match="length_fn=3 is not callable"):
        GPUOrchStrategy(length_fn=3)
    with pytest.raises(ConfigurationError, match="max_batch_tokens=0"):
        GPUOrchStrategy(max_batch_tokens=0)


def test_wrong_kinds_of_arguments():
    with pytest.raises(ConfigurationError, match="expected OrchestratorConfig"):
        GPUOrchStrategy({"batch_size": 3})
    with pytest.raises(ConfigurationError, match="not callable"):
        GPUOrchStrategy(parallelize_fn="plan")
    with pytest.raises(ConfigurationError, match="not both"):
        GPUOrchStrategy(parallelize_fn=lambda m, d: m, tensor_parallel_plan={})
    with pytest.raises(ConfigurationError, match="output_dir=7 is a int"):
        GPUOrchStrategy(output_dir=7)


def test_devices_do_not_divide(tmp_path):
    with pytest.raises(ConfigurationError, match="1 devices cannot be cut into replicas of tensor_parallel_size=2"):
        predict(Model(), rows(), tensor_parallel_size=2, output_dir=tmp_path)


def test_a_model_that_does_not_fit(tmp_path):
    model = Model()
    model.register_parameter("huge", torch.nn.Parameter(torch.empty(2**50, device="meta"), requires_grad=False))
    with pytest.raises(ModelDoesNotFitError) as raised:
        predict(model, rows(), output_dir=tmp_path, model_fingerprint="off")
    assert raised.value.fitting_tensor_parallel_size > 1
    assert f"tensor_parallel_size={raised.value.fitting_tensor_parallel_size}" in str(raised.value)
    assert model.steps == 0


def test_shuffle_is_overridden_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="shuffle=True is overridden"):
        got = predict(Model(), rows(shuffle=True), output_dir=tmp_path)
    assert torch.equal(torch.cat(list(got)), torch.arange(40.0).reshape(20, 2) * 2)


def test_out_of_order_loading_is_refused(tmp_path):
    model = Model()
    with pytest.raises(ConfigurationError, match=r"in_order=False"):
        predict(model, rows(num_workers=1, in_order=False), output_dir=tmp_path)
    assert model.steps == 0


def test_an_iterator_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="can be iterated only once"):
        predict(Model(), iter([torch.ones(2)]), output_dir=tmp_path)


def test_another_dataset_in_the_same_directory_is_refused_and_named(tmp_path):
    before = predict(Model(), rows(20), output_dir=tmp_path)
    kept = [batch.clone() for batch in before]
    model = Model()
    with pytest.raises(JobMismatchError, match="20 there, 24 here"):
        predict(model, rows(24), output_dir=tmp_path)
    assert model.steps == 0
    assert all(torch.equal(a, b) for a, b in zip(kept, read_predictions(tmp_path), strict=True))


def test_other_weights_in_the_same_directory_are_refused(tmp_path):
    predict(Model(), rows(), output_dir=tmp_path)
    model = Model()
    model.weight.data += 1
    with pytest.raises(JobMismatchError, match="model weights"):
        predict(model, rows(), output_dir=tmp_path)
    assert len(predict(model, rows(), output_dir=tmp_path, model_fingerprint="off")) == 5


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(PredictionStorageError, match="cannot"):
        predict(Model(), rows(), output_dir=tmp_path / "out")


def test_a_file_in_place_of_the_directory(tmp_path):
    path = tmp_path / "file"
    path.write_text("in the way")
    model = Model()
    with pytest.raises(PredictionStorageError):
        predict(model, rows(), output_dir=path)
    assert model.steps == 0


def test_a_prediction_without_durable_form_is_named(tmp_path):
    model = Model(lambda batch: {"scores": [batch, object()]})
    with pytest.raises(UnsupportedPredictionError, match=r"\['scores'\]\[1\].* object"):
        predict(model, rows(), output_dir=tmp_path)


def test_stop_iteration_in_a_step_does_not_end_the_run_quietly(tmp_path):
    def stop(batch):
        raise StopIteration

    with pytest.raises(RuntimeError, match="raised StopIteration on batch 0"):
        predict(Model(stop), rows(), output_dir=tmp_path)


def test_an_error_keeps_what_is_computed_and_the_next_run_goes_on(tmp_path):
    model = Model()
    model.output = lambda batch: 1 / 0 if model.steps >= 4 else batch * 2
    with pytest.raises(ZeroDivisionError):
        predict(model, rows(), output_dir=tmp_path, chunk_size=1)
    again = Model()
    assert len(predict(again, rows(), output_dir=tmp_path, chunk_size=1)) == 5
    assert again.steps == 2


def test_orchestrator_needs_our_strategy():
    from lightning.fabric import Fabric

    with pytest.raises(ConfigurationError, match="needs Fabric\\(strategy='gpuorch'\\)"):
        MultiGPUOrchestrator(fabric=Fabric(strategy="auto", devices=1, accelerator="cpu"))
    with pytest.raises(ConfigurationError, match="give the settings to its strategy"):
        MultiGPUOrchestrator(OrchestratorConfig(), fabric=Fabric(strategy="gpuorch", devices=1, accelerator="cpu"))


def test_a_dataset_is_put_into_batches_of_the_configured_size(tmp_path):
    class Rows(Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, index):
            return torch.tensor([float(index), 1.0])

    session.leave()
    orchestrator = MultiGPUOrchestrator(batch_size=6, output_dir=tmp_path / "out")
    orchestrator.initialize(device="cpu")
    sizes = [len(output) for output in orchestrator.predict(torch.nn.Identity(), Rows(), step=lambda batch: 2 * batch)]
    assert sizes == [6, 6, 6, 2]
    assert torch.cat(list(orchestrator.predictions))[:, 0].tolist() == [2.0 * i for i in range(20)]


def test_a_plain_fabric_loop_with_dynamic_batching_is_told_that_it_has_none(caplog):
    from lightning.fabric import Fabric

    session.leave()
    fabric = Fabric(strategy=FabricStrategy(enable_dynamic_batching=True), devices=1, accelerator="cpu")
    fabric.launch()
    with caplog.at_level(logging.WARNING, "lightning_gpuorch"):
        loader = fabric.setup_dataloaders(DataLoader(torch.arange(6.0).unsqueeze(1), batch_size=4))
    assert [len(batch) for batch in loader] == [4, 2]
    assert "enable_dynamic_batching has no effect" in caplog.text
