"""The one place where what a user gives as a directory or file becomes a path of this machine.

``~`` is expanded, ``file:`` URLs are decoded, and URLs of other storage (``s3://``, ``gs://``, ``memory://``) are refused:
:class:`pathlib.Path` would make a local folder named ``s3:`` of them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from lightning_gpuorch.errors import ConfigurationError

# One slash is enough: a URL that went through os.path.normpath or pathlib has only one left. Two letters at least, as one
# is a drive of Windows. "::" chains URLs, as fsspec does (simplecache::s3://bucket).
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)(?::/|::|:\\)")


def local_path(value: Any, name: str) -> Path:
    """Turn what a user has given into a path of this machine.

    Args:
        value: Text, a ``Path`` or another :class:`os.PathLike`; a ``file:`` URL is allowed.
        name: What it was given as, for the error message.

    Returns:
        The absolute path: what is relative is seen from the directory of now, wherever the script goes later.

    Raises:
        ConfigurationError: It is no path, is empty, is a URL of other storage, or names an unknown user.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise ConfigurationError(f"{name}={value!r} is a {type(value).__name__}; expected a path.")
    # Before os.fspath: path objects of cloud libraries answer that with a copy on this machine.
    text = str(value) if _URL.match(str(value)) else os.fspath(value)
    if not isinstance(text, str):
        raise ConfigurationError(f"{name}={value!r} is a path of bytes; expected text. Decode it with os.fsdecode.")
    if not text.strip():
        raise ConfigurationError(f"{name}={value!r} is empty; expected a path. The current directory is '.'.")
    if "\0" in text:
        raise ConfigurationError(f"{name}={value!r} contains a null character, which no path can.")
    url = _URL.match(text)
    if url is not None or text.lower().startswith("file:"):
        return _from_url(text, "file" if url is None else url["scheme"].lower(), name)
    path = Path(text)
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:
        raise ConfigurationError(
            f"{name}={text!r} names the home of a user that this machine does not know. Use an absolute path; a folder of "
            f"that name is './{text}'."
        ) from error


def _from_url(text: str, scheme: str, name: str) -> Path:
    chained = _URL.match(text.rpartition("::")[2])
    if chained is not None:
        scheme = chained["scheme"].lower()
    if scheme != "file" or "::" in text:
        raise ConfigurationError(
            f"{name}={text!r} is on {scheme}: storage, where predictions cannot be kept yet. Use a directory of this "
            "machine or of a file system that all nodes mount, and copy it when the job is complete."
        )
    # Not the path of the split URL: a file's name may contain "?" and "#".
    host, rest = "", text[len("file:") :]
    if rest.startswith("//"):
        host = urlsplit(text).netloc
        rest = rest[2 + len(host) :]
    path = Path(unquote(rest))
    if host.lower() not in ("", "localhost") or not path.is_absolute():
        raise ConfigurationError(
            f"{name}={text!r} is not an absolute path of this machine; write file:///absolute/path, or the path alone."
        )
    # "//x" would stay as it is, and means something else on some systems.
    return Path("/", *path.parts[1:])
