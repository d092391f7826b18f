"""The tensor-parallel plan as plain data: what is cut, how, and what it costs.

A plan says for every parameter which dimension is cut and which indices each rank keeps, for every layer which exchange
goes with the cut, and which attributes of other modules (a head count, say) have another value on a rank. It holds no
tensors, modules or process groups: it prints, compares, travels as JSON and is tested without processes.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from lightning_gpuorch.errors import TensorParallelError
from lightning_gpuorch.parallel.tensor_parallel.intervals import Intervals, RankIntervals, length
from lightning_gpuorch.parallel.tensor_parallel.plan_check import check_plan

FORMAT_VERSION = 1


class LayerKind(str, enum.Enum):
    """How a layer works on a rank, and which collective it issues."""

    COLUMN = "column"
    """Output channels are cut and stay local: no collective."""
    COLUMN_GATHER = "column_gather"
    """Output channels are cut and gathered: one all-gather."""
    ROW = "row"
    """Input channels are cut, the input arrives local: one all-reduce, then the bias once."""
    ROW_SPLIT = "row_split"
    """Input channels are cut, the input arrives whole: the rank takes its slice, then as ``ROW``."""
    VOCABULARY = "vocabulary"
    """Rows of an embedding are cut: one all-reduce."""
    HEADS = "heads"
    """``nn.MultiheadAttention`` cut by heads: one all-reduce."""
    EXPERTS = "experts"
    """Fused experts cut in their inner dimension: one all-reduce."""
    LOCAL = "local"
    """Runs its own forward on parameters cut along with a block, because other code reads them: no collective."""
    REPLICATED = "replicated"
    """Whole on every rank: no collective."""


COLLECTIVES = {
    LayerKind.COLUMN_GATHER: "all_gather",
    LayerKind.ROW: "all_reduce",
    LayerKind.ROW_SPLIT: "all_reduce",
    LayerKind.VOCABULARY: "all_reduce",
    LayerKind.HEADS: "all_reduce",
    LayerKind.EXPERTS: "all_reduce",
}


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """The role of one layer.

    Attributes:
        kind: How it works on a rank.
        intervals: By rank: output channels (column kinds), input channels (row kinds), rows (vocabulary) or heads;
            empty for replicated layers and experts.
        reason: Why the layer is not cut, or not cut better; empty if nothing is to be said.
        source: Where the decision comes from: ``user``, ``handler``, ``published``, ``probe`` or ``fallback``.
    """

    kind: LayerKind
    intervals: RankIntervals = ()
    reason: str = ""
    source: str = "probe"


@dataclasses.dataclass(frozen=True)
class ParameterPlan:
    """What each rank keeps of one parameter or buffer.

    Attributes:
        shape: Shape of the whole tensor.
        dtype: Its dtype, as in ``float32``.
        dim: The dimension that is cut; None if every rank keeps the whole.
        intervals: By rank, the indices of ``dim`` it keeps.
        only_rank: The one rank that keeps the values, the others keep zeros: for biases inside a layer whose outputs
            are summed over the ranks. None otherwise.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    dim: int | None = None
    intervals: RankIntervals = ()
    only_rank: int | None = None

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return torch.empty((), dtype=torch_dtype(self.dtype)).element_size()

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return torch.Size(self.shape).numel() * self.itemsize

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """Give the shape of the piece ``rank`` keeps."""
        if self.dim is None:
            return self.shape
        return (*self.shape[: self.dim], length(self.intervals[rank]), *self.shape[self.dim + 1 :])

    def local_bytes(self, rank: int) -> int:
        """Give the bytes ``rank`` keeps."""
        return torch.Size(self.local_shape(rank)).numel() * self.itemsize


@dataclasses.dataclass(frozen=True)
class AttributePatch:
    """An attribute that has another value on each rank.

    Attributes:
        module: Qualified name of the module; empty for the model itself.
        attribute: Name of the attribute; ``config.num_heads`` for a field of an object the module holds (the object
            is copied, so that others who share it see no change).
        values: The value by rank: numbers, booleans, or tuples of numbers.
        whole: The value in the whole model.
    """

    module: str
    attribute: str
    values: tuple[Any, ...]
    whole: Any = None


