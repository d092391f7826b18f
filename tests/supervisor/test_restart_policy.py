import ast
from pathlib import Path

import pytest

import lightning_gpuorch
from lightning_gpuorch import FailureRecoveryManager
from lightning_gpuorch.control.error_record import ErrorRecord, note_failure
from lightning_gpuorch.errors import (
    CollectiveTimeoutError,
    ConfigurationError,
    MissingPredictionsError,
    StorageFullError,
    UnreadableStreamError,
)
from lightning_gpuorch.supervisor.restart_policy import RULES, Action, Evidence, FailureKind, classify


def test_every_kind_of_failure_has_a_rule():
    assert set(RULES) == set(FailureKind)


def _named(enum: str, *, in_rules: bool) -> set[str]:
    """Members of an enum that the package's code names, in the table of rules or anywhere else."""
    found = set()
    for path in Path(lightning_gpuorch.__file__).parent.rglob("*.py"):
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            is_table = isinstance(statement, ast.AnnAssign) and ast.unparse(statement.target) == "RULES"
            if is_table == in_rules:
                found |= {
                    node.attr
                    for node in ast.walk(statement)
                    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == enum
                }
    return found


def test_every_kind_of_failure_is_found_by_some_code():
    assert _named("FailureKind", in_rules=False) == set(FailureKind.__members__)


def test_every_action_of_the_rules_is_carried_out():
    decided = _named("Action", in_rules=True)
    # What is retried in place never comes to the supervisor. Letting a rank end takes nothing: it has ended.
    assert _named("Action", in_rules=False) == decided - {Action.RETRY_IN_PLACE.name, Action.END_RANK.name}
    assert decided == set(Action.__members__)


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


def _record(error: BaseException, **changed: object) -> ErrorRecord:
    """The record of an exception that was raised here."""
    try:
        raise error
    except BaseException as raised:  # noqa: BLE001 - also what ends a script
        return ErrorRecord(**{**vars(ErrorRecord.of(raised, raised.__traceback__, 1)), **changed})


IN_STEP = {"doing": "predict_step", "units": (4, 8)}


@pytest.mark.parametrize(
    ("evidence", "kind"),
    [
        # An exit code alone is no evidence.
        *[(Evidence(code, None, has_worked=True), FailureKind.RANK_DEATH) for code in (1, 9, 65, 74, 75, 78, -9)],
        (Evidence(0, None), FailureKind.EARLY_EXIT),
        # What a worker reports itself is.
        (Evidence(78, _record(ConfigurationError("no"))), FailureKind.CONFIGURATION),
        (Evidence(65, _record(MissingPredictionsError("3"))), FailureKind.MISSING_DATA),
        (Evidence(65, _record(UnreadableStreamError("3"))), FailureKind.MISSING_DATA),
        (Evidence(74, _record(StorageFullError("full"))), FailureKind.STORAGE),
        (
            Evidence(1, _record(CollectiveTimeoutError("rank 1 is late")), generation=1),
            FailureKind.COMMUNICATION_TIMEOUT,
        ),
        (Evidence(75, ErrorRecord(type="SystemExit", message="", exit_code=75)), FailureKind.STOP_REQUESTED),
        (Evidence(75, _record(SystemExit(75), exited_with=75), has_worked=True, generation=1), FailureKind.EXCEPTION),
        (Evidence(1, _record(ConfigurationError("no"))), FailureKind.DETERMINISTIC_EXCEPTION),
        # Exceptions of the script.
        (Evidence(1, _record(ValueError("label 17"))), FailureKind.DETERMINISTIC_EXCEPTION),
        (Evidence(1, _record(OSError("a callback cannot write")), in_batch=True), FailureKind.EXCEPTION),
        (Evidence(1, _record(ValueError("label 17")), generation=1), FailureKind.EXCEPTION),
        (Evidence(1, _record(ValueError("x"), **IN_STEP)), FailureKind.STEP_EXCEPTION),
        (Evidence(1, _record(ValueError("x"), **IN_STEP), has_worked=True), FailureKind.STEP_EXCEPTION),
        (Evidence(1, _record(ValueError("x"), **IN_STEP), is_repeated=True), FailureKind.DETERMINISTIC_EXCEPTION),
        (Evidence(1, _record(ValueError("x"), is_final=True), has_worked=True), FailureKind.DETERMINISTIC_EXCEPTION),
        (
            Evidence(1, _record(ValueError("x")), has_worked=True, has_open_jobs=False, has_closed_jobs=True),
            FailureKind.DETERMINISTIC_EXCEPTION,
        ),
        # Exceptions of the machine.
        (Evidence(1, _record(RuntimeError("CUDA error: an illegal memory access"))), FailureKind.ENVIRONMENT_EXCEPTION),
        (Evidence(1, _record(ConnectionResetError())), FailureKind.ENVIRONMENT_EXCEPTION),
        (Evidence(1, _record(OSError(5, "Input/output error"))), FailureKind.ENVIRONMENT_EXCEPTION),
        (Evidence(1, _record(FileNotFoundError(2, "labels.json"))), FailureKind.DETERMINISTIC_EXCEPTION),
    ],
)
def test_a_failure_is_classified_by_its_evidence(evidence, kind):
    assert classify(evidence) is kind


def test_the_record_names_the_exception_the_line_and_the_samples(tmp_path):
    def step():
        raise ValueError("prompt is too long\nby 12 tokens")

    try:
        step()
    except ValueError as error:
        note_failure(error, "predict_step", units=range(136, 140))
        ErrorRecord.of(error, error.__traceback__, 7).write(tmp_path / "record")
    record = ErrorRecord.read(tmp_path / "record")
    line = step.__code__.co_firstlineno + 1
    assert record.headline == f"ValueError: prompt is too long (predict_step of 136-139, test_restart_policy.py:{line})"
    assert record.signature == f"ValueError at test_restart_policy.py:{line}"
    assert "by 12 tokens" in record.traceback


def test_a_record_that_was_cut_off_is_none(tmp_path):
    (tmp_path / "record").write_text('{"type": "Val')
    assert ErrorRecord.read(tmp_path / "record") is None
    assert ErrorRecord.read(tmp_path / "nothing") is None
