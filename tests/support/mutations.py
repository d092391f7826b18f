"""Changes to files that keep their checksums right: what another program, or another person, could have written.

Every function takes a :class:`random.Random`, so that a seed replays a change; hypothesis can be that, too.
"""

from __future__ import annotations

import copy
import json
import os
import random
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRELUDE = struct.Struct("<4sHHI")

NUMBERS: list[Any] = [
    0, -1, 1, 2, 3, 7, 255, 2**16, 2**24, 2**28, 2**31 - 1, 2**32, 2**40, 2**53, 2**60, 2**61 - 1, 2**62, 2**63 - 1, 2**63,
    2**64, 2**200, 10**400, -2, -(2**31), -(2**60), -(2**62), -(2**63), 0.5, -0.0, 1e-5, 1e18, 1e308,
    float("nan"), float("inf"), float("-inf"),
]  # fmt: skip
OTHERS: list[Any] = [
    True, False, None, "", "x", "0", "-1", "\x00", "\ud800", "NaN", "../../etc/passwd", "a" * 5000, "builtins:object",
    "os:stat_result", "int64", "float32", "load", "_dynamo", "compiler", "O", "<U0", "V0", "<f8", "M8[ns]",
    "not_kept", [], {}, [[]], [None], {"a": 1}, [0] * 2000, [0, 1], ["x", "y"],
]  # fmt: skip
_BIG = hex(2**61 - 1)
HOSTILE_NODES: list[Any] = [
    ["range", 0, 2**40, 1], ["range", 0, 2**62, 1], ["pandas.range", 0, 2**40, 1, ["list", [None]]],
    ["set", ["range", 0, 2**40, 1]], ["frozenset", ["range", 0, 2**33, 1]], ["tuple", ["range", 0, 2**40, 1]],
    ["deque", ["range"], 2**60], ["int", "f" * 200_000], ["fraction", "f" * 200_000, "e" * 199_999],
    ["fraction", "1", "0"], ["decimal", "1E+999999999"], ["decimal", "9" * 100_000], ["zone", "../../etc/passwd"],
    ["zone", "x" * 5000], ["torch", "load"], ["torch", "nn"], ["nested", [["tensor", 0]], "compiler"],
    ["nested", [["tensor", 0]], "_dynamo"], ["nested", [["range", 0, 2**40, 1]], "float32"],
    ["sparse", "sparse_coo", [["tensor", 0], ["tensor", 1]], [2**40, 2**20]],
    ["masked", ["range", 0, 2**33, 1], None, ["ndarray", 0], False],
    ["masked", ["ndarray", 0], ["range", 0, 2**33, 1], ["ndarray", 1], False], ["recarray", ["range", 0, 5, 1]],
    ["ndarray", 0, "<U0", [2**40]], ["ndarray", 0, "V0", [2**31, 2**20]], ["ndarray", 0, "<U0", [2**28]],
    ["objects", "O", [0, 2**62], []], ["numpy", "V2000000000", ""], ["numpy", "<U0", ""],
    ["scipy", "lil_matrix", "coo", [["ndarray", 0], ["tuple", [["ndarray", 1], ["ndarray", 1]]]], [2**40, 2]],
    ["scipy", "csr_array", "coo", [["ndarray", 0], ["tuple", [["ndarray", 0], ["ndarray", 0]]]], [2**33, 2]],
    ["scipy", "lil_array", "dia", [["ndarray", 0], ["ndarray", 0]], [2**27, 2**27]],
    ["scipy", "dok_array", "dia", [["ndarray", 0], ["range", 0, 2**33, 1]], [2**27, 2**27]],
    ["image", "L", [2**20, 2**20], 0, None, [], []], ["image", "1", [2**31, 1], 0, None, [], []],
    ["image", "RGBA", [0, 2**40], 0, None, [], []],
    ["pandas.frame", [], ["pandas.range", 0, 2**40, 1, ["list", [None]]],
     ["pandas.range", 0, 2**40, 1, ["list", [None]]], ["dict", [], []]],
    ["pandas.frame", [["pandas.range", 0, 2**33, 1, ["list", [None]]]],
     ["pandas.range", 0, 1, 1, ["list", [None]]], ["pandas.range", 0, 2**33, 1, ["list", [None]]], ["dict", [], []]],
    ["pandas.series", ["pandas.range", 0, 2**33, 1, ["list", [None]]], ["pandas.range", 0, 2**33, 1, ["list", [None]]], None],
    ["pandas.levels", [["pandas.range", 0, 2**33, 1, ["list", [None]]]], ["list", [None]]],
    ["pandas.index", ["pandas.range", 0, 2**33, 1, ["list", [None]]], ["list", [None]]],
    ["pandas.index", ["range", 0, 2**33, 1], ["list", [None]], "D"], ["pandas.plain", ["range", 0, 2**33, 1]],
    ["pandas.objects", ["range", 0, 2**33, 1]], ["pandas.value", ["list", []]], ["pandas.missing", "read_csv"],
    ["dict", [["int", _BIG], ["int", hex(2 * (2**61 - 1))]], [1, 2]], ["dict", [["list", []]], [0]],
    ["dict", [["tensor", 0]], [1]], ["mapping", "collections:Counter", ["x"], [1], ["__class__"], ["x"]],
    ["mapping", "collections:OrderedDict", [1], [1], ["a"], [["item", 9]]],
    ["mapping", "os:_Environ", [1], [1], [], []], ["dataclass", "builtins:int", ["a"], [1]],
    ["namedtuple", "x:y", ["class", "def"], [1, 2]],
    ["namedtuple", "x:Y", [f"f{i}" for i in range(2000)], list(range(2000))],
    ["structseq", "time:struct_time", list(range(9))], ["structseq", "os:stat_result", list(range(10))],
    ["enum", "re:RegexFlag", None, ["int", "f" * 5000]], ["enum", "builtins:int", "x", 1], ["namespace", [1], [2]],
    ["slice", 1], ["size", [2**62, 2**62]], ["size", "abc"], ["memoryview", 0, "B", [0, 2**62]],
    ["memoryview", 0, "d", [1]], ["array", 0, "u"], ["array", 0, "Q"], ["quantized", ["tensor", 0], 0.0, 2**40],
    ["quantized", ["tensor", 0], ["tensor", 1], ["tensor", 1], 99], ["jagged", ["tensor", 0], ["tensor", 1], None, 7],
    ["tensor", 0, "complex128", [2**62, 4]], ["tensor", 0, "float8_e8m0fnu", [0, 2**62]], ["list", None, "str", 0, 1],
    ["list", None, "int", 0], ["list", None, "bool", 0], ["list", None, "float", 0, 0], ["npmasked"], ["ellipsis"],
    ["datetime", "9999-12-31T23:59:59", ["offset", [0, 1, 0]], 0], ["timedelta", 10**12, 0, 0], ["offset", [9, 9, 9]],
    ["path", "PosixPath", "\x00"], ["float", "ff"], ["complex", ""], ["str", "zz"], ["uuid", "f" * 31],
    ["device", "cuda:999999999999999999"], [], [[]], [None], [["list"]],
]  # fmt: skip


