"""Hooks of a batch on one device: what they change is kept, what they have not finished is computed again, and one number."""

from __future__ import annotations

import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, Callback, TQDMProgressBar
from torch.utils.data import DataLoader, IterableDataset

from lightning_gpuorch import MultiGPUOrchestrator, read_predictions
from lightning_gpuorch.predictions import PartStore
from lightning_gpuorch.pytorch import GPUOrchStrategy
from lightning_gpuorch.worker import session
from tests.support.kinds import LimitedStep

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore:.*LeafSpec.*")]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

ROWS = torch.arange(46.0).reshape(23, 2)


class Stream(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(ROWS)


class Batches:
    """No DataLoader at all."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(ROWS.split(4))


LOADERS: dict[str, Callable[[], Any]] = {
    "map": lambda: DataLoader(ROWS, batch_size=4),  # type: ignore[arg-type]
    "worker": lambda: DataLoader(ROWS, batch_size=4, num_workers=1),  # type: ignore[arg-type]
    "stream": lambda: DataLoader(Stream(), batch_size=4),
    "iterable": Batches,
}


def ours(directory: Path, **options: Any) -> GPUOrchStrategy:
    session.leave()
    return GPUOrchStrategy(output_dir=directory, log_level="WARNING", **{"chunk_size": 2, **options})


def trainer(strategy: Any, *callbacks: Any, **options: Any) -> pl.Trainer:
    defaults = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(
        strategy=strategy, devices=1, accelerator="cpu", callbacks=list(callbacks), **{**defaults, **options}
    )


class Module(pl.LightningModule):
    def __init__(self, step: Callable[[torch.Tensor], Any] = lambda batch: batch * 2):
        super().__init__()
        self.step, self.weight = step, torch.nn.Parameter(torch.ones(1))
        self.numbers: list[Any] = []
        self.returned: list[int] = []

    def predict_step(self, batch: torch.Tensor, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.numbers.append((dataloader_idx, batch_idx))
        output = self.step(batch)
        self.returned.append(id(output))
        return output


class AtEnd(Callback):
    """Calls a function with a batch's output and number when the batch is over."""

    def __init__(self, act: Callable[[Any, int], Any]):
        self.act = act

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.act(outputs, batch_idx)


class Writer(BasePredictionWriter):
    """Notes what prediction writers are given; a batch may be made to fail."""

    def __init__(self, fail: Callable[[int], None] = lambda batch_idx: None):
        super().__init__(write_interval="batch")
        self.fail = fail
        self.began: list[tuple[int, int]] = []
        self.written: list[tuple[int, int]] = []
        self.indices: dict[tuple[int, int], Any] = {}
        self.rows: dict[tuple[int, int], list[float]] = {}

    def on_predict_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.began.append((dataloader_idx, batch_idx))

    def write_on_batch_end(
        self, trainer: Any, pl_module: Any, prediction: Any, batch_indices: Any, batch: Any, batch_idx: int, loader: int
    ) -> None:
        self.fail(batch_idx)
        self.written.append((loader, batch_idx))
        self.indices[loader, batch_idx] = batch_indices
        self.rows[loader, batch_idx] = batch[:, 0].tolist()


def equal(got: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return bool(torch.equal(got, expected))
    if isinstance(expected, np.ndarray):
        return bool(np.array_equal(got, expected))
    if isinstance(expected, dict):
        return list(got) == list(expected) and all(equal(got[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        return len(got) == len(expected) and all(map(equal, got, expected))
    return bool(got == expected)


def multiply(output: Any, _: int) -> None:
    output.mul_(10)


def denormalise(output: Any, number: int) -> None:
    output["y"].mul_(10)
    output["batch"] = number
    del output["big"]


def replace(output: Any, _: int) -> None:
    output[0] = output[0] + 1
    output[1].extend(["more", None])
    output.append("new")


def nest(output: Any, number: int) -> None:
    output["rows"][0]["y"] = output["rows"][0].pop("y").double() + number
    output["rows"].pop()


def empty(output: Any, _: int) -> None:
    output.clear()


def scale_array(output: Any, _: int) -> None:
    output[0][:] *= 3


CHANGES: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[Any, int], None]]] = {
    "tensor": (lambda batch: batch * 2, multiply),
    "dict": (lambda batch: {"y": batch * 2, "big": batch.repeat(1, 50)}, denormalise),
    "list": (lambda batch: [batch * 2, ["one"]], replace),
    "nested": (lambda batch: {"rows": [{"y": batch * 2}, (batch,)]}, nest),
    "all of it": (lambda batch: {"y": batch * 2}, empty),
    "array in a tuple": (lambda batch: (batch.numpy().copy(), 1), scale_array),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("loader", LOADERS)
def test_what_a_callback_changes_is_kept(loader: str, change: str, tmp_path: Path) -> None:
    step, act = CHANGES[change]
    data = LOADERS[loader]()
    expected = trainer("auto", AtEnd(act)).predict(Module(step), data)
    got = trainer(ours(tmp_path), AtEnd(act)).predict(Module(step), data)
    assert equal(list(got), expected)
    assert equal(list(read_predictions(tmp_path)), expected)


def test_what_the_modules_own_hook_changes_is_kept_after_what_callbacks_have_changed(tmp_path: Path) -> None:
    class Own(Module):
        def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            outputs.add_(1)

    got = trainer(ours(tmp_path), AtEnd(multiply)).predict(Own(), LOADERS["map"]())
    assert equal(torch.cat(list(got)), ROWS * 20 + 1)


def test_callbacks_are_given_the_very_object_that_the_step_returned(tmp_path: Path) -> None:
    seen: list[int] = []
    module = Module(lambda batch: {"y": batch})
    trainer(ours(tmp_path), AtEnd(lambda output, _: seen.append(id(output)))).predict(module, LOADERS["map"]())
    assert seen == module.returned
    assert len(seen) == 6


def test_an_output_is_final_when_the_next_batch_is_asked_for(tmp_path: Path) -> None:
    buffer, kept = torch.zeros(4, 2), []

    def step(batch: torch.Tensor) -> Any:
        for earlier in kept:
            earlier["list"].append("too late")
            earlier["own"].fill_(-1)
        return {"shared": buffer[: len(batch)].copy_(batch), "own": batch * 2, "list": ["in time"]}

    got = trainer(ours(tmp_path), AtEnd(lambda output, _: kept.append(output))).predict(Module(step), LOADERS["map"]())
    assert equal(torch.cat([output["shared"] for output in got]), ROWS)
    assert equal(torch.cat([output["own"] for output in got]), ROWS * 2)
    assert all(output["list"] == ["in time"] for output in got)


def test_predict_step_with_an_iterator(tmp_path: Path) -> None:
    class OnIterator(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.numbers: list[int] = []

        def predict_step(self, dataloader_iter: Any) -> Any:
            batch, batch_idx, _ = next(dataloader_iter)
            self.numbers.append(batch_idx)
            return batch * 2

    store, module, seen = PartStore(tmp_path / "dataloader_0"), OnIterator(), []
    got = trainer(ours(tmp_path), AtEnd(multiply)).predict(module, LOADERS["map"]())
    assert equal(torch.cat(list(got)), ROWS * 20)
    assert module.numbers == [0, 1, 2, 3, 4, 5]
    store.path(2).unlink()
    module = OnIterator()
    trainer(ours(tmp_path), AtEnd(lambda output, number: seen.append(number))).predict(module, LOADERS["map"]())
    assert module.numbers == seen == [4, 5]


def test_with_dynamic_batching(tmp_path: Path) -> None:
    strategy = ours(tmp_path, enable_dynamic_batching=True, max_batch_tokens=14)
    got = trainer(strategy, AtEnd(multiply)).predict(Module(), LOADERS["map"]())
    assert equal(list(got), list((ROWS * 20).split(4)))


def test_a_batch_that_was_computed_in_halves(tmp_path: Path) -> None:
    step = LimitedStep("tuple", 2)
    got = trainer(ours(tmp_path), AtEnd(lambda output, _: output[0].zero_())).predict(Module(step), LOADERS["map"]())
    expected = trainer("auto").predict(Module(LimitedStep("tuple")), LOADERS["map"]())
    assert max(step.calls) > 2
    for mine, theirs in zip(got, expected, strict=True):
        assert not mine[0].any()
        assert equal(mine[1:], theirs[1:])


class OnPurposeError(Exception):
    pass


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("failing", [0, 1, 3, 5], ids="batch {}".format)
def test_a_batch_whose_callback_fails_is_computed_again_and_no_other(loader: str, failing: int, tmp_path: Path) -> None:
    def fail(batch_idx: int) -> None:
        if batch_idx == failing:
            raise OnPurposeError

    module, writer = Module(), Writer(fail)
    with pytest.raises(OnPurposeError):
        trainer(ours(tmp_path, chunk_size=1), writer).predict(module, LOADERS[loader]())
    assert writer.written == [(0, number) for number in range(failing)]
    kept = read_predictions(tmp_path, allow_missing=True)
    assert sorted(PartStore(tmp_path / "dataloader_0").done()) == list(range(failing)), kept
    again, module = Writer(), Module()
    got = trainer(ours(tmp_path, chunk_size=1), again).predict(module, LOADERS[loader]())
    assert module.numbers == again.written == [(0, number) for number in range(failing, 6)]
    assert equal(torch.cat(list(got)), ROWS * 2)


@pytest.mark.parametrize("hook", ["on_predict_batch_start", "on_predict_batch_end"])
def test_stop_iteration_in_a_hook_is_no_end_of_the_data(hook: str, tmp_path: Path) -> None:
    class Stopping(Callback):
        pass

    labels = iter(range(3))
    setattr(Stopping, hook, lambda self, *arguments: next(labels))
    with pytest.raises(RuntimeError, match=f"{hook} raised StopIteration.*3 batches"):
        trainer(ours(tmp_path, chunk_size=1), Stopping()).predict(Module(), LOADERS["map"]())
    assert sorted(PartStore(tmp_path / "dataloader_0").done()) == [0, 1, 2]


class Overlapping:
    """Copies like those on CUDA: begun in the order of the steps, and picked up later."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def to_device(self, batch: Any) -> Any:
        return batch

    def to_host(self, output: Any) -> Any:
        number, copied, log = int(output["number"]), {key: value.clone() for key, value in output.items()}, self.log
        log.append(f"copy {number}")

        class Copy:
            def result(self) -> Any:
                log.append(f"picked up {number}")
                return copied

        return Copy()


def test_copies_overlap_with_steps_and_hold_what_callbacks_have_changed(tmp_path: Path) -> None:
    transfers = Overlapping()

    class Begin(Callback):
        def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.strategy.runtime.transfers = transfers

    def step(batch: torch.Tensor) -> Any:
        number = int(batch[0, 0]) // 8
        transfers.log.append(f"step {number}")
        return {"y": batch * 2, "number": torch.tensor(number)}

    def change(output: Any, number: int) -> None:
        output["y"].mul_(10)
        transfers.log.append(f"callback {number}")

    got = trainer(ours(tmp_path, chunk_size=1), Begin(), AtEnd(change)).predict(Module(step), LOADERS["map"]())
    assert equal(torch.cat([output["y"] for output in got]), ROWS * 20)
    expected = []
    for number in range(6):
        before = [f"picked up {number - 1}"] if number else []
        expected += [f"step {number}", *before, f"callback {number}", f"copy {number}"]
    assert transfers.log == [*expected, "picked up 5"]


def test_what_was_done_before_an_error_is_picked_up_though_its_copy_was_under_way(tmp_path: Path) -> None:
    transfers = Overlapping()

    class Begin(Callback):
        def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.strategy.runtime.transfers = transfers

    def step(batch: torch.Tensor) -> Any:
        if int(batch[0, 0]) == 24:
            raise OnPurposeError
        return {"y": batch, "number": batch[0, 0] / 8}

    with pytest.raises(OnPurposeError):
        trainer(ours(tmp_path, chunk_size=1, on_error="raise"), Begin()).predict(Module(step), LOADERS["map"]())
    assert sorted(PartStore(tmp_path / "dataloader_0").done()) == [0, 1, 2]


@pytest.mark.parametrize("loader", LOADERS)
def test_one_number_in_the_step_and_in_every_hook(loader: str, tmp_path: Path) -> None:
    data = [LOADERS[loader](), LOADERS["map"]()]
    stock, alone = Writer(), Module()
    trainer("auto", stock).predict(alone, data)
    writer, module = Writer(), Module()
    trainer(ours(tmp_path), writer).predict(module, data)
    assert module.numbers == writer.began == writer.written == stock.written == alone.numbers
    assert writer.rows == stock.rows
    if loader in ("map", "worker"):
        assert writer.indices == stock.indices
    PartStore(tmp_path / "dataloader_1").path(1).unlink()
    later, module = Writer(), Module()
    trainer(ours(tmp_path), later).predict(module, data)
    assert module.numbers == later.began == later.written == [(1, 2), (1, 3)], "what is missing keeps its numbers"
    assert later.indices == {(1, 2): [8, 9, 10, 11], (1, 3): [12, 13, 14, 15]}


def test_pieces_of_a_batch_have_numbers_of_their_own(tmp_path: Path) -> None:
    trainer(ours(tmp_path)).predict(Module(), LOADERS["map"]())
    store = PartStore(tmp_path / "dataloader_0")
    for chunk in (0, 1):  # samples 0 to 15, in chunks of 8
        store.path(chunk).unlink()
    writer, module = Writer(), Module()
    trainer(ours(tmp_path), writer).predict(module, DataLoader(ROWS, batch_size=6))  # type: ignore[arg-type]
    # The loader has 4 batches: 0-5, 6-11, 12-17, 18-22. Chunks end at 8 and 16.
    pieces = {0: [0, 1, 2, 3, 4, 5], 1: [6, 7], 4 + 8: [8, 9, 10, 11], 2: [12, 13, 14, 15]}
    assert writer.indices == {(0, number): indices for number, indices in pieces.items()}
    assert module.numbers == writer.written


def test_dynamic_batches_never_share_a_number(tmp_path: Path) -> None:
    seen: dict[Any, list[int]] = {}
    count = 0
    for tokens in (6, 8, 14):
        writer, module = Writer(), Module()
        options = {"enable_dynamic_batching": True, "max_batch_tokens": tokens, "chunk_size": 3}
        data = [LOADERS["map"](), LOADERS["stream"]()]
        trainer(ours(tmp_path, **options), writer).predict(module, data)
        assert module.numbers == writer.began == writer.written
        assert len(set(writer.written)) == len(writer.written) > 2
        for place, rows in writer.rows.items():
            assert seen.setdefault(place, rows) == rows, "one number, two batches"
            if place[0] == 0:
                assert writer.indices[place] == [int(row) // 2 for row in rows]
        count += len(writer.written)
        for loader in (0, 1):
            PartStore(tmp_path / f"dataloader_{loader}").path(0).unlink()
    assert len(seen) > 6
    assert count >= len(seen)


def test_the_progress_bar_of_lightning_counts_batches(tmp_path: Path) -> None:
    shown: list[int] = []

    class Bar(TQDMProgressBar):
        def on_predict_batch_end(self, *arguments: Any, **named: Any) -> None:
            super().on_predict_batch_end(*arguments, **named)
            shown.append(int(self.predict_progress_bar.n))

    options = {"enable_dynamic_batching": True, "max_batch_tokens": 14}
    bar = Bar()
    trainer(ours(tmp_path, **options), bar, enable_progress_bar=True).predict(Module(), LOADERS["map"]())
    assert shown == list(range(1, len(shown) + 1))
    assert len(shown) > 2
    assert "on_predict_batch_end" not in vars(bar), "the bar is as it was"


class Notes:
    """A callback as Fabric knows it: called by keyword."""

    def __init__(self, act: Callable[[Any, int], Any] = lambda output, number: None):
        self.act, self.began, self.ended = act, [], []

    def on_predict_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.began.append(batch_idx)

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.act(outputs, batch_idx)
        self.ended.append(batch_idx)


@pytest.fixture
def orchestrate(tmp_path: Path) -> Iterator[Callable[..., MultiGPUOrchestrator]]:
    def make(*callbacks: Any) -> MultiGPUOrchestrator:
        session.leave()
        orchestrator = MultiGPUOrchestrator(output_dir=tmp_path, log_level="WARNING", chunk_size=1, callbacks=callbacks)
        orchestrator.initialize(0, 1)
        return orchestrator

    yield make
    session.leave()


class Doubling(torch.nn.Module):
    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return batch * 2


def test_orchestrator_keeps_what_callbacks_change_and_gives_their_object(orchestrate: Any) -> None:
    objects: list[int] = []

    def act(output: torch.Tensor, _: int) -> None:
        objects.append(id(output))
        output.mul_(10)

    notes = Notes(act)
    orchestrator = orchestrate(notes)
    given = [(id(output), output.clone()) for output in orchestrator.predict(Doubling(), LOADERS["map"]())]
    assert [place for place, _ in given] == objects
    assert equal(torch.cat([output for _, output in given]), ROWS * 20)
    assert equal(torch.cat(list(orchestrator.predictions)), ROWS * 20)
    assert notes.began == notes.ended == [0, 1, 2, 3, 4, 5]


def test_orchestrator_loop_that_is_left_keeps_all_but_the_batch_in_hand(orchestrate: Any, tmp_path: Path) -> None:
    for number, _ in enumerate(orchestrate().predict(Doubling(), LOADERS["map"]())):
        if number == 3:
            break
    assert sorted(PartStore(tmp_path / "dataloader_0").done()) == [0, 1, 2]
    orchestrator = orchestrate()
    with pytest.raises(OnPurposeError):  # noqa: PT012
        for number, _ in enumerate(orchestrator.predict(Doubling(), LOADERS["map"]())):
            if number == 1:
                raise OnPurposeError
    assert sorted(PartStore(tmp_path / "dataloader_0").done()) == [0, 1, 2, 3]
    notes = Notes()
    orchestrator = orchestrate(notes)
    for _ in orchestrator.predict(Doubling(), LOADERS["map"]()):
        pass
    assert notes.began == notes.ended == [4, 5]
    assert equal(torch.cat(list(orchestrator.predictions)), ROWS * 2)


def test_orchestrator_computes_a_batch_again_whose_callback_failed(orchestrate: Any, tmp_path: Path) -> None:
    def fail(output: Any, number: int) -> None:
        if number == 2:
            raise OnPurposeError

    with pytest.raises(OnPurposeError):
        list(orchestrate(Notes(fail)).predict(Doubling(), LOADERS["map"]()))
    assert sorted(PartStore(tmp_path / "dataloader_0").done()) == [0, 1]
    notes = Notes()
    list(orchestrate(notes).predict(Doubling(), LOADERS["map"]()))
    assert notes.ended == [2, 3, 4, 5]


def test_between_two_predict_calls_there_is_no_thread_and_the_second_is_recorded_as_the_first(tmp_path: Path) -> None:
    for number in range(2):
        one = trainer(GPUOrchStrategy(output_dir=tmp_path / str(number), log_level="WARNING"))
        assert len(one.predict(Module(), LOADERS["map"]())) == 6
        assert not [thread for thread in threading.enumerate() if thread.name == "gpuorch-events"]


def test_what_a_strategy_knows_of_its_job_can_be_pickled(tmp_path: Path) -> None:
    one = trainer(ours(tmp_path))
    one.predict(Module(torch.neg), LOADERS["map"]())
    again = pickle.loads(pickle.dumps([one.strategy.runtime, one.strategy.model_setup]))
    assert again[0].config == one.strategy.config
