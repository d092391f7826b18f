"""The store through which the ranks of a tensor-parallel group find each other: the coordinator's, over the control plane.

A store of torch's own that listens can be read by every user of the host, and one in a file is looked at every 10 ms, which
is most of the time that new connections of a group take.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from lightning_gpuorch.control.messages.ranks import Lookup, Publish
from lightning_gpuorch.control.transport import Channel


class CoordinatorStore(dist.Store):
    """Keys of one group. Has what connecting needs: keys are set once, and waited for.

    Args:
        channel: Connection to the coordinator.
        prefix: Of the keys, used by no other group or generation.
        timeout_seconds: Longest wait for a key.
    """

    def __init__(self, channel: Channel, prefix: str, timeout_seconds: float):
        super().__init__()
        self._channel, self._prefix, self._timeout_seconds = channel, prefix, timeout_seconds
        self.set_timeout(timedelta(seconds=timeout_seconds))

    def set(self, key: str, value: str | bytes) -> None:
        """Set a key."""
        content = value.encode() if isinstance(value, str) else value
        self._channel.call(Publish(key=self._prefix + key, value=content), timeout_seconds=self._timeout_seconds)

    def get(self, key: str) -> bytes:
        """The value of a key, once another rank has set it."""
        return self._look_up(key, self._timeout_seconds)

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        """The values of several keys."""
        return [self.get(key) for key in keys]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Wait until all keys are set."""
        for key in keys:
            self._look_up(key, self._timeout_seconds if timeout is None else timeout.total_seconds())

    def _look_up(self, key: str, timeout_seconds: float) -> bytes:
        found: bytes = self._channel.call(Lookup(key=self._prefix + key), timeout_seconds=timeout_seconds).value
        return found
