"""What can be configured, where each value comes from, and what is checked before anything starts.

A field is taken from the argument if one was given, else from the environment variable ``GPUORCH_<FIELD>``, else from
its default. The environment is read here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.paths import local_path

ENVIRONMENT_PREFIX = "GPUORCH_"

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


@dataclass(frozen=True, kw_only=True)
class OrchestratorConfig:
    """Settings of an orchestrated job. Immutable; see :meth:`resolve` for the precedence of sources."""

    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Data-plane backend of a tensor-parallel group; ``auto`` takes nccl on CUDA and gloo elsewhere."""
    timeout_sec: float = 30.0
    """Longest wait for one data-plane collective, and for the coordinator to answer one request."""
    collective_timeout_sec: float = 1800.0
    """Longest wait for all ranks to arrive at a job-wide collective of the control plane."""
    memory_fraction: float = 0.9
    """Share of a device's memory that the job may use."""
    health_check_interval_sec: float = 5.0
    """Time between two readings of the devices."""
    heartbeat_timeout_sec: float = 10.0
    """A rank whose heartbeat is older than this, once it is past its first step, counts as stuck."""
    start_timeout_sec: float = 900.0
    """Longest time from process start to the first completed step."""
    step_timeout_sec: float = 60.0
    """Smallest progress limit of a step; the limit in force is the larger of this and 10 x the slowest recent step."""
    commit_timeout_sec: float = 300.0
    """Longest time the disk may take for one part of the results, or make the loop wait."""
    exit_timeout_sec: float = 60.0
    """Longest time a worker may take to leave after its work is done, or to drain after SIGTERM."""
    enable_auto_restart: bool = True
    """Restart a replica whose rank died or got stuck."""
    enable_group_recovery: bool = True
    """Repair faults inside of a tensor-parallel group in place; otherwise they restart the replica."""
    enable_warm_start: bool = True
    """Fork workers from a process that has imported torch and Lightning already."""
    enable_preflight: bool = True
    """Check each GPU, in a process of its own, before a generation is started on it."""
    preflight_timeout_sec: float = 120.0
    """A GPU whose check has not answered by then is not used; the check imports torch first."""
    spare_devices: int = 0
    """GPUs of each node to hold back for replicas whose own GPU fails."""
    allow_tensor_parallel_shrink: bool = False
    """When the last replica has lost devices and there are no spares, let it go on with those it has left."""
    lease_term_sec: float = 30.0
    """A node that is silent for so long loses the chunks it holds to others; it may come back."""
    node_timeout_sec: float = 300.0
    """A node that is silent for so long is given up, and gives up itself."""
    preemption_notice: str = ""
    """Where it is told that this machine will be taken away, which takes its node out of the job as SIGTERM does: the path
    of a file that appears then, or ``aws``, ``gcp`` or ``azure`` for the cloud's metadata service."""
    late_node_output_dir: str = ""
    """The job's output directory. A node other than 0 that has found no coordinator for ``start_timeout_sec`` looks there
    whether the job has ended: it ends with 0 if all predictions are there."""
    token: str = ""
    """Secret that the nodes of a job share; one node alone makes its own."""
    allow_insecure: bool = False
    """Let a job of several nodes run without a token: any host that reaches its port can then take part."""
    tls_certificate: str = ""
    """Certificate of this node (PEM, with its chain). With ``tls_key`` and ``tls_ca`` the control plane is encrypted
    wherever it is a port: all processes of the job need the three, and show each other certificates of that authority."""
    tls_key: str = ""
    """Private key of ``tls_certificate`` (PEM, not encrypted)."""
    tls_ca: str = ""
    """Certificates (PEM) of the authority that has signed those of all nodes."""
    max_restart_attempts: int = 3
    """Restarts of one replica without progress before it is retired."""
    max_chunk_failures: int = 3
    """Deaths of workers in the same sample before it is given up, at least two of them while it was computed alone."""
    on_error: Literal["isolate", "record", "raise"] = "isolate"
    """What to do about a sample that raises when it is read, collated or computed: ``isolate`` gives it up, names it, and
    completes all others (exit code 65); ``record`` stores its error (type, message) in place of a prediction, so that the
    job is complete (exit code 0), and a rerun does not try it again; ``raise`` ends the job at once with the exception.
    Samples in which workers die are given up in any case, and end the job with 65."""
    max_errored_samples: int | None = None
    """Samples of the job that may be given up; one more ends the job. ``None`` sets no bound, but a job of which nothing at
    all can be read, or computed, ends at once in any case."""
    enable_oom_halving: bool = True
    """Compute a batch that does not fit into memory in parts; a sample that does not fit alone is given up and named."""
    batch_size: int = 32
    """Samples per batch of a map-style dataset that :meth:`~lightning_gpuorch.MultiGPUOrchestrator.predict` gets without a
    DataLoader."""
    enable_dynamic_batching: bool = False
    """Form batches of similar length by a token budget and by what memory allows, instead of a fixed count."""
    max_batch_tokens: int | Literal["auto"] = "auto"
    """Padded tokens of a dynamic batch; ``auto`` takes 1,024 on the CPU and what fits into memory on a GPU."""
    tensor_parallel_size: int | Literal["auto"] = "auto"
    """Ranks that share one copy of the model; ``auto`` takes the fewest at which its weights, and headroom for
    activations, fit the memory budget of every device."""
    verify: Literal["first_batch", "off"] = "first_batch"
    """On the first batch, compare one block of a sharded model, with its real weights, to its unsharded self."""
    plan_cache: str = "auto"
    """Directory in which tensor-parallel plans are kept between runs; ``auto`` takes one in the user's cache directory,
    ``off`` plans again each time."""
    data_parallel_size: int | Literal["auto"] = "auto"
    """Replicas; ``auto`` takes all devices divided by the tensor-parallel size."""
    storage_options: Mapping[str, str] | None = dataclasses.field(default=None, repr=False)
    """Options of the client of an object store in which predictions are kept: ``endpoint``, ``region``, ``timeout``, keys and
    so on. What is not given comes from the store's usual environment (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, ...). As
    an environment variable, a JSON object."""
    chunk_size: int | Literal["auto"] = "auto"
    """Batches per chunk, the unit that is leased, computed and made durable as one part file. ``auto`` begins with 32 at
    most, and lets them grow in long jobs, until a part has ``part_bytes`` or takes ``part_sec``."""
    part_bytes: int = 64 * 2**20
    """Bytes that a part file is to have at most, about, where ``chunk_size`` is ``auto``. With dynamic batching the inputs
    of a chunk count as well."""
    part_sec: float = 30.0
    """Time that a part file is to take at most, about, where ``chunk_size`` is ``auto``. A death costs less: what is
    computed of a part that is not whole is kept every few seconds."""
    resume_check: Literal["headers", "sampled", "all"] = "sampled"
    """What is read of existing parts before a job goes on. ``headers``: the header and length of each, which finds what is
    cut short. ``sampled``: 64 parts, other ones each time, in addition as a whole, against their checksums; if one part in
    20 is damaged, this finds one with 96%. ``all``: every byte. Damage that is not found then is found when predictions are
    read, or by ``gpuorch predictions verify``, which reads everything."""
    sharding: Literal["auto", "off"] = "auto"
    """How streams are shared out: ``auto`` gives each replica shards of its own to read, where the stream's shards are known;
    ``off`` lets each replica read the whole of it, and compute the chunks that it leases."""
    keep_outputs: bool | Literal["auto"] = "auto"
    """Store what ``predict_step`` returns. Otherwise a marker takes its place: that a batch is done is durable, its output is
    left to callbacks, and may be of any type. ``auto`` keeps outputs, unless the Trainer was called with
    ``return_predictions=False`` and there is no ``output_dir``."""
    output_format: Literal["gpq", "parquet"] = "gpq"
    """Format of part files. ``parquet`` makes files that other tools read while the job runs, with a row per sample and
    columns by the structure of the predictions, which have to have an entry per sample. ``gpq`` takes any prediction."""
    keep_columns: Sequence[str] | None = None
    """Names of entries of the batches, which have to be dicts, that Parquet parts carry along as columns: ``["id", "url"]``.
    As an environment variable, separated by commas."""
    key_column: str = ""
    """A column that is kept and whose values have to be unique; those that are not are named."""
    max_pending_bytes: int = 256 * 2**20
    """Predictions that may wait for the disk before the loop has to."""
    model_fingerprint: str = "auto"
    """Identity of the weights: ``auto`` samples them, ``off`` skips the check, any other text is taken as it is."""
    metrics_address: str = "127.0.0.1"
    """Interface on which metrics are served; ``0.0.0.0`` lets a Prometheus on another host, or outside of a container, read
    them."""
    metrics_port: int = 9400
    """Port of the node's Prometheus endpoint; 0 takes a free one."""
    baseline_file: str = ""
    """Throughput of one device, as ``gpuorch calibrate`` has measured it, for ``distributed_scaling_efficiency_percent``."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"
    """Level of the plugin's own log."""
    enable_profiling: bool = False
    """Record a bounded PyTorch profile on each rank: some steps after the first ones, and again at each ``SIGUSR2``."""
    trace_every_steps: int = 100
    """One step in so many is traced, where OpenTelemetry is installed; a step in which something went wrong always is."""
    trace_endpoint: str = ""
    """Where traces go: the URL of an OTLP/HTTP collector (``http://host:4318/v1/traces``), ``file`` for files beside the
    run's records, or empty for what the application itself has set up with OpenTelemetry, if anything."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigurationError: A value has the wrong type or lies outside its range.
        """
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not _accepts(hints[field.name], value):
                shown = "" if field.name == "storage_options" else f"={value!r}"  # it may hold keys
                raise ConfigurationError(
                    f"{field.name}{shown} is a {type(value).__name__}; expected {_describe(hints[field.name])}."
                )
            check = _RANGES.get(field.name)
            if check is not None and not isinstance(value, str) and not check[0](value):
                raise ConfigurationError(f"{field.name}={value!r} is out of range: it must be {check[1]}.")
        for name, other_words in _PATHS.items():
            if getattr(self, name) not in other_words:
                local_path(getattr(self, name), name)
        tls = {name: getattr(self, name) for name in ("tls_certificate", "tls_key", "tls_ca")}
        lacking = [name for name, value in tls.items() if not value]
        if 0 < len(lacking) < len(tls):
            raise ConfigurationError(f"{' and '.join(lacking)} must be set as well: TLS needs {', '.join(tls)}.")

    @classmethod
    def resolve(cls, config: OrchestratorConfig | None = None, /, **overrides: Any) -> OrchestratorConfig:
        """Combine arguments, environment and defaults.

        Args:
            config: A ready configuration; fields that differ from their default count as given arguments.
            **overrides: Single fields; they beat ``config``.

        Returns:
            The configuration in force.

        Raises:
            ConfigurationError: An unknown field or environment variable, a wrong type or a value out of range.
        """
        names = {field.name: field for field in dataclasses.fields(cls)}
        for name in overrides:
            if name not in names:
                raise ConfigurationError(f"unknown configuration field {name!r}{nearest(name, names)}.")
        values = _read_environment(os.environ, cls)
        if config is not None:
            if not isinstance(config, OrchestratorConfig):
                raise ConfigurationError(
                    f"config={config!r} is a {type(config).__name__}; expected OrchestratorConfig."
                )
            for name, field in names.items():
                if getattr(config, name) != field.default:
                    values[name] = getattr(config, name)
        values.update(overrides)
        return cls(**values)


