from __future__ import annotations

from typing import Any

from hypothesis import settings


def examples(number: int, **others: Any) -> settings:
    """Settings of a property test that runs so many examples, and a fifth of them among the fast tests."""
    return settings(max_examples=max(10, number // 5) if settings.default.max_examples < 100 else number, **others)
