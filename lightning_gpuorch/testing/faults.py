"""Which faults happen to a job, when, and to whom: a plan that prints, and that its print brings back.

A plan is a line of text, faults separated by ``;``, each ``KIND@MOMENT/rankN``::

    kill@40%/rank1; gil-hang@commit 10%/rank0; exit0@end/rank1; kill-supervisor@60%

A fault happens once in a run, however often its rank is restarted.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from lightning_gpuorch.errors import ConfigurationError

LAST_PERCENT = 95
"""Share of the chunks that is durable in the moment ``last``."""


class FaultKind(Enum):
    """What happens."""

    KILL = "kill"
    """SIGKILL."""
    STOP = "stop"
    """SIGSTOP: the process is there and does nothing."""
    EXCEPTION = "exception"
    """A RuntimeError."""
    EXIT0 = "exit0"
    """The process leaves with exit code 0, as if its work were done."""
    HANG = "hang"
    """A loop in Python that never ends."""
    GIL_HANG = "gil-hang"
    """Native code that never returns and holds the GIL, so that no other thread runs."""
    SKIP_COLLECTIVE = "skip-collective"
    """The rank never enters a collective in which its peers wait."""
    BLOCK_COLLECTIVE = "block-collective"
    """The rank blocks inside a communication that no rank answers."""
    KILL_SUPERVISOR = "kill-supervisor"
    """SIGKILL of the supervisor; the same command is run again."""
    TERM_SUPERVISOR = "term-supervisor"
    """SIGTERM of the supervisor: it drains the job and leaves with exit code 75; the same command is run again."""


SUPERVISOR_KINDS = frozenset({FaultKind.KILL_SUPERVISOR, FaultKind.TERM_SUPERVISOR})
WORKER_KINDS = tuple(kind for kind in FaultKind if kind not in SUPERVISOR_KINDS)


class When(Enum):
    """The kinds of moments."""

    START = "start"
    """In the first step of a process."""
    RESTART = "restart"
    """In the first step of a process that takes the place of one that died."""
    SHARE = "share"
    """In a step, once a share of the job's chunks is durable."""
    COMMIT = "commit"
    """While a part is written: its temporary file is whole, and not yet linked to its name."""
    END = "end"
    """All of the rank's work is durable, and the job does not know yet that the rank is done."""


@dataclass(frozen=True)
class Moment:
    """When a fault happens.

    Attributes:
        when: The kind of moment.
        percent: Share of the job's chunks that is durable by then; used by ``share`` and ``commit``.
    """

    when: When
    percent: int = 0

    def __str__(self) -> str:
        if self.when is When.SHARE:
            return "last" if self.percent == LAST_PERCENT else f"{self.percent}%"
        return f"commit {self.percent}%" if self.when is When.COMMIT and self.percent else str(self.when.value)

    @property
    def label(self) -> str:
        """The kind of moment as reports count it: shares are ``middle`` or ``last``."""
        if self.when is not When.SHARE:
            return str(self.when.value)
        return "last" if self.percent >= LAST_PERCENT else "middle"

    @classmethod
    def parse(cls, text: str) -> Moment:
        """Read a moment: ``start``, ``restart``, ``40%``, ``last``, ``commit``, ``commit 40%`` or ``end``.

        Raises:
            ConfigurationError: It is none of these.
        """
        words = text.strip()
        if words == "last":
            return cls(When.SHARE, LAST_PERCENT)
        match = re.fullmatch(r"(commit\s+)?(\d{1,2})%", words)
        if match:
            return cls(When.COMMIT if match[1] else When.SHARE, int(match[2]))
        if words in ("start", "restart", "commit", "end"):
            return cls(When(words))
        raise ConfigurationError(
            f"{text!r} is no moment; expected start, restart, a share like 40%, last, commit, commit 40% or end."
        )


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        kind: What happens.
        moment: When.
        rank: To whom; for faults of the supervisor, by whose work the moment is told.
    """

    kind: FaultKind
    moment: Moment
    rank: int = 0

    def __str__(self) -> str:
        return f"{self.kind.value}@{self.moment}/rank{self.rank}"

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Read a fault.

        Raises:
            ConfigurationError: It is not ``KIND@MOMENT/rankN`` with a known kind and moment.
        """
        match = re.fullmatch(r"\s*([\w-]+)\s*@([^/]+?)(?:/\s*rank\s*(\d+))?\s*", text)
        if match is None:
            raise ConfigurationError(f"{text!r} is no fault; expected KIND@MOMENT/rankN, as in kill@40%/rank1.")
        try:
            kind = FaultKind(match[1])
        except ValueError:
            known = ", ".join(kind.value for kind in FaultKind)
            raise ConfigurationError(f"{match[1]!r} is no kind of fault; expected one of {known}.") from None
        return cls(kind, Moment.parse(match[2]), int(match[3] or 0))


@dataclass(frozen=True)
class FaultPlan(Sequence[Fault]):
    """The faults of one run.

    Attributes:
        faults: In no particular order: each waits for its moment.
    """

    faults: tuple[Fault, ...] = ()

    def __str__(self) -> str:
        return "; ".join(map(str, self.faults))

    def __len__(self) -> int:
        return len(self.faults)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.faults[index]

    def __iter__(self) -> Iterator[Fault]:
        return iter(self.faults)

    @classmethod
    def parse(cls, text: str) -> FaultPlan:
        """Read a plan.

        Raises:
            ConfigurationError: A fault cannot be read.
        """
        return cls(tuple(Fault.parse(part) for part in text.split(";") if part.strip()))

    @classmethod
    def draw(
        cls,
        seed: int,
        count: int,
        world_size: int,
        tensor_parallel_size: int = 1,
        kinds: Sequence[FaultKind] = tuple(FaultKind),
    ) -> FaultPlan:
        """Draw a plan; the same arguments give the same plan.

        Args:
            seed: Of the random numbers.
            count: Faults.
            world_size: Ranks of the job.
            tensor_parallel_size: Ranks per replica; only the first of each writes parts.
            kinds: Kinds to choose from.
        """
        rng = random.Random(seed)
        faults: list[Fault] = []
        while len(faults) < count:
            kind = rng.choice(list(kinds))
            fault = Fault(kind, _draw_moment(rng, kind), rng.randrange(world_size))
            if fault.moment.when is When.COMMIT:
                leader = fault.rank - fault.rank % tensor_parallel_size
                fault = Fault(fault.kind, fault.moment, leader)
            # Two deaths in the first step of one rank's processes look like a sample that kills the ranks that compute it.
            first_steps = [f for f in faults if f.moment.when in _FIRST_STEP and f.rank == fault.rank]
            if fault.moment.when in _FIRST_STEP and first_steps:
                continue
            faults.append(fault)
        return cls(tuple(faults))


_FIRST_STEP = frozenset({When.START, When.RESTART})


def _draw_moment(rng: random.Random, kind: FaultKind) -> Moment:
    when = rng.choice(("start", "restart", "middle", "middle", "last", "commit", "commit", "end"))
    if when == "end" and kind is FaultKind.TERM_SUPERVISOR:
        when = "middle"  # a job whose work is done has nothing to drain
    if when == "middle":
        return Moment(When.SHARE, rng.randrange(5, LAST_PERCENT - 5))
    if when == "commit":
        return Moment(When.COMMIT, rng.randrange(0, LAST_PERCENT - 5))
    return Moment(When.SHARE, LAST_PERCENT) if when == "last" else Moment(When(when))
