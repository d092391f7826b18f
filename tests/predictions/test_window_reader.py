"""Windows are read while others are computed, and never wait for more than a chunk."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lightning_gpuorch.control.messages.leases import Lease
from lightning_gpuorch.predictions.loading import window_bounds, window_reader
from lightning_gpuorch.predictions.loading.source import Span
from lightning_gpuorch.predictions.loading.window import Window
from lightning_gpuorch.predictions.loading.window_bounds import WindowBounds
from lightning_gpuorch.predictions.loading.window_reader import BackgroundWindowReader, Requested, WindowReader

SECONDS = 30


class Spans:
    """Chunks of two spans of four samples; ``before(n)`` is called before span ``n`` is read."""

    def __init__(self, num_chunks: int, before: Callable[[int], None] = lambda span: None, **answer: Any):
        self.num_chunks, self.before, self.answer = num_chunks, before, answer
        self.read = 0

    def __iter__(self) -> Iterator[tuple[Requested, list[int]]]:
        for number in range(2 * self.num_chunks):
            self.before(number)
            indices = list(range(4 * number, 4 * number + 4))
            span = Span(indices[0], 4, number, indices)
            asked = Requested(Lease(chunk=number // 2, **self.answer), span, False, number % 2 == 1)
            self.read += 1
            yield asked, indices


def bounds(chunks: int) -> WindowBounds:
    """Windows of so many chunks."""
    known = WindowBounds(num_replicas=1)
    known.samples_per_chunk = 8
    known.observe(num_samples=1, num_bytes=window_bounds.BYTES_PER_WINDOW // (8 * chunks))
    return known


def chunks_of(window: Window | None) -> list[int]:
    assert window is not None
    return sorted({piece.chunk for piece in window.pieces})


def test_all_of_a_window_is_read_when_it_is_needed() -> None:
    spans = Spans(7)
    reader = WindowReader(iter(spans), bounds(3))
    assert spans.read == 0
    assert chunks_of(reader.next()) == [0, 1, 2]
    assert spans.read == 6
    assert chunks_of(reader.next()) == [3, 4, 5]
    assert chunks_of(reader.next()) == [6]
    assert reader.next() is None


def test_some_of_the_next_one_is_read_when_told_and_no_more_than_that_one() -> None:
    spans = Spans(7)
    reader = WindowReader(iter(spans), bounds(2))
    assert chunks_of(reader.next()) == [0, 1]
    reader.read_ahead(7)
    assert spans.read == 6, "eight samples: spans are read as a whole"
    reader.read_ahead(1000)
    assert spans.read == 8
    assert chunks_of(reader.next()) == [2, 3]
    assert spans.read == 8


def test_in_the_background_a_window_is_cut_where_it_stands() -> None:
    stands, go_on = threading.Event(), threading.Event()

    def before(span: int) -> None:
        if span == 6:
            stands.set()
            assert go_on.wait(SECONDS)

    spans = Spans(7, before)
    reader = BackgroundWindowReader(iter(spans), bounds(5))
    assert stands.wait(SECONDS)
    assert chunks_of(reader.next()) == [0, 1, 2]
    go_on.set()
    rest = []
    while (window := reader.next()) is not None:
        rest += chunks_of(window)
    assert rest == [3, 4, 5, 6]
    reader.close()


def test_in_the_background_a_chunk_is_never_cut() -> None:
    spans_of_windows = []
    reader: Any = None
    begun = threading.Event()

    def before(span: int) -> None:
        assert begun.wait(SECONDS)
        window = reader._open
        spans_of_windows.append(0 if window is None else len(window.pieces))

    spans = Spans(3, before)
    reader = BackgroundWindowReader(iter(spans), bounds(3))
    begun.set()
    with reader._changed:
        assert reader._changed.wait_for(lambda: reader._whole, SECONDS)
    assert spans_of_windows == [0, 0, 2, 2, 4, 4]
    assert chunks_of(reader.next()) == [0, 1, 2]
    assert reader.next() is None


def test_in_the_background_no_more_than_one_whole_window_is_read_ahead() -> None:
    read = threading.Event()
    spans = Spans(100, lambda span: read.set() if span == 3 else None)
    reader = BackgroundWindowReader(iter(spans), bounds(2))
    assert chunks_of(reader.next())[0] == 0
    assert read.wait(SECONDS)
    with reader._changed:
        assert reader._changed.wait_for(lambda: reader._whole, SECONDS)
    reader.close()
    assert not reader._thread.is_alive()
    assert spans.read <= 8, "one that was cut, one that is whole"


def test_an_error_of_the_dataset_is_raised_when_all_before_it_is_computed() -> None:
    def before(span: int) -> None:
        if span == 5:
            raise OSError("sample 20 is not there")

    spans = Spans(7, before)
    reader = BackgroundWindowReader(iter(spans), bounds(5))
    chunks: list[int] = []
    with pytest.raises(OSError, match="sample 20 is not there"):
        chunks.extend(chunk for window in iter(reader.next, None) for chunk in chunks_of(window))
    assert chunks == [0, 1]
    reader.close()


def test_a_dataset_that_hangs_is_not_waited_for_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_reader, "_CLOSE_SECONDS", 0.1)
    go_on = threading.Event()
    spans = Spans(7, lambda span: None if span < 2 else go_on.wait(SECONDS) and None)
    reader = BackgroundWindowReader(iter(spans), bounds(5))
    assert chunks_of(reader.next()) == [0]
    reader.close()
    assert reader._thread.is_alive()
    go_on.set()
    reader._thread.join(SECONDS)
    assert not reader._thread.is_alive()
