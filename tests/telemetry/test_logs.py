from __future__ import annotations

import io
import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.telemetry import CONTEXT, FailureTally, configure_logging

log = logging.getLogger("lightning_gpuorch.somewhere")


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_file_per_rank_and_start_holds_every_record_with_its_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure_logging("INFO", rank=3, replica=1, directory=tmp_path / "logs", generation=2, stream=io.StringIO())
    monkeypatch.setitem(CONTEXT, "step", 17)
    monkeypatch.setitem(CONTEXT, "chunk", 4)
    monkeypatch.setitem(CONTEXT, "trace_id", "ab" * 16)
    log.info("went %s", "well", extra={"batch_size": 8})
    try:
        raise KeyError("lost")
    except KeyError:
        log.exception("went wrong\nin two lines")
    log.debug("not asked for")
    first, second = records(tmp_path / "logs" / "rank-00003.attempt-2.jsonl")
    assert {k: v for k, v in first.items() if k != "ts"} == {
        "level": "INFO", "logger": "lightning_gpuorch.somewhere", "message": "went well", "rank": 3, "replica": 1,
        "generation": 2, "step": 17, "chunk": 4, "trace_id": "ab" * 16, "batch_size": 8,
    }  # fmt: skip
    assert second["message"] == "went wrong\nin two lines"
    assert "KeyError: 'lost'" in second["exception"]


def test_console_shows_information_of_rank_0_and_warnings_of_the_others() -> None:
    lines = {}
    for rank in (0, 3):
        stream = io.StringIO()
        configure_logging("INFO", rank=rank, replica=0, stream=stream)
        log.info("ready")
        log.warning("slow")
        lines[rank] = stream.getvalue().splitlines()
    assert lines == {0: ["[rank 0] ready", "[rank 0] warning: slow"], 3: ["[rank 3] warning: slow"]}


def test_configuring_again_replaces_and_leaves_other_handlers_and_loggers_alone(tmp_path: Path) -> None:
    ours, root = logging.getLogger("lightning_gpuorch"), logging.getLogger()
    foreign = logging.NullHandler()
    ours.addHandler(foreign)
    before = list(root.handlers), root.level, logging.getLogger("lightning").handlers
    try:
        streams = [io.StringIO(), io.StringIO()]
        for stream in streams:
            configure_logging("DEBUG", rank=0, replica=0, directory=tmp_path, stream=stream)
        log.debug("once")
        assert [stream.getvalue() for stream in streams] == ["", "[rank 0] debug: once\n"]
        assert len(records(tmp_path / "rank-00000.attempt-0.jsonl")) == 1
        assert foreign in ours.handlers
        assert len(ours.handlers) == 3
        assert before == (list(root.handlers), root.level, logging.getLogger("lightning").handlers)
    finally:
        ours.removeHandler(foreign)


def test_what_json_has_no_form_for_is_still_one_readable_line(tmp_path: Path) -> None:
    configure_logging("INFO", rank=0, replica=0, directory=tmp_path, stream=io.StringIO())
    log.info(
        "odd \udcff", extra={"where": tmp_path, "loss": float("nan"), "nested": [float("inf")], "kinds": {"b", "a"}}
    )
    (record,) = records(tmp_path / "rank-00000.attempt-0.jsonl")
    assert (record["where"], record["loss"], record["nested"]) == (str(tmp_path), "nan", ["inf"])
    assert record["kinds"] == ["a", "b"]
    assert record["message"] == "odd \udcff"


@pytest.mark.parametrize("level", ["LOUD", "", "Level 7"])
def test_an_unknown_level_is_refused_and_named(level: str) -> None:
    with pytest.raises(ConfigurationError, match=f"log_level={level!r}"):
        configure_logging(level, rank=0, replica=0)


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError("nobody reads")


def test_a_broken_console_and_an_unwritable_directory_are_counted_and_raise_nothing(
    tmp_path: Path, tally: FailureTally, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    configure_logging("INFO", rank=0, replica=0, directory=tmp_path / "file" / "logs", stream=Broken(), failures=tally)
    log.info("unheard")
    assert tally.counts() == {"logs": 2}
    log.info("wrong arguments %d", "text")
    assert tally.counts() == {"logs": 4}
    assert capfd.readouterr().err == ""  # the logging package's default would print a traceback here


def test_every_nth_failing_call_leaves_the_caller_untouched(
    tmp_path: Path, tally: FailureTally, failing_system: Any
) -> None:
    failing_system.thread = threading.current_thread()
    n = 0
    while True:
        n += 1
        failing_system.calls = failing_system.failed = 0
        failing_system.fail_at = n
        configure_logging(
            "INFO", rank=0, replica=0, directory=tmp_path / str(n) / "logs", stream=io.StringIO(), failures=tally
        )
        counted = tally.count("logs")
        for i in range(3):
            log.info("line %d", i)
        configure_logging("INFO", rank=0, replica=0, stream=io.StringIO(), failures=tally)  # closes the file
        failing_system.fail_at = 0
        assert tally.count("logs") - counted == failing_system.failed
        if not failing_system.failed:
            break
        path = tmp_path / str(n) / "logs" / "rank-00000.attempt-0.jsonl"
        written = [r["message"] for r in records(path)] if path.exists() else []
        assert len(written) >= 2
        assert written == [m for m in ("line 0", "line 1", "line 2") if m in written]
    assert n > 5  # mkdir, open, three writes, close
