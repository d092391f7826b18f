"""Every kind of value that people return comes back as it was; bytes that nobody wrote raise the project's own error."""

from __future__ import annotations

import array
import collections
import contextlib
import dataclasses
import datetime
import decimal
import enum
import fractions
import json
import pathlib
import struct
import subprocess
import sys
import types
import uuid
import warnings
import zlib
import zoneinfo
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch.utils.data import DataLoader

from lightning_gpuorch.errors import CorruptPartError, GPUOrchError, UnsupportedPredictionError
from lightning_gpuorch.predictions.storage.part_file import Envelope, encode_envelope
from lightning_gpuorch.predictions.storage.values.base import class_name, loaded_class
from lightning_gpuorch.predictions.storage.values.containers import _fresh_namedtuple
from lightning_gpuorch.worker import session
from tests.support.examples import examples

# Said by torch when such tensors are made, which is what the tests are about.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*beta state.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*prototype stage.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_fx_tracing.*"),
    pytest.mark.filterwarnings("ignore:.*quantiz.*"),
]


class Color(enum.Enum):
    RED = 1
    BLUE = "b"
    ALSO_RED = 1  # noqa: PIE796 - an alias, on purpose


class Level(enum.IntEnum):
    LOW = 3


class Access(enum.Flag):
    READ = 1
    WRITE = 2


def to_bytes(*values: Any) -> bytes:
    return b"".join(encode_envelope({}, values).buffers)


def round_trip(value: Any) -> Any:
    return Envelope(to_bytes(value), "test").prediction(0)


