from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tp_ranks import ProcessRanks


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessRanks]:
    ranks = ProcessRanks(2, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()