def storage_options_in_force(given: Mapping[str, str] | None) -> Mapping[str, str]:
    """Options of an object store where there is no configuration: what was given, else the environment's.

    Raises:
        ConfigurationError: They are not text by text, or a variable of the environment is wrong.
    """
    overrides = {} if given is None else {"storage_options": given}
    return OrchestratorConfig.resolve(**overrides).storage_options or {}


_positive = (lambda v: v > 0, "greater than 0")
_at_least_one = (lambda v: v >= 1, "1 or more")
_not_negative = (lambda v: v >= 0, "0 or more")

_PATHS = {
    "plan_cache": ("auto", "off"),
    "baseline_file": ("",),
    **dict.fromkeys(("tls_certificate", "tls_key", "tls_ca"), ("",)),
}
"""Fields that are paths, and what else they may be."""

_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "timeout_sec": _positive,
    "collective_timeout_sec": _positive,
    "memory_fraction": (lambda v: 0 < v <= 1, "greater than 0 and at most 1"),
    "health_check_interval_sec": _positive,
    "heartbeat_timeout_sec": _positive,
    "start_timeout_sec": _positive,
    "step_timeout_sec": _positive,
    "commit_timeout_sec": _positive,
    "exit_timeout_sec": _positive,
    "preflight_timeout_sec": _positive,
    "spare_devices": _not_negative,
    "lease_term_sec": _positive,
    "node_timeout_sec": _positive,
    "max_restart_attempts": _not_negative,
    "max_chunk_failures": _at_least_one,
    "max_errored_samples": (lambda v: v is None or v >= 0, "0 or more, or None"),
    "batch_size": _at_least_one,
    "max_batch_tokens": _at_least_one,
    "tensor_parallel_size": _at_least_one,
    "data_parallel_size": _at_least_one,
    "chunk_size": _at_least_one,
    "part_bytes": _at_least_one,
    "part_sec": _positive,
    "max_pending_bytes": _at_least_one,
    "trace_every_steps": _at_least_one,
    "metrics_port": (lambda v: 0 <= v <= 65535, "between 0 and 65535"),
}