def same(a: Any, b: Any) -> bool:
    """Equal in type and in everything that can be seen."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return same_tensors(a, b)
    if isinstance(a, np.ma.MaskedArray):
        return a.dtype == b.dtype and np.array_equal(a.mask, b.mask) and np.array_equal(a.filled(), b.filled())
    if isinstance(a, (np.ndarray, np.void)):
        return a.dtype == b.dtype and a.shape == b.shape and str(a) == str(b)
    if isinstance(a, (pd.DataFrame, pd.Series, pd.Index)):
        check: Any = {pd.DataFrame: pd.testing.assert_frame_equal, pd.Series: pd.testing.assert_series_equal}
        check.get(type(a), pd.testing.assert_index_equal)(a, b)
        return bool(getattr(a, "attrs", None) == getattr(b, "attrs", None))
    if isinstance(a, (pd.api.extensions.ExtensionArray, pa.Table, pa.RecordBatch, pa.Array, pa.ChunkedArray)):
        return bool(a.equals(b))
    if scipy.sparse.issparse(a):
        return bool(a.format == b.format and a.shape == b.shape and (a != b).nnz == 0)
    if isinstance(a, Image.Image):
        pixels = (a.mode, a.size, a.tobytes(), a.getpalette(), a.info)
        return pixels == (b.mode, b.size, b.tobytes(), b.getpalette(), b.info)
    if a is pd.NaT or a is pd.NA:
        return a is b
    if isinstance(a, collections.defaultdict):
        return a == b and a.default_factory == b.default_factory
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def same_tensors(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.layout != b.layout or a.dtype != b.dtype:
        return False
    if a.is_nested:
        return len(a.unbind()) == len(b.unbind()) and all(map(torch.equal, a.unbind(), b.unbind()))
    if a.is_quantized:
        return a.qscheme() == b.qscheme() and torch.equal(a, b)
    if a.layout is torch.sparse_coo and a.is_coalesced() != b.is_coalesced():
        return False
    return a.shape == b.shape and torch.equal(a.to_dense(), b.to_dense())


def jagged() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2, 4), torch.zeros(3, 4)], layout=torch.jagged)


def palette_image() -> Image.Image:
    image = Image.new("RGB", (4, 4), (200, 10, 3)).convert("P")
    image.info["transparency"] = 3
    return image


RECORDS = np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")])
BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")

SCALARS: list[Any] = [
    pathlib.Path("a/b"), pathlib.PurePosixPath("/x"), pathlib.PureWindowsPath("C:/x"), pathlib.Path("\udcff"),
    datetime.datetime(2020, 1, 2, 3, 4, 5, 6), datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc),
    datetime.datetime(2020, 10, 25, 2, 30, fold=1, tzinfo=BERLIN),
    datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=-5, seconds=7), "EST")),
    datetime.date.min, datetime.date.max, datetime.time(1, 2, 3, 4), datetime.time(tzinfo=datetime.timezone.utc),
    datetime.timedelta(-1, 2, 3), datetime.timezone.utc, BERLIN,
    decimal.Decimal("-1E+5"), decimal.Decimal("Infinity"), decimal.Decimal("0.10"), fractions.Fraction(1, 3),
    fractions.Fraction(10**40, 7), uuid.UUID(int=7), Color.RED, Color.BLUE, Color.ALSO_RED, Level.LOW,
    Access.READ | Access.WRITE, Access(0), bytearray(b"ab"), bytearray(), memoryview(b"abcd"),
    memoryview(b"abcd").cast("H"), memoryview(bytes(12)).cast("B", [3, 4]), memoryview(b""), array.array("d", [1.5]),
    array.array("b"), ..., range(3, 9, 2), range(10**30), slice(1, None, 2), slice("a", "b"), torch.float8_e5m2,
    torch.bool, torch.device("cuda:1"), torch.device("cpu"), torch.strided, torch.channels_last, pd.NaT, pd.NA,
    pd.Timestamp("2020-01-01", tz="UTC"), pd.Timestamp("2020-01-01 10:00:00.000000001"), pd.Timedelta("1D"),
    pd.Period("2020-01"), pd.Interval(0, 1), np.void(b"ab"), RECORDS[0],
]  # fmt: skip

CONTAINERS: list[Any] = [
    set(), {1, "a", None}, set(range(40)), frozenset([frozenset([1]), (1, 2)]), collections.deque([1, [2]], maxlen=3),
    collections.deque(), {(1, 2): 3, Color.RED: 4, datetime.date(2020, 1, 1): 5, pathlib.Path("x"): 6, frozenset([1]): 7},
    {np.int64(1): 2, 1.5: 3, b"k": 4, decimal.Decimal(2): 5, ((1, ("a", None)),): 6},
    types.SimpleNamespace(a=1, b=torch.float16), collections.defaultdict(list, {1: [2]}),
    collections.defaultdict(int), collections.OrderedDict(a={"b": ()}), collections.Counter("aab"),
    {"a": [{"b": ({1}, collections.deque([pathlib.Path("x")]))}]},
]  # fmt: skip

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch says of some layouts that they are new
    ARRAYS: list[Any] = [
        torch.eye(3).to_sparse(), torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (3,), check_invariants=False),
        torch.sparse_coo_tensor(torch.zeros(1, 2, dtype=torch.long), torch.ones(2, 3), (4, 3), check_invariants=False),
        torch.zeros(2, 3).to_sparse(), torch.eye(3).to_sparse_csr(), torch.eye(3).to_sparse_csc(),
        torch.eye(4).to_sparse_bsr((2, 2)), torch.eye(4).to_sparse_bsc((2, 2)),
        torch.ones(2, 3, 3).bfloat16().to_sparse_csr(),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), torch.nested.nested_tensor([]),
        np.array(["a", None, [1], {"k": np.arange(2)}], dtype=object), np.array(7, dtype=object),
        np.zeros((0, 2), dtype=object),
        np.array(["a", "bc"], dtype=np.dtypes.StringDType()), np.array([["2020-01-01", "NaT"]], "M8[D]"),
        np.ma.array([1, 2], mask=[0, 1]), np.ma.array([1.0, 2.0], fill_value=7), np.ma.masked_all((2, 2), "i4"),
        RECORDS, RECORDS.reshape(1, 1), RECORDS.view(np.recarray), np.zeros(2, [("a", [("b", "i2", (2,))]), ("c", "U3")]),
        np.zeros(2, np.dtype([("a", "i1"), ("b", "f8")], align=True)), np.zeros(2, "V4"), np.zeros(0, RECORDS.dtype),
        *(getattr(scipy.sparse, f"{form}_{kind}")(np.eye(4)) for form in ("csr", "csc", "coo", "lil", "dok", "bsr", "dia")
          for kind in ("array", "matrix")),
        scipy.sparse.coo_array(np.arange(3.0)),
        Image.new("L", (2, 3), 7), Image.new("1", (5, 3), 1), Image.new("RGBA", (2, 2), (1, 2, 3, 4)),
        Image.new("F", (2, 2), 1.5), Image.new("I;16", (2, 2), 300), Image.new("RGB", (0, 0)), palette_image(),
    ]  # fmt: skip

TABLES: list[Any] = [
    pd.DataFrame({"a": [1, 2], "b": ["x", None], 3: [1.5, 2]}), pd.DataFrame([[1, 2]], columns=["a", "a"]),
    pd.DataFrame(), pd.DataFrame({"a": []}), pd.DataFrame({"a": [1, 2, 3]}).iloc[1:], pd.DataFrame({"a": [1j, 2]}),
    pd.DataFrame({"t": pd.date_range("2020", periods=3, tz="Europe/Berlin"), "n": pd.array([1, None, 2]),
                  "c": pd.Categorical(["a", "b", "a"], ordered=True), "o": [{"a": 1}, [1], None]},
                 index=pd.MultiIndex.from_tuples([("a", 1), ("a", 2), ("b", 1)], names=["x", None])),
    pd.DataFrame([[1, 2]], columns=pd.MultiIndex.from_tuples([("a", "b"), ("a", "c")], names=["u", "v"])),
    pd.DataFrame({"p": pd.period_range("2020-01", periods=2, freq="M"), "i": pd.interval_range(0, 2)}),
    pd.DataFrame({"a": pd.array(["q", None], dtype="string"), "b": [True, False]}), pd.Series([1], name="n"),
    pd.Series(["a", "b"], index=["x", "y"], name=("t", 1)), pd.Series([b"a", pathlib.Path("x")]),
    pd.Index([1, 2], name="q"), pd.RangeIndex(3, name="r"), pd.date_range("2020", periods=3), pd.Index(["a", 1]),
    pd.Categorical(["a", None]), pd.array([1, None]), pa.table({"a": [1, 2]}), pa.table({}), pa.array([1, None]),
    pa.record_batch({"a": [1]}), pa.chunked_array([[1], [2]]), pa.array(["a", "b"]).dictionary_encode(),
]  # fmt: skip


def describe(value: Any) -> str:
    return type(value).__name__


@pytest.mark.parametrize("value", SCALARS + CONTAINERS + ARRAYS + TABLES, ids=describe)
def test_a_value_comes_back_as_it_was(value: Any) -> None:
    assert same(round_trip(value), value)
    assert same(round_trip([value, {"k": (value,)}][1])["k"][0], value)


def test_values_that_are_tensors_of_their_own_class() -> None:
    for tensor in (jagged(), jagged().transpose(1, 2)):
        assert same(round_trip(tensor), tensor)
    per_tensor = torch.quantize_per_tensor(torch.randn(5), 0.1, 3, torch.qint8)
    scales, zeros = torch.tensor([0.1, 0.2]), torch.tensor([0, 1])
    per_channel = torch.quantize_per_channel(torch.randn(2, 3), scales, zeros, 0, torch.quint8)
    assert all(same(round_trip(tensor), tensor) for tensor in (per_tensor, per_channel))


def test_polars() -> None:
    polars = pytest.importorskip("polars")
    frames = [
        polars.DataFrame({"a": [1, None], "b": ["x", "y"], "c": [[1], [2, 3]], "d": [datetime.date(2020, 1, 1), None]}),
        polars.DataFrame({"a": polars.Series(["x", "y"], dtype=polars.Categorical), "n": [None, None]}),
        polars.DataFrame(),
    ]
    for frame in frames:
        back = round_trip(frame)
        assert (type(back), back.schema) == (type(frame), frame.schema)
        assert back.equals(frame)
    series = round_trip(polars.Series("s", [1, 2]))
    assert (series.name, series.to_list()) == ("s", [1, 2])
    with pytest.raises(UnsupportedPredictionError, match=r"LazyFrame.*\.collect\(\)"):
        round_trip(polars.LazyFrame())


class Own:
    pass


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Own(), r"Own, which cannot be stored.*keep_outputs=False"),
        (pd.DataFrame({"a": [Own()]}), r"output\['a'\]\[0\] is of type .*Own"),
        (pd.DataFrame({"a": pd.arrays.SparseArray([0, 1])}), r"output\['a'\] is of Sparse.*astype|Arrow cannot store"),
        (type("Frame", (pd.DataFrame,), {})({"a": [1]}), "Frame.*class of pandas itself"),
        (memoryview(b"abcd")[::2], r"bytes\(\.\.\.\)"),
        (type("Where", (pathlib.PurePosixPath,), {})("x"), r"str\(\.\.\.\)"),
    ],
    ids=["object", "object column", "sparse column", "subclass", "strided view", "own path"],
)
def test_what_cannot_be_stored_is_refused_with_the_way_out(value: Any, message: str) -> None:
    with pytest.raises(UnsupportedPredictionError, match=message):
        round_trip(value)


def test_bytes_do_not_depend_on_the_order_of_a_set() -> None:
    script = (
        "import sys; from lightning_gpuorch.predictions.storage.part_file import encode_envelope; "
        "sys.stdout.buffer.write(b''.join(encode_envelope({}, [{'b', 'a', 'zz', 'c'}, frozenset(['x', 1, None])]).buffers))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script], env={**__import__("os").environ, "PYTHONHASHSEED": seed}, check=True,
            capture_output=True, timeout=120,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(outputs) == 1


def test_packages_that_are_not_loaded_are_not_imported(tmp_path: pathlib.Path) -> None:
    values = [pd.DataFrame({"a": [1, 2], "b": ["x", None]}), pd.Series([1.5], name="s"), Image.new("L", (1, 2)),
              scipy.sparse.csr_array(np.eye(2)), pd.Timestamp("2020"), pd.NaT, Color.RED]  # fmt: skip
    path = tmp_path / "part"
    path.write_bytes(to_bytes(*values))
    script = """
