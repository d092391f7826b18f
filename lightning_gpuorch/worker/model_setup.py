"""A model gets ready on a rank: one rank decides how many ranks share it and how it is cut; all do the same.

1. The smallest memory budget of all ranks counts.
2. Rank 0 finds the tensor-parallel size, if it is open, and a verified plan; the control plane tells the others. A
   restarted rank is told the same.
3. Each rank keeps its part; if the parameters are on meta, it reads that part, and nothing else, from a checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_gpuorch.devices.memory import ACTIVATION_HEADROOM, check_model_fits, memory_budget_bytes, model_bytes
from lightning_gpuorch.errors import ConfigurationError, GPUOrchError, ModelDoesNotFitError, TensorParallelError
from lightning_gpuorch.parallel.tensor_parallel import (
    Checkpoint,
    Communicator,
    LoadReport,
    PlanCache,
    TensorParallelPlan,
    applied_plan,
    apply_plan,
    check_first_batch,
    check_outputs_agree,
    load_sharded,
    open_checkpoint,
    plan_tensor_parallel,
    smallest_tensor_parallel_size,
    verify_plan,
)
from lightning_gpuorch.parallel.tensor_parallel.example_input import BatchSource, Calls, planned_calls
from lightning_gpuorch.parallel.tensor_parallel.isolation import CommunicatesError, NoCollectives
from lightning_gpuorch.parallel.tensor_parallel.plan import format_bytes
from lightning_gpuorch.parallel.tensor_parallel.reference_run import ExampleError
from lightning_gpuorch.paths import local_path
from lightning_gpuorch.predictions.loading.describe import describe
from lightning_gpuorch.predictions.samples.tensors import fingerprint_files, fingerprint_tensors, fingerprint_weights
from lightning_gpuorch.worker.random_state import keep_random_state
from lightning_gpuorch.worker.runtime import Runtime

log = logging.getLogger(__name__)

ParallelizeFn = Callable[[nn.Module, Any], nn.Module]

_cut_from: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
"""Identity of the whole weights of models that hold only a part of them, or were read by part."""

LOAD_REPORT_SECONDS = 10.0
"""How often a log line tells how far loading is, where there is no terminal for a progress bar."""


@dataclasses.dataclass(frozen=True)
class _Decision:
    """What rank 0 found.

    Attributes:
        tensor_parallel_size: Ranks that share the model.
        plan: How it is cut, as JSON; None if it stays whole or ``parallelize_fn`` cuts it.
        lines: The arithmetic, for the log.
        details: The plan in words, for a closer look.
        warning: What the user should know.
    """

    tensor_parallel_size: int
    plan: str | None = None
    lines: tuple[str, ...] = ()
    details: str = ""
    warning: str = ""


class ModelSetup:
    """Prepares models for one runtime.

    Args:
        runtime: The rank's connection to its job.
        parallelize_fn: Called as ``parallelize_fn(module, device_mesh)`` instead of planning.
        plan: A ready plan, instead of planning; it is verified.
        example_input: What models are called with: a tensor, a tuple of arguments or a mapping of keywords.
    """

    def __init__(
        self,
        runtime: Runtime,
        parallelize_fn: ParallelizeFn | None = None,
        plan: TensorParallelPlan | Mapping[str, Any] | None = None,
        example_input: Any = None,
    ):
        if parallelize_fn is not None and plan is not None:
            raise ConfigurationError("pass parallelize_fn or tensor_parallel_plan, not both.")
        if parallelize_fn is not None and not callable(parallelize_fn):
            raise ConfigurationError(f"parallelize_fn={parallelize_fn!r} is not callable.")
        if isinstance(plan, Mapping):
            plan = TensorParallelPlan.from_dict(plan)
        if plan is not None and not isinstance(plan, TensorParallelPlan):
            raise ConfigurationError(
                f"tensor_parallel_plan={plan!r} is a {type(plan).__name__}; expected a TensorParallelPlan or its dict."
            )
        self.runtime, self.parallelize_fn, self.plan, self.example_input = runtime, parallelize_fn, plan, example_input
        self._ready: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.load_report: LoadReport | None = None
        """What the last :meth:`load` did on this rank: bytes read, seconds, missing and unexpected names."""

    def __getstate__(self) -> dict[str, Any]:
        """A pickled model is another one, and not ready."""
        return {name: value for name, value in vars(self).items() if name != "_ready"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin with no model that is ready."""
        vars(self).update(state, _ready=weakref.WeakSet())

    def is_ready(self, model: nn.Module) -> bool:
        """Whether :meth:`prepare` returned this model, or its user has sharded it."""
        return model in self._ready or applied_plan(model) is not None or _has_dtensors(model)

    def fingerprint(self, model: nn.Module) -> str | None:
        """Identity of the model's weights as a whole, the same at every tensor-parallel size; None if not known."""
        setting = self.runtime.config.model_fingerprint
        if setting != "auto":
            return None if setting == "off" else setting
        applied = applied_plan(model)
        whole = applied is None or (applied[0].tensor_parallel_size == 1 and model not in _cut_from)
        whole = whole and not _has_dtensors(model) and not has_meta(model)
        return fingerprint_weights(model) if whole else _cut_from.get(model)

    def weights_change(self, *models: nn.Module) -> None:
        """Where their weights were read from no longer tells which they are.

        Args:
            *models: Models that are trained from here on; all that were prepared, if none are given.
        """
        for model in models or tuple(self._ready):
            _cut_from.pop(model, None)

    # Sharding

    def prepare(
        self, model: nn.Module, batches: BatchSource | None = None, step: str | Callable[..., Any] = ""
    ) -> nn.Module:
        """Decide how many ranks share a model if that is open, and keep this rank's part; every rank must call this.

        Args:
            model: The whole model, on the CPU or its parameters on meta; changed in place, except by ``parallelize_fn``.
            batches: Gives the first batch of every dataloader.
            step: What is called with a batch, ``predict_step`` or a function; empty if it is the model itself.

        Returns:
            The model of this rank, on the device it was on. A model that is prepared already is returned as it is.

        Raises:
            ModelDoesNotFitError: It is larger than the memory budget; the message has the arithmetic.
            TensorParallelError: It has to be cut, and there is no verified plan.
        """
        if self.is_ready(model):
            return model
        identity = self.fingerprint(model)
        self.runtime.note_model(model)
        decision = self._decide(model, functools.partial(planned_calls, model, self.example_input, batches, step))
        topology = self.runtime.settle(decision.tensor_parallel_size)
        if topology.rank == 0:
            for line in decision.lines:
                log.info("%s", line)
            log.debug("%s", decision.details)
            if decision.warning:
                log.warning("%s", decision.warning)
        prepared = model
        if decision.plan is not None:
            self._apply(model, TensorParallelPlan.from_dict(json.loads(decision.plan)))
        elif topology.tensor_parallel_size > 1 and self.parallelize_fn is not None:
            prepared = self.parallelize_fn(model, self.runtime.mesh)
            if not isinstance(prepared, nn.Module):
                raise ConfigurationError(
                    f"parallelize_fn returned a {type(prepared).__name__}; it must return the parallelized module."
                )
        for one in (model, prepared):
            if identity is not None:
                _cut_from[one] = identity
            self._ready.add(one)
        return prepared

    def _decide(self, model: nn.Module, calls: Callable[[], list[Calls]]) -> _Decision:
        world = self.runtime.world
        budget = memory_budget_bytes(self.runtime.device, self.runtime.config.memory_fraction)
        topology = world.topology
        if world.settled and topology.ranks_per_replica == 1:
            check_model_fits(model, budget)
            return _Decision(1)
        budget = min(world.collectives.all_gather_object(budget))
        outcome: _Decision | GPUOrchError | None = None
        if topology.rank == 0 or topology.shrunk:
            try:
                with torch.compiler.set_stance("force_eager"):  # what the user has compiled is planned uncompiled
                    outcome = self._choose(model, calls, budget)
            except GPUOrchError as error:
                outcome = error
        # What was decided for the whole group no longer fits a replica that has shrunk, so each of its ranks decides, and
        # all decide the same; the collective is called all the same, as every life of a rank calls them in one order.
        decided = world.collectives.broadcast_object(outcome)
        outcome = outcome if topology.shrunk else decided
        if isinstance(outcome, GPUOrchError):
            raise outcome
        assert outcome is not None
        return outcome

    def _choose(self, model: nn.Module, calls: Callable[[], list[Calls]], budget_bytes: int) -> _Decision:
        """Rank 0's part: the size, and a plan that is verified and fits."""
        world = self.runtime.world
        is_open = not world.settled
        sizes = world.candidate_sizes if is_open else (world.topology.tensor_parallel_size,)
        usable = int(budget_bytes * (1 - ACTIVATION_HEADROOM))
        total = model_bytes(model).total
        named = type(model).__name__
        arithmetic = (
            f"{named}: {format_bytes(total)} of weights and buffers; a device may give {format_bytes(budget_bytes)}, less "
            f"{ACTIVATION_HEADROOM:.0%} for activations = {format_bytes(usable)}"
        )
        if is_open and self.plan is None and total <= usable:
            return _Decision(1, lines=(f"{arithmetic}: tensor_parallel_size=1",))
        if self.parallelize_fn is not None:
            # How parallelize_fn will cut is not known; an even share is the best it can do.
            size = next((size for size in sizes if math.ceil(total / size) <= usable), sizes[-1])
            check_model_fits(model, budget_bytes, tensor_parallel_size=size)
            return _Decision(size, lines=(f"{arithmetic}: tensor_parallel_size={size}",))
        try:
            alternatives = calls()
        except TensorParallelError as error:
            if self.plan is not None or total > usable:
                raise TensorParallelError(f"{arithmetic}. {error}") from error
            stays = f"The model stays whole: {format_bytes(total)} on each of {sizes[0]} ranks."
            return _Decision(sizes[0], warning=f"{error} {stays}")
        on_cpu(model)
        try:
            with NoCollectives():  # type: ignore[no-untyped-call]
                return self._planned(model, alternatives, sizes, budget_bytes)
        except CommunicatesError as error:
            if self.plan is not None:
                raise
            check_model_fits(model, budget_bytes)
            return _Decision(sizes[0], lines=(f"{named} is left as it is: {error}",))

    def _planned(
        self, model: nn.Module, alternatives: list[Calls], sizes: tuple[int, ...], budget_bytes: int
    ) -> _Decision:
        """A verified plan, the user's or one that is found, for the smallest size that fits."""
        first: ExampleError | None = None
        for calls in alternatives:
            try:
                if self.plan is not None:
                    return self._given(model, calls, sizes, int(budget_bytes * (1 - ACTIVATION_HEADROOM)))
                return self._found(model, calls, sizes, budget_bytes)
            except ExampleError as error:
                first = first or error
        assert first is not None
        raise first

    def _found(self, model: nn.Module, calls: Calls, sizes: tuple[int, ...], budget_bytes: int) -> _Decision:
        call, *also = calls
        choice = smallest_tensor_parallel_size(
            model,
            budget_bytes,
            call.args,
            example_kwargs=call.kwargs,
            method=call.method,
            candidates=sizes,
            headroom_fraction=ACTIVATION_HEADROOM,
            planner=functools.partial(self._planner(), also=also),
        )
        assert choice.plan is not None
        lines = (
            *choice.arithmetic,
            f"tensor_parallel_size={choice.tensor_parallel_size}",
            *choice.plan.describe().split("\n"),
        )
        return _Decision(choice.tensor_parallel_size, choice.plan.to_json(), lines)

    def _given(self, model: nn.Module, calls: Calls, sizes: tuple[int, ...], usable: int) -> _Decision:
        """The user's own plan, if it is right for the model and fits."""
        assert self.plan is not None
        size = self.plan.tensor_parallel_size
        if size not in sizes:
            raise ConfigurationError(
                f"tensor_parallel_plan is for {size} ranks; this job can have {' or '.join(map(str, sizes))} per model."
            )
        call, *also = calls
        report = verify_plan(model, self.plan, call.args, example_kwargs=call.kwargs, method=call.method, also=also)
        report.raise_for_failures()
        needed = self.plan.max_rank_bytes + model_bytes(model).buffers
        if needed > usable:
            raise ModelDoesNotFitError(
                f"{type(model).__name__} needs {format_bytes(needed)} on the fullest of {size} ranks with the given plan; "
                f"{format_bytes(usable)} are usable.",
                needed,
                usable,
                None,
            )
        return _Decision(size, self.plan.to_json(), (self.plan.summary(),), self.plan.describe())

    def _planner(self) -> Callable[..., TensorParallelPlan]:
        directory = plan_cache_directory(self.runtime.config.plan_cache)
        return plan_tensor_parallel if directory is None else PlanCache(directory).plan

    def _apply(self, model: nn.Module, plan: TensorParallelPlan) -> None:
        topology, mesh = self.runtime.world.topology, self.runtime.mesh
        group = mesh.get_group("tensor_parallel") if mesh is not None else None
        apply_plan(model, plan, topology.tensor_parallel_rank, group)
        if self.runtime.config.verify == "first_batch":
            self._check_on_first_batch(model)

    def _check_on_first_batch(self, model: nn.Module) -> None:
        """Compare blocks with their unsharded selves on the first batch, which is computed without torch.compile."""
        check = check_first_batch(model)
        wrappers = self.runtime.step_wrappers

        def run_eagerly(call: Callable[[Any], Any], batch: Any, ticket: Any) -> Any:
            pending = check is not None and check.pending
            with torch.compiler.set_stance("force_eager") if pending else contextlib.nullcontext():
                output = call(batch)
            if run_eagerly in wrappers:
                check_outputs_agree(model, output)
                wrappers.remove(run_eagerly)  # only now: a rank that has to leave the step repeats it with its peers
            return output

        wrappers.append(run_eagerly)

    # Weights

    def load(
        self,
        model: nn.Module,
        source: str | os.PathLike[str] | Mapping[str, Any] | Checkpoint,
        *,
        strict: bool = True,
    ) -> LoadReport:
        """Read this rank's part of a checkpoint into a prepared model, and put all of it on the device.

        Args:
            model: The model; one that is not cut is loaded whole.
            source: A checkpoint of any kind :func:`~lightning_gpuorch.parallel.tensor_parallel.open_checkpoint` knows.
            strict: Whether missing parameters are an error.

        Raises:
            TensorParallelError: The checkpoint is damaged, incomplete, or of another model; nothing was changed, unless
                damage shows only while reading.
        """
        topology, device = self.runtime.world.topology, self.runtime.device
        checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
        if applied_plan(model) is None:
            apply_plan(model, plan_tensor_parallel(model, None, 1), 0, Communicator(None, 0, 1))
        plan, rank = applied_plan(model) or (None, 0)
        assert plan is not None
        with _LoadProgress(topology.rank == 0, checkpoint.location) as progress:
            report = load_sharded(model, checkpoint, plan, rank, device=device, strict=strict, progress=progress)
        model.to(device)  # the buffers
        self.load_report = report
        if self.runtime.config.model_fingerprint == "auto":
            if isinstance(source, (str, os.PathLike)):
                _cut_from[model] = fingerprint_files(Path(source))
            elif isinstance(source, Mapping):
                _cut_from[model] = fingerprint_tensors(source)
        if topology.replica == 0:
            log.info("rank %d: %s", topology.rank, report.describe())
        if report.unexpected and topology.rank == 0:
            shown = ", ".join(report.unexpected[:8])
            log.warning(
                "%d keys of %s have no place in the model: %s", len(report.unexpected), checkpoint.location, shown
            )
        if report.missing and topology.rank == 0:
            shown = ", ".join(report.missing[:8])
            log.warning("%d tensors are missing in %s: %s", len(report.missing), checkpoint.location, shown)
        return report