# --- JSON -------------------------------------------------------------------------------------------------------------


def change_json(rng: random.Random, tree: Any, vocabulary: list[Any] | None = None) -> Any:
    """Return a tree with one to four changes anywhere in it."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        tree = _change_once(rng, tree, vocabulary or [])
    return tree


def _change_once(rng: random.Random, tree: Any, vocabulary: list[Any]) -> Any:
    places = _places(tree)
    if not places or rng.random() < 0.03:
        return copy.deepcopy(rng.choice(NUMBERS + OTHERS + vocabulary))
    holder, key = rng.choice(places)
    value = holder[key]
    kind = rng.randrange(16)
    if kind < 3:
        holder[key] = copy.deepcopy(rng.choice(NUMBERS))
    elif kind < 5:
        holder[key] = copy.deepcopy(rng.choice(OTHERS))
    elif kind < 7 and vocabulary:
        holder[key] = copy.deepcopy(rng.choice(vocabulary))
    elif kind == 7:
        other, name = rng.choice(places)
        holder[key] = copy.deepcopy(other[name])
    elif kind == 8:
        del holder[key]
    elif kind == 9 and isinstance(holder, list):
        holder[key:key] = [copy.deepcopy(value) for _ in range(rng.choice((1, 1, 2, 50, 1000)))]
    elif kind == 10:
        other, name = rng.choice(places)
        holder[key], other[name] = copy.deepcopy(other[name]), copy.deepcopy(value)
    elif kind == 11:
        for _ in range(rng.choice((1, 1, 3, 90, 400))):
            value = [value]
        holder[key] = value
    elif kind == 12 and isinstance(holder, dict):
        holder[rng.choice(("", "x", "\ud800", "__class__", "a" * 300, key + "_"))] = holder.pop(key)
    elif kind == 13 and type(value) in (int, float):
        holder[key] = rng.choice(
            (value + 1, value - 1, -value, value * 2, float(min(value, 1e300)), str(value), value == 1, [value])
        )
    elif kind == 14 and isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        holder[key] = rng.choice(
            (value[:at], value + value, value[:at] + "\x00" + value[at:], value.upper(), value[::-1])
        )
    elif kind == 15 and isinstance(value, list):
        rng.shuffle(value)
    else:
        holder[key] = rng.choice((0, -1, 2**40, None, [], {}, ""))
    return tree


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Where something can be changed: a container, and an index or key in it."""
    found: list[tuple[Any, Any]] = []
    pending = [tree]
    while pending and len(found) < 5000:
        value = pending.pop()
        keys = range(len(value)) if isinstance(value, list) else list(value) if isinstance(value, dict) else ()
        for key in keys:
            found.append((value, key))
            pending.append(value[key])
    return found


