"""Plans for ranks and later runs without planning again: from the first rank, and from a file.

A cached plan is found by a fingerprint of everything the planner looks at: the model's modules, their code, plain
attributes and configuration, the parameters' names, shapes and dtypes, what is tied, the example input, the number of
ranks, and the versions of the libraries.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_gpuorch._version import __version__
from lightning_gpuorch.checked_files import parse_object, read_file
from lightning_gpuorch.errors import TensorParallelError
from lightning_gpuorch.parallel.tensor_parallel.anatomy import ModelCall
from lightning_gpuorch.parallel.tensor_parallel.communicator import Communicator
from lightning_gpuorch.parallel.tensor_parallel.generation import from_first_rank
from lightning_gpuorch.parallel.tensor_parallel.plan import FORMAT_VERSION, TensorParallelPlan
from lightning_gpuorch.parallel.tensor_parallel.planning import plan_tensor_parallel
from lightning_gpuorch.parallel.tensor_parallel.verify import verify_plan

logger = logging.getLogger(__name__)

_MAX_BYTES = 64 * 2**20
"""Of a plan: every expert of a large model has its intervals on every rank."""


class PlanCache:
    """Plans in a directory, one JSON file each.

    A file that cannot be read or written costs planning time, never the run.

    Args:
        directory: Where plans are kept; created when the first one is written.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)

    def plan(
        self,
        model: nn.Module,
        example_input: Any,
        tensor_parallel_size: int,
        *,
        example_kwargs: Mapping[str, Any] | None = None,
        method: str | Callable[..., Any] = "forward",
        also: Sequence[ModelCall] = (),
        seed: int = 0,
    ) -> TensorParallelPlan:
        """Give the cached plan, or plan with :func:`plan_tensor_parallel` and keep it.

        Args and raises as :func:`plan_tensor_parallel`.
        """
        arguments = (example_input, dict(example_kwargs or {}), method, list(also), seed)
        path = self.directory / f"{fingerprint(model, tensor_parallel_size, arguments)}.json"
        cached = self._read(path)
        call = ModelCall.of(example_input, example_kwargs, method)
        if (
            cached is not None
            and _is_of_model(cached, model, tensor_parallel_size)
            and self._is_right(cached, model, call, also)
        ):
            return cached
        plan = plan_tensor_parallel(
            model,
            example_input,
            tensor_parallel_size,
            example_kwargs=example_kwargs,
            method=method,
            also=also,
            seed=seed,
        )
        self._write(path, plan)
        return plan

    @staticmethod
    def _is_right(plan: TensorParallelPlan, model: nn.Module, call: ModelCall, also: Sequence[ModelCall]) -> bool:
        """Verify a plan from a file as any other: code that the fingerprint does not see may have changed."""
        try:
            report = verify_plan(model, plan, call.args, example_kwargs=call.kwargs, method=call.method, also=also)
        except Exception as error:  # noqa: BLE001 - whatever an untrusted plan does to the check, planning again is right
            logger.warning("The cached tensor-parallel plan cannot be verified (%r); planning again.", error)
            return False
        if not report.ok:
            logger.warning(
                "The cached tensor-parallel plan is not right any more (%s); planning again.", report.failures[0]
            )
        return report.ok

    def _read(self, path: Path) -> TensorParallelPlan | None:
        try:
            return TensorParallelPlan.from_dict(parse_object(read_file(path, _MAX_BYTES)))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TensorParallelError) as error:
            logger.warning("The cached tensor-parallel plan %s cannot be used (%s); planning again.", path, error)
            return None

    def _write(self, path: Path, plan: TensorParallelPlan) -> None:
        temporary = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.directory, prefix=".plan-")
            with os.fdopen(handle, "w") as file:
                file.write(plan.to_json())
            os.replace(temporary, path)
        except OSError as error:
            logger.warning("The tensor-parallel plan is not cached in %s: %s.", self.directory, error)
            if temporary is not None and os.path.exists(temporary):
                os.unlink(temporary)