import sys, pathlib
for name in ("pandas", "PIL", "PIL.Image", "scipy", "scipy.sparse"):
    sys.modules.setdefault(name, None)  # importing it would fail
from lightning_gpuorch.predictions.storage.part_file import Envelope
envelope = Envelope(pathlib.Path(sys.argv[1]).read_bytes(), "part")
print([envelope.prediction(i) for i in range(envelope.num_predictions)])
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.startswith("[{'columns': {'a': [1, 2], 'b': ['x', None]}, 'index': [0, 1]}, {'values': [1.5]")
    assert "'mode': 'L', 'size': (1, 2)" in done.stdout
    assert "'format': 'csr', 'shape': (2, 2)" in done.stdout
    assert done.stdout.rstrip().endswith("None, 1]")


def test_an_enum_that_has_changed_gives_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = to_bytes(Color.RED, {Color.RED: 1, 1: 2})
    monkeypatch.setattr(sys.modules[__name__], "Color", enum.Enum("Color", {"RED": 2}))
    envelope = Envelope(raw, "test")
    assert envelope.prediction(0) == 1
    with pytest.raises(CorruptPartError, match="two keys are equal"):
        envelope.prediction(1)


# --- Bytes that nobody wrote ------------------------------------------------------------------------------------------


def forged(nodes: Any, columns: bytes | None = None, header: Any = None) -> bytes:
    """A part with right checksums and any content."""
    structure = nodes if isinstance(nodes, bytes) else json.dumps(nodes).encode()
    blob = struct.pack("<Q", 2) + b"{}" if columns is None else columns
    own = {"structure_bytes": len(structure), "columns_bytes": len(blob), "body_crc32": zlib.crc32(structure + blob)}
    text = json.dumps(own if header is None else header).encode()
    covered = struct.pack("<4sHHI", b"GPQ1", 1, 0, len(text))
    return covered + struct.pack("<I", zlib.crc32(text, zlib.crc32(covered))) + text + structure + blob