@dataclasses.dataclass(frozen=True)
class ShapeRule:
    """A hard-coded size inside a module's forward that has to be smaller on a rank.

    In a ``view`` or ``reshape`` with ``num_dims`` sizes the one at ``position`` (counted from the end, negative) is
    multiplied by ``local / whole``: where the call would fail otherwise, and in every call if one of the sizes is ``-1``.

    Attributes:
        operation: ``view``, ``reshape`` or ``unflatten``.
        num_dims: Number of sizes in the call.
        position: Which of them, from the end.
        whole: The size in the whole model.
        local: The size by rank.
        is_open: Whether the rule is for calls in which one of the sizes is ``-1``.
    """

    operation: str
    num_dims: int
    position: int
    whole: int
    local: tuple[int, ...]
    is_open: bool = False


@dataclasses.dataclass(frozen=True)
class TensorParallelPlan:
    """A model's tensor-parallel plan: data only.

    Attributes:
        tensor_parallel_size: Number of ranks the plan is for.
        layers: Role of every layer that could be cut, by qualified module name.
        parameters: What each rank keeps of every parameter and of the buffers that are cut, by qualified name. Tied
            parameters are listed under each of their names.
        attributes: Attributes with another value on each rank.
        shape_rules: Rules for hard-coded sizes, by the module whose forward needs them.
        ties: Groups of names that are one tensor.
        notes: What the planner has to say, for people.
    """

    tensor_parallel_size: int
    layers: Mapping[str, LayerPlan]
    parameters: Mapping[str, ParameterPlan]
    attributes: tuple[AttributePatch, ...] = ()
    shape_rules: Mapping[str, tuple[ShapeRule, ...]] = dataclasses.field(default_factory=dict)
    ties: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()

    # -- what it costs ------------------------------------------------------------------------------------------------

    def unique_parameters(self) -> Iterator[tuple[str, ParameterPlan]]:
        """Iterate over the parameters, tied ones once."""
        repeated = {name for group in self.ties for name in group[1:]}
        return ((name, plan) for name, plan in self.parameters.items() if name not in repeated)

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole model's parameters."""
        return sum(plan.num_bytes for _, plan in self.unique_parameters())

    def bytes_on(self, rank: int) -> int:
        """Give the bytes of parameters ``rank`` keeps."""
        return sum(plan.local_bytes(rank) for _, plan in self.unique_parameters())

    @property
    def max_rank_bytes(self) -> int:
        """Bytes of parameters on the rank that keeps most."""
        return max(self.bytes_on(rank) for rank in range(self.tensor_parallel_size))

    @property
    def replicated_bytes(self) -> int:
        """Bytes every rank keeps whole."""
        return sum(plan.num_bytes for _, plan in self.unique_parameters() if plan.dim is None)

    @property
    def sharded_fraction(self) -> float:
        """Share of the model's bytes that is cut, 0 to 1."""
        total = self.total_bytes
        return 1.0 - self.replicated_bytes / total if total else 0.0

    def collectives(self) -> dict[str, int]:
        """Count the collectives of one forward in which every layer is called once."""
        counts: dict[str, int] = defaultdict(int)
        for layer in self.layers.values():
            if layer.kind in COLLECTIVES:
                counts[COLLECTIVES[layer.kind]] += 1
        return dict(counts)

    # -- text and JSON ------------------------------------------------------------------------------------------------

    def summary(self) -> str:
        """Write what the plan costs in one line."""
        return (
            f"Tensor-parallel plan for {self.tensor_parallel_size} ranks: {format_bytes(self.total_bytes)} of parameters, "
            f"{100 * self.sharded_fraction:.1f}% sharded, at most {format_bytes(self.max_rank_bytes)} per rank, "
            f"{format_bytes(self.replicated_bytes)} on every rank."
        )

    def describe(self) -> str:
        """Write the plan for people: layers by kind, bytes per rank, collectives, what stays whole and why."""
        lines = [self.summary()]
        counts = self.collectives()
        total = sum(counts.values())
        parts = ", ".join(f"{count} {operation}" for operation, count in sorted(counts.items()))
        lines.append(f"Collectives per forward: {total}" + (f" ({parts})" if parts else ""))
        rows: dict[tuple[str, str, str], int] = defaultdict(int)
        costs: dict[tuple[str, str, str], int] = defaultdict(int)
        for name, layer in self.layers.items():
            row = (generic_name(name), layer.kind.value, layer.reason)
            rows[row] += 1
            if layer.kind is LayerKind.REPLICATED:
                own = (plan.num_bytes for key, plan in self.parameters.items() if key.rpartition(".")[0] == name)
                costs[row] += sum(own)
        width = max((len(name) for name, _, _ in rows), default=0)
        for row, count in rows.items():
            name, kind, reason = row
            cost = f"  {format_bytes(costs[row])} on every rank" if costs[row] else ""
            why = f"  ({reason})" if reason else ""
            lines.append(f"  {name:<{width}}  {kind:<13} x{count}{cost}{why}")
        if self.attributes:
            changed = sorted({f"{generic_name(patch.module)}.{patch.attribute}" for patch in self.attributes})
            lines.append("Attributes that differ by rank: " + ", ".join(changed))
        if self.shape_rules:
            changed = sorted({generic_name(scope) or "(model)" for scope in self.shape_rules})
            lines.append("Hard-coded sizes adjusted in: " + ", ".join(changed))
        lines.extend(f"Note: {note}" for note in self.notes)
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Turn the plan into JSON-ready values."""
        return {"format_version": FORMAT_VERSION, **_plain(self)}

    def to_json(self) -> str:
        """Write the plan as JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TensorParallelPlan:
        """Read what :meth:`to_dict` wrote.

        Raises:
            TensorParallelError: If the data is of another format version or not a plan.
        """
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise TensorParallelError(
                f"A tensor-parallel plan of format version {version!r} cannot be read; this release reads "
                f"{FORMAT_VERSION}. Plan the model again."
            )
        try:
            plan = cls(
                tensor_parallel_size=data["tensor_parallel_size"],
                layers={
                    name: LayerPlan(LayerKind(row["kind"]), _tuples(row["intervals"]), row["reason"], row["source"])
                    for name, row in data["layers"].items()
                },
                parameters={
                    name: ParameterPlan(
                        tuple(row["shape"]), row["dtype"], row["dim"], _tuples(row["intervals"]), row["only_rank"]
                    )
                    for name, row in data["parameters"].items()
                },
                attributes=tuple(
                    AttributePatch(row["module"], row["attribute"], _tuples(row["values"]), _tuples(row["whole"]))
                    for row in data["attributes"]
                ),
                shape_rules={
                    scope: tuple(ShapeRule(**{**row, "local": tuple(row["local"])}) for row in rules)
                    for scope, rules in data["shape_rules"].items()
                },
                ties=_tuples(data["ties"]),
                notes=tuple(data["notes"]),
            )
            check_plan(plan)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TensorParallelError(f"This is not a tensor-parallel plan: {error!r:.500}.") from error
        return plan


def generic_name(name: str) -> str:
    """Replace the numbers in a qualified name: ``layers.3.mlp`` becomes ``layers.*.mlp``."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def format_bytes(num_bytes: float) -> str:
    """Write bytes with a binary unit: ``1.50 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.2f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} TiB"


def torch_dtype(name: str) -> torch.dtype:
    """Give the dtype of a name such as ``bfloat16``."""
    dtype = vars(torch).get(name)
    if not isinstance(dtype, torch.dtype):
        raise TensorParallelError(f"Unknown dtype {name!r} in a tensor-parallel plan.")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Give the short name of a dtype: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def local_parameter(tensor: torch.Tensor, plan: ParameterPlan, rank: int) -> torch.Tensor:
    """Cut a whole tensor to what ``rank`` keeps; the result owns its memory (meta tensors stay on meta)."""
    from lightning_gpuorch.parallel.tensor_parallel.intervals import take

    if plan.dim is None:
        piece = tensor if plan.only_rank in (None, rank) else torch.zeros_like(tensor)
        return piece.detach()
    intervals: Intervals = plan.intervals[rank]
    # A slice of dimension 0 is a view that would keep the whole storage alive.
    return take(tensor.detach(), plan.dim, intervals).clone(memory_format=torch.contiguous_format)
