"""A report of what a model takes on several devices, made without its weights."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.parallel.tensor_parallel.example_input import find_example_input
from lightning_gpuorch.parallel.tensor_parallel.meta import empty_parameters
from lightning_gpuorch.parallel.tensor_parallel.plan import TensorParallelPlan, dtype_name, format_bytes
from lightning_gpuorch.parallel.tensor_parallel.planning import plan_tensor_parallel
from lightning_gpuorch.parallel.tensor_parallel.sizing import SizeChoice, WeightBytes, smallest_tensor_parallel_size

SIZES = (1, 2, 4, 8)
"""Degrees looked at when none is asked for."""


def model_report(spec: str, tensor_parallel_size: int | None = None, budget_bytes: int | None = None) -> str:
    """Say how a model is cut: bytes per rank, collectives, what stays whole and why, and whether it fits.

    The model is built without memory for its weights, unless its factory insists on having them.

    Args:
        spec: ``module:factory``, where the factory returns a module, or a module and what it is called with; or a
            directory with a transformers ``config.json``, or such a file.
        tensor_parallel_size: The degree; None takes the smallest that fits the budget, and compares several if there is
            no budget.
        budget_bytes: Bytes one device may give; None leaves out whether it fits.

    Raises:
        ConfigurationError: The specification names nothing that can be built.
        ModelDoesNotFitError: The model does not fit the budget; the message has the arithmetic and a degree that would
            do.
        TensorParallelError: There is no verified plan, or nothing says what the model is called with.
    """
    model, example = build_model(spec)
    source = "the factory's"
    if example is None:
        example, source = find_example_input(model)
    whole = WeightBytes.of(model)
    dtypes = sorted({dtype_name(parameter.dtype) for parameter in model.parameters()})
    count = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        f"{type(model).__name__}: {count:,} parameters in {', '.join(dtypes)}, {format_bytes(whole.parameters)}; "
        f"buffers {format_bytes(whole.buffers)}",
        f"Example input ({source}): {_described(example)}",
    ]
    started = time.monotonic()
    if tensor_parallel_size is None and budget_bytes is None:
        for size in SIZES:
            plan = plan_tensor_parallel(model, example, size)
            lines.append(f"{_ranks(size)}: {format_bytes(plan.max_rank_bytes + whole.buffers)} each")
    elif budget_bytes is None:
        assert tensor_parallel_size is not None
        plan = plan_tensor_parallel(model, example, tensor_parallel_size)
    else:
        sizes = SIZES if tensor_parallel_size is None else (tensor_parallel_size,)
        choice: SizeChoice = smallest_tensor_parallel_size(model, budget_bytes, example, candidates=sizes)
        lines += choice.arithmetic
        if tensor_parallel_size is None:
            lines.append(f"The smallest degree that fits is {choice.tensor_parallel_size}.")
        plan = choice.plan or plan_tensor_parallel(model, example, 1)
    lines.append(f"Bytes by rank: {_by_rank(plan)}")
    lines.append(plan.describe())
    lines.append(f"Planned and verified in {time.monotonic() - started:.1f} s, without weights.")
    return "\n".join(lines)


def build_model(spec: str) -> tuple[nn.Module, Any]:
    """Build what a specification names, its parameters on meta.

    Args:
        spec: As for :func:`model_report`.

    Returns:
        The module in eval mode, and its example input or None.

    Raises:
        ConfigurationError: It names nothing that can be built.
    """
    path = Path(spec)
    if path.is_dir() or path.suffix == ".json":
        return _from_transformers(path), None
    name, _, attribute = spec.partition(":")
    if not attribute:
        raise ConfigurationError(
            f"{spec!r} is neither a directory or config.json of a transformers model nor module:factory."
        )
    factory = _imported(name, attribute)
    try:
        with empty_parameters():
            built = factory()
    except (RuntimeError, NotImplementedError):  # it reads its weights while it builds, so they must be there
        built = factory()
    model, example = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"{spec} returned a {type(model).__name__}; expected a torch.nn.Module.")
    return model.eval(), example


def _imported(name: str, attribute: str) -> Callable[[], Any]:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        found: Any = importlib.import_module(name)
    except ImportError as error:
        raise ConfigurationError(f"the module {name!r} cannot be imported: {error}.") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigurationError(f"{name} has no {attribute!r}.")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigurationError(
            f"{name}:{attribute} is a {type(found).__name__}; expected a callable without arguments."
        )
    return found  # type: ignore[no-any-return]


def _from_transformers(path: Path) -> nn.Module:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigurationError(f"{path} holds no config.json; expected a directory of a transformers model.")
    try:
        import transformers
    except ImportError as error:
        raise ConfigurationError(f"reading {file} needs transformers, which is not installed.") from error
    try:
        config = transformers.AutoConfig.from_pretrained(str(file.parent if file.name == "config.json" else file))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(f"{file} is not a configuration transformers knows: {error}") from error
    names = [name for name in getattr(config, "architectures", None) or () if hasattr(transformers, name)]
    dtype = getattr(config, "dtype", None) or torch.get_default_dtype()
    with empty_parameters():
        if names:
            model: nn.Module = getattr(transformers, names[0])._from_config(config, dtype=dtype)
        else:
            model = transformers.AutoModel.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    return model.eval()


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{dtype_name(value.dtype)} {list(value.shape)}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_described(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(_described(item) for item in value) + ")"
    return repr(value)


def _by_rank(plan: TensorParallelPlan) -> str:
    sizes = [plan.bytes_on(rank) for rank in range(plan.tensor_parallel_size)]
    if len(set(sizes)) == 1:
        return f"{format_bytes(sizes[0])} on each of {_ranks(len(sizes))}"
    return ", ".join(f"{format_bytes(size)} on rank {rank}" for rank, size in enumerate(sizes))


def _ranks(size: int) -> str:
    return "1 rank" if size == 1 else f"{size} ranks"
