"""Which node of a Ray cluster has which rank, what its supervisor's process tells, and what the command line refuses."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from lightning_gpuorch._version import __version__
from lightning_gpuorch.cli import ray_node
from lightning_gpuorch.cli.main import gpuorch
from lightning_gpuorch.cli.ray_cluster import NodeRanks
from lightning_gpuorch.cli.ray_node import Progress, RayNode


def test_nodes_are_numbered_as_they_come_and_the_next_one_replaces_one_that_is_lost() -> None:
    ranks = NodeRanks(3)
    assert [ranks.take(node) for node in ("a", "b")] == [0, 1]
    assert not ranks.is_welcome("a")
    ranks.release("b", None)
    assert ranks.num_free == 2
    assert ranks.take("c") == 1, "nobody waits for the place of the node that is lost"
    assert ranks.take("d") == 2
    assert ranks.num_free == 0


@pytest.mark.parametrize("code", [0, 65, 74, 75])
def test_a_node_that_has_left_or_knows_the_end_is_not_taken_in_again(code: int) -> None:
    ranks = NodeRanks(2)
    ranks.take("a")
    ranks.release("a", code)
    assert not ranks.is_welcome("a")
    assert ranks.take("b") == 0


@pytest.mark.parametrize("code", [None, 1, -9, 78])
def test_a_node_whose_supervisor_fails_is_tried_three_times(code: int | None) -> None:
    ranks = NodeRanks(2)
    for _ in range(3):
        assert ranks.is_welcome("a")
        ranks.take("a")
        ranks.release("a", code)
    assert not ranks.is_welcome("a")
    assert ranks.num_free == 2


def test_a_rank_that_another_supervisor_may_still_have_is_given_last() -> None:
    ranks = NodeRanks(3)
    assert [ranks.take(node) for node in ("a", "b")] == [0, 1]
    ranks.release("b", 78)
    assert [ranks.take(node) for node in ("b", "c")] == [2, 1]


def test_a_node_that_fails_before_it_has_a_rank_is_counted_and_frees_none() -> None:
    ranks = NodeRanks(1)
    for _ in range(3):
        ranks.release("a", None)
    assert not ranks.is_welcome("a")
    assert ranks.num_free == 1


async def _to_the_end(node: RayNode, progress: Progress) -> Progress:
    lines, num_dropped = list(progress.lines), progress.num_dropped
    deadline = time.monotonic() + 60
    while progress.code is None:
        assert time.monotonic() < deadline, lines
        progress = await node.follow()
        lines += progress.lines
        num_dropped += progress.num_dropped
    return Progress(lines, num_dropped, progress.code)


def test_a_node_tells_what_its_supervisor_prints_and_how_it_ends(tmp_path: Path) -> None:
    async def run(*arguments: str) -> Progress:
        node = RayNode("script.py", str(tmp_path))
        return await _to_the_end(node, await node.start(list(arguments), {}))

    assert asyncio.run(run("--version")) == Progress([(1, f"gpuorch, version {__version__}")], 0, 0)
    refused = asyncio.run(run("run", "absent.py"))
    assert refused.code == 2
    assert {number for number, _ in refused.lines} == {2}
    assert "'absent.py' does not exist" in refused.lines[-1][1]


def test_a_supervisor_is_started_once_and_stopped_by_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("JOB_ID", "1"), ("STEP_ID", "0"), ("PROCID", "0"), ("STEP_NUM_TASKS", "4")):
        monkeypatch.setenv(f"SLURM_{name}", value)  # Ray was started by srun, with other tasks beside it
    (tmp_path / "script.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(300)\n")

    async def run() -> tuple[Progress, int]:
        node = RayNode(str(tmp_path / "script.py"), str(tmp_path))
        arguments = ["run", "--accelerator", "cpu", "--devices", "1", "script.py"]
        lines: list[tuple[int, str]] = []
        deadline = time.monotonic() + 60
        while (1, "here") not in lines:  # as if every answer were lost
            assert time.monotonic() < deadline, lines
            lines += (await node.start(arguments, {"GPUORCH_EXIT_TIMEOUT_SEC": "1"})).lines
        assert len(psutil.Process().children()) == 1
        await node.terminate()
        return await _to_the_end(node, await node.follow()), len(psutil.Process().children())

    progress, num_children = asyncio.run(run())
    assert progress.code == 75, progress
    assert num_children == 0


def _read(tmp_path: Path, printed: bytes) -> tuple[list[str], int]:
    async def read() -> Progress:
        node = RayNode("script.py", str(tmp_path))
        reader = asyncio.StreamReader()
        reader.feed_data(printed)
        reader.feed_eof()
        await node._read(1, reader)
        return node._take(None)

    progress = asyncio.run(read())
    return [line for _, line in progress.lines], progress.num_dropped


def test_lines_that_nobody_asks_for_are_dropped_oldest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_node, "_MAX_LINES", 3)
    assert _read(tmp_path, b"0\n1\n2\n3\n4") == (["2", "3", "4"], 2)


def test_a_line_without_an_end_is_passed_on_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_node, "_MAX_LINE_BYTES", 8)
    assert _read(tmp_path, b"\n" + b"x" * 20) == (["", "x" * 15, "x" * 5], 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--address", "auto"), "goes with --cluster ray"),
        (("--cluster", "ray", "--node-rank", "0"), "--node-rank is chosen by --cluster ray"),
        (("--cluster", "ray", "--main-port", "1"), "--main-port is chosen by --cluster ray"),
        (("--cluster", "ray", "--devices", "auto"), "give the number of devices of each node"),
        (("--cluster", "ray", "--devices", "0,1"), "give the number of devices of each node"),
        (("--cluster", "ray", "--devices", "0"), "give the number of devices of each node"),
        (("--cluster", "ray", "--strategy", "ddp"), "needs strategy gpuorch"),
    ],
)
def test_options_that_do_not_go_with_a_cluster_are_refused(
    options: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.touch()
    result = CliRunner().invoke(gpuorch, ["run", *options, str(script)])
    assert result.exit_code == 78, result.output
    assert words in result.output


def test_a_cluster_without_ray_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    script = tmp_path / "script.py"
    script.touch()
    result = CliRunner().invoke(gpuorch, ["run", "--cluster", "ray", str(script)])
    assert result.exit_code == 78, result.output
    assert "pip install 'lightning_gpuorch[ray]'" in result.output
