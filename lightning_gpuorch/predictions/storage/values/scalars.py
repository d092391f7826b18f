"""Numbers, text, bytes, paths, points in time, enums, and other small values."""

from __future__ import annotations

import array
import datetime
import decimal
import enum
import fractions
import os
import pathlib
import struct
import uuid
import zoneinfo
from typing import Any

import torch

from lightning_gpuorch.predictions.storage.values.base import (
    INT64_MAX,
    INT64_MIN,
    Decode,
    Decoder,
    Encode,
    Encoder,
    Finder,
    Node,
    add_bytes,
    class_name,
    loaded_class,
    refuse,
)


def _encode_itself(_encoder: Encoder, value: Any, _path: str, _depth: int) -> Node:
    return value


def _encode_str(_encoder: Encoder, value: str, _path: str, _depth: int) -> Node:
    # JSON would join two lone surrogates into one character.
    try:
        value.encode()
    except UnicodeEncodeError:
        return ["str", value.encode("utf-8", "surrogatepass").hex()]
    return value


def _encode_int(_encoder: Encoder, value: int, _path: str, _depth: int) -> Node:
    # Beyond 64 bits decimal digits are slow, and Python limits how many it converts.
    return value if INT64_MIN <= value <= INT64_MAX else ["int", hex(value)]


def _encode_float(_encoder: Encoder, value: float, _path: str, _depth: int) -> Node:
    return value if value - value == 0.0 else ["float", struct.pack("<d", value).hex()]


def _encode_memoryview(encoder: Encoder, value: memoryview, path: str, _depth: int) -> Node:
    if not value.c_contiguous or len(value.format) != 1:
        raise refuse(value, path, "Return bytes(...) of it.")
    return ["memoryview", add_bytes(encoder, value.tobytes()), value.format, list(value.shape or ())]


def _decode_memoryview(decoder: Decoder, column: int, code: str, shape: list[int]) -> memoryview:
    content = memoryview(bytearray(decoder.buffer(column)))
    # An empty one has no shape that could be cast to.
    return content.cast(code, shape) if 0 not in shape else content.cast(code)  # type: ignore[call-overload,no-any-return]


def _decode_array(decoder: Decoder, column: int, code: str) -> array.array[Any]:
    values: array.array[Any] = array.array(code)
    values.frombytes(decoder.buffer(column))
    return values


_MAX_FRACTION_DIGITS = 2**14
"""Hexadecimal: to reduce a fraction takes time as the square of them."""


def _encode_fraction(encoder: Encoder, value: fractions.Fraction, path: str, _depth: int) -> Node:
    parts = [hex(value.numerator), hex(value.denominator)]
    if max(map(len, parts)) > _MAX_FRACTION_DIGITS:
        raise refuse(value, path, "Return float(...) of it.")
    return ["fraction", *parts]


def _decode_fraction(_decoder: Decoder, *parts: str) -> fractions.Fraction:
    if max(map(len, parts)) > _MAX_FRACTION_DIGITS:
        raise ValueError("a fraction has too many digits")
    above, below = (int(part, 16) for part in parts)
    return fractions.Fraction(above, below)


# --- Paths: a class of this system, and of another system its pure relative -------------------------------------------


def _encode_path(encoder: Encoder, value: pathlib.PurePath, path: str, depth: int) -> Node:
    kind = type(value).__name__
    if type(value) is not getattr(pathlib, kind, None):
        raise refuse(value, path, "Return str(...) of it.")
    return ["path", kind, _encode_str(encoder, str(value), path, depth)]


def _decode_path(decoder: Decoder, kind: str, text: Node) -> pathlib.PurePath:
    windows = {"WindowsPath", "PureWindowsPath"}
    classes: dict[str, type[pathlib.PurePath]] = {
        "PosixPath": pathlib.PurePosixPath if os.name == "nt" else pathlib.Path,
        "WindowsPath": pathlib.Path if os.name == "nt" else pathlib.PureWindowsPath,
        **dict.fromkeys(windows - {"WindowsPath"}, pathlib.PureWindowsPath),
        "PurePosixPath": pathlib.PurePosixPath,
    }
    return classes[kind](decoder.decode(text))


# --- Time -------------------------------------------------------------------------------------------------------------


def _encode_zone(encoder: Encoder, value: datetime.tzinfo, path: str, depth: int) -> Node:
    if value is datetime.timezone.utc:
        return ["utc"]
    if type(value) is datetime.timezone:
        arguments: Any = value.__getinitargs__()  # type: ignore[attr-defined]
        offset, *name = arguments
        return ["offset", [offset.days, offset.seconds, offset.microseconds], *name]
    key = getattr(value, "key", None)
    if type(value) is not zoneinfo.ZoneInfo or key is None:
        raise refuse(
            value, path, "Return times with datetime.timezone or zoneinfo.ZoneInfo, such as .astimezone() gives."
        )
    return ["zone", key]


def _encode_time(encoder: Encoder, value: datetime.datetime | datetime.time, path: str, depth: int) -> Node:
    tag = "datetime" if isinstance(value, datetime.datetime) else "time"
    zone = None if value.tzinfo is None else _encode_zone(encoder, value.tzinfo, f"{path}.tzinfo", depth)
    return [tag, value.replace(tzinfo=None, fold=0).isoformat(), zone, value.fold]


