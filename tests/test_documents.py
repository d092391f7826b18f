"""What documents for contributors say exists, exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_PATH = re.compile(r"(?:lightning_gpuorch|tests|docs|examples)/[\w./-]*[\w/]")


def paths_in(text: str) -> set[str]:
    return set(_PATH.findall(text))


@pytest.mark.parametrize(
    "document", ["docs/architecture.md", "docs/contributing.md", ".github/PULL_REQUEST_TEMPLATE.md"]
)
def test_every_path_exists(document):
    paths = paths_in((ROOT / document).read_text())
    missing = {path for path in paths if not (ROOT / path).exists()}
    assert not missing


def test_architecture_answers_where_things_are():
    """The files a newcomer asks for first, and every room of the package."""
    paths = paths_in((ROOT / "docs/architecture.md").read_text())
    rooms = {
        f"lightning_gpuorch/{p.name}/" for p in (ROOT / "lightning_gpuorch").iterdir() if (p / "__init__.py").exists()
    }
    assert len(rooms) >= 10
    assert rooms <= paths
    assert {
        "lightning_gpuorch/worker/oom/halving.py",
        "lightning_gpuorch/supervisor/restart_policy.py",
        "lightning_gpuorch/predictions/storage/files.py",
        "lightning_gpuorch/telemetry/metrics/exporter.py",
    } <= paths


def test_files_named_in_diagrams_exist():
    tails = {
        tail
        for diagram in (ROOT / "docs/architecture").glob("*.svg")
        for tail in re.findall(r"[\w/]+\.py", diagram.read_text())
    }
    files = [path.as_posix() for path in (ROOT / "lightning_gpuorch").rglob("*.py")]
    assert tails
    assert not {tail for tail in tails if not any(file.endswith(f"/{tail}") for file in files)}


def test_the_documented_commands_are_those_there_are():
    from tests.tasks import TASKS

    documented = re.findall(r"python -m tests\.tasks (\w+)", (ROOT / "docs/contributing.md").read_text())
    assert set(documented) == set(TASKS)


def test_every_entry_of_the_slow_tests_exists():
    from tests.conftest import SLOW

    for entry in SLOW:
        module, _, function = entry.partition("::")
        assert f"def {function}" in (ROOT / "tests" / module).read_text(), entry
