"""``OOMBatchHalving`` under the Trainer with its own strategies, under ours, and under Fabric."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, Sampler

import lightning_gpuorch  # noqa: F401 - registers strategy="gpuorch"
from lightning_gpuorch.callbacks.oom_batch_halving import OOMBatchHalving
from lightning_gpuorch.errors import MissingPredictionsError
from lightning_gpuorch.pytorch import GPUOrchStrategy
from lightning_gpuorch.testing.memory import CPUMemoryBudget
from lightning_gpuorch.worker.oom.halving import OOMEvent, SingleSampleOOMError
from tests.support.kinds import COLLATE, LimitedStep, equal

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*predict returned None.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:You are using a custom batch sampler"),
    pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor"),
    pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument"),
]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    names = ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning_gpuorch.worker.oom.halving")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


class Model(pl.LightningModule):
    def __init__(self, step: LimitedStep):
        super().__init__()
        self.step, self.weight = step, torch.nn.Linear(1, 1)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.step(batch)


def predict(
    step: LimitedStep,
    loaders: Any,
    callbacks: list[Any],
    tmp_path: Path,
    strategy: Any = "auto",
    model: pl.LightningModule | None = None,
) -> Any:
    trainer = pl.Trainer(
        strategy=strategy,
        devices=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        default_root_dir=tmp_path,
    )
    return trainer.predict(model or Model(step), loaders)


def loader(kind: str, count: int = 30, size: int = 13, **options: Any) -> DataLoader[Any]:
    return DataLoader(range(count), batch_size=size, collate_fn=COLLATE[kind], **options)


@pytest.mark.parametrize("strategy", ["auto", "gpuorch"])
@pytest.mark.parametrize(
    ("kind", "output"),
    [
        ("dict", "dict"),
        ("two_alike", "tuple"),
        ("encoding", "model_output"),
        ("object", "list"),
        ("ragged", "two_alike"),
    ],
)
def test_the_trainer_returns_what_it_returns_undisturbed(kind: str, output: str, strategy: str, tmp_path: Path) -> None:
    if strategy == "gpuorch" and output == "model_output":
        output = "dict"  # how durable predictions rebuild classes is tested elsewhere
    expected = predict(LimitedStep(output), loader(kind), [], tmp_path / "a")
    for limit in (2, 5):
        step, callback = LimitedStep(output, limit), OOMBatchHalving()
        outputs = predict(step, loader(kind), [callback], tmp_path / str(limit), strategy)
        assert equal(list(outputs), expected)
        assert callback.num_ooms >= 1
        assert callback.num_splits == {2: 3, 5: 2}[limit]
        assert max(step.calls[4:]) <= limit


def test_workers_and_custom_batch_samplers(tmp_path: Path) -> None:
    class Odd(Sampler[list[int]]):
        def __iter__(self) -> Iterator[list[int]]:
            yield from ([5, 4, 3], [0, 1, 2, 6, 7, 8, 9], [10])

        def __len__(self) -> int:
            return 3

    data = DataLoader(range(11), batch_sampler=Odd(), collate_fn=COLLATE["two_alike"], num_workers=1)
    expected = predict(LimitedStep("tuple"), data, [], tmp_path)
    outputs = predict(LimitedStep("tuple", 2), data, [OOMBatchHalving()], tmp_path)
    assert equal(outputs, expected)


@pytest.mark.parametrize("strategy", ["auto", "gpuorch"])
def test_a_real_module_under_a_byte_budget(strategy: str, tmp_path: Path) -> None:
    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(64, 64) for _ in range(5)])

        def predict_step(self, batch: torch.Tensor, batch_idx: int) -> dict[str, torch.Tensor]:
            activations = [batch]
            for layer in self.layers:
                activations.append(layer(activations[-1]))
            return {"mean": activations[-1].mean(1), "max": activations[-1].amax(1)}

    torch.manual_seed(0)
    model, data = Net(), torch.randn(200, 64)
    loader = DataLoader(data, batch_size=64)
    expected = predict(LimitedStep(""), loader, [], tmp_path / "a", model=model)
    callback, budget = OOMBatchHalving(), CPUMemoryBudget(10**9, resident=model)
    budget.limit_bytes = budget.used_bytes + 60_000  # a whole batch makes 98 KB of activations
    with budget:
        outputs = list(predict(LimitedStep(""), loader, [callback], tmp_path / "b", strategy, model))
    assert callback.num_splits >= 3
    for output, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, wanted)


def test_several_dataloaders_with_different_outputs(tmp_path: Path) -> None:
    class Two(Model):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            self.step.output = ("dict", "two_alike")[dataloader_idx]
            return self.step(batch)

    loaders = [loader("tensor"), loader("object", 9, 4)]
    expected = predict(LimitedStep(""), loaders, [], tmp_path, model=Two(LimitedStep("")))
    outputs = predict(LimitedStep(""), loaders, [OOMBatchHalving()], tmp_path, model=Two(LimitedStep("", 2)))
    assert equal(outputs, expected)


def test_a_step_without_batch_idx(tmp_path: Path) -> None:
    class Short(Model):
        def predict_step(self, batch: Any) -> Any:
            return self.step(batch)

    outputs = predict(
        LimitedStep(""), loader("tensor"), [OOMBatchHalving()], tmp_path, model=Short(LimitedStep("tensor", 4))
    )
    assert torch.cat(outputs)[:, 0].tolist() == [2.0 * i for i in range(30)]


@pytest.mark.parametrize("outcome", ["end", "error"])
def test_the_module_is_left_as_it_was(outcome: str, tmp_path: Path) -> None:
    class Failing(Model):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            assert "predict_step" in vars(self)
            if outcome == "error":
                raise RuntimeError("mine")
            return self.step(batch)

    model, step = Failing(LimitedStep("tensor")), LimitedStep("tensor")
    if outcome == "error":
        with pytest.raises(RuntimeError, match="mine"):
            predict(step, loader("tensor"), [OOMBatchHalving()], tmp_path, model=model)
    else:
        predict(step, loader("tensor"), [OOMBatchHalving()], tmp_path, model=model)
    assert "predict_step" not in vars(model)


def test_our_runtime_is_left_as_it_was(tmp_path: Path) -> None:
    callback = OOMBatchHalving()
    trainer = pl.Trainer(
        strategy="gpuorch",
        devices=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        callbacks=[callback],
        default_root_dir=tmp_path,
    )
    for _ in range(2):
        trainer.predict(Model(LimitedStep("tensor", 4)), loader("tensor"))
        assert trainer.strategy.runtime.surviving_steps is None
    assert callback.num_splits == 4


@pytest.mark.parametrize("enabled", [True, False])
def test_our_strategy_halves_without_the_callback_unless_told_not_to(enabled: bool, tmp_path: Path) -> None:
    strategy = GPUOrchStrategy(enable_oom_halving=enabled)
    trainer = pl.Trainer(
        strategy=strategy, devices=1, accelerator="cpu", logger=False, enable_progress_bar=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    if not enabled:
        with pytest.raises(torch.OutOfMemoryError):
            trainer.predict(Model(LimitedStep("tensor", 4)), loader("tensor"))
        return
    outputs = trainer.predict(Model(LimitedStep("tensor", 4)), loader("tensor"))
    assert torch.cat(list(outputs))[:, 0].tolist() == [2.0 * i for i in range(30)]


def test_a_step_on_the_iterator_is_passed_through_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class OnIterator(Model):
        def predict_step(self, dataloader_iter: Any) -> Any:
            batch, _, _ = next(dataloader_iter)
            return self.step(batch)

    model = OnIterator(LimitedStep("tensor"))
    with caplog.at_level(logging.WARNING, logger="lightning_gpuorch"):
        outputs = predict(LimitedStep(""), loader("tensor"), [OOMBatchHalving()], tmp_path, model=model)
    assert torch.cat(outputs)[:, 0].tolist() == [2.0 * i for i in range(30)]
    assert [record.name for record in caplog.records].count("lightning_gpuorch.callbacks.oom_batch_halving") == 1


class TestOneSample:
    def test_another_strategy_names_it(self, tmp_path: Path) -> None:
        step = LimitedStep("tensor", too_large=frozenset({17.0}))
        with pytest.raises(SingleSampleOOMError, match="sample 17 of the dataset of dataloader 0") as caught:
            predict(step, loader("tensor"), [OOMBatchHalving()], tmp_path)
        assert caught.value.position == 4

    def test_ours_goes_on_without_it(self, tmp_path: Path) -> None:
        step, callback = LimitedStep("dict", limit=6, too_large=frozenset({17.0, 29.0})), OOMBatchHalving()
        strategy = GPUOrchStrategy(output_dir=tmp_path / "out")
        with pytest.raises(MissingPredictionsError, match="17, 29") as caught:
            predict(step, loader("tensor"), [callback], tmp_path, strategy)
        assert list(caught.value.indices) == [17, 29]
        assert callback.num_lost == 2


def test_events_reach_the_hook(tmp_path: Path) -> None:
    events: list[OOMEvent] = []
    predict(LimitedStep("tensor", 5), loader("tensor"), [OOMBatchHalving(on_oom=events.append)], tmp_path)
    assert [(event.size, event.next_size) for event in events] == [(13, 7), (7, 4)]
    assert "this process uses" in events[0].memory


def test_fabric(tmp_path: Path) -> None:
    from lightning.fabric import Fabric

    from lightning_gpuorch import GPUOrchStrategy as FabricStrategy
    from lightning_gpuorch import MultiGPUOrchestrator

    callback = OOMBatchHalving()
    fabric = Fabric(strategy=FabricStrategy(), devices=1, accelerator="cpu", callbacks=[callback])
    fabric.launch()
    step = LimitedStep("dict", 3)
    orchestrator = MultiGPUOrchestrator(fabric=fabric, output_dir=tmp_path)
    model = fabric.setup_module(torch.nn.Linear(3, 1))
    for _ in orchestrator.predict(model, loader("two_alike"), step=step):
        pass
    expected = [LimitedStep("dict")(COLLATE["two_alike"](list(range(i, min(i + 13, 30))))) for i in (0, 13, 26)]
    assert equal(list(orchestrator.predictions), expected)
    assert callback.num_splits == 3


def test_a_fabric_loop_with_another_strategy_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    from lightning.fabric import Fabric

    fabric = Fabric(devices=1, accelerator="cpu", callbacks=[OOMBatchHalving()])
    model = fabric.setup_module(Model(LimitedStep("tensor")))
    model.mark_forward_method("predict_step")
    with caplog.at_level(logging.WARNING, logger="lightning_gpuorch"):
        fabric.call("on_predict_start", trainer=fabric, pl_module=model)
        output = model.predict_step(COLLATE["tensor"]([1, 2]), 0)
        fabric.call("on_predict_end", trainer=fabric, pl_module=model)
    assert output[:, 0].tolist() == [2.0, 4.0]
    assert "use lightning_gpuorch.worker.oom.halving.BatchHalver" in caplog.text
