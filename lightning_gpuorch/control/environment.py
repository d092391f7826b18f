"""What the supervisor tells a worker: the private environment variables and nothing else.

They start with an underscore, because ``GPUORCH_*`` names are the user's configuration.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

CONTROL = "_GPUORCH_CONTROL"
TOKEN = "_GPUORCH_TOKEN"
GENERATION = "_GPUORCH_GENERATION"
DEVICE = "_GPUORCH_DEVICE"
RUN_ID = "_GPUORCH_RUN_ID"
HOST = "_GPUORCH_HOST"
HEARTBEAT = "_GPUORCH_HEARTBEAT"
RUN_DIRECTORY = "_GPUORCH_RUN_DIRECTORY"
SHRUNK = "_GPUORCH_SHRUNK"


@dataclass(frozen=True)
class WorkerEnvironment:
    """A worker's place in a supervised job.

    Attributes:
        rank: Global rank.
        world_size: Ranks in the job.
        local_rank: Rank within the node.
        node_rank: Which node.
        control: Address of the coordinator.
        token: The job's shared secret.
        generation: How often this rank's replica was started before.
        device_index: Which device of the node to use; None takes the local rank's.
        run_id: Identifies the launch, the same on every rank and over restarts.
        host: Address at which other nodes reach this one.
        heartbeat: Path of the node's heartbeat table, if the supervisor judges liveness.
        local_world_size: Ranks on this node, which is the number of rows of that table.
        run_directory: Where logs, events and metrics of the run go.
        shrunk: Devices this rank's replica has left, and how many it began with, if it goes on with fewer.
    """

    rank: int
    world_size: int
    local_rank: int
    node_rank: int
    control: str
    token: str
    generation: int
    device_index: int | None
    run_id: str
    host: str
    heartbeat: str | None
    run_directory: str | None
    local_world_size: int = 1
    shrunk: tuple[int, int] | None = None

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> WorkerEnvironment | None:
        """The worker environment of this process, or None if no supervisor started it."""
        if CONTROL not in environment:
            return None
        device = environment.get(DEVICE)
        left, _, before = environment.get(SHRUNK, "").partition("/")
        return cls(
            rank=int(environment["RANK"]),
            world_size=int(environment["WORLD_SIZE"]),
            local_rank=int(environment["LOCAL_RANK"]),
            node_rank=int(environment["NODE_RANK"]),
            control=environment[CONTROL],
            token=environment[TOKEN],
            generation=int(environment[GENERATION]),
            device_index=int(device) if device else None,
            run_id=environment[RUN_ID],
            host=environment.get(HOST, "127.0.0.1"),
            heartbeat=environment.get(HEARTBEAT) or None,
            run_directory=environment.get(RUN_DIRECTORY) or None,
            local_world_size=int(environment.get("LOCAL_WORLD_SIZE", environment["WORLD_SIZE"])),
            shrunk=(int(left), int(before)) if before else None,
        )

    def variables(self) -> dict[str, str]:
        """The variables that :meth:`read` reads back."""
        return {
            "RANK": str(self.rank),
            "GLOBAL_RANK": str(self.rank),  # litdata looks here, and would take every rank for the first one
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "NODE_RANK": str(self.node_rank),
            CONTROL: self.control,
            TOKEN: self.token,
            GENERATION: str(self.generation),
            DEVICE: "" if self.device_index is None else str(self.device_index),
            RUN_ID: self.run_id,
            HOST: self.host,
            HEARTBEAT: self.heartbeat or "",
            RUN_DIRECTORY: self.run_directory or "",
            SHRUNK: "" if self.shrunk is None else f"{self.shrunk[0]}/{self.shrunk[1]}",
        }