def one_column(content: bytes, shape: list[int] | None = None, dtype: str = "U8", **more: Any) -> bytes:
    entry = {"dtype": dtype, "shape": shape or [len(content)], "data_offsets": [0, len(content)], **more}
    entries = json.dumps({"0": entry}).encode()
    return struct.pack("<Q", len(entries)) + entries + content


TOO_MUCH = 10**15
HOSTILE: list[Any] = [
    ["tensor", 0, "complex128", [TOO_MUCH]], ["tensor", 7], ["tensor"], ["tensor", 0, "nn", [1]],
    ["tensor", 0, "complex128", [-1]], ["ndarray", 0, "|O", [1]], ["ndarray", 0, "<f8", [TOO_MUCH, TOO_MUCH]],
    ["ndarray", 0, [["a", "|O"]], [1]], ["ndarray", 0, {"a": 1}, [1]], ["numpy", "O", "00"], ["numpy", "<f8", "zz"],
    ["objects", "O", [TOO_MUCH], []], ["objects", "q", [0], []], ["float", "00"], ["complex", 3], ["str", "ff"],
    ["int", "q"], ["list", None, "float", 0], ["list", None, "str", 0, 0], ["list", 3], ["dict", [1, 2], [3]],
    ["dict", [["list", []]], [1]], ["set", ["list", [["dict", [], []]]]], ["namedtuple", "a:b", ["x", "x"], [1, 2]],
    ["namedtuple", "a:b", ["import os"], [1]], ["namedtuple", "collections:Counter", ["x"], [1, 2]],

    ["mapping", "builtins:dict", [], [], ["__class__"], [1]], ["mapping", "builtins:dict", [1], [2], ["a"], [["item", 9]]],
    ["dataclass", "builtins:int", ["x"], []], ["path", "Path2", "x"], ["path", "PosixPath", 3], ["datetime", "x", None, 0],
    ["datetime", "2020-01-01", ["zone", "../../etc/passwd"], 0], ["zone", "/etc/passwd"], ["date", 1], ["time", "25:00"],
    ["offset", [99, 0, 0]], ["decimal", "x"], ["fraction", "0x1", "0x0"], ["uuid", "q"], ["torch", "load"],
    ["torch", "nonesuch"], ["device", "gpu?"], ["array", 0, "q"], ["array", 0, "?"], ["memoryview", 0, "d", [3]],
    ["sparse", "sparse_coo", [["list", []], 1], [3]], ["sparse", "bad", [], []], ["quantized", 1, 2, 3],
    ["nested", ["x"], "float32"], ["jagged", None, None, None, 1], ["masked", 1, 2, 3, 4], ["scipy", "evil", "csr", [], [1]],
    ["image", "RGB", [TOO_MUCH, TOO_MUCH], 0, None, [], []], ["image", "XX", [1, 1], 0, None, [], []],
    ["pandas.arrow", 0], ["pandas.frame", [], 1, 2, 3], ["polars", "DataFrame", 0], ["pyarrow", "Table", 0],
    ["range", 1, 2, 0], ["slice"], ["deque", [], "x"], ["size", ["a"]], ["namespace", ["a"], []], ["enum", "builtins:int"],
    ["nonesuch"], [],
    [["a"]], [{}], ["bytes", 0, 1], ["pandas.index", 3, ["list", []]], ["recarray", 1],
]  # fmt: skip


