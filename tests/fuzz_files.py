"""Files that somebody else has made: each is read or refused with the project's own error, in 2 s and 256 MiB.

The bytes of a file itself do not count: a part is read as a whole.

``python -m tests.fuzz_files --mutations 100000 --seed 1`` changes one file after another, with right checksums, and has
everything read it that reads it in earnest. Each is read in a child process that is watched from outside. What is found is
printed with the number of the change; ``--only NUMBER`` repeats it, with the traceback.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import json
import os
import random
import resource
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SECONDS = 2.0
BYTES = 256 * 2**20
_ADDRESS_SPACE_BYTES = 2 * 2**30
"""What a reader may reserve beyond what is in use before: more raises MemoryError, which counts as too much."""
_HANG_SECONDS, _START_SECONDS = 60.0, 300.0
_CHANGES_PER_CHILD = 5000
_ROOT = Path(__file__).parent.parent


def values() -> list[Any]:
    """Outputs of every type that can be stored."""
    from tests.predictions import test_values as known

    plain: list[Any] = [
        None, 1, 2**70, 0.5, "text", b"raw", [1, 2, "x"], ("a", 1), {"a": 1, "b": [2.0]}, list(range(40)), ["word"] * 30,
        [b"a"] * 20, [True] * 20, [0.5] * 20,
    ]  # fmt: skip
    tensors = known.torch.arange(12.0).reshape(3, 4)
    more: list[Any] = [
        tensors, tensors.bfloat16(), tensors.to(known.torch.complex128), tensors.numpy(), known.jagged(),
        known.torch.quantize_per_tensor(tensors, 0.1, 3, known.torch.qint8), tensors.max(dim=1),
        known.Item(known.pathlib.Path("x"), known.datetime.datetime.min, [1]),
    ]  # fmt: skip
    with contextlib.suppress(ImportError):
        import polars

        more.append(polars.DataFrame({"a": [1, None], "b": ["x", "y"], "c": [[1], [2, 3]]}))
    return [*plain, *more, *known.SCALARS, *known.CONTAINERS, *known.ARRAYS, *known.TABLES]


class Fuzzer:
    """Changes files and reads them, each change by its number.

    Args:
        directory: Scratch, on a disk that is in memory if there is one.
        seed: Replays all changes.
    """

    def __init__(self, directory: Path, seed: str):
        from tests.support import hostile_files

        hostile_files.quiet()
        self._files, self._seed = hostile_files, seed
        self._clean, self._used = directory / "clean", directory / "used"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            hostile_files.write_files(self._clean, values())
        self._targets = hostile_files.targets(self._clean)
        self._last: Any = None
        self._is_disturbed = True
        tempfile.tempdir = str(self._used / "tmp")

    def change(self, number: int) -> tuple[Any, Any, str]:
        """Change one of the files, the others being as they were; returns which, who is to read it, and how it is changed."""
        rng = random.Random(f"{self._seed}/{number}")
        target = rng.choice(self._targets)
        self._refresh(target)
        path = self._used / target.path
        if rng.random() < 0.04:
            how = self._files.mutations.replace_by_no_file(rng, path)
        else:
            how = target.change.__name__
            try:
                raw = target.change(rng, path.read_bytes())
            except RecursionError:  # Python cannot copy or write what has come of it
                raw, how = b"[" * 100_000, "brackets"
            path.unlink()
            path.write_bytes(raw)
        return target, rng.choice(target.readers), how

    def warm_up(self) -> None:
        """Have everything read as it is: what is imported by it is not counted later."""
        for target in {target.name: target for target in self._targets}.values():
            for reader in target.readers:
                self._refresh(target)
                with contextlib.suppress(*self._files.ALLOWED):
                    self.read(target, reader)

    def _refresh(self, target: Any) -> None:
        """Fresh files: links, since nothing writes into a file that is there."""
        last, self._last = self._last, target
        if last is not None and not self._is_disturbed:
            self._restore(last.path)
            return
        shutil.rmtree(self._used, ignore_errors=True)
        shutil.copytree(self._clean, self._used, copy_function=os.link)
        self._is_disturbed = False

    def _restore(self, path: str) -> None:
        changed = self._used / path
        if changed.is_dir() and not changed.is_symlink():
            shutil.rmtree(changed)
        else:
            changed.unlink(missing_ok=True)
        os.link(self._clean / path, changed)
        changed.with_name(f".{changed.name}").unlink(missing_ok=True)

    def read(self, target: Any, reader: Any) -> None:
        """Have a file read."""
        # Whoever goes on with a job sets things aside in it.
        self._is_disturbed |= getattr(reader, "__name__", "") in self._files.DISTURBING
        with _silence():
            reader(self._used, target.path)

    def run(self, number: int, show: bool = False) -> dict[str, Any]:
        """Make a change and have it read; returns what that has cost, and what was wrong."""
        target, reader, how = self.change(number)
        name = getattr(reader, "__name__", "")
        file_bytes = _bytes_in(self._used / target.path)
        result: dict[str, Any] = {"number": number, "target": target.name, "how": how, "reader": name}
        gc.collect() if number % 50 == 0 else None
        before = _peak(reset=True)
        began, cpu = time.monotonic(), time.process_time()
        try:
            self.read(target, reader)
            result["outcome"] = "read"
        except self._files.ALLOWED as error:
            result["outcome"] = "refused"
            result["memory_error"] = _is_memory_error(error)
            if show:
                print(f"{name}: {type(error).__name__}: {str(error)[:500]}")
        except Exception as error:  # noqa: BLE001 - which it is is what is to be found
            result["outcome"] = "foreign"
            result["error"] = f"{type(error).__name__} at {_place(error)}: {str(error)[:60]!r}"
            result["memory_error"] = _is_memory_error(error)
            if show:
                traceback.print_exc()
        result["seconds"], result["cpu"] = time.monotonic() - began, time.process_time() - cpu
        result["bytes"] = _peak() - before
        result["file_bytes"] = file_bytes
        return result


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def _peak(reset: bool = False) -> int:
    """The most memory this process has had resident since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _bytes_in(path: Path) -> int:
    """What a file has on its disk: a sparse one may claim any length."""
    found = path.lstat()
    return min(found.st_size, 512 * found.st_blocks) if stat.S_ISREG(found.st_mode) else 0