def has_meta(model: nn.Module) -> bool:
    """Whether a model waits for its weights: some parameters are on meta."""
    return any(parameter.is_meta for parameter in model.parameters())


def refuse_meta(model: nn.Module, remedy: str) -> None:
    """Refuse a model without weights.

    Raises:
        ConfigurationError: Some parameters are on meta; the first are named.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if names:
        raise ConfigurationError(
            f"{len(names)} parameters of {type(model).__name__} are on meta and have no values, such as "
            f"{', '.join(names[:3])}. {remedy}"
        )


def on_cpu(model: nn.Module) -> None:
    """Move a model to the CPU, where plans are made; parameters on meta stay."""
    if any(tensor.device.type not in ("cpu", "meta") for tensor in (*model.parameters(), *model.buffers())):
        model._apply(lambda tensor: tensor if tensor.is_meta else tensor.cpu())  # type: ignore[no-untyped-call]


def first_batch(loader: Any) -> Any:
    """The first batch of a dataloader as a single device would see it; None if it is empty."""
    with warnings.catch_warnings(), keep_random_state():
        warnings.simplefilter("ignore")  # what is wrong with the loader is said when the job opens it
        return describe(loader, limit=1).first_batch()


def plan_cache_directory(setting: str) -> Path | None:
    """Where plans are kept between runs, by the setting ``plan_cache``; None for ``off``."""
    if setting == "off":
        return None
    if setting != "auto":
        return local_path(setting, "plan_cache")
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lightning_gpuorch" / "plans"


def _has_dtensors(model: nn.Module) -> bool:
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


class _LoadProgress:
    """Shows how far loading is: a bar on a terminal, else a log line from time to time."""

    def __init__(self, shown: bool, location: str):
        self._shown, self._location = shown, location
        self._bar: Any = None
        self._task: Any = None
        self._next = time.monotonic() + LOAD_REPORT_SECONDS

    def __enter__(self) -> Callable[[int, int], None]:
        if self._shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(f"loading {Path(self._location).name}")
        return self._update

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _update(self, done: int, total: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif self._shown and time.monotonic() > self._next:
            self._next = time.monotonic() + LOAD_REPORT_SECONDS
            log.info("loading %s: %d of %d tensors", self._location, done, total)
