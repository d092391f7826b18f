from __future__ import annotations

from lightning_gpuorch.telemetry import StepRecord


def step_record(num_samples: int = 8, seconds: float = 0.1, step: int = 0, ended_seconds: float = 100.0) -> StepRecord:
    """A step that ended at a given time, and was all that its rank had to do."""
    ended_ns = round(ended_seconds * 1e9)
    began_ns = ended_ns - round(seconds * 1e9)
    return StepRecord(
        step=step, chunk=7, num_samples=num_samples, asked_ns=began_ns, delivered_ns=began_ns, began_ns=began_ns,
        computed_ns=ended_ns, ended_ns=ended_ns, free_ns=began_ns,
    )  # fmt: skip