def _is_memory_error(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError) or "allocate" in str(error)[:300]:
            return True
        error = error.__cause__ or error.__context__
    return False


def _place(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "lightning_gpuorch" in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"


class Child:
    """A process of its own that runs a stretch of changes, and tells of each before and after it.

    Not a fork: thread pools of polars do not survive one.
    """

    def __init__(self, seed: str, numbers: range):
        command = [sys.executable, "-m", "tests.fuzz_files", "--child", "--seed", seed, "--first", str(numbers.start)]
        self._process = subprocess.Popen(
            [*command, "--mutations", str(len(numbers))], stdout=subprocess.PIPE, cwd=_ROOT, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self._rest = b""

    def results(self) -> Iterator[dict[str, Any] | None]:
        """What the child tells; None where nothing came for too long."""
        assert self._process.stdout is not None
        limit_seconds = _START_SECONDS
        while True:
            ready, _, _ = select.select([self._process.stdout], [], [], limit_seconds)
            if not ready:
                yield None
                return
            data = os.read(self._process.stdout.fileno(), 2**16)
            if not data:
                return
            limit_seconds = _HANG_SECONDS
            *lines, self._rest = (self._rest + data).split(b"\n")
            yield from map(json.loads, lines)

    def end(self) -> int:
        """Wait for it a little, and kill it; returns its status as :class:`subprocess.Popen` does."""
        assert self._process.stdout is not None
        self._process.stdout.close()
        try:
            return self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait(30)


def run_as_child(seed: str, numbers: range) -> None:
    """Run changes and tell of each on standard output."""
    out = os.fdopen(os.dup(1), "w")
    with fuzzer(seed) as one:
        _limit_address_space()
        for number in numbers:
            print(json.dumps({"number": number}), file=out, flush=True)
            print(json.dumps(one.run(number)), file=out, flush=True)


def _limit_address_space() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _ADDRESS_SPACE_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class Findings:
    """What was found, and figures."""

    def __init__(self) -> None:
        self.changes = 0
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.by_target: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.problems: dict[str, list[int]] = collections.defaultdict(list)
        self.most = {"seconds": 0.0, "cpu": 0.0, "bytes": 0, "file_bytes": 0}
        self.large = 0

    def add(self, result: dict[str, Any]) -> None:
        """Judge what one reader did."""
        number, where = result["number"], f"{result['target']} by {result['reader']}"
        self.outcomes[result["outcome"]] += 1
        self.by_target[result["target"]][result["outcome"]] += 1
        for name in self.most:
            self.most[name] = max(self.most[name], result[name])
        if result["outcome"] == "foreign":
            self.problems[f"foreign: {where}: {result['error']}"].append(number)
        if result["cpu"] > SECONDS:
            self.problems[f"slow: {where} ({result['how']})"].append(number)
        self.large += result["bytes"] > BYTES
        if result["bytes"] - result["file_bytes"] > BYTES or result.get("memory_error"):
            self.problems[f"memory: {where} ({result['how']})"].append(number)

    def summary(self) -> str:
        """All of it, as text."""
        lines = [f"{self.changes} changed files: {dict(self.outcomes)}"]
        lines += [f"  {name}: {dict(counts)}" for name, counts in sorted(self.by_target.items())]
        most = self.most
        lines.append(
            f"at most {most['cpu']:.2f} s of CPU time ({most['seconds']:.2f} s), {most['bytes'] / 2**20:.0f} MiB; "
            f"{self.large} took more than {BYTES / 2**20:.0f} MiB with the bytes of the file; the largest file has "
            f"{most['file_bytes'] / 2**20:.0f} MiB"
        )
        for problem, numbers in sorted(self.problems.items(), key=lambda item: -len(item[1])):
            lines.append(f"{len(numbers)}x {problem} --only {' '.join(map(str, numbers[:3]))}")
        lines.append(f"{sum(map(len, self.problems.values()))} problems")
        return "\n".join(lines)


def fuzz(seed: str, numbers: range, progress: bool = False) -> Findings:
    """Run changes in watched child processes, one after the other."""
    findings = Findings()
    upcoming = numbers
    while upcoming:
        stretch = upcoming[:_CHANGES_PER_CHILD]
        child = Child(seed, stretch)
        at, doing = stretch[0] - 1, "its start"
        for result in child.results():
            if result is None:
                findings.problems[f"hang: {doing}"].append(at)
                break
            findings.changes += result["number"] != at
            at, doing = result["number"], f"{result.get('target')} after {result.get('reader')}"
            if "outcome" in result:
                findings.add(result)
        code = child.end()
        if at < stretch[0]:
            raise RuntimeError(f"a child did not come to its first change; it ended with {code}")
        if code not in (0, -signal.SIGKILL):
            findings.problems[f"the child ended with {code}: {doing}"].append(at)
        upcoming = range(at + 1, numbers.stop)
        if progress:
            print(f"{findings.changes} changes, {sum(map(len, findings.problems.values()))} problems", flush=True)
    return findings


@contextlib.contextmanager
def fuzzer(seed: str) -> Iterator[Fuzzer]:
    """A fuzzer with scratch files of its own."""
    before = tempfile.tempdir
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    scratch = Path(tempfile.mkdtemp(prefix="gpuorch-fuzz-", dir=place))
    try:
        made = Fuzzer(scratch, seed)
        made.warm_up()
        yield made
    finally:
        tempfile.tempdir = before
        shutil.rmtree(scratch, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=100_000, help="how many files to change")
    parser.add_argument("--seed", default="1", help="replays all changes")
    parser.add_argument("--first", type=int, default=0, help="number of the first change")
    parser.add_argument("--only", type=int, nargs="*", help="run these changes here, and print tracebacks")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    numbers = range(options.first, options.first + options.mutations)
    if options.child:
        run_as_child(options.seed, numbers)
        return 0
    if options.only:
        with fuzzer(options.seed) as one:
            for number in options.only:
                print(json.dumps(one.run(number, show=True)))
        return 0
    findings = fuzz(options.seed, numbers, progress=True)
    print(findings.summary())
    return 1 if findings.problems else 0


if __name__ == "__main__":
    sys.exit(main())
