"""Training under Fabric: on one device as with Lightning's own strategy, on several it is refused."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gpuorch import MultiGPUOrchestrator
from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.worker import session

PACKAGES = ("lightning.fabric", "lightning_fabric")
DATA = torch.linspace(-1, 1, 48).reshape(12, 4)


def fabric_of(package: str, strategy: str, **options: Any) -> Any:
    importlib.import_module("lightning_gpuorch")
    session.leave()
    return importlib.import_module(package).Fabric(accelerator="cpu", devices=1, strategy=strategy, **options)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 2))


def train(fabric: Any, directory: Path, *, apart: bool) -> dict[str, Tensor]:
    """Train as people do, save and load in the middle; return the weights."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    if apart:
        model, optimizer = fabric.setup_module(model), fabric.setup_optimizers(optimizer)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    else:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        model, optimizer, scheduler = fabric.setup(model, optimizer, scheduler=scheduler)
    loader = fabric.setup_dataloaders(DataLoader(DATA, batch_size=4, shuffle=True))
    torch.manual_seed(1)
    for epoch in range(2):
        for number, batch in enumerate(loader):
            with fabric.no_backward_sync(model, enabled=number == 0):
                loss = fabric.all_reduce(model(batch).square().mean())
                fabric.backward(loss) if number % 2 else loss.backward()
            if number > 0:
                fabric.clip_gradients(model, optimizer, max_norm=1.0)
                optimizer.step()
                optimizer.zero_grad()
        scheduler.step()
        if epoch == 0:
            state = {"model": model, "optimizer": optimizer}
            fabric.save(directory / "state.ckpt", state)
            with torch.no_grad():
                model.module[0].weight.zero_()
            optimizer.zero_grad()
            fabric.load(directory / "state.ckpt", state)
    assert model.training
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("launched", [False, True])
def test_training_on_one_device_is_lightnings(tmp_path: Path, package: str, apart: bool, launched: bool) -> None:
    expected = train(fabric_of(package, "auto"), tmp_path, apart=apart)
    fabric = fabric_of(package, "gpuorch")
    if launched:
        fabric.launch()
    trained = train(fabric, tmp_path, apart=apart)
    assert expected.keys() == trained.keys()
    assert all(torch.equal(trained[name], value) for name, value in expected.items())


@pytest.mark.parametrize("keeps_dropout", [False, True])
def test_predictions_after_training_are_made_in_eval_mode(tmp_path: Path, keeps_dropout: bool) -> None:
    fabric = fabric_of("lightning.fabric", "gpuorch")
    model = net()
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    fabric.backward(model(DATA).mean())
    optimizer.step()
    orchestrator = MultiGPUOrchestrator(fabric=fabric, output_dir=tmp_path / "out")
    orchestrator.initialize()
    if keeps_dropout:  # Monte Carlo dropout: one layer is left in train mode by its user
        model.eval()
        model.module[2].train()
    for _ in orchestrator.predict(model, DataLoader(DATA, batch_size=5)):
        pass
    found = torch.cat(list(orchestrator.predictions))
    assert not model.training
    assert model.module[2].training == keeps_dropout
    model.eval()
    with torch.no_grad():
        assert torch.allclose(found, model(DATA)) != keeps_dropout


def test_a_model_set_up_for_predictions_alone_keeps_its_mode_on_one_device() -> None:
    fabric = fabric_of("lightning.fabric", "gpuorch")
    assert fabric.setup(net()).module.training
    assert not fabric.setup(net().eval()).module.training


def test_a_process_that_another_launcher_has_made_trains_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_torchrun = {"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "1"}
    for name, value in {**of_torchrun, "TORCHELASTIC_RUN_ID": "one", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "0")
    expected = train(fabric_of("lightning.fabric", "auto"), tmp_path, apart=False)
    fabric = fabric_of("lightning.fabric", "gpuorch")
    fabric.launch()
    trained = train(fabric, tmp_path, apart=False)
    assert all(torch.equal(trained[name], value) for name, value in expected.items())


def test_an_optimizer_is_made_after_the_weights_of_an_empty_model_are_read(tmp_path: Path) -> None:
    fabric = fabric_of("lightning.fabric", "gpuorch")
    torch.save(net().state_dict(), tmp_path / "weights.pt")
    with fabric.init_module(empty_init=True):
        model = net()
    with pytest.raises(ConfigurationError, match="SGD has parameters without values"):
        fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model = fabric.setup_module(model)
    fabric.load_raw(tmp_path / "weights.pt", model)
    identity = fabric.strategy.model_setup.fingerprint
    of_the_file = identity(model.module)
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
    fabric.backward(model(DATA).square().mean())
    optimizer.step()
    assert not torch.equal(model.module[0].weight, net()[0].weight)
    assert identity(model.module) != of_the_file


@pytest.mark.parametrize("package", PACKAGES)
def test_training_on_several_devices_is_refused_before_the_model_is_touched(package: str) -> None:
    importlib.import_module("lightning_gpuorch")
    fabric = importlib.import_module(package).Fabric(accelerator="cpu", devices=2, strategy="gpuorch")
    fabric._launched = True
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attempts = (
        lambda: fabric.setup(model, optimizer),
        lambda: fabric.setup_optimizers(optimizer),
        lambda: fabric.backward(model(DATA).mean()),
    )
    for attempt in attempts:
        with pytest.raises(ConfigurationError, match=r"has 2.*Fabric\(strategy='ddp'\)"):
            attempt()
    assert model.training
    assert model[0].weight.grad is None
