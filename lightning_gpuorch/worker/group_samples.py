"""The ranks of a tensor-parallel group compute one batch, and read it each by itself: they may not be able to read the same.

One rank's disk fails, or its copy of a file is damaged, where the others read well. A sample that one of them could not read
is given up by all. They tell each other what they have together with the comparison of their input: one number more in what
is gathered anyway, and only where those differ, the samples themselves.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from lightning_gpuorch.errors import InputMismatchError
from lightning_gpuorch.predictions.loading.source import Span
from lightning_gpuorch.predictions.loading.tickets import Ticket

Sample = tuple[int, str]
"""What a sample is known by on all ranks: its unit and its dataset index, in text."""


class SamplesDifferError(Exception):
    """The ranks have read different samples of a batch. All of them raise this, and nothing is computed.

    Attributes:
        reasons: Of the samples that only some ranks have, why the others have not.
    """

    def __init__(self, reasons: Mapping[Sample, str]):
        super().__init__("the ranks of a group have read different samples")
        self.reasons = reasons


@dataclasses.dataclass(frozen=True)
class SamplesRead:
    """What this rank has read of the batch in hand.

    Attributes:
        span: The samples; None if there are none.
        reasons: Why units that have been given up could not be read, by unit.
    """

    span: Span | None
    reasons: Mapping[int, str]

    @property
    def digest(self) -> int:
        """A number that is the same on ranks that have the same samples; taken in each step."""
        if self.span is None:
            return 0
        known = self.span.sample_units, list(self.span.indices or ())
        return zlib.crc32(repr(known).encode("utf-8", "surrogatepass"))

    def differs(self, group: Any, first_rank: int) -> SamplesDifferError:
        """Exchange what was read; every rank of the group does so.

        Args:
            group: The group.
            first_rank: Its first rank in the job.

        Raises:
            InputMismatchError: A rank has other samples although it could read those of the others.
        """
        told: list[Any] = [None] * dist.get_world_size(group)
        samples = () if self.span is None else samples_of(self.span)
        dist.all_gather_object(told, (samples, dict(self.reasons)), group=group)
        reasons: dict[Sample, str] = {}
        for sample in sorted({sample for samples, _ in told for sample in samples}):
            for place, (samples, why) in enumerate(told):
                if sample in samples or sample in reasons:
                    continue
                if sample[0] not in why:
                    raise InputMismatchError(
                        f"rank {first_rank + place} was not given sample {sample[1]}, which another rank of its "
                        "tensor-parallel group is to compute; all of them must run on the same input. Is the dataset random?"
                    )
                reasons[sample] = f"rank {first_rank + place} could not read it: {why[sample[0]]}"
        return SamplesDifferError(reasons)


def samples_of(span: Span) -> tuple[Sample, ...]:
    """What the samples of a span are known by; nothing of a stream."""
    return tuple(zip(span.sample_units, map(repr, span.indices or ()), strict=True))


def without(ticket: Ticket, lost: frozenset[int]) -> Ticket:
    """The ticket of a batch less some positions.

    Args:
        ticket: The batch; its samples have dataset indices.
        lost: The positions.
    """
    span, kept = ticket.span, [position for position in range(ticket.size or 0) if position not in lost]
    assert span.indices is not None
    units = span.sample_units
    return dataclasses.replace(
        ticket,
        span=dataclasses.replace(
            span,
            indices=[span.indices[position] for position in kept],
            units=[units[position] for position in kept],
        ),
        positions=[ticket.positions[position] for position in kept] if ticket.window is not None else (),
        shape=None if ticket.shape is None else (len(kept), ticket.shape[1]),
    )
