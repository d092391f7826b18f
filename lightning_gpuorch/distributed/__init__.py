"""Process groups of a replica, and the control plane of the whole job."""

from lightning_gpuorch.distributed.collectives import CollectiveLedger, ControlCollectives, one_per_replica
from lightning_gpuorch.distributed.process_group import MESH_AXES, ProcessGroupManager
from lightning_gpuorch.distributed.recovery_ledger import RecoveryLedger
from lightning_gpuorch.distributed.topology import Topology
from lightning_gpuorch.distributed.wire import (
    Channel,
    ControlServer,
    LocalChannel,
    Message,
    RemoteChannel,
    answered,
    refused,
)

__all__ = [
    "MESH_AXES",
    "Channel",
    "CollectiveLedger",
    "ControlCollectives",
    "ControlServer",
    "LocalChannel",
    "Message",
    "ProcessGroupManager",
    "RecoveryLedger",
    "RemoteChannel",
    "Topology",
    "answered",
    "one_per_replica",
    "refused",
]
