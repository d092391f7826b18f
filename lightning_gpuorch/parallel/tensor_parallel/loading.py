"""Values get into a sharded model: each rank reads its own intervals, once, straight into place.

1. Every parameter and persistent buffer is matched with a key of the checkpoint; tied ones with the key of any of their
   names.
2. Names and shapes are checked before anything is read.
3. Each tensor is read in its cut form, converted and put in place; several threads read at once.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from lightning_gpuorch.errors import TensorParallelError
from lightning_gpuorch.parallel.tensor_parallel.checkpoint import open_checkpoint
from lightning_gpuorch.parallel.tensor_parallel.checkpoint_base import Checkpoint
from lightning_gpuorch.parallel.tensor_parallel.plan import ParameterPlan, TensorParallelPlan, dtype_name, format_bytes
from lightning_gpuorch.parallel.tensor_parallel.quantized import refuse_quantized


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What loading one rank's part did.

    Attributes:
        bytes_read: Bytes asked from the checkpoint.
        local_bytes: Bytes of the values now in the model.
        seconds: Time it took.
        num_tensors: Tensors read.
        missing: Parameters and buffers the checkpoint lacks.
        unexpected: Keys of the checkpoint that the model has no use for.
        converted: Tensors whose dtype was converted, by ``"float16 -> float32"``.
    """

    bytes_read: int
    local_bytes: int
    seconds: float
    num_tensors: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    converted: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def describe(self) -> str:
        """Write the report in one line."""
        rate = self.bytes_read / max(self.seconds, 1e-9)
        text = f"read {format_bytes(self.bytes_read)} in {self.seconds:.1f} s ({format_bytes(rate)}/s), "
        text += f"{self.num_tensors} tensors, {format_bytes(self.local_bytes)} kept"
        if self.unexpected:
            text += f", {len(self.unexpected)} keys not used"
        return text


@dataclasses.dataclass
class _Target:
    """One tensor to load: its places in the model and its key in the checkpoint."""

    names: list[str]
    current: torch.Tensor
    plan: ParameterPlan | None
    key: str | None = None


def load_sharded(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any] | Checkpoint,
    plan: TensorParallelPlan,
    rank: int,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    strict: bool = True,
    rename: Callable[[str], str] | None = None,
    num_threads: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> LoadReport:
    """Load one rank's part of a checkpoint into a model that :func:`apply_plan` has sharded.

    Args:
        model: The sharded model; its parameters may be on meta.
        source: A checkpoint of any kind :func:`open_checkpoint` knows, or an opened one.
        plan: The plan the model was sharded with.
        rank: The rank it was sharded for.
        dtype: Floating-point parameters are converted to it; None keeps each parameter's own dtype.
        device: Where values go; None keeps each tensor's device, the CPU for tensors on meta.
        strict: Whether a missing parameter is an error. Keys that are not used never are; the report names them.
        rename: Maps a key of the checkpoint to a name in the model; None finds a common prefix by itself.
        num_threads: Threads that read.
        progress: Called with the tensors done and the tensors in all.

    Raises:
        TensorParallelError: If the model is not sharded with this plan, names or shapes do not match, or the checkpoint
            is damaged. Nothing has been changed unless damage shows only while reading.
    """
    started = time.monotonic()
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    targets = _targets(model, plan, rank)
    checkpoint = _seen_by_model(checkpoint, model, targets)
    unexpected = _match(checkpoint, targets, rename)
    wanted = [target for target in targets if target.key is not None]
    dtypes = {target.key: (checkpoint.dtype(target.key), target.current.dtype) for target in wanted if target.key}
    refuse_quantized(checkpoint.location, dtypes, unexpected)
    missing = _check(checkpoint, targets, strict, model)
    converted: Counter[str] = Counter()

    def read(target: _Target) -> tuple[torch.Tensor, int]:
        value, num_bytes = _read(checkpoint, target, rank)
        if value.shape != target.current.shape:
            raise TensorParallelError(
                f"{target.names[0]} came as {tuple(value.shape)} from {checkpoint.location}, the model needs "
                f"{tuple(target.current.shape)}: the checkpoint is of another model."
            )
        goal = target.current.dtype
        if dtype is not None and goal.is_floating_point:
            goal = dtype
        if value.dtype != goal:
            converted[f"{dtype_name(value.dtype)} -> {dtype_name(goal)}"] += 1
        place = device if device is not None else "cpu" if target.current.is_meta else target.current.device
        return value.to(device=place, dtype=goal, copy=True), num_bytes

    bytes_read = local_bytes = 0
    with ThreadPoolExecutor(max_workers=max(1, num_threads), thread_name_prefix="load") as pool:
        for done, (target, (value, num_bytes)) in enumerate(zip(wanted, pool.map(read, wanted), strict=True), 1):
            _put(model, target, value)
            bytes_read += num_bytes
            local_bytes += value.numel() * value.element_size()
            if progress is not None:
                progress(done, len(wanted))
    return LoadReport(
        bytes_read,
        local_bytes,
        time.monotonic() - started,
        len(wanted),
        tuple(missing),
        tuple(unexpected),
        dict(converted),
    )