@pytest.mark.parametrize("node", HOSTILE, ids=lambda node: json.dumps(node)[:40])
def test_hostile_nodes_raise_the_projects_error(node: Any) -> None:
    envelope = Envelope(forged([node], one_column(b"\xff\xfe\xfd")), "test")
    with pytest.raises(CorruptPartError, match="test is damaged"):
        envelope.prediction(0)


def test_indices_that_lie_outside_of_a_sparse_tensor_are_found() -> None:
    for good in (torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr(), scipy.sparse.csr_array(np.eye(3))):
        raw = bytearray(to_bytes(good))
        envelope = Envelope(bytes(raw), "test")
        node = json.loads(bytes(envelope._nodes[0]))
        node[-2 if node[1] == "sparse_coo" else -1][:] = [1] * len(good.shape)  # the shape alone is changed
        envelope._nodes = [json.dumps(node).encode()]
        with pytest.raises(CorruptPartError):
            envelope.prediction(0)


@pytest.mark.parametrize(
    "raw",
    [
        forged(b"[" * 100_000),
        forged(b"nonsense"),
        forged(b"3"),
        forged([], b"\0"),
        forged([], struct.pack("<Q", 2) + b"[3"),
        forged([], header=[1]),
        forged([], header={"structure_bytes": -1, "columns_bytes": 1, "body_crc32": 0}),
        forged([], header={"structure_bytes": "x", "columns_bytes": 1, "body_crc32": 0}),
        forged([], header={}),
    ],
    ids=range(9),
)
def test_hostile_envelopes_raise_the_projects_error(raw: bytes) -> None:
    with pytest.raises(CorruptPartError, match="test is damaged"):
        Envelope(raw, "test")


def test_a_column_outside_of_the_file_is_found() -> None:
    for offsets in ([0, 99], [-3, 3], [2, 1], "x"):
        with pytest.raises(CorruptPartError):
            Envelope(forged([["bytes", 0]], one_column(b"abc", data_offsets=offsets)), "test")


def test_a_column_gives_its_bytes_once() -> None:
    """Else a small file becomes a prediction of any size."""
    envelope = Envelope(forged([["list", [["bytes", 0]] * 50_000]], one_column(b"abc")), "test")
    with pytest.raises(CorruptPartError, match="column 0 is used twice"):
        envelope.prediction(0)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.just(TOO_MUCH)
    | st.text(max_size=3)
    | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=8,
)


def test_row_pointers_that_go_back_are_refused() -> None:
    matrix = scipy.sparse.csr_matrix(np.eye(4))
    matrix.indptr[:] = [0, 2**30, 0, 2**30, 0]  # scipy's own check passes: the last one is 0
    raw = b"".join(map(bytes, encode_envelope({}, [matrix]).buffers))
    with pytest.raises(CorruptPartError, match="row pointers of a sparse matrix do not ascend"):
        Envelope(raw, "test").prediction(0)