def _read_environment(environment: Mapping[str, str], cls: type[OrchestratorConfig]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    variables = {ENVIRONMENT_PREFIX + name.upper(): name for name in hints}
    values = {}
    for variable, text in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        if variable not in variables:
            raise ConfigurationError(
                f"unknown environment variable {variable}={text!r}{nearest(variable, variables)}; "
                f"{ENVIRONMENT_PREFIX}* names are reserved for the fields of OrchestratorConfig."
            )
        name = variables[variable]
        values[name] = _parse(hints[name], text, variable)
    return values


def _parse(hint: Any, text: str, variable: str) -> Any:
    for kind in typing.get_args(hint) if _is_union(hint) else (hint,):
        if typing.get_origin(kind) is Literal:
            matches = [choice for choice in typing.get_args(kind) if str(choice).lower() == text.strip().lower()]
            if matches:
                return matches[0]
        elif kind is type(None):
            if text.strip().lower() in ("", "none"):
                return None
        elif _is_mapping(kind):
            try:
                value = json.loads(text)
            except ValueError:
                continue
            if _accepts(kind, value):
                return value
        elif _is_sequence(kind):
            return [name.strip() for name in text.split(",") if name.strip()]
        elif kind is bool:
            if text.strip().lower() in _TRUE | _FALSE:
                return text.strip().lower() in _TRUE
        elif kind is str:
            return text
        elif kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
    shown = "" if "STORAGE_OPTIONS" in variable else f"={text!r}"  # it may hold keys
    raise ConfigurationError(f"environment variable {variable}{shown} cannot be read as {_describe(hint)}.")


def _is_mapping(hint: Any) -> bool:
    return typing.get_origin(hint) is Mapping


def _is_sequence(hint: Any) -> bool:
    return typing.get_origin(hint) is Sequence


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Union or type(hint).__name__ == "UnionType"


def _accepts(hint: Any, value: Any) -> bool:
    if _is_union(hint):
        return any(_accepts(kind, value) for kind in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return isinstance(value, str) and value in typing.get_args(hint)
    if _is_mapping(hint):
        return isinstance(value, Mapping) and all(
            isinstance(name, str) and isinstance(item, (str, int, float)) for name, item in value.items()
        )
    if _is_sequence(hint):
        return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    if _is_union(hint):
        return " or ".join(_describe(kind) for kind in typing.get_args(hint))
    if _is_mapping(hint):
        return "an object of names and texts"
    if _is_sequence(hint):
        return "a list of names"
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(hint))
    return {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "None"}[hint]


def nearest(name: str, known: Collection[str]) -> str:
    """What an unknown name may have meant, as the end of an error message."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
