"""Certificates for tests, made with the ``openssl`` command."""

from __future__ import annotations

import subprocess
from pathlib import Path


def make_authority(directory: Path, name: str) -> None:
    """An authority: ``NAME.pem`` and ``NAME.key``."""
    _openssl(
        "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}",
        "-keyout", f"{directory / name}.key", "-out", f"{directory / name}.pem",
    )  # fmt: skip


def make_certificate(directory: Path, authority: str, name: str) -> None:
    """A certificate of an authority: ``NAME.pem`` and ``NAME.key``."""
    path, by = directory / name, directory / authority
    _openssl(
        "req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}", "-keyout", f"{path}.key", "-out", f"{path}.csr"
    )
    _openssl(
        "x509", "-req", "-in", f"{path}.csr", "-CA", f"{by}.pem", "-CAkey", f"{by}.key", "-CAcreateserial",
        "-days", "2", "-out", f"{path}.pem",
    )  # fmt: skip


def _openssl(*arguments: str) -> None:
    subprocess.run(("openssl", *arguments), check=True, capture_output=True, timeout=60)