tags = st.sampled_from(sorted({node[0] for node in HOSTILE if node and isinstance(node[0], str)}))


@given(tags, st.lists(json_values | st.tuples(tags, json_values).map(list), max_size=5))
@examples(300)
def test_any_node_gives_a_value_or_the_projects_error(tag: str, arguments: list[Any]) -> None:
    envelope = Envelope(forged([[tag, *arguments]], one_column(b"\xff\xfe\xfd")), "test")
    with contextlib.suppress(GPUOrchError):
        envelope.prediction(0)


@dataclasses.dataclass(frozen=True)
class Item:
    path: pathlib.Path
    when: datetime.datetime
    scores: Any


zones = st.none() | st.sampled_from([datetime.timezone.utc, BERLIN]) | st.builds(
    datetime.timezone, st.timedeltas(datetime.timedelta(hours=-23), datetime.timedelta(hours=23))
)  # fmt: skip
keys = st.recursive(
    st.integers()
    | st.text(max_size=3)
    | st.dates()
    | st.decimals(allow_nan=False)
    | st.uuids()
    | st.sampled_from(Color),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=2),
    max_leaves=3,
)
leaves = keys | st.datetimes(timezones=zones) | st.timedeltas() | st.fractions() | st.binary(max_size=20).map(bytearray)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(keys, inner, max_size=3)
        | st.sets(keys, max_size=3)
        | st.lists(inner, max_size=3).map(collections.deque)
        | st.builds(Item, st.just(pathlib.Path("x")), st.datetimes(), inner)
    ),
    max_leaves=8,
)


@given(trees)
@examples(150)
def test_any_tree_of_such_values_comes_back(tree: Any) -> None:
    assert same(round_trip(tree), tree)


def test_what_a_step_returns_is_returned(tmp_path: pathlib.Path) -> None:
    shared = {"frame": pd.DataFrame({"a": [0]}), "array": np.zeros(1), "bytes": bytearray(b"0"), "set": {0}}
    changing = [shared["frame"], collections.deque([torch.zeros(1)], maxlen=2), np.ma.array([1, 2], mask=[0, 1])]

    class Model(LightningModule):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            # The same objects each time, changed: what is stored must be what was returned.
            shared["frame"].loc[0, "a"] = batch_idx
            shared["array"][0] = batch_idx
            shared["bytes"][0] = batch_idx
            shared["set"].add(batch_idx)
            changing[1].append(batch.sum())
            fixed = [range(3), memoryview(b"ab"), array.array("b", b"x"), b"raw", slice(2), Color.RED, BERLIN]
            return {
                "shared": dict(shared),
                "changing": list(changing),
                "fixed": fixed,
                (1, 2): Image.new("L", (1, 1), batch_idx),
            }

    session.leave()
    trainer = Trainer(
        accelerator="cpu", devices=1, strategy="gpuorch", default_root_dir=tmp_path, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    first, _, third = trainer.predict(Model(), DataLoader(torch.ones(3), batch_size=1))
    session.leave()
    assert same(third["shared"]["frame"], pd.DataFrame({"a": [2]}))
    assert [int(one["shared"]["array"][0]) for one in (first, third)] == [0, 2]
    assert (first["shared"]["bytes"], third["shared"]["bytes"]) == (bytearray([0]), bytearray([2]))
    assert (first["shared"]["set"], third["shared"]["set"]) == ({0}, {0, 1, 2})
    assert first["shared"]["frame"]["a"].tolist() == [0]
    assert (third["changing"][1].maxlen, list(third["changing"][1])) == (2, [1, 1])
    assert first["fixed"] == [range(3), memoryview(b"ab"), array.array("b", b"x"), b"raw", slice(2), Color.RED, BERLIN]
    assert third[1, 2].getpixel((0, 0)) == 2


def test_a_class_made_in_a_function_is_found_again_and_elsewhere_its_fields_are_given_by_name() -> None:
    class Output(collections.namedtuple("Output", ["mean", "scale"])):
        __slots__ = ()

    [name] = {class_name(Output)}
    assert loaded_class(name) is Output
    other = _fresh_namedtuple("Output", ("mean", "scale"))(1, 2)
    assert (other["mean"], other.scale, other[0], other[0:1]) == (1, 2, 1, (1,))
    with pytest.raises(TypeError):
        other["median"]
