"""Callbacks that collect: a part and a warning, or the whole on request. Lightning's progress bar ends full."""

import pytest

from tests.conftest import gpuorch_run


def test_a_collecting_callback_sees_its_ranks_part_and_is_named_once(runner):
    finished = runner.run("collecting.py", launcher=gpuorch_run())
    ranks = finished.result["ranks"]
    assert sorted(value for result, _ in ranks for value in result) == [2.0 * n for n in range(23)]
    assert finished.result["bar"] == [6, 6]
    if all(seen for _, seen in ranks):  # else one rank has had everything
        assert finished.output.count("Collector collects in on_predict_batch_end") == 1
        assert 'strategy="gpuorch_replay_outputs"' in finished.output


@pytest.mark.parametrize(("loaders", "dynamic"), [(1, ()), (2, ()), (1, ("--dynamic",))])
def test_on_request_every_rank_collects_the_whole_in_dataset_order(runner, loaders, dynamic):
    finished = runner.run("collecting.py", "--replay", "--loaders", loaders, *dynamic, launcher=gpuorch_run())
    whole = [2.0 * n for length in (23, 27)[:loaders] for n in range(length)]
    batches = [[loader, batch] for loader, count in enumerate((6, 7)[:loaders]) for batch in range(count)]
    assert finished.result["ranks"] == [[whole, batches]] * 2
    assert "collects in on_predict_batch_end" not in finished.output


def test_on_request_also_what_an_earlier_run_has_computed_is_collected(runner, tmp_path):
    arguments = ("collecting.py", "--devices", 1, "--output", tmp_path / "out")
    first = runner.run(*arguments, launcher=gpuorch_run(1)).result
    again = runner.run(*arguments, "--replay", launcher=gpuorch_run(1)).result
    assert again["ranks"] == first["ranks"]