def change_text(rng: random.Random, text: bytes) -> bytes:
    """Change JSON as text: what no JSON library would write."""
    at = rng.randrange(len(text) + 1)
    kind = rng.randrange(8)
    if kind == 0:
        return text[:at] + rng.choice((b"[", b'{"a":', b"[[],")) * rng.choice((10, 1000, 60_000)) + text[at:]
    if kind == 1:
        return text[:at] + b"1" * rng.choice((5, 400, 5000)) + text[at:]
    if kind == 2:
        return text[:at]
    if kind == 3 and b":" in text:  # a key twice
        start = text.find(b'"', min(at, text.rfind(b'"')))
        return text[:start] + rng.choice((b'"crc32":0,', b'"chunk":1,', b'"ts":1,', b'"dtype":"F64",')) + text[start:]
    if kind == 4:
        return (
            text[:at]
            + rng.choice((b"NaN", b"1e999", b"\xff\xfe", b"\x00", b"\\ud800", b'"\\ud800"', b"//", b"'"))
            + text[at + 1 :]
        )
    if kind == 5:
        return b"\xef\xbb\xbf" + text
    if kind == 6:
        return text + rng.choice((b"]", b"}", b" " * 50_000, b"null", text))
    return change_bytes(rng, text)


def change_bytes(rng: random.Random, raw: bytes) -> bytes:
    """Change bytes without regard for what they mean."""
    changed = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(changed) + 1)
        length = rng.choice((1, 1, 2, 4, 8, 64))
        kind = rng.randrange(6)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            del changed[at : at + length]
        elif kind == 3:
            changed[at:at] = rng.randbytes(length)
        elif kind == 4:
            changed[at : at + length] = rng.choice((b"\x00", b"\xff", b"\x7f")) * length
        else:
            start = rng.randrange(len(changed) + 1)
            changed[at:at] = changed[start : start + length]
    return bytes(changed)


