"""The room's public list."""

from __future__ import annotations

import inspect

import pytest

from lightning_gpuorch import predictions


@pytest.mark.parametrize("name", predictions.__all__)
def test_every_public_name_is_there_and_described(name: str) -> None:
    assert inspect.getdoc(getattr(predictions, name))


def test_the_public_list_is_whole() -> None:
    assert sorted(predictions.__all__) == sorted(predictions._HOMES)
    with pytest.raises(AttributeError, match="no_such_name"):
        predictions.no_such_name  # noqa: B018 - the access is the test
