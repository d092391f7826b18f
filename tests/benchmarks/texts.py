"""Real texts of skewed length that are on every machine that can run the benchmarks: no download, a fixed order.

Taken in turn until there are enough: docstrings of the standard library, paragraphs of the descriptions of installed
distributions, on Debian the entries of the system's changelogs and package descriptions, docstrings of Lightning and of
torch. Texts shorter than 20 characters and repeated ones are left out. The order is a shuffle with a fixed seed.
"""

from __future__ import annotations

import ast
import gzip
import importlib.metadata
import json
import random
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

MIN_CHARACTERS = 20
_ENTRIES_PER_CHANGELOG = 40


def docstrings(root: Path, skip: frozenset[str]) -> Iterator[str]:
    """Every docstring below a folder."""
    for path in sorted(root.rglob("*.py")):
        if skip & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield ast.get_docstring(node) or ""


def standard_library() -> Iterator[str]:
    """Docstrings of Python."""
    skip = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"})
    return docstrings(Path(sysconfig.get_paths()["stdlib"]), skip)


def descriptions() -> Iterator[str]:
    """Paragraphs of what distributions say of themselves."""
    for distribution in sorted(importlib.metadata.distributions(), key=lambda d: d.metadata["Name"].lower()):
        yield from re.split(r"\n\s*\n", str(distribution.metadata.get_payload()))


def changelogs() -> Iterator[str]:
    """Newest entries of each changelog of a Debian system."""
    for path in sorted(Path("/usr/share/doc").glob("*/changelog.Debian.gz")):
        text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
        entries = re.split(r"\n  \* ", text)[1 : 1 + _ENTRIES_PER_CHANGELOG]
        yield from (entry.split("\n\n")[0].split("\n -- ")[0] for entry in entries)


def package_descriptions() -> Iterator[str]:
    """What the packages of a Debian system are."""
    status = Path("/var/lib/dpkg/status")
    if status.exists():
        yield from re.findall(r"^Description: (.*(?:\n .*)*)", status.read_text(errors="replace"), re.MULTILINE)


def package_docstrings(name: str) -> Iterator[str]:
    """Docstrings of an installed package."""
    yield from docstrings(Path(sysconfig.get_paths()["purelib"]) / name, frozenset({"test", "tests", "testing"}))


SOURCES = {
    "standard library docstrings": standard_library,
    "descriptions of distributions": descriptions,
    "Debian changelogs": changelogs,
    "Debian package descriptions": package_descriptions,
    "Lightning docstrings": lambda: package_docstrings("lightning"),
    "torch docstrings": lambda: package_docstrings("torch"),
}


def collect(count: int) -> tuple[list[str], dict[str, int]]:
    """The texts and how many of them come from where.

    Args:
        count: Texts to collect.

    Raises:
        SystemExit: This machine has fewer.
    """
    seen: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, source in SOURCES.items():
            for text in source():
                stripped = text.strip()
                if len(stripped) >= MIN_CHARACTERS:
                    seen.setdefault(stripped, name)
            if len(seen) >= count:
                break
    if len(seen) < count:
        raise SystemExit(f"this machine has {len(seen)} texts, {count} were asked for.")
    texts = list(seen)
    random.Random(0).shuffle(texts)
    texts = texts[:count]
    return texts, dict(Counter(seen[text] for text in texts))


if __name__ == "__main__":
    collected, origins = collect(int(sys.argv[2]))
    Path(sys.argv[1]).write_text(json.dumps(collected))
    print(origins)