def seal(data: dict[str, Any]) -> bytes:
    """JSON with the checksum that the manifest and its like carry."""
    data = {key: value for key, value in data.items() if key != "crc32"}
    return json.dumps({**data, "crc32": zlib.crc32(json.dumps(data, sort_keys=True).encode())}, indent=1).encode()


def change_sealed(rng: random.Random, raw: bytes) -> bytes:
    """Change a file that carries its checksum; in most cases it is right afterwards."""
    if rng.random() < 0.15:
        return change_text(rng, raw)
    data = json.loads(raw)
    data.pop("crc32", None)
    changed = change_json(rng, data)
    return seal(changed) if isinstance(changed, dict) else json.dumps(changed).encode()


def change_object(rng: random.Random, raw: bytes) -> bytes:
    """Change a file that is one JSON value."""
    if rng.random() < 0.3:
        return change_text(rng, raw)
    return json.dumps(change_json(rng, json.loads(raw))).encode()


def change_lines(rng: random.Random, raw: bytes) -> bytes:
    """Change a file of JSON lines."""
    lines = [line for line in raw.split(b"\n") if line]
    for _ in range(rng.choice((1, 1, 3, 10))):
        at = rng.randrange(len(lines))
        kind = rng.randrange(8)
        if kind < 4:
            try:
                lines[at] = json.dumps(change_json(rng, json.loads(lines[at]))).encode()
            except (ValueError, RecursionError):
                lines[at] = change_bytes(rng, lines[at])
        elif kind == 4:
            lines[at] = change_text(rng, lines[at])
        elif kind == 5:
            lines[at:at] = [lines[at]] * rng.choice((1, 200))
        elif kind == 6:
            # Many of a kind that differ in their numbers: what is quadratic shows.
            try:
                record = json.loads(lines[at])
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict):
                names = [name for name, value in record.items() if type(value) is int]
                many = [{**record, **dict.fromkeys(names, number)} for number in range(rng.choice((20, 20, 300)))]
                lines[at:at] = [json.dumps(one).encode() for one in many]
        else:
            rng.shuffle(lines)
    return rng.choice((b"\n", b"\n", b"\n", b"\r\n", b"\n\n")).join(lines) + rng.choice((b"\n", b""))


# --- Part files -------------------------------------------------------------------------------------------------------


class Part:
    """A part file in its sections, each of which can be changed; :meth:`signed` puts them together."""

    def __init__(self, raw: bytes):
        magic, version, reserved, header_bytes = PRELUDE.unpack_from(raw)
        self.prelude = [magic, version, reserved]
        self.fields: Any = json.loads(raw[16 : 16 + header_bytes])
        body = raw[16 + header_bytes :]
        structure = body[: self.fields.pop("structure_bytes")]
        columns = body[len(structure) :]
        del self.fields["columns_bytes"], self.fields["body_crc32"]
        (entries_bytes,) = struct.unpack_from("<Q", columns)
        self.structure: Any = json.loads(structure)
        self.entries: Any = json.loads(columns[8 : 8 + entries_bytes])
        self.data = columns[8 + entries_bytes :]
        self.entries_bytes: int | None = None
        self.header_text: Callable[[bytes], bytes] = bytes
        self.structure_text: Callable[[bytes], bytes] = bytes
        self.own: dict[str, Any] = {}
        self.swapped = False

    def signed(self) -> bytes:
        """The file, with right checksums."""
        structure = self.structure_text(json.dumps(self.structure).encode())
        entries = json.dumps(self.entries).encode()
        entries_bytes = len(entries) if self.entries_bytes is None else self.entries_bytes
        columns = struct.pack("<Q", entries_bytes & (2**64 - 1)) + entries + self.data
        body = columns + structure if self.swapped else structure + columns
        header: Any = self.fields
        if isinstance(header, dict):
            own = {"structure_bytes": len(structure), "columns_bytes": len(columns), "body_crc32": zlib.crc32(body)}
            header = {**header, **own, **self.own}
        text = self.header_text(json.dumps(header).encode())
        covered = PRELUDE.pack(*self.prelude, len(text))
        return covered + struct.pack("<I", zlib.crc32(text, zlib.crc32(covered))) + text + body


