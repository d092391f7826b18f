"""The one place where what a user gives as a directory or file becomes a path: of this machine, or in an object store.

``~`` is expanded and ``file:`` URLs are decoded. Where predictions are kept, URLs of object stores (``s3://``, ``gs://``,
``az://``, ``memory://``) are taken as well; elsewhere, and for any other scheme, URLs are refused:
:class:`pathlib.Path` would make a local folder named ``s3:`` of them.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from lightning_gpuorch.errors import ConfigurationError

# One slash is enough: a URL that went through os.path.normpath or pathlib has only one left. Two letters at least, as one
# is a drive of Windows. "::" chains URLs, as fsspec does (simplecache::s3://bucket).
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)(?::/|::|:\\)")


_OBJECT_SCHEMES = frozenset({"s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "memory"})
_MAX_KEY_BYTES = 900
"""Of a directory's key; stores allow 1,024 with the names of the files in it."""


@dataclass(frozen=True)
class ObjectPath:
    """A directory or a file in an object store, as ``Path`` is one of this machine: plain data, which opens nothing.

    Attributes:
        root: The store: scheme and bucket (``s3://bucket``), as it was given.
        key: What follows, without slashes at its ends; empty for the bucket itself.
        options: Of the store's client; they may hold secrets, so they are not shown.
    """

    root: str
    key: str = ""
    options: tuple[tuple[str, str], ...] = dataclasses.field(default=(), repr=False)

    def __truediv__(self, name: str) -> ObjectPath:
        return dataclasses.replace(self, key=f"{self.key}/{name}" if self.key else name)

    def __str__(self) -> str:
        return f"{self.root}/{self.key}"

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> ObjectPath:
        """The directory it is in; of a bucket, the bucket itself."""
        return dataclasses.replace(self, key=self.key.rpartition("/")[0])

    def with_name(self, name: str) -> ObjectPath:
        """Another file of the same directory."""
        return self.parent / name

    @property
    def is_of_this_process(self) -> bool:
        """Whether no other process can see it."""
        return self.root.startswith("memory:")


Location = Path | ObjectPath
"""Where predictions are kept."""


def location(value: Any, name: str, options: Mapping[str, str] | None = None) -> Location:
    """Turn what a user has given as a place for predictions into a path.

    Args:
        value: As :func:`local_path` takes it, or the URL of a bucket or of a prefix in one.
        name: What it was given as, for the error message.
        options: Of the store's client, where it is an object store.

    Raises:
        ConfigurationError: It is neither, or names no bucket.
    """
    if isinstance(value, ObjectPath):
        return value if options is None else dataclasses.replace(value, options=_plain(options))
    text = str(value) if isinstance(value, (str, os.PathLike)) else ""
    url = _URL.match(text)
    if url is None or "::" in text or "\\" in text or url["scheme"].lower() not in _OBJECT_SCHEMES:
        return local_path(value, name)
    scheme = url["scheme"].lower()
    # One slash is what pathlib and os.path.normpath leave of two.
    bucket, *parts = text[len(scheme) + 1 :].lstrip("/").split("/")
    if not bucket.strip() and scheme != "memory":
        raise ConfigurationError(f"{name}={text!r} names no bucket; write {scheme}://bucket/prefix.")
    parts = [part for part in parts if part]
    if any(part in (".", "..") or not part.isprintable() for part in parts):
        raise ConfigurationError(f"{name}={text!r} has a part that no key may have: '.', '..' or a control character.")
    key = "/".join(parts)
    if len(key.encode(errors="replace")) > _MAX_KEY_BYTES:
        raise ConfigurationError(
            f"{name}={text[:60]!r}... is longer than the {_MAX_KEY_BYTES} bytes a prefix may have."
        )
    return ObjectPath(f"{scheme}://{bucket}", key, _plain(options or {}))


def _plain(options: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Options as text, in a fixed order: paths are compared, and are keys."""
    return tuple(sorted((k, str(v).lower() if isinstance(v, bool) else str(v)) for k, v in options.items()))


def options_of(path: Location) -> dict[str, str]:
    """Options of the client of the store that a path is in; none of a path of this machine."""
    return {} if isinstance(path, Path) else dict(path.options)


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
            f"{name}={text!r} is on {scheme}: storage, which cannot be used here. Use a path of this machine or of a file "
            "system that all nodes mount; predictions can be kept in s3://, gs:// and az:// buckets as well (output_dir)."
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
