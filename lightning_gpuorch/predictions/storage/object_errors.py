"""What an object store says when it refuses: as an ``OSError``, in few words, and whether to try again helps."""

from __future__ import annotations

import errno
import re

from obstore import exceptions

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([^<]{1,80})</Code>")
_MESSAGE = re.compile(r"<Message>([^<]{1,300})")
_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|bucket does not exist", re.IGNORECASE)
_NOT_NOW = frozenset({408, 409, 425, 429})
"""Status codes of requests that may be sent again as they are; so may those from 500 on, but for what is not supported."""
_UNSUPPORTED = frozenset({501, 505})
_CREDENTIALS_FROM_HOST = ("169.254.169.254", "169.254.170.2", "metadata.google.internal")

NO_BUCKET = errno.ENXIO
"""Of the error where there is no such bucket."""
NOT_SUPPORTED = errno.ENOTSUP
"""Of the error where the store does not know such a request."""


def status_of(error: Exception) -> int | None:
    """The status code that the store has answered with; None if there was no answer."""
    found = _STATUS.search(str(error))
    return None if found is None else int(found[1])


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later: no answer, or one that says so."""
    if not isinstance(error, exceptions.GenericError):
        return False
    status = status_of(error)
    return status is None or status in _NOT_NOW or (status >= 500 and status not in _UNSUPPORTED)


def as_os_error(error: Exception) -> OSError:
    """The error as one of the operating system's kind; ``FileNotFoundError`` only where the file is what is missing."""
    said = in_words(error)
    if _NO_BUCKET.search(str(error)):
        return OSError(NO_BUCKET, "there is no such bucket")
    if isinstance(error, (FileNotFoundError, exceptions.NotFoundError)):
        return FileNotFoundError(errno.ENOENT, said)
    if isinstance(error, (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)):
        return PermissionError(errno.EACCES, said)
    if isinstance(error, exceptions.NotSupportedError) or status_of(error) in _UNSUPPORTED:
        return OSError(NOT_SUPPORTED, said)
    return OSError(errno.EIO, said)


def in_words(error: Exception) -> str:
    """What is of use in the many lines of an error: the answer's status, code and message, or the first line."""
    text = str(error).partition("Debug source:")[0].strip()
    if any(host in text for host in _CREDENTIALS_FROM_HOST):
        return "no credentials were found: neither in the environment nor in storage_options, and this host offers none"
    status, code, message = status_of(error), _CODE.search(text), _MESSAGE.search(text)
    if status is not None and code is not None:
        return f"{status} {code[1]}" + (f": {message[1].strip()}" if message else "")
    return " ".join(text.split())[:400]
