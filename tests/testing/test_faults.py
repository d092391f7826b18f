"""Fault plans print, and their print brings them back."""

import pytest

from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.testing.faults import Fault, FaultKind, FaultPlan, Moment, When
from tests.benchmarks import chaos_campaign


def test_a_plan_is_its_print():
    text = "kill@40%/rank1; gil-hang@commit 10%/rank0; exit0@end/rank1; stop@last/rank3; kill-supervisor@start/rank0"
    plan = FaultPlan.parse(text)
    assert str(plan) == text
    assert plan[0] == Fault(FaultKind.KILL, Moment(When.SHARE, 40), 1)
    assert FaultPlan.parse(" kill@ 40% / rank1;gil-hang @commit  10%/rank 0;") == FaultPlan(plan[:2])
    assert len(FaultPlan.parse("")) == 0


@pytest.mark.parametrize("seed", range(50))
def test_drawn_plans_come_back_and_fit_the_job(seed):
    plan = FaultPlan.draw(seed, 6, world_size=4, tensor_parallel_size=2)
    assert len(plan) == 6
    assert FaultPlan.parse(str(plan)) == plan == FaultPlan.draw(seed, 6, 4, 2)
    assert all(fault.rank in range(4) for fault in plan)
    assert all(fault.rank % 2 == 0 for fault in plan if fault.moment.when is When.COMMIT), "only leaders commit"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("kill", "kill' is no fault"),
        ("murder@40%/rank1", "'murder' is no kind of fault; expected one of kill, stop"),
        ("kill@noon/rank1", "'noon' is no moment; expected start"),
        ("kill@140%/rank1", "'140%' is no moment"),
        ("kill@40%/rankx", "is no"),
    ],
)
def test_what_is_no_plan_is_refused_with_what_would_be(text, problem):
    with pytest.raises(ConfigurationError, match=problem):
        FaultPlan.parse(f"stop@10%/rank0; {text}")


@pytest.mark.parametrize("setup", chaos_campaign.SETUPS)
def test_the_campaign_plans_every_cell_as_often_as_it_is_wanted(setup):
    import collections
    import random

    processes, tp = chaos_campaign.SETUPS[setup]
    cells = chaos_campaign.cells(processes, tp)
    assert len(cells) == (49 if processes == tp else 56)
    planned = collections.Counter()
    for chosen, plan in chaos_campaign.plans(processes, tp, 2 * cells, 6, random.Random(1)):
        planned.update(chosen)
        assert len(chosen) == len(plan) <= 6
        for cell, fault in zip(chosen, plan, strict=True):
            assert (fault.rank == 0) is not cell.other
            assert cell.moment == {"restart": "start"}.get(fault.moment.label, fault.moment.label)
    assert planned == dict.fromkeys(cells, 2)
