"""Halving gives what the undisturbed step gives, retries nothing else, and keeps nothing alive."""

from __future__ import annotations

import gc
import logging
import sys
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gpuorch.errors import MemoryBudgetError
from lightning_gpuorch.predictions.samples import CannotMergeError, CannotSplitError
from lightning_gpuorch.testing.memory import CPUMemoryBudget
from lightning_gpuorch.worker.oom.detection import is_out_of_memory, release
from lightning_gpuorch.worker.oom.halving import BatchHalver, OOMEvent, SingleSampleOOMError
from lightning_gpuorch.worker.oom.limits import SizeLimits, shape_bucket
from tests.support.examples import examples
from tests.support.kinds import COLLATE, OUTPUT, LimitedStep, equal


@pytest.fixture(scope="module", autouse=True)
def cheap_collections() -> Iterator[None]:
    """As after loading a model: full collections look at new objects only."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.ERROR, logger="lightning_gpuorch"):
        yield


def spans(count: int, size: int) -> list[list[int]]:
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]


def run_all(
    kind: str, step: LimitedStep, count: int, size: int, halver: BatchHalver | None, survive: bool = False
) -> list[Any]:
    outputs = []
    for samples in spans(count, size):
        batch = COLLATE[kind](samples)
        if halver is None:
            outputs.append(step(batch))
            continue
        recollate = partial(lambda samples, start, stop: COLLATE[kind](samples[start:stop]), samples)
        run = halver.run_surviving if survive else halver.run
        outputs.append(run(step, batch, size=len(samples), recollate=recollate))
    return outputs


@pytest.mark.parametrize("output", OUTPUT)
@pytest.mark.parametrize("kind", COLLATE)
def test_every_kind_of_batch_and_output_equals_the_undisturbed_run(kind: str, output: str) -> None:
    for count, size in ((30, 13), (9, 4)):
        expected = run_all(kind, LimitedStep(output), count, size, None)
        for limit in (1, 2, 3, 5, 12):
            step, halver = LimitedStep(output, limit), BatchHalver()
            assert equal(run_all(kind, step, count, size, halver), expected), (count, size, limit, step.calls)
            assert (halver.num_ooms > 0) == (limit < size)


@given(
    st.sampled_from(sorted(COLLATE)),
    st.sampled_from(sorted(OUTPUT)),
    st.integers(1, 40),
    st.integers(1, 16),
    st.lists(st.integers(1, 16), min_size=1, max_size=12),
)
@examples(120)
def test_any_sizes_and_a_limit_that_changes(kind: str, output: str, count: int, size: int, limits: list[int]) -> None:
    class Changing(LimitedStep):
        def __call__(self, batch: Any) -> Any:
            self.limit = limits[len(self.calls) % len(limits)]
            return super().__call__(batch)

    expected = run_all(kind, LimitedStep(output), count, size, None)
    try:
        outputs = run_all(kind, Changing(output), count, size, BatchHalver())
    except CannotMergeError:  # only parts of size one, of a step that was never seen on more
        assert output in ("list_of_tensors", "two_alike", "tuple", "model_output")
        return
    assert equal(outputs, expected)


class TestOneSample:
    def test_it_is_given_up_and_the_others_are_computed(self) -> None:
        step = LimitedStep("dict", limit=9, too_large=frozenset({5.0, 6.0, 21.0}))
        halver = BatchHalver()
        results = run_all("tensor", step, 30, 13, halver, survive=True)
        assert [result.lost for result in results] == [(5, 6), (8,), ()]
        kept = [v for result in results for v in result.output["y"][:, 0].tolist()]
        assert kept == [2.0 * i for i in range(30) if i not in (5, 6, 21)]
        assert halver.num_lost == 3
        assert len(step.calls) < 45

    def test_run_raises_with_the_position(self) -> None:
        step = LimitedStep("tensor", too_large=frozenset({3.0}))
        with pytest.raises(SingleSampleOOMError, match="position 3 of a batch of 8") as caught:
            run_all("tensor", step, 8, 8, BatchHalver())
        assert caught.value.position == 3

    def test_nothing_survives(self) -> None:
        result = BatchHalver().run_surviving(LimitedStep("tensor", limit=0), torch.zeros(4, 3), size=4)
        assert result.lost == (0, 1, 2, 3)
        assert result.output is None

    def test_it_does_not_shrink_later_batches(self) -> None:
        step = LimitedStep("tensor", too_large=frozenset({5.0}))
        run_all("tensor", step, 64, 16, BatchHalver(), survive=True)
        assert step.calls[-3:] == [16, 16, 16]

    def test_samples_padded_by_it_are_built_anew(self) -> None:
        lengths = [3, 4, 500, 5, 2]

        def collate(start: int, stop: int) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence([torch.ones(n) for n in lengths[start:stop]], batch_first=True)

        def step(batch: torch.Tensor) -> torch.Tensor:
            if batch.shape[1] > 100:
                raise torch.OutOfMemoryError
            return batch.sum(1)

        result = BatchHalver().run_surviving(step, collate(0, 5), size=5, recollate=collate)
        assert result.lost == (2,)
        assert result.output.tolist() == [3, 4, 5, 2]

    def test_a_step_that_fails_once_at_one_sample_is_tried_again(self) -> None:
        failures = iter([True, True, True, False, False, False])

        def step(batch: torch.Tensor) -> torch.Tensor:
            if next(failures, False):
                raise torch.OutOfMemoryError
            return batch + 1

        assert BatchHalver().run(step, torch.arange(3), size=3).tolist() == [1, 2, 3]


class TestOtherErrors:
    @pytest.mark.parametrize(
        "error",
        [
            RuntimeError("out of memory is what I feel"),
            RuntimeError("CUDA error: an illegal memory access was encountered"),
            torch.AcceleratorError("CUDA error: device-side assert triggered"),
            ValueError("x"),
            KeyboardInterrupt(),
            StopIteration(),
        ],
    )
    def test_they_are_never_retried(self, error: BaseException) -> None:
        calls = []

        def step(batch: Any) -> Any:
            calls.append(batch)
            raise error

        halver = BatchHalver()
        with pytest.raises(type(error)) as caught:
            halver.run(step, torch.zeros(8), size=8)
        assert caught.value is error
        assert len(calls) == 1
        assert halver.num_ooms == 0

    def test_one_in_a_part_passes_too(self) -> None:
        def step(batch: torch.Tensor) -> torch.Tensor:
            if len(batch) > 2:
                raise torch.OutOfMemoryError
            raise RuntimeError("mine")

        with pytest.raises(RuntimeError, match="mine"):
            BatchHalver().run(step, torch.zeros(8), size=8)

    def test_what_counts_as_out_of_memory(self) -> None:
        def wrapped(outer: Exception, inner: Exception, explicit: bool) -> Exception:
            if explicit:
                outer.__cause__ = inner
            else:
                outer.__context__ = inner
            return outer

        allocation, illegal = torch.AcceleratorError("CUDA error"), torch.AcceleratorError("CUDA error")
        allocation.error_code, illegal.error_code = 2, 700
        assert is_out_of_memory(torch.OutOfMemoryError("x"))
        assert is_out_of_memory(MemoryBudgetError("x"))
        assert is_out_of_memory(allocation)
        assert not is_out_of_memory(illegal)
        assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"))
        assert is_out_of_memory(wrapped(RuntimeError("Sharding propagation failed"), torch.OutOfMemoryError(), True))
        assert is_out_of_memory(wrapped(RuntimeError("x"), torch.OutOfMemoryError(), False))
        hidden = wrapped(RuntimeError("on purpose"), torch.OutOfMemoryError(), False)
        hidden.__suppress_context__ = True  # raise ... from None
        assert not is_out_of_memory(hidden)

    def test_the_error_of_torchs_own_cpu_allocator_counts(self) -> None:
        with pytest.raises(RuntimeError) as caught:
            torch.empty(1 << 60, dtype=torch.uint8)
        assert is_out_of_memory(caught.value)

    def test_a_batch_that_cannot_be_cut_says_so(self) -> None:
        def step(batch: Any) -> Any:
            raise torch.OutOfMemoryError("no room")

        with pytest.raises(CannotSplitError, match=r"memory ran out.*object"):
            BatchHalver().run(step, object())
        with pytest.raises(CannotSplitError, match="memory ran out with 4 samples"):
            BatchHalver().run(step, [torch.zeros(4, 2)] * 4, size=4)

    def test_reductions_are_refused(self) -> None:
        def step(batch: torch.Tensor) -> dict[str, Any]:
            if len(batch) > 3:
                raise torch.OutOfMemoryError
            return {"y": batch, "loss": batch.mean()}

        with pytest.raises(CannotMergeError, match=r"output\['loss'\].*reduction"):
            BatchHalver().run(step, torch.arange(8.0), size=8)

    def test_similarities_within_the_batch_are_refused(self) -> None:
        def step(batch: torch.Tensor) -> torch.Tensor:
            if len(batch) > 4:
                raise torch.OutOfMemoryError
            return batch @ batch.T

        with pytest.raises(CannotMergeError):
            BatchHalver().run(step, torch.randn(8, 5), size=8)


class Deep(torch.nn.Module):
    """Keeps its activations in a local list, as real models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(64, 64) for _ in range(6)])
        self.seen: list[weakref.ref[torch.Tensor]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(weakref.ref(x))
        activations = [x]
        for layer in self.layers:
            activations.append(layer(activations[-1]))
            self.seen.append(weakref.ref(activations[-1]))
        return activations[-1]


class TestNothingStaysAlive:
    @pytest.mark.parametrize("how", ["plain", "cause", "context", "cycle", "group"])
    def test_no_activation_is_alive_at_the_retry(self, how: str) -> None:
        model, alive_at_retry = Deep(), []

        class CustomError(Exception):
            me: Any = None

        def step(batch: torch.Tensor) -> torch.Tensor:
            if model.seen:
                alive_at_retry.append(sum(ref() is not None for ref in model.seen))
                model.seen.clear()
            if len(batch) <= 8:
                return batch
            hidden = model(batch * 1)
            if how == "plain":
                raise torch.OutOfMemoryError
            if how == "group" and sys.version_info >= (3, 11):
                raise ExceptionGroup("several", [torch.OutOfMemoryError()])  # noqa: F821
            error = CustomError("wrapped")
            error.hidden = hidden  # type: ignore[attr-defined]
            try:
                raise torch.OutOfMemoryError
            except torch.OutOfMemoryError as cause:
                if how == "cycle":
                    error.me = error
                if how == "context":
                    raise RuntimeError from None or cause
                raise RuntimeError("sharding") from cause

        gc.disable()  # only what the halver does counts
        try:
            with torch.no_grad():
                BatchHalver().run(step, torch.randn(32, 64), size=32)
        finally:
            gc.enable()
        assert alive_at_retry
        assert set(alive_at_retry) == {0}

    def test_the_last_uncaught_error_of_a_prompt_is_let_go(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = Deep()
        try:
            hidden = model(torch.randn(4, 64))
            raise torch.OutOfMemoryError
        except torch.OutOfMemoryError as error:
            monkeypatch.setattr(sys, "last_exc", error, raising=False)
            monkeypatch.setattr(sys, "last_traceback", error.__traceback__, raising=False)
        del hidden
        failing = iter([True])

        def step(batch: torch.Tensor) -> torch.Tensor:
            if next(failing, False):
                raise torch.OutOfMemoryError
            return batch

        BatchHalver().run(step, torch.zeros(4), size=4)
        assert sys.last_exc.__traceback__ is None

    def test_release_clears_the_frames_of_all_causes(self) -> None:
        def fail() -> None:
            local = torch.zeros(3)
            refs.append(weakref.ref(local))
            raise torch.OutOfMemoryError

        refs: list[weakref.ref[torch.Tensor]] = []
        try:
            try:
                fail()
            except torch.OutOfMemoryError as error:
                raise RuntimeError from error
        except RuntimeError as error:
            kept = error
            release(kept)
        assert refs[0]() is None

    def test_a_model_under_a_real_byte_budget(self) -> None:
        model = Deep().eval()
        batch = torch.randn(512, 64)
        with torch.inference_mode():
            expected = model(batch)
        model.seen.clear()
        budget = CPUMemoryBudget(10**9, resident=model)
        weights = budget.used_bytes
        budget.limit_bytes = weights + 2 * expected.nbytes + 150_000
        halver = BatchHalver()
        with budget, torch.inference_mode():
            for _ in range(2):
                output = halver.run(model, batch, size=512)
                torch.testing.assert_close(output, expected)
                del output
        assert budget.num_ooms == halver.num_ooms > 0
        gc.collect()
        assert budget.used_bytes == weights


class TestReports:
    def test_the_hook_gets_every_error_and_cannot_break_the_run(self) -> None:
        events: list[OOMEvent] = []

        def hook(event: OOMEvent) -> None:
            events.append(event)
            raise ValueError("observer")

        halver = BatchHalver(on_oom=hook, describe_memory=lambda: "1 of 2 GiB")
        run_all("tensor", LimitedStep("tensor", 4), 13, 13, halver)
        assert [(event.position, event.size, event.next_size) for event in events] == [(0, 13, 7), (0, 7, 4)]
        assert {event.memory for event in events} == {"1 of 2 GiB"}
        assert (halver.num_ooms, halver.num_splits, halver.num_lost) == (2, 1, 0)

    def test_the_log_line_says_what_and_how_much(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, logger="lightning_gpuorch"):
            halver = BatchHalver(describe_memory=lambda: "1.5 of 2.0 GiB in use")
            run_all("tensor", LimitedStep("tensor", 8), 13, 13, halver)
        assert "out of memory with 13 samples at position 0; going on with 7. 1.5 of 2.0 GiB in use" in caplog.text
        assert all(record.exc_info is None for record in caplog.records)


class TestRememberedSizes:
    def test_the_next_batch_is_cut_before_it_fails(self) -> None:
        step, halver = LimitedStep("tensor", 5), BatchHalver()
        run_all("tensor", step, 26, 13, halver)
        assert step.calls[-3:] == [4, 4, 4] or max(step.calls[3:]) <= 5
        assert halver.num_ooms == 2

    def test_it_grows_back_to_just_below_what_failed(self) -> None:
        step, halver = LimitedStep("tensor", 24), BatchHalver()
        run_all("tensor", step, 32 * 400, 32, halver)
        assert halver.num_ooms <= 4
        assert max(step.calls[-40:]) <= 24
        assert halver.limits.limit(shape_bucket(torch.zeros(32, 3), 32)) >= 16

    def test_after_the_pressure_ends_whole_batches_come_back(self) -> None:
        step, halver = LimitedStep("tensor", 8), BatchHalver(limits=SizeLimits(forget_after=50))
        run_all("tensor", step, 320, 32, halver)
        step.limit = 10**9
        run_all("tensor", step, 32 * 200, 32, halver)
        assert step.calls[-10:] == [32] * 10
        assert not halver.limits

    def test_short_samples_are_not_limited_by_long_ones(self) -> None:
        limits = SizeLimits()
        limits.failed(10, 64)
        assert limits.limit(9) is None
        assert limits.limit(10) == 32
        assert limits.limit(11) == 32

    @given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 64)), min_size=1, max_size=60), st.integers(1, 64))
    @examples(60)
    def test_a_stable_limit_is_hit_ever_more_rarely(self, batches: list[tuple[int, int]], fits: int) -> None:
        limits, failures = SizeLimits(), 0
        for bucket, size in batches * 5:
            left, calm = size, True
            while left:
                part = min(left, limits.limit(bucket) or size)
                if part > fits:
                    limits.failed(bucket, part)
                    failures, calm = failures + 1, False
                else:
                    limits.fitted(bucket, part)
                    left -= part
            limits.end_step(bucket, size, calm=calm)
        assert failures <= 6 * 14 + len(batches) // 4

    def test_buckets(self) -> None:
        assert shape_bucket(torch.zeros(8, 100), 8) == shape_bucket(torch.zeros(3, 100), 3)
        assert shape_bucket({"x": torch.zeros(8, 500)}, 8) > shape_bucket({"x": torch.zeros(8, 100)}, 8)
        assert shape_bucket(["a" * 300, "b"], 2) == shape_bucket(["a" * 300] * 9, 9)
        assert shape_bucket([[1] * 300, [2]], 2) == shape_bucket([[1] * 300] * 9, 9)
        assert shape_bucket([torch.zeros(300)], 1) == shape_bucket([torch.zeros(2), torch.zeros(300)], 2)


def test_the_size_is_told_from_structure_if_not_given() -> None:
    step = LimitedStep("tensor", 3)
    assert torch.equal(BatchHalver().run(step, torch.ones(8, 3)), torch.full((8, 3), 2.0))


@pytest.mark.parametrize("remember", [True, False])
def test_what_did_not_fit_is_remembered_unless_somebody_else_does_it(remember: bool) -> None:
    sizes: list[int] = []

    def step(batch: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batch))
        if len(sizes) == 1:
            raise torch.OutOfMemoryError
        return batch

    halver = BatchHalver(remember=remember)
    for _ in range(2):
        assert len(halver.run(step, torch.zeros(8, 2))) == 8
    assert sizes == [8, 4, 4, *([4, 4] if remember else [8])]
