"""Messages as bytes: MessagePack, tagged by type and decoded strictly; errors travel as :class:`Refused`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import reduce
from operator import or_
from typing import Any, get_args

import msgspec

from lightning_gpuorch import errors
from lightning_gpuorch.control.messages import collectives, leases, nodes, ranks, recovery
from lightning_gpuorch.control.messages.base import Answer, AnswerT, Message, Refused, Request
from lightning_gpuorch.errors import ControlPlaneError, GPUOrchError, ProtocolError

_SHOWN_CHARACTERS = 80
_MODULES = (collectives, leases, nodes, ranks, recovery)


def _concrete(base: type[Message]) -> Iterator[type[Message]]:
    """Types that are sent, which are those without subclasses."""
    for subclass in base.__subclasses__():
        yield from (_concrete(subclass) if subclass.__subclasses__() else (subclass,))


REQUEST_TYPES: tuple[type[Message], ...] = tuple(_concrete(Request))
ANSWER_TYPES: tuple[type[Message], ...] = tuple(_concrete(Answer))
ANSWERS_OF: dict[type[Message], Any] = {
    request: get_args(request.__orig_bases__[0])[0]  # type: ignore[attr-defined]
    for request in REQUEST_TYPES
}
"""By request: the type of its answer, or a union of types."""

_PLAIN_TYPES: tuple[type[Any], ...] = (str, int, float, list, tuple, dict)


def _plain(value: Any) -> Any:
    """The plain form of a value whose type is a subclass of a plain one, as that of ``torch.__version__`` is."""
    for kind in _PLAIN_TYPES:
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(f"{value!r} of type {type(value).__name__} is no plain data")


_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)
_decoders = {
    Request: msgspec.msgpack.Decoder(reduce(or_, REQUEST_TYPES)),
    Answer: msgspec.msgpack.Decoder(reduce(or_, ANSWER_TYPES)),
}


def encode_into(message: Message, buffer: bytearray, offset: int = 0) -> None:
    """Append a message to a buffer.

    Raises:
        ProtocolError: A value cannot be sent.
    """
    try:
        _encoder.encode_into(message, buffer, offset)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ProtocolError(f"{type(message).__name__} cannot be sent: {error}") from None


def decode_request(data: bytes) -> Request[Any]:
    """Read a request.

    Raises:
        ProtocolError: It is malformed, or of a type that is not known.
    """
    return _decode(Request, data)  # type: ignore[no-any-return]


def decode_answer(data: bytes, request: Request[AnswerT]) -> AnswerT:
    """Read the answer to a request.

    Raises:
        GPUOrchError: The request was refused.
        ProtocolError: The answer is malformed, or answers something else.
    """
    answer = _decode(Answer, data)
    if isinstance(answer, Refused):
        raise error_of(answer)
    if not isinstance(answer, ANSWERS_OF[type(request)]):
        raise ProtocolError(f"{type(request).__name__} was answered with {type(answer).__name__}")
    return answer  # type: ignore[no-any-return]


def refused(error: GPUOrchError) -> Refused:
    """An error for the way to the asking side."""
    return Refused(
        error=type(error).__name__,
        message=_printable(str(error)),
        differences=tuple(_printable(line) for line in getattr(error, "differences", ())),
        indices=tuple(getattr(error, "indices", ())),
    )


def error_of(answer: Refused) -> GPUOrchError:
    """The error that :func:`refused` has described."""
    kind = getattr(errors, answer.error, None)
    if not (isinstance(kind, type) and issubclass(kind, GPUOrchError)):
        return ControlPlaneError(f"{answer.error}: {answer.message}")
    if issubclass(kind, errors.JobMismatchError):
        return kind(answer.message, answer.differences)
    if issubclass(kind, errors.MissingPredictionsError):
        return kind(answer.message, answer.indices)
    try:
        return kind(answer.message)
    except TypeError:  # it takes more than a message, which stays behind
        return ControlPlaneError(f"{answer.error}: {answer.message}")


def _printable(text: str) -> str:
    """Text that can be encoded: a path may hold bytes that are no characters."""
    return text.encode("utf-8", "backslashreplace").decode()


def _decode(kind: type[Message], data: bytes) -> Any:
    try:
        return _decoders[kind].decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(_describe(kind, data, error)) from None


def _describe(kind: type[Message], data: bytes, error: Exception) -> str:
    """What is wrong with a message: its type, the field and the value."""
    noun = kind.__name__.lower()
    try:
        raw = msgspec.msgpack.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return f"a malformed {noun} of {len(data)} bytes was received, which begins with {data[:16]!r}: {error}"
    name = raw.get("type") if isinstance(raw, dict) else None
    text, _, path = str(error).partition(" - at `$")
    value = raw
    for key, index in re.findall(r"\.(\w+)|\[(\d+)\]", path.rstrip("`")):  # a key of a dict has no name in the path
        try:
            value = value[key or int(index)]
        except (LookupError, TypeError):
            break
    where = f"{name or noun}{path.rstrip('`')}"
    shown = repr(value)
    if len(shown) > _SHOWN_CHARACTERS:
        shown = shown[:_SHOWN_CHARACTERS] + "..."
    return f"a malformed {noun} was received: {where}: {text}; the value is {shown}"
