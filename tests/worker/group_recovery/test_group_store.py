"""The coordinator as the store of a group."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import PrefixStore

from lightning_gpuorch.control.coordinator import Coordinator
from lightning_gpuorch.control.transport import LocalChannel
from lightning_gpuorch.errors import ControlPlaneTimeoutError
from lightning_gpuorch.worker.group_store import CoordinatorStore


def test_keys_are_waited_for_and_groups_do_not_see_each_other() -> None:
    channel = LocalChannel(Coordinator(2))
    store = CoordinatorStore(channel, "replica-0/1/", 5.0)
    epoch = PrefixStore("epoch-3", store)  # torch's own code in between, as in a group
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(store.get, "epoch-3/address")
        epoch.set("address", b"\x00\xff")
        assert waiting.result(5) == b"\x00\xff"
    assert epoch.multi_get(["address", "address"]) == [b"\x00\xff"] * 2
    with pytest.raises(ControlPlaneTimeoutError):
        store.wait(["nothing"], timedelta(seconds=0.05))
    with pytest.raises(ControlPlaneTimeoutError):
        CoordinatorStore(channel, "replica-0/2/", 0.05).get("epoch-3/address")
