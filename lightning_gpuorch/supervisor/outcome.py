"""How a job ends: exit code 0 if and only if every opened job is complete, by the part files themselves."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass

from lightning_gpuorch.control.coordinator import Coordinator
from lightning_gpuorch.errors import (
    EXIT_CONFIGURATION,
    EXIT_DATA_MISSING,
    EXIT_FAILURE,
    EXIT_RESUMABLE,
    EXIT_STORAGE,
    InputMismatchError,
    MissingPredictionsError,
    PredictionStorageError,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """The end of a job.

    Attributes:
        exit_code: Of the job.
        missing: What has no prediction, if anything is known to be missing.
        by_failure: Whether the first failure explains it.
        mismatch: Ranks have read different input, so that nothing is a result.
    """

    exit_code: int
    missing: MissingPredictionsError | None = None
    by_failure: bool = False
    mismatch: InputMismatchError | None = None


def decide_outcome(coordinator: Coordinator, exit_codes: Collection[int], stopped: bool) -> Outcome:
    """Judge a job of which every rank has ended, or was given up.

    Args:
        coordinator: Knows the opened jobs and the retired replicas.
        exit_codes: Of all ranks; a retired rank counts as failed.
        stopped: Whether the end was requested.
    """
    codes = set(exit_codes)
    # Why the others were asked to stop counts, not that they were.
    cause = next((code for code in (EXIT_CONFIGURATION, EXIT_STORAGE) if code in codes), None)
    try:
        coordinator.verify()
    except InputMismatchError as error:
        return Outcome(error.exit_code, by_failure=True, mismatch=error)
    except PredictionStorageError as error:  # nothing can be said of parts that cannot be listed
        log.error("%s", error)
        return Outcome(error.exit_code, by_failure=True)
    except MissingPredictionsError as error:
        if cause is not None:
            return Outcome(cause, error, by_failure=True)
        if stopped or EXIT_RESUMABLE in codes:
            return Outcome(EXIT_RESUMABLE, error)
        code = EXIT_DATA_MISSING if codes <= {0, EXIT_DATA_MISSING} else EXIT_FAILURE
        return Outcome(code, error, by_failure=True)
    whole = coordinator.gang or coordinator.needs_every_replica  # a stage that a retired replica leaves incomplete
    others_finished = bool(coordinator.jobs and coordinator.retired) and 0 in codes and codes <= {0, EXIT_FAILURE}
    if coordinator.jobs and codes <= {0, EXIT_DATA_MISSING}:
        return Outcome(0)  # what one rank could not read, another one has
    if codes <= {0} or (others_finished and not whole):
        return Outcome(0)
    if cause is not None:
        return Outcome(cause, by_failure=True)
    if stopped:
        return Outcome(EXIT_RESUMABLE)
    return Outcome(max(codes - {0}), by_failure=True)