def _targets(model: nn.Module, plan: TensorParallelPlan, rank: int) -> list[_Target]:
    """List the model's tensors, tied ones once, after checking that the model is sharded with the plan."""
    tied = {name: group for group in plan.ties for name in group}
    found: dict[int, _Target] = {}
    keep_persistent = set(model.state_dict(keep_vars=True))
    parameters = list(model.named_parameters(remove_duplicate=False))
    buffers = [(name, value) for name, value in model.named_buffers(remove_duplicate=False) if name in keep_persistent]
    for name, value in (*parameters, *buffers):
        own = plan.parameters.get(name)
        if own is None and isinstance(value, nn.Parameter):
            raise TensorParallelError(f"The plan does not know the parameter {name}: it belongs to another model.")
        if own is not None and own.local_shape(rank) != tuple(value.shape):
            raise TensorParallelError(
                f"{name} has shape {tuple(value.shape)}; rank {rank} of the plan keeps {own.local_shape(rank)}. "
                "Apply the plan "
                "with apply_plan before loading."
            )
        target = found.setdefault(id(value), _Target([], value, own))
        target.names += [name, *(other for other in tied.get(name, ()) if other not in target.names and other != name)]
        target.names = list(dict.fromkeys(target.names))
    return list(found.values())


def _seen_by_model(checkpoint: Checkpoint, model: nn.Module, targets: list[_Target]) -> Checkpoint:
    """See a transformers checkpoint under the model's names, if it is one whose names differ."""
    keys = set(checkpoint.keys())
    if all(any(name in keys for name in target.names) for target in targets):
        return checkpoint
    # The model itself, or the one inside of a LightningModule; the names around it differ by a prefix only.
    outermost: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        is_inside = any(not outer or name.startswith(f"{outer}.") for outer in outermost)
        if not is_inside and any(cls.__module__ == "transformers.modeling_utils" for cls in type(module).__mro__):
            outermost[name] = module
    if len(outermost) == 1:
        from lightning_gpuorch.parallel.tensor_parallel.transformers_checkpoint import converted_checkpoint

        return converted_checkpoint(checkpoint, next(iter(outermost.values())))
    return checkpoint


def _match(checkpoint: Checkpoint, targets: list[_Target], rename: Callable[[str], str] | None) -> list[str]:
    """Give every target its key; returns the keys nobody wants."""
    keys = checkpoint.keys()
    names = [name for target in targets for name in target.names]
    rename = rename or common_renaming(keys, names)
    by_name = {rename(key): key for key in keys}
    used = set()
    for target in targets:
        own = [by_name[name] for name in target.names if name in by_name]
        used.update(own)
        target.key = own[0] if own else None
    return sorted(set(keys) - used)


def common_renaming(keys: list[str], names: list[str]) -> Callable[[str], str]:
    """Find the prefix by which a checkpoint's keys and a model's names differ (``model.``, ``module.``, none).

    Args:
        keys: Keys of the checkpoint.
        names: Names in the model.

    Returns:
        A function from key to name.
    """
    known = set(names)
    votes: Counter[tuple[str, str]] = Counter({("", ""): sum(key in known for key in keys)})
    if votes["", ""] < len(known) / 2:
        for key in keys:
            parts = key.split(".")
            for start in range(1, len(parts)):
                if ".".join(parts[start:]) in known:
                    votes[".".join(parts[:start]) + ".", ""] += 1
        present = set(keys)
        for name in known:
            parts = name.split(".")
            for start in range(1, len(parts)):
                if ".".join(parts[start:]) in present:
                    votes["", ".".join(parts[:start]) + "."] += 1
    # The most matches win; of equals the shorter change.
    strip, add = max(votes, key=lambda pair: (votes[pair], -len(pair[0]) - len(pair[1])))
    return lambda key: key if key in known else add + key.removeprefix(strip)


def _check(checkpoint: Checkpoint, targets: list[_Target], strict: bool, model: nn.Module) -> list[str]:
    problems = []
    missing = []
    for target in targets:
        if target.key is None:
            is_ready_buffer = not isinstance(target.current, nn.Parameter) and not target.current.is_meta
            if not is_ready_buffer:
                missing.append(target.names[0])
            continue
        expected = target.plan.shape if target.plan is not None else tuple(target.current.shape)
        shape = checkpoint.shape(target.key)
        if shape is not None and shape != expected:
            problems.append(f"{target.names[0]} has shape {shape}, the model needs {expected}")
    known = set(model.state_dict(keep_vars=True))
    lost = [name for name, value in model.named_buffers() if value.is_meta and name not in known]
    if lost:
        raise TensorParallelError(
            f"{len(lost)} buffers are on meta and in no checkpoint, such as {lost[0]}: their values are lost. "
            "Build the model "
            "with empty_parameters(), which leaves buffers real, instead of torch.device('meta')."
        )
    if problems:
        listed = "\n  ".join(problems[:8])
        raise TensorParallelError(
            f"{checkpoint.location} is of another model: {len(problems)} tensors have other shapes.\n  {listed}"
        )
    if missing and strict:
        listed = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise TensorParallelError(
            f"{checkpoint.location} lacks {len(missing)} of the model's {len(targets)} tensors: {listed}. Its "
            "keys look like "
            f"{', '.join(checkpoint.keys()[:3])}."
        )
    return missing


def _read(checkpoint: Checkpoint, target: _Target, rank: int) -> tuple[torch.Tensor, int]:
    assert target.key is not None
    plan = target.plan
    if plan is not None and plan.only_rank not in (None, rank):
        return torch.zeros(plan.shape, dtype=target.current.dtype), 0
    if plan is None or plan.dim is None:
        return checkpoint.read(target.key)
    return checkpoint.read(target.key, plan.dim, plan.intervals[rank])


def _put(model: nn.Module, target: _Target, value: torch.Tensor) -> None:
    is_parameter = isinstance(target.current, nn.Parameter)
    tensor = nn.Parameter(value, requires_grad=target.current.requires_grad) if is_parameter else value
    for name in target.names:
        prefix, _, key = name.rpartition(".")
        module = model.get_submodule(prefix)
        own = module._parameters if is_parameter else module._buffers
        own[key] = tensor  # type: ignore[assignment]
