"""Recovery inside a tensor-parallel group on NCCL: two ranks on one GPU, whose memory really runs out."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks.group_recovery import KINDS, campaign, on_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

FAULTS = 12


@pytest.mark.timeout(200)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["drain", "abort"])
def test_out_of_memory_on_any_rank_is_mended_in_place(way: str, kind: str) -> None:
    results = on_ranks(2, campaign, FAULTS, kind, 1, way=way, backend="nccl", timeout_seconds=180)
    for result in results:
        print({name: value for name, value in result.items() if name != "outputs"})
        assert result["equal"] == result["injected"] == result["cut"] == FAULTS
        assert result["checksum"] == results[0]["checksum"]
        assert result["recoveries"] == results[0]["recoveries"] >= FAULTS
        # The first ones know too little to drain.
        least = FAULTS - 3 if kind == "plain" else 1
        assert result["drained"] >= least if way == "drain" else result["drained"] == 0
        assert result["end"]["device_kib"] - result["start"]["device_kib"] < 1024
        assert result["end"]["threads"] <= result["start"]["threads"]
