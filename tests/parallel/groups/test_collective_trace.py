"""What a step still has to communicate, foretold from other steps."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from lightning_gpuorch.parallel.groups import collective_trace
from lightning_gpuorch.parallel.groups.collective_trace import StepTraces, _extrapolate
from lightning_gpuorch.parallel.groups.recoverable_group import live_groups, register_backends
from tests.support.examples import examples

WIDTH = 6


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    register_backends()
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gpuorch_gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def issue(inputs, how="regular"):
    """The collectives of a step: one of constant size, one of the input's size, one by tokens."""
    batch, length = inputs["ids"].shape
    dist.all_reduce(torch.ones(4))
    dist.all_reduce(torch.ones(batch, length, WIDTH))
    if how == "more":
        dist.all_reduce(torch.ones(1, dtype=torch.int32))
    mine = torch.ones(batch * length, WIDTH, dtype=torch.float64)
    dist.all_gather([torch.empty_like(mine)], mine)


def inputs_of(batch, length):
    return {"ids": torch.zeros(batch, length, dtype=torch.int64), "texts": ["a"] * batch}


def learn(traces, sizes, how="regular"):
    for size in sizes:
        inputs = inputs_of(*size)
        traces.begin(inputs)
        issue(inputs, how)
        traces.end(completed=True)


def fail_after(traces, size, num_collectives):
    traces.begin(inputs_of(*size))
    for _ in range(num_collectives):
        dist.all_reduce(torch.ones(4))
    traces.end(completed=False)
    return traces.rest()


def shapes_of(rest):
    """What a rest really issues."""
    seen = []
    (one,) = live_groups()
    hook = lambda group, method, args, kwargs: seen.append(  # noqa: E731
        (method, [tuple(t.shape) for t in _tensors(args)], {t.dtype for t in _tensors(args)})
    )
    collective_trace.issue_hooks.append(hook)
    try:
        rest.issue(5.0)
    finally:
        collective_trace.issue_hooks.remove(hook)
    assert one.aborted is None
    return seen


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, (list, tuple)) else []


def test_what_is_left_of_a_known_step(group):
    traces = StepTraces()
    learn(traces, [(2, 3), (2, 3)])
    rest = fail_after(traces, (2, 3), 1)
    assert len(rest) == 2
    first, second = shapes_of(rest)
    assert first == ("allreduce", [(2, 3, WIDTH)], {torch.float32})
    assert second[1:] == ([(6, WIDTH), (6, WIDTH)], {torch.float64})
    assert len(fail_after(traces, (2, 3), 3)) == 0
    assert fail_after(traces, (2, 3), 4) is None, "it has issued more than the step we know"


def test_sizes_never_seen_are_foretold(group):
    traces = StepTraces()
    learn(traces, [(2, 3), (5, 3), (2, 7), (5, 11)])
    shapes = [shapes for _, shapes, _ in shapes_of(fail_after(traces, (3, 32), 0))]
    assert shapes == [[(4,)], [(3, 32, WIDTH)], [(96, WIDTH), (96, WIDTH)]]


def test_nothing_is_foretold_from_too_little(group):
    traces = StepTraces()
    assert fail_after(traces, (2, 3), 0) is None
    learn(traces, [(2, 3)])
    assert fail_after(traces, (2, 3), 0) is None, "seen once: it may depend on the data"
    learn(traces, [(2, 3)])
    assert fail_after(traces, (2, 5), 0) is None, "is 3 the length or a constant?"
    learn(traces, [(2, 4)])
    assert fail_after(traces, (2, 5), 0) is not None


def test_a_first_step_that_does_more_is_forgotten(group):
    traces = StepTraces()
    learn(traces, [(2, 3)], "more")
    learn(traces, [(2, 3), (2, 3)])
    assert len(fail_after(traces, (2, 3), 0)) == 3


def test_steps_that_depend_on_the_data_are_never_foretold(group):
    traces = StepTraces()
    for _ in range(3):
        learn(traces, [(2, 3), (2, 3)])
        learn(traces, [(2, 3), (2, 3)], "more")
    assert fail_after(traces, (2, 3), 0) is None


def test_what_proved_wrong_is_not_used_again(group):
    traces = StepTraces()
    learn(traces, [(2, 3), (2, 3)])
    assert fail_after(traces, (2, 3), 0) is not None
    traces.distrust()
    learn(traces, [(2, 3), (2, 3)])
    assert fail_after(traces, (2, 3), 0) is None


def test_a_collective_that_failed_at_once_leaves_the_rest_unknown(group):
    traces = StepTraces()
    learn(traces, [(2, 3), (2, 3)])
    traces.begin(inputs_of(2, 3))
    with pytest.raises((RuntimeError, ValueError)):
        live_groups()[0].allreduce([torch.ones(2), torch.ones(2, dtype=torch.int64)])
    traces.end(completed=False)
    assert traces.rest() is None


def test_nothing_stays_hooked_and_nothing_is_recorded_for_ever(group):
    traces = StepTraces()
    learn(traces, [(2, 3)] * 40)
    assert not collective_trace.issue_hooks
    traces.begin(inputs_of(2, 3))
    assert not collective_trace.issue_hooks, "it has been learnt"
    traces.end(completed=True)


laws = st.one_of(
    st.builds(lambda c: lambda x: c, st.integers(0, 50)),
    st.builds(lambda i, k: lambda x: k * x[i], st.integers(0, 2), st.integers(1, 8)),
    st.builds(lambda i, c: lambda x: x[i] + c, st.integers(0, 2), st.integers(0, 3)),
    st.builds(lambda i, j, k: lambda x: k * x[i] * x[j], st.integers(0, 2), st.integers(0, 2), st.integers(1, 4)),
)
lengths = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))


@examples(500)
@given(laws, st.lists(lengths, min_size=1, max_size=8, unique=True), lengths)
def test_a_size_that_follows_a_law_is_foretold_right_or_not_at_all(law, seen, new):
    assert _extrapolate(seen, [law(x) for x in seen], new) in (None, law(new))


@examples(200)
@given(laws)
def test_a_size_that_follows_a_law_is_foretold_from_a_few_different_inputs(law):
    seen = [(3, 5, 7), (4, 11, 2), (9, 5, 13), (1, 2, 31), (6, 23, 8)]
    assert _extrapolate(seen, [law(x) for x in seen], (8, 17, 19)) == law((8, 17, 19))
