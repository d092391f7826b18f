"""The fields of :class:`~lightning_gpuorch.OrchestratorConfig` as keyword arguments, for editors and type checkers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from typing_extensions import TypedDict

from lightning_gpuorch.config import nearest
from lightning_gpuorch.errors import ConfigurationError


class OrchestratorOptions(TypedDict, total=False):
    """Fields of :class:`~lightning_gpuorch.OrchestratorConfig`, which says what they mean and checks them."""

    backend: Literal["auto", "nccl", "gloo"]
    timeout_sec: float
    collective_timeout_sec: float
    memory_fraction: float
    health_check_interval_sec: float
    heartbeat_timeout_sec: float
    start_timeout_sec: float
    step_timeout_sec: float
    commit_timeout_sec: float
    exit_timeout_sec: float
    enable_auto_restart: bool
    enable_group_recovery: bool
    enable_warm_start: bool
    enable_preflight: bool
    preflight_timeout_sec: float
    spare_devices: int
    allow_tensor_parallel_shrink: bool
    lease_term_sec: float
    node_timeout_sec: float
    preemption_notice: str
    late_node_output_dir: str
    token: str
    allow_insecure: bool
    tls_certificate: str
    tls_key: str
    tls_ca: str
    max_restart_attempts: int
    max_chunk_failures: int
    on_error: Literal["isolate", "record", "raise"]
    max_errored_samples: int | None
    enable_oom_halving: bool
    batch_size: int
    enable_dynamic_batching: bool
    max_batch_tokens: int | Literal["auto"]
    tensor_parallel_size: int | Literal["auto"]
    verify: Literal["first_batch", "off"]
    plan_cache: str
    data_parallel_size: int | Literal["auto"]
    storage_options: Mapping[str, str] | None
    chunk_size: int | Literal["auto"]
    part_bytes: int
    part_sec: float
    resume_check: Literal["headers", "sampled", "all"]
    sharding: Literal["auto", "off"]
    keep_outputs: bool | Literal["auto"]
    output_format: Literal["gpq", "parquet"]
    keep_columns: Sequence[str] | None
    key_column: str
    max_pending_bytes: int
    model_fingerprint: str
    metrics_address: str
    metrics_port: int
    baseline_file: str
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
    enable_profiling: bool
    trace_every_steps: int
    trace_endpoint: str


def refuse_unknown(options: OrchestratorOptions, taken_by: Callable[..., Any]) -> None:
    """Refuse options that are no fields of the configuration.

    Args:
        options: As they were given.
        taken_by: What they were given to, besides arguments of its own.

    Raises:
        ConfigurationError: There is one; the nearest name of a field or an argument is named.
    """
    own = [name for name, p in inspect.signature(taken_by).parameters.items() if p.kind is not p.VAR_KEYWORD]
    known = [*OrchestratorOptions.__annotations__, *own]
    for name in options:
        if name not in known:
            raise ConfigurationError(f"unknown argument {name!r}{nearest(name, known)}.")
