"""The commands of contributors and of continuous integration: ``python -m tests.tasks NAME``, each listed in TASKS.

They run with the interpreter that runs this module, from the root of the repository, and stop at the first failure.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
"""Where this environment has its programs; it need not be activated."""

PYTEST = "python -m pytest -q -n 2 --dist worksteal"

TASKS: dict[str, tuple[str, ...]] = {
    "install": ("python -m pip install -q -e .[dev]",),
    "fast": (f"{PYTEST} -m 'not job and not slow'",),
    "all": (PYTEST,),
    "lint": ("ruff check .", "ruff format --check .", "lint-imports", "codespell"),
    "types": ("mypy",),
    "docs": ("sphinx-build -q -W --keep-going -b html docs docs/_build/html",),
    "examples": (
        "lightning run {root}/examples/embed_text.py --devices 2 --limit 200 --output embed",
        # The same again has nothing left to do, and says so.
        "sh -c 'lightning run {root}/examples/embed_text.py --devices 1 --limit 200 --output embed"
        """ | grep "0 of them in this run"'""",
        "gpuorch predictions verify embed",
        "python {root}/examples/predict_trainer.py",
        "python {root}/examples/tensor_parallel.py --devices 2",
        "gpuorch run {root}/examples/predict_fabric.py --devices 2",
    ),
}
_IN_A_SCRATCH_DIRECTORY = {"examples"}


def run(name: str, arguments: list[str]) -> int:
    """Run a task.

    Args:
        name: Which.
        arguments: Added to its last command, such as the tests to run.

    Returns:
        The exit code of the first command that fails, else 0.
    """
    environment = {
        "OMP_NUM_THREADS": "1", **os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        directory = scratch if name in _IN_A_SCRATCH_DIRECTORY else ROOT
        commands = [shlex.split(command.format(root=ROOT)) for command in TASKS[name]]
        commands[-1] += arguments
        for command in commands:
            print("$", shlex.join(command), flush=True)
            code = subprocess.run(command, cwd=directory, env=environment, check=False).returncode
            if code:
                return code
    return 0


def main() -> int:
    """The command line."""
    if len(sys.argv) < 2 or sys.argv[1] not in TASKS:
        for name, commands in TASKS.items():
            print(f"{name:9} {'; '.join(commands)}")
        return 2
    return run(sys.argv[1], sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