def change_part(rng: random.Random, raw: bytes) -> bytes:
    """Change a part file in one to three places and sign it again; in a few cases without signing it."""
    if rng.random() < 0.08:
        return change_bytes(rng, raw)
    part = Part(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(_PART_CHANGES)(rng, part)
    return part.signed()


def _change_structure(rng: random.Random, part: Part) -> None:
    part.structure = change_json(rng, part.structure, HOSTILE_NODES)


def _put_hostile_node(rng: random.Random, part: Part) -> None:
    if isinstance(part.structure, list) and part.structure:
        part.structure[rng.randrange(len(part.structure))] = copy.deepcopy(rng.choice(HOSTILE_NODES))


def _change_columns(rng: random.Random, part: Part) -> None:
    part.entries = change_json(rng, part.entries)


def _change_one_column(rng: random.Random, part: Part) -> None:
    if not isinstance(part.entries, dict) or not part.entries:
        return
    entry = part.entries[rng.choice(sorted(part.entries))]
    if not isinstance(entry, dict):
        return
    kind = rng.randrange(4)
    if kind == 0:
        entry["dtype"] = rng.choice(
            ("BOOL", "U8", "I8", "I16", "I64", "U64", "F16", "BF16", "F32", "F64", "C64", "F8_E4M3", "X")
        )
    elif kind == 1:
        entry["shape"] = [rng.choice(NUMBERS[:20]) for _ in range(rng.choice((0, 1, 2, 3, 40, 65)))]
    elif kind == 2:
        entry["data_offsets"] = sorted(rng.choice((0, 1, len(part.data), len(part.data) + 1, 2**40)) for _ in range(2))
    else:
        entry["shape"] = [0, rng.choice(NUMBERS[:20])]


def _change_data(rng: random.Random, part: Part) -> None:
    part.data = change_bytes(rng, part.data)


def _change_fields(rng: random.Random, part: Part) -> None:
    part.fields = change_json(rng, part.fields)


def _claim_more(rng: random.Random, part: Part) -> None:
    """Make stored batches claim more samples than they have; consistently."""
    batches = part.fields.get("batches") if isinstance(part.fields, dict) else None
    if not isinstance(batches, list) or not all(isinstance(entry, dict) for entry in batches):
        return
    count = rng.choice((0, 1, 5, 2**16, 2**20, 2**22, 2**24, 2**28 - 1, 2**28, 2**40, 2**62))
    for entry in rng.sample(batches, rng.randrange(len(batches) + 1)):
        start = entry.get("first_unit", 0) if rng.random() < 0.7 else rng.choice(NUMBERS[:20])
        entry["size"] = count
        for name in ("indices", "units"):
            if name in entry or rng.random() < 0.5:
                begin = start if isinstance(start, int) else 0
                entry[name] = {"start": begin, "stop": begin + count}
        if rng.random() < 0.3:
            entry["first_unit"] = start
    if rng.random() < 0.2:
        batches *= rng.choice((2, 16, 64))


def _collide(rng: random.Random, part: Part) -> None:
    """Keys whose hashes are equal."""
    count, prime = rng.choice((50, 5000, 30_000)), 2**61 - 1
    form = rng.randrange(3)
    keys = [
        ["int", hex(number * prime)] if form < 2 else ["tuple", [["int", hex(number * prime)], 1]]
        for number in range(1, count)
    ]
    node = ["set", ["list", keys]] if form == 1 else ["dict", keys, [0] * len(keys)]
    if isinstance(part.structure, list) and part.structure:
        part.structure[0] = node


def _overlap_text(rng: random.Random, part: Part) -> None:
    """Lengths of a packed list of text that wrap around when they are added up."""
    count = rng.choice((30, 3000, 30_000))
    lengths = ([1] if rng.random() < 0.5 else []) + [2**63 - 1, 2**63 - 1, 2] * count
    text = b"x" * 200_000
    wrapped = sum(lengths) % 2**64
    lengths.append((len(text) - wrapped) % 2**64 % 2**63)
    part.data = text + struct.pack(f"<{len(lengths)}q", *lengths)
    part.entries = {
        "0": {"dtype": "U8", "shape": [len(text)], "data_offsets": [0, len(text)]},
        "1": {"dtype": "I64", "shape": [len(lengths)], "data_offsets": [len(text), len(part.data)]},
    }
    if isinstance(part.structure, list) and part.structure:
        part.structure[0] = ["list", None, rng.choice(("str", "bytes")), 0, 1]


def _repeat(rng: random.Random, part: Part) -> None:
    if isinstance(part.structure, list) and part.structure:
        node = rng.choice([*part.structure, *HOSTILE_NODES])
        part.structure[0] = ["list", [copy.deepcopy(node) for _ in range(rng.choice((2, 20, 100)))]]


def _change_frame(rng: random.Random, part: Part) -> None:
    kind = rng.randrange(9)
    if kind == 0:
        part.prelude[rng.randrange(1, 3)] = rng.choice((0, 1, 2, 65535))
    elif kind == 1:
        part.entries_bytes = rng.choice((0, 1, 2**31, 2**40, 2**63, -1))
    elif kind == 2:
        part.own = {rng.choice(("structure_bytes", "columns_bytes", "body_crc32")): rng.choice(NUMBERS + OTHERS)}
    elif kind == 3:
        shift = rng.choice((1, -1, 8, 64, 2**40))
        part.own = {"structure_bytes": len(json.dumps(part.structure)) + shift}
    elif kind == 4:
        part.swapped = True
    elif kind == 5:
        part.header_text = lambda text: change_text(rng, text)
    elif kind == 6:
        part.structure_text = lambda text: change_text(rng, text)
    elif kind == 7:
        part.data = part.data[: rng.randrange(len(part.data) + 1)]
    else:
        part.data += rng.randbytes(rng.choice((1, 100, 100_000)))


_PART_CHANGES: list[Callable[[random.Random, Part], None]] = [
    *[_change_structure] * 6, *[_put_hostile_node] * 4, *[_change_columns] * 2, *[_change_one_column] * 3,
    *[_change_data] * 4, *[_change_fields] * 4, *[_claim_more] * 3, _collide, _overlap_text, _repeat,
    *[_change_frame] * 4,
]  # fmt: skip


# --- What is no file --------------------------------------------------------------------------------------------------


def replace_by_no_file(rng: random.Random, path: Path) -> str:
    """Put something else in a file's place: a pipe, a link, a directory, a huge file without content, a device."""
    raw = path.read_bytes()
    path.unlink()
    kinds = ["pipe", "socket", "link", "own link", "loop", "dangling", "directory", "nested directory", "directory with pipe",
             "sparse", "sparse behind", "empty", "device", "zero device"]  # fmt: skip
    kind = rng.choice(kinds)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path)) if len(str(path)) < 100 else os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("/etc/passwd")
    elif kind == "own link":
        copied = path.with_name("." + path.name)
        copied.write_bytes(raw)
        path.symlink_to(copied)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to("/nonexistent")
    elif kind == "directory":
        path.mkdir()
    elif kind == "nested directory":
        (path / "content" / "content").mkdir(parents=True)
    elif kind == "directory with pipe":
        path.mkdir()
        os.mkfifo(path / "content")
    elif kind in ("sparse", "sparse behind"):
        path.write_bytes(raw if kind == "sparse behind" else b"")
        os.truncate(path, 2**37)
    elif kind == "empty":
        path.touch()
    elif os.geteuid() == 0:
        os.mknod(path, 0o20644, os.makedev(1, 3 if kind == "device" else 5))
    return kind
