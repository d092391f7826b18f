"""What supervisors ask and report."""

from __future__ import annotations

import msgspec

from lightning_gpuorch.control.messages.base import Answer, Done, LoaderKey, RaisedException, Request, UnitRange


class NodeJoined(Answer, frozen=True):
    """A node's place in the job.

    Attributes:
        first_rank: Its first global rank.
        world_size: Ranks of the job.
        run_id: The run's name, which is node 0's.
        generation: First generation of its replicas; another supervisor may have had this place before.
        is_late: The job goes on without this node, or has ended: there is nothing to do but to wait for its exit code.
    """

    first_rank: int
    world_size: int
    run_id: str
    generation: int = 0
    is_late: bool = False


class JoinNode(Request[NodeJoined], frozen=True):
    """A supervisor takes part with so many ranks; answered when enough nodes have joined. It is asked again while it waits.

    ``supervisor`` is a random name that no other supervisor has: who asks again is told from who asks for the same place.
    """

    node: int
    supervisor: str
    ranks: int
    min_nodes: int
    max_nodes: int
    run_id: str


class DeviceVerdict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the generation of a rank reported of its device."""

    verdict: str
    evidence: list[str]
    generation: int


class JobState(Answer, frozen=True):
    """What a supervisor has to know of the job.

    Attributes:
        tensor_parallel_size: Ranks per replica, once a rank has said so.
        gang: Whether all ranks restart together.
        gang_generation: How often they did.
        needs_every_replica: Whether no other replica can take over a replica's share.
        draining: Whether no more work is handed out.
        abort_code: Exit code with which everything is to end now, if so.
        lost: Whether the coordinator has given this node up.
        has_jobs: Whether any predict call was opened.
        records: Directory for the run's records, where results are kept.
        progress_by_replica: How often each has made a chunk durable, or kept something of one.
        open_ranks: By rank of this node that may not leave yet: whether all it has opened is complete.
        verdicts: Last verdict on a rank's device that asks for something.
    """

    tensor_parallel_size: int | None
    gang: bool
    gang_generation: int
    needs_every_replica: bool
    draining: bool
    abort_code: int | None
    lost: bool
    has_jobs: bool
    records: str | None
    progress_by_replica: dict[int, int]
    open_ranks: dict[int, bool]
    verdicts: dict[int, DeviceVerdict]


class GetJobState(Request[JobState], frozen=True):
    """Ask for the state of the job, which renews the leases of the node."""

    node: int
    supervisor: str


class EndGeneration(Request[Done], frozen=True):
    """A generation is over, with the chunk and the units it was computing, by job and dataloader."""

    replica: int
    generation: int
    blamed: dict[LoaderKey, int]
    positions: dict[LoaderKey, UnitRange]
    exception: RaisedException | None = None
    """What the script raised there, if that is what ended it."""


class Deaths(Answer, frozen=True):
    """Workers that died in the same units, the most of any unit."""

    deaths: int


class GetDeaths(Request[Deaths], frozen=True):
    """Ask whether workers have died in these units before."""

    blamed: dict[LoaderKey, int]
    positions: dict[LoaderKey, UnitRange]


class RetireReplica(Request[Done], frozen=True):
    """A replica will not come back."""

    replica: int


class DropRanks(Request[Done], frozen=True):
    """A replica goes on without some of its ranks."""

    ranks: list[int]


class EndRank(Request[Done], frozen=True):
    """A rank has ended, and is no longer part of collectives."""

    rank: int
    why: str


class DrainReplica(Request[Done], frozen=True):
    """Hand a replica no more work."""

    replica: int
    generation: int


class AbortJob(Request[Done], frozen=True):
    """End everything, everywhere, with this exit code."""

    code: int


class GangRestarted(Answer, frozen=True):
    """The next generation of all ranks."""

    generation: int


class RestartGang(Request[GangRestarted], frozen=True):
    """Restart all ranks of the job together; repeated requests for one generation count once."""

    generation: int


class JobEnded(Answer, frozen=True):
    """The exit code of the job."""

    exit_code: int


class LeaveNode(Request[JobEnded], frozen=True):
    """All ranks of a node have ended; answered when it is known how the job ends, or at once if the node alone leaves."""

    node: int
    supervisor: str
    codes: dict[int, int]
    drained: bool = False
