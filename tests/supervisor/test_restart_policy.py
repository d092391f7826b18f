from lightning_gpuorch import FailureRecoveryManager
from lightning_gpuorch.supervisor.restart_policy import RULES, Action, FailureKind


def test_every_kind_of_failure_has_a_rule():
    assert set(RULES) == set(FailureKind)


def test_oom_is_retried_in_place_for_ever():
    manager = FailureRecoveryManager(max_restart_attempts=0)
    assert {manager.handle_gpu_oom(0).action for _ in range(50)} == {Action.RETRY_IN_PLACE}


def test_restart_until_the_budget_is_spent_then_retire():
    manager = FailureRecoveryManager(max_restart_attempts=2, tensor_parallel_size=2)
    actions = [manager.handle_communication_timeout(rank).action for rank in (2, 3, 2)]
    assert actions == [Action.RESTART_REPLICA, Action.RESTART_REPLICA, Action.RETIRE_REPLICA]
    assert manager.decide(FailureKind.RANK_DEATH, 0).action is Action.RESTART_REPLICA, "another replica's budget"


def test_progress_refills_the_budget():
    manager = FailureRecoveryManager(max_restart_attempts=1)
    for _ in range(20):
        assert manager.decide(FailureKind.RANK_DEATH, 0).action is Action.RESTART_REPLICA
        manager.record_progress(0)


def test_auto_restart_can_be_turned_off():
    manager = FailureRecoveryManager(enable_auto_restart=False)
    assert manager.decide(FailureKind.STUCK, 0).action is Action.RETIRE_REPLICA


def test_poison_does_not_cost_the_replica():
    manager = FailureRecoveryManager(max_restart_attempts=0)
    assert manager.decide(FailureKind.POISON, 0).action is Action.RESTART_REPLICA


def test_reset_forgets():
    manager = FailureRecoveryManager(max_restart_attempts=1)
    manager.decide(FailureKind.RANK_DEATH, 0)
    manager.reset()
    assert manager.decide(FailureKind.RANK_DEATH, 0).attempt == 1
    assert manager.counts[FailureKind.RANK_DEATH] == 1
