"""Fragments: what is computed of windows that are not whole yet is found again, and never taken for more than it is."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from lightning_gpuorch.predictions import StoredBatch
from lightning_gpuorch.predictions.storage import fragments
from lightning_gpuorch.predictions.storage.fragments import FragmentReader, FragmentWriter
from lightning_gpuorch.predictions.storage.journal import remove_fragments

READ = fragments.PartStore.read


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def batch(*units: int) -> StoredBatch:
    return StoredBatch(units[0], list(units), len(units), torch.tensor(units), list(units))


def add(writer: FragmentWriter, *units: int) -> None:
    writer.add(batch(*units), {unit // 10 for unit in units})


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("unfinished-*/*"))


def units_found(directory: Path, *wanted: int, loader: int = 0) -> list[list[int]]:
    return [stored.output.tolist() for stored in find(FragmentReader(directory, loader, "samples"), *wanted)]


def find(reader: FragmentReader, *wanted: int, look_again: bool = False) -> list[StoredBatch]:
    return list(reader.find(wanted)) if reader.has_any(look_again) else []


def test_a_fragment_is_written_when_it_is_due_and_found_by_anybody(tmp_path: Path) -> None:
    clock, kept = Clock(), []
    writer = FragmentWriter(tmp_path, 0, "samples", kept.append, clock=clock)
    add(writer, 1, 25)
    assert not files(tmp_path)
    clock.now = 3.0
    add(writer, 2, 31, 44)
    assert len(files(tmp_path)) == 1
    assert kept == [5]
    assert units_found(tmp_path, 25) == [[1, 25]], "whole batches, as computed"
    assert units_found(tmp_path, 1, 44) == [[1, 25], [2, 31, 44]]
    assert units_found(tmp_path, 3) == []
    assert units_found(tmp_path, 1, loader=1) == [], "that is another dataloader"


def test_it_is_removed_when_all_its_chunks_are_durable(tmp_path: Path) -> None:
    clock = Clock()
    writer = FragmentWriter(tmp_path, 0, "samples", clock=clock)
    for units in ((1, 25), (26, 31)):
        clock.now += 3.0
        add(writer, *units)
    writer.on_durable(2)
    writer.on_durable(7)
    assert len(files(tmp_path)) == 2
    writer.on_durable(0)
    assert units_found(tmp_path, 1, 31) == [[26, 31]]
    writer.on_durable(3)
    assert not files(tmp_path)


def test_nothing_is_written_twice_and_nothing_of_a_window_that_is_whole(tmp_path: Path) -> None:
    writer = FragmentWriter(tmp_path, 0, "samples", clock=Clock())
    add(writer, 1, 2)
    writer.end_window()
    writer.write()
    assert not files(tmp_path)
    add(writer, 3)
    writer.write()
    writer.write()
    assert len(files(tmp_path)) == 1


def test_a_slow_disk_gets_fewer(tmp_path: Path) -> None:
    clock = Clock()
    writer = FragmentWriter(tmp_path, 0, "samples", clock=clock)
    commit = writer._store.commit

    def slow(*arguments: object) -> bool:
        clock.now += 1.0
        return commit(*arguments)  # type: ignore[arg-type]

    writer._store.commit = slow  # type: ignore[method-assign]
    clock.now = 3.0
    add(writer, 1)
    clock.now = 103.0
    add(writer, 2)
    assert len(files(tmp_path)) == 1
    clock.now = 104.0
    add(writer, 3)
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("harm", ["cut", "flipped", "emptied"])
def test_a_damaged_one_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: str
) -> None:
    writer = FragmentWriter(tmp_path, 0, "samples", clock=Clock())
    for units in ((1, 2), (3, 4)):
        add(writer, *units)
        writer.write()
    path = files(tmp_path)[0]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes({"cut": content[:-9], "flipped": content, "emptied": b""}[harm])
    with caplog.at_level(logging.WARNING):
        assert units_found(tmp_path, 1, 2, 3, 4) == [[3, 4]]
    assert "passed over" in caplog.text
    assert str(path) in caplog.text


def test_one_that_is_gone_is_no_news(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = FragmentWriter(tmp_path, 0, "samples", clock=Clock())
    add(writer, 1, 2)
    writer.write()
    reader = FragmentReader(tmp_path, 0, "samples")
    assert not find(reader, 9, look_again=False), "it has looked what there is"
    writer.on_durable(0)
    with caplog.at_level(logging.WARNING):
        assert not find(reader, 1, look_again=False)
    assert not caplog.records


def test_it_is_read_once_for_chunks_that_come_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = FragmentWriter(tmp_path, 0, "samples", clock=Clock())
    add(writer, 1, 12, 23)
    writer.write()
    read = []
    monkeypatch.setattr(fragments.PartStore, "read", lambda store, number: read.append(number) or READ(store, number))
    reader = FragmentReader(tmp_path, 0, "samples")
    for unit in (1, 12, 23):
        assert [found.output.tolist() for found in find(reader, unit, look_again=True)] == [[1, 12, 23]]
    assert read == [0]
    assert not find(reader, 31, look_again=True)
    assert not reader._parts, "who needs none keeps none"
    monkeypatch.setattr(fragments, "BYTES_IN_MEMORY", 10)
    for _ in range(2):
        assert len(find(reader, 1, look_again=True)) == 1
    assert read == [0, 0, 0]


def test_what_appeared_later_is_found_by_who_looks_again(tmp_path: Path) -> None:
    reader = FragmentReader(tmp_path, 0, "samples")
    assert not find(reader, 1, look_again=False)
    writer = FragmentWriter(tmp_path, 0, "samples", clock=Clock())
    add(writer, 1, 2)
    writer.write()
    assert not find(reader, 1, look_again=False), "it costs nothing while nobody has died"
    assert len(find(reader, 1, look_again=True)) == 1


def test_a_directory_that_cannot_be_written_costs_fragments_and_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = FragmentWriter(tmp_path / "gone", 0, "samples", clock=Clock())
    with caplog.at_level(logging.WARNING):
        for unit in range(3):
            add(writer, unit)
            writer.write()
    assert len(caplog.records) == 1, "said once"
    assert "has vanished" in caplog.text


def test_where_parts_have_no_room_all_are_given_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = FragmentWriter(tmp_path, 0, "samples", clock=Clock())
    add(writer, 1)
    writer.write()
    assert files(tmp_path)
    writer.give_up()
    writer.on_durable(0)
    add(writer, 2)
    writer.write()
    assert not list(tmp_path.iterdir())
    assert not caplog.records


def test_those_of_a_complete_job_are_removed(tmp_path: Path) -> None:
    for loader in range(2):
        writer = FragmentWriter(tmp_path, loader, "samples", clock=Clock())
        add(writer, 1)
        writer.write()
    (tmp_path / "manifest.json").write_text("{}")
    remove_fragments(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