def _decode_time(
    make: type[datetime.datetime | datetime.time], decoder: Decoder, text: str, zone: Node, fold: int
) -> Any:
    return make.fromisoformat(text).replace(tzinfo=decoder.decode(zone), fold=fold)


def _decode_offset(_decoder: Decoder, offset: list[int], *name: str) -> datetime.timezone:
    return datetime.timezone(datetime.timedelta(*offset), *name)


# --- Enums ------------------------------------------------------------------------------------------------------------


def _encode_enum(encoder: Encoder, value: enum.Enum, path: str, depth: int) -> Node:
    name = value._name_ if value._name_ in type(value).__members__ else None
    return ["enum", class_name(type(value)), name, encoder.encode_part(value._value_, f"{path}.value", depth)]


def _decode_enum(decoder: Decoder, name_of_class: str, name: str | None, value: Node) -> Any:
    """The member of a class that is loaded and still has it with the same value; else the value."""
    cls, plain = loaded_class(name_of_class), decoder.decode(value)
    if cls is None or not issubclass(cls, enum.Enum):
        return plain
    if name is None:
        return cls(plain) if issubclass(cls, enum.Flag) else plain
    member = cls.__members__.get(name)
    try:
        return member if member is not None and bool(member._value_ == plain) else plain
    except (RuntimeError, ValueError):  # values that have no single answer, such as tensors
        return member


# --- torch ------------------------------------------------------------------------------------------------------------

_TORCH_CONSTANTS = (torch.dtype, torch.layout, torch.memory_format)


def _encode_torch_constant(_encoder: Encoder, value: Any, _path: str, _depth: int) -> Node:
    return ["torch", str(value).removeprefix("torch.")]


def _decode_torch_constant(_decoder: Decoder, name: str) -> Any:
    value = vars(torch).get(name)
    if not isinstance(value, _TORCH_CONSTANTS):
        raise TypeError(f"torch.{name} is no constant")
    return value


ENCODERS: dict[type, Encode] = {
    type(None): _encode_itself,
    bool: _encode_itself,
    str: _encode_str,
    int: _encode_int,
    float: _encode_float,
    complex: lambda _e, value, _p, _d: ["complex", struct.pack("<dd", value.real, value.imag).hex()],
    bytes: lambda encoder, value, _p, _d: ["bytes", add_bytes(encoder, value)],
    bytearray: lambda encoder, value, _p, _d: ["bytearray", add_bytes(encoder, bytes(value))],
    memoryview: _encode_memoryview,
    array.array: lambda encoder, value, _p, _d: ["array", add_bytes(encoder, value.tobytes()), value.typecode],
    type(...): lambda _e, _v, _p, _d: ["ellipsis"],
    decimal.Decimal: lambda _e, value, _p, _d: ["decimal", str(value)],
    fractions.Fraction: _encode_fraction,
    uuid.UUID: lambda _e, value, _p, _d: ["uuid", value.hex],
    datetime.datetime: _encode_time,
    datetime.time: _encode_time,
    datetime.date: lambda _e, value, _p, _d: ["date", value.isoformat()],
    datetime.timedelta: lambda _e, value, _p, _d: ["timedelta", value.days, value.seconds, value.microseconds],
    torch.device: lambda _e, value, _p, _d: ["device", str(value)],
    **dict.fromkeys(_TORCH_CONSTANTS, _encode_torch_constant),
}

FINDERS: list[Finder] = [
    (lambda value: isinstance(value, enum.Enum), _encode_enum),
    (lambda value: isinstance(value, pathlib.PurePath), _encode_path),
    (lambda value: type(value) in (datetime.timezone, zoneinfo.ZoneInfo), _encode_zone),
]

DECODERS: dict[str, Decode] = {
    "str": lambda _d, text: str(bytes.fromhex(text), "utf-8", "surrogatepass"),
    "int": lambda _d, digits: int(digits, 16),
    "float": lambda _d, raw: struct.unpack("<d", bytes.fromhex(raw))[0],
    "complex": lambda _d, raw: complex(*struct.unpack("<dd", bytes.fromhex(raw))),
    "bytes": lambda decoder, column: bytes(decoder.buffer(column)),
    "bytearray": lambda decoder, column: bytearray(decoder.buffer(column)),
    "memoryview": _decode_memoryview,
    "array": _decode_array,
    "ellipsis": lambda _d: ...,
    "decimal": lambda _d, text: decimal.Decimal(text),
    "fraction": _decode_fraction,
    "uuid": lambda _d, digits: uuid.UUID(hex=digits),
    "path": _decode_path,
    "datetime": lambda decoder, *parts: _decode_time(datetime.datetime, decoder, *parts),
    "time": lambda decoder, *parts: _decode_time(datetime.time, decoder, *parts),
    "date": lambda _d, text: datetime.date.fromisoformat(text),
    "timedelta": lambda _d, *parts: datetime.timedelta(*parts),
    "utc": lambda _d: datetime.timezone.utc,
    "offset": _decode_offset,
    "zone": lambda _d, key: zoneinfo.ZoneInfo(key),
    "enum": _decode_enum,
    "device": lambda _d, text: torch.device(text),
    "torch": _decode_torch_constant,
}
