"""GPUs that are not there: a stand-in for NVIDIA's management library, driven by a text file.

The real ``pynvml`` runs on top of it, so that a test covers everything down to the library's C interface. The library
is compiled with the system's C compiler the first time it is needed.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

STATE_VARIABLE = "FAKE_NVML_STATE"
SOURCE = Path(__file__).with_name("fake_nvml.c")
HEALTHY_GPU: dict[str, float | int | str] = {
    "temperature": 45,
    "temperature_slowdown": 87,
    "power_milliwatts": 250_000,
    "sm_clock_megahertz": 1980,
    "utilization_percent": 70,
    "memory_total": 85_520_809_984,
    "memory_used": 20_000_000_000,
    "clock_event_reasons": 0,
    "ecc_uncorrected": 0,
    "remap_pending": 0,
    "retirement_pending": 0,
    "pcie_replays": 0,
    "nvlinks": 4,
    "field:230": 0,
}
"""What each GPU reports until it is told otherwise; the keys are those of the state file."""


def find_compiler() -> str | None:
    """The system's C compiler, if there is one."""
    return shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc")


def build_library(directory: Path) -> Path:
    """Compile the library.

    Args:
        directory: Where it goes; a library of the same source that is there already is used.

    Returns:
        Path of ``libnvidia-ml.so.1``.

    Raises:
        FileNotFoundError: There is no C compiler.
        subprocess.CalledProcessError: The compiler failed; its messages are on standard error.
    """
    compiler = find_compiler()
    if compiler is None:
        raise FileNotFoundError("the fake NVML library needs a C compiler: install gcc, or set CC.")
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    library = directory / f"fake-nvml-{digest}" / "libnvidia-ml.so.1"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            built = Path(scratch) / library.name
            flags = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-pthread"]
            # The name by which pynvml asks for the library, so that a loaded copy answers to it.
            flags.append(f"-Wl,-soname,{library.name}")
            subprocess.run([compiler, *flags, str(SOURCE), "-o", str(built)], check=True)
            os.replace(built, library)  # test processes may build at the same time
    return library


def attach(library: str | os.PathLike[str], state_file: str | os.PathLike[str]) -> None:
    """Put a library under this process's ``pynvml``; other users of NVML in this process are not affected.

    A rank of a test job calls this with what the test's :class:`FakeNVML` has: all ranks then see the same GPUs, and the
    test changes them for all.

    Args:
        library: :attr:`FakeNVML.library`.
        state_file: :attr:`FakeNVML.state_file`.
    """
    import pynvml

    os.environ[STATE_VARIABLE] = os.fspath(state_file)
    pynvml.nvmlLib = ctypes.CDLL(os.fspath(library))
    pynvml._nvmlGetFunctionPointer_cache.clear()


class FakeNVML:
    """Some GPUs and what they report.

    Args:
        directory: Holds the state file; the library is compiled into it unless ``library`` is given.
        num_gpus: GPUs.
        library: A library made by :func:`build_library`.
    """

    def __init__(self, directory: str | os.PathLike[str], num_gpus: int = 4, library: Path | None = None):
        self.state_file = Path(directory) / "nvml-state"
        self.library = library if library is not None else build_library(Path(directory))
        self.num_gpus = num_gpus
        self._written_ns = 0
        self._values: dict[tuple[str, str], str] = {("*", k): str(v) for k, v in HEALTHY_GPU.items()}
        self._values["driver", "gpus"] = str(num_gpus)
        self._write()

    @staticmethod
    def uuid(gpu: int) -> str:
        """UUID of a GPU, as long as nothing else was set."""
        return f"GPU-00000000-0000-0000-0000-{gpu:012d}"

    def set(self, gpu: int | None, **values: Any) -> None:
        """Set what a GPU reports; every GPU if it is None. ``None`` makes a sensor unsupported.

        A value may be a ramp, ``"60..95@3"``: from 60 to 95 within three seconds of this call. Keys with characters
        that no keyword can have are set with :meth:`set_key`.
        """
        for key, value in values.items():
            self._assign("*" if gpu is None else str(gpu), key, value)
        self._write()

    def set_key(self, scope: int | str, key: str, value: Any) -> None:
        """Set one line of the state file, for example ``set_key(1, "delay:nvmlDeviceGetPowerUsage", 1500)``."""
        self._assign(str(scope), key, value)
        self._write()

    def reset(self, gpu: int) -> None:
        """Make a GPU report again what every GPU does."""
        for scope, key in list(self._values):
            if scope == str(gpu):
                del self._values[scope, key]
        self._write()

    def send_xid(self, gpu: int, xid: int) -> None:
        """Have the driver report an XID error."""
        with open(f"{self.state_file}.xids", "a", encoding="utf-8") as file:
            file.write(f"{gpu} {xid}\n")

    def attach(self) -> None:
        """Put the library under this process's ``pynvml``; see :func:`attach`."""
        attach(self.library, self.state_file)

    @staticmethod
    def detach() -> None:
        """Give ``pynvml`` the real library back, if there is one."""
        import pynvml

        pynvml.nvmlLib = None
        pynvml._nvmlGetFunctionPointer_cache.clear()
        os.environ.pop(STATE_VARIABLE, None)

    def _assign(self, scope: str, key: str, value: Any) -> None:
        self._values[scope, key] = "none" if value is None else str(value)

    def _write(self) -> None:
        text = "".join(f"{scope} {key} {value}\n" for (scope, key), value in self._values.items())
        temporary = self.state_file.with_suffix(".new")
        temporary.write_text(text, encoding="utf-8")
        # The library notices a change by inode and time; both may repeat when two changes follow within a clock tick.
        self._written_ns = max(self._written_ns + 1, time.time_ns())
        os.utime(temporary, ns=(self._written_ns, self._written_ns))
        os.replace(temporary, self.state_file)