def _is_of_model(plan: TensorParallelPlan, model: nn.Module, tensor_parallel_size: int) -> bool:
    """Whether a plan names this number of ranks and the model's parameters by their shapes: else it is not tried."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    planned = {name: own.shape for name, own in plan.parameters.items() if name in shapes}
    of_model = plan.tensor_parallel_size == tensor_parallel_size and planned == shapes
    if not of_model:
        logger.warning("The cached tensor-parallel plan is of another model; planning again.")
    return of_model


def plan_on_first_rank(
    model: nn.Module,
    example_input: Any,
    process_group: dist.ProcessGroup | Communicator | None = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    method: str | Callable[..., Any] = "forward",
    also: Sequence[ModelCall] = (),
    seed: int = 0,
    cache: PlanCache | None = None,
) -> TensorParallelPlan:
    """Plan on the group's first rank and give every rank that plan; all ranks of the group call this.

    Args:
        model: The whole model.
        example_input: As for :func:`plan_tensor_parallel`; the first rank's counts.
        process_group: The tensor-parallel group; its size is the degree.
        example_kwargs: Keyword arguments of the call.
        method: Name of the method that will be called, or a function that calls the model.
        also: Further calls the plan must be right for.
        seed: Seed of the probe's numbers.
        cache: Where plans are kept between runs.

    Raises:
        TensorParallelError: On every rank, if the first rank finds no plan.
    """
    communicator = process_group if isinstance(process_group, Communicator) else Communicator(process_group)
    outcome: tuple[str, str] | None = None
    if communicator.rank == 0:
        planner = plan_tensor_parallel if cache is None else cache.plan
        try:
            plan = planner(
                model,
                example_input,
                communicator.size,
                example_kwargs=example_kwargs,
                method=method,
                also=also,
                seed=seed,
            )
            outcome = ("plan", plan.to_json())
        except TensorParallelError as error:
            outcome = ("error", str(error))
    kind, text = from_first_rank(outcome, communicator)
    if kind == "error":
        raise TensorParallelError(text)
    return TensorParallelPlan.from_dict(json.loads(text))


def fingerprint(model: nn.Module, tensor_parallel_size: int, arguments: Any) -> str:
    """Give the hexadecimal digest of everything a plan depends on."""
    digest = hashlib.sha256()

    def add(*values: object) -> None:
        digest.update(repr(values).encode())

    add(FORMAT_VERSION, __version__, torch.__version__, tensor_parallel_size, _described(arguments))
    sources: set[str] = set()
    for name, module in model.named_modules():
        plain = {
            key: _described(value)
            for key, value in sorted(vars(module).items())
            if not key.startswith("_") and key != "training"
        }
        add(name, type(module).__module__, type(module).__qualname__, module.extra_repr(), plain)
        sources.update(filter(None, (_source_file(cls) for cls in type(module).__mro__)))
    identities: dict[int, int] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        add(name, tuple(tensor.shape), str(tensor.dtype), identities.setdefault(id(tensor), len(identities)))
    for path in sorted(sources):
        add(path, hashlib.sha256(Path(path).read_bytes()).hexdigest())
    return digest.hexdigest()[:32]


def _source_file(cls: type) -> str | None:
    if cls.__module__.partition(".")[0] in ("torch", "builtins"):  # covered by their versions
        return None
    try:
        return inspect.getsourcefile(cls)
    except TypeError:
        return None  # a class typed into an interpreter has no file


def _described(value: Any) -> Any:
    """Describe a value by what can matter to a plan, the same way in every process."""
    if isinstance(value, torch.Tensor):
        # Integers choose paths (padding, token types); of other tensors the shape is what counts.
        values = "" if value.is_floating_point() or value.is_meta else value.tolist()
        return ("tensor", tuple(value.shape), str(value.dtype), values)
    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.dtype, torch.device)):
        return repr(value)
    if isinstance(value, Mapping):
        return {str(key): _described(item) for key, item in sorted(value.items(), key=lambda pair: str(pair[0]))}
    if isinstance(value, (list, tuple)):
        return [_described(item) for item in value]
    if dataclasses.is_dataclass(value) or hasattr(value, "to_dict"):
        fields = value.to_dict() if hasattr(value, "to_dict") else vars(value)
        return (type(value).__qualname__, _described(fields))
    return type(value).__qualname__
