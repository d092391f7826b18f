import pytest

from lightning_gpuorch.devices.pool import DevicePool
from lightning_gpuorch.errors import ConfigurationError


def test_a_bad_device_is_replaced_by_a_spare_and_never_used_again():
    pool = DevicePool.of_indices([0, 1], spares=[2])
    assert pool.condemn(1, "fell off the bus").index == 1
    assert pool.replace(1).index == 2
    assert pool.condemn(1, "again").index == 2
    assert pool.replace(1) is None
    assert pool.free == []


def test_healthy_devices_of_a_retired_replica_serve_others():
    pool = DevicePool.of_indices([0, 1, 2, 3])
    pool.condemn(1, "bad")
    assert pool.replace(1) is None
    assert [device.index for device in pool.release([0, 1])] == [0]
    pool.condemn(2, "bad as well")
    assert pool.replace(2).index == 0
    assert {rank: device.index for rank, device in pool.holders.items()} == {2: 0, 3: 3}


def test_places_on_the_cpu_are_no_spares():
    pool = DevicePool.of_indices([None, None])
    assert pool.condemn(0, "bad").fault == "bad"
    assert pool.release([1]) == []
    assert pool.replace(0) is None


def test_a_spare_in_use_is_refused():
    with pytest.raises(ConfigurationError, match=r"devices \[1\] are in use"):
        DevicePool.of_indices([0, 1], spares=[1, 2])
