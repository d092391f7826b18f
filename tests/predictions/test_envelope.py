"""Round trips of every kind of prediction, refusals, and damage: no flipped bit or missing byte goes unnoticed."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import random
import struct
import subprocess
import sys
import textwrap
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transformers import BatchEncoding
from transformers.modeling_outputs import BaseModelOutput

from lightning_gpuorch.errors import CorruptPartError, PredictionStorageError, UnsupportedPredictionError
from lightning_gpuorch.predictions import check_storable
from lightning_gpuorch.predictions.storage.part_file import Envelope, encode_envelope
from tests.support.examples import examples


def to_bytes(*predictions: Any, **fields: Any) -> bytearray:
    encoded = encode_envelope(fields, predictions)
    raw = bytearray().join(encoded.buffers)
    assert len(raw) == encoded.num_bytes
    return raw


def round_trip(prediction: Any) -> Any:
    return Envelope(to_bytes(prediction), "test").prediction(0)


def same(a: Any, b: Any) -> bool:
    """Equal in type, structure and every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
    if isinstance(a, (np.ndarray, np.generic)):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, dict):
        return len(a) == len(b) and all(
            same(x, y) and same(a[x], b[y]) for x, y in zip(a.keys(), b.keys(), strict=True)
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return bool(a == b)


def bits(tensor: torch.Tensor) -> bytes:
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@dataclasses.dataclass
class Boxes:
    xyxy: torch.Tensor
    labels: list[str]
    note: str | None = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    score: float
    total: float = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", self.score * 2)


@dataclasses.dataclass
class Slotted:
    __slots__ = ("value",)
    value: int


class Point(NamedTuple):
    x: torch.Tensor
    y: int


class Scores(dict):  # type: ignore[type-arg]
    """A dict with state of its own, and code that must not run again when it is read."""

    def __init__(self, items: Any = (), best: str = ""):
        super().__init__(items)
        self.best = best

    def __setitem__(self, key: Any, value: Any) -> None:
        raise AssertionError("reading ran the class's code")


class Words(list):  # type: ignore[type-arg]
    pass


ALL_DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64,
    torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
]  # fmt: skip


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    if dtype is torch.bool:
        return torch.rand(shape) > 0.5
    width = torch.empty(0, dtype=dtype).itemsize
    raw = torch.randint(0, 256, (math.prod(shape) * width,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape) if raw.numel() else torch.empty(shape, dtype=dtype)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_tensors_of_every_dtype(dtype: torch.dtype) -> None:
    for shape in [(), (1,), (0,), (3, 0, 2), (5, 3), (2, 3, 4)]:
        tensor = random_tensor(dtype, *shape)
        assert same(round_trip(tensor), tensor), shape


def test_tensors_of_any_layout_in_memory() -> None:
    base = torch.arange(24.0).reshape(2, 3, 4)
    views = [base.transpose(0, 2), base[:, 1:, ::2], base[0, 0, 0], base.expand(5, 2, 3, 4), base.flip(0)]
    views += [torch.randn(4, dtype=torch.complex64).conj(), torch.randn(4, dtype=torch.complex64).conj().imag]
    views += [torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)]
    for view in views:
        assert same(round_trip(view), view)


def test_a_view_costs_its_own_bytes_only() -> None:
    base = torch.zeros(1_000_000)
    assert len(to_bytes([base[:10], base[10:20], base.reshape(1000, 1000)[:, 3]])) < 8000


def test_parameters_and_gradients_come_back_as_plain_tensors() -> None:
    parameter = torch.nn.Parameter(torch.randn(3))
    result = round_trip({"weight": parameter, "loss": parameter * 2})
    assert same(result["weight"], parameter.detach())
    assert not result["loss"].requires_grad


def test_tensors_are_writable_and_independent_of_the_file_and_of_each_other() -> None:
    envelope = Envelope(to_bytes(torch.arange(4.0)), "test")
    first, second = envelope.prediction(0), envelope.prediction(0)
    first.add_(1)
    assert second.tolist() == [0, 1, 2, 3]
    assert first.untyped_storage().nbytes() == 16  # nothing else of the file is kept alive
    array = round_trip(np.arange(3))
    array[0] = 7


ARRAYS = [
    np.arange(6).reshape(2, 3), np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.array(3.5, np.float32),
    np.arange(10)[::-2], np.arange(4, dtype=">i4"), np.array([1 + 2j]), np.array([True, False]),
    np.array(["ab", "", "日本"]), np.array([b"x", b"yz"]), np.array([], np.float64), np.zeros((2, 0), "U3"),
    np.array([""]), np.array(["2020-01-02", "NaT"], "M8[ns]"), np.array([5, -1], "m8[s]"), np.zeros(3, np.float16),
    np.array([1.5], np.longdouble),
]  # fmt: skip


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype.str}-{a.shape}")
def test_numpy_arrays(array: np.ndarray[Any, Any]) -> None:
    assert same(round_trip(array), np.ascontiguousarray(array).reshape(array.shape))


SCALARS = [np.float32(1.25), np.int8(-3), np.bool_(True), np.str_("é"), np.str_(""), np.bytes_(b"a"), np.complex64(1j)]
SCALARS += [np.datetime64("2020-01-01T10:00"), np.timedelta64(3, "h"), np.datetime64("NaT", "s"), np.uint64(2**64 - 1)]


@pytest.mark.parametrize("scalar", SCALARS, ids=repr)
def test_numpy_scalars(scalar: np.generic) -> None:
    assert same(round_trip(scalar), scalar)


PLAIN = [None, True, False, 0, -1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 10**5000, 1.5, -0.0, 5e-324, math.inf]
PLAIN += [-math.inf, math.nan, struct.unpack("d", b"\x01\0\0\0\0\0\xf8\xff")[0], complex(-0.0, math.nan), "", "a\0b"]
PLAIN += ["\ud83d\ude00", "\ud800", "😀", b"", b"\0\xff" * 40, [], (), {}, [[]], ([],), torch.Size([2, 3])]


@pytest.mark.parametrize("value", PLAIN, ids=lambda v: repr(v)[:30] if not isinstance(v, int) else hex(v)[:20])
def test_plain_values(value: Any) -> None:
    assert same(round_trip(value), value)
    assert same(round_trip([value] * 20), [value] * 20)  # long lists of one type take another way
    assert same(round_trip(tuple([value] * 20)), tuple([value] * 20))


def test_keys_of_every_type_in_their_order() -> None:
    value = {"z": 1, 3: "int", None: [], 2.5: 0, "a": {False: 1}}
    assert same(round_trip(value), value)


def test_containers_with_a_class() -> None:
    counter = collections.Counter("abca")
    ordered = collections.OrderedDict(b=1, a=torch.ones(2))
    ordered.move_to_end("b")
    results = round_trip([Point(torch.ones(2), 3), Boxes(torch.ones(1, 4), ["cat"]), Frozen(1.5), Slotted(3), counter])
    assert all(map(same, results, [Point(torch.ones(2), 3), Boxes(torch.ones(1, 4), ["cat"]), Frozen(1.5)]))
    assert type(results[3]) is Slotted
    assert results[3].value == 3
    assert type(results[4]) is collections.Counter
    assert results[4] == counter
    assert list(round_trip(ordered)) == ["a", "b"]
    assert type(round_trip(ordered)) is collections.OrderedDict
    assert round_trip(MappingProxyType({"a": 1})) == {"a": 1}
    default = round_trip(collections.defaultdict(list, a=[1]))
    assert (type(default), default) == (collections.defaultdict, {"a": [1]})
    assert default["b"] == []


def test_dict_subclass_keeps_its_attributes_without_running_its_code() -> None:
    result = round_trip(Scores({"a": 1}, best="a"))
    assert (type(result), dict(result), result.best) == (Scores, {"a": 1}, "a")


def test_struct_sequences_of_torch() -> None:
    result = round_trip(torch.tensor([[1.0, 5.0]]).max(dim=1))
    assert type(result) is torch.return_types.max
    assert result.values.tolist() == [5.0]


def test_transformers_outputs() -> None:
    states = (torch.ones(1, 2), torch.zeros(1, 2))
    output = round_trip(BaseModelOutput(last_hidden_state=torch.ones(2), hidden_states=states))
    assert type(output) is BaseModelOutput
    assert list(output.keys()) == ["last_hidden_state", "hidden_states"]
    assert output["last_hidden_state"] is output.last_hidden_state
    assert output.attentions is None
    encoding = BatchEncoding({"input_ids": torch.ones(2, 3, dtype=torch.long)}, encoding=None)
    encoding._encodings = [object()]  # what a fast tokenizer leaves there cannot be stored
    back = round_trip(encoding)
    assert type(back) is BatchEncoding
    assert same(back["input_ids"], encoding["input_ids"])
    assert back.encodings is None


def test_classes_of_another_process_are_neither_imported_nor_guessed(tmp_path: Any) -> None:
    module = tmp_path / "somewhere_else.py"
    module.write_text(
        textwrap.dedent("""
        import collections, dataclasses, sys
        from pathlib import Path
        from lightning_gpuorch.predictions.storage.part_file import encode_envelope
        @dataclasses.dataclass
        class Box:
            size: int
        Pair = collections.namedtuple("Pair", "left right")
        class Bag(dict):
            pass
        if __name__ == "__main__":
            import somewhere_else as own
            encoded = encode_envelope({}, [[own.Box(3), own.Pair(1, 2), own.Bag(a=1)]])
            Path(sys.argv[1]).write_bytes(b"".join(encoded.buffers))
        """)
    )
    target = tmp_path / "out.gpq"
    subprocess.run([sys.executable, str(module), str(target)], check=True, timeout=120)
    box, pair, bag = Envelope(target.read_bytes(), "test").prediction(0)
    assert "somewhere_else" not in sys.modules
    assert box == {"size": 3}
    assert (pair.left, pair.right, type(pair).__name__) == (1, 2, "Pair")
    assert (type(bag), bag) == (dict, {"a": 1})
    again = Envelope(target.read_bytes(), "test").prediction(0)[1]
    assert type(again) is type(pair)


def test_a_class_whose_fields_have_changed_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = to_bytes([Boxes(torch.ones(1), []), Point(torch.ones(1), 2)])

    @dataclasses.dataclass
    class Other:
        area: float

    class Other2(NamedTuple):
        z: int

    monkeypatch.setattr(sys.modules[__name__], "Boxes", Other)
    monkeypatch.setattr(sys.modules[__name__], "Point", Other2)
    box, point = Envelope(raw, "test").prediction(0)
    assert box == {"xyxy": torch.ones(1), "labels": [], "note": None}
    assert type(point)._fields == ("x", "y")


REFUSED = [
    (lambda: {"boxes": [0, {object()}]}, r"output\['boxes'\]\[1\]\[0\] is of type object"),
    (lambda: Boxes(torch.ones(1), [object()]), r"output\.labels\[0\].*object.*keep_outputs=False"),  # type: ignore[list-item]
    (lambda: Point(torch.ones(1), Words()), r"output\.y.*Words.*list\(\.\.\.\)"),  # type: ignore[arg-type]
    (lambda: {(1, object()): 3}, r"the key \(1, .*\[1\] is of type object"),
    (lambda: {torch.ones(1): 3}, r"key that is a tensor"),
    (lambda: Scores({"a": 1}, best=object()), r"output\.best"),  # type: ignore[arg-type]
    (lambda: torch.ones(2, device="meta"), "meta device"),
    (lambda: torch.ones(2).as_subclass(type("Masked", (torch.Tensor,), {})), "Masked.*as_subclass"),
    (lambda: np.array([object()]), r"output\[0\] is of type object"),
    (lambda: np.zeros(2, [("a", "O")]), "dtype.*Return a list"),
    (lambda: np.zeros(2).view(type("Grid", (np.ndarray,), {})), "Grid.*plain array"),
    (lambda: ValueError("x"), r"ValueError.*repr\(\.\.\.\)"),
    (lambda: (i for i in ()), r"generator.*list\(\.\.\.\)"),
    (lambda: lambda: 0, "function"),
    (lambda: Boxes, "type.*cannot be stored"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message[:20] for _, message in REFUSED])
def test_what_cannot_be_stored_is_named(make: Any, message: str) -> None:
    prediction = make()
    with pytest.raises(UnsupportedPredictionError, match=message):
        check_storable(prediction)
    with pytest.raises(UnsupportedPredictionError, match=message):
        encode_envelope({}, [prediction])


def test_a_prediction_that_contains_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(UnsupportedPredictionError, match="contains itself"):
        check_storable(loop)


def test_metadata_must_be_plain_json() -> None:
    assert Envelope(to_bytes(replica=1, why=None), "test").fields == {"replica": 1, "why": None}
    for fields in ({"a": object()}, {"a": math.nan}, {"body_crc32": 1}):
        with pytest.raises(PredictionStorageError):
            encode_envelope(fields, [])


def test_columns_are_a_safetensors_blob_that_anybody_can_read() -> None:
    tensors = [torch.randn(3, 4), torch.arange(5, dtype=torch.uint8), torch.randn(2).bfloat16(), torch.tensor(True)]
    raw = to_bytes(tensors)
    (header_bytes,) = struct.unpack_from("<I", raw, 8)
    header = json.loads(raw[16 : 16 + header_bytes])
    columns = safetensors.torch.load(bytes(raw[16 + header_bytes + header["structure_bytes"] :]))
    assert (16 + header_bytes) % 64 == 0
    assert header["structure_bytes"] % 64 == 0
    assert all(same(columns[str(i)], tensor) for i, tensor in enumerate(tensors))


def test_many_strings_are_compact() -> None:
    words = [f"word {i}" for i in range(100_000)]
    raw = to_bytes(words)
    assert len(raw) < sum(map(len, words)) + 8 * len(words) + 2000
    assert Envelope(raw, "test").prediction(0) == words


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers() | st.binary(max_size=40)
plain |= st.text(st.characters(exclude_categories=()), max_size=20)
arrays = hnp.arrays(
    st.one_of(
        hnp.scalar_dtypes(), hnp.unicode_string_dtypes(max_len=4), hnp.byte_string_dtypes(max_len=4)
    ),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)  # fmt: skip


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Tensors of any dtype and any bits, some of them transposed."""
    dtype = draw(st.sampled_from(ALL_DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=2))
    num_bytes = math.prod(shape) * torch.empty(0, dtype=dtype).itemsize
    raw = torch.tensor(list(draw(st.binary(min_size=num_bytes, max_size=num_bytes))), dtype=torch.uint8)
    raw = raw % 2 if dtype is torch.bool else raw
    tensor = raw.view(dtype).reshape(shape) if num_bytes else torch.empty(shape, dtype=dtype)
    return tensor.mT if draw(st.booleans()) and tensor.ndim == 2 else tensor


keys = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
trees = st.recursive(
    plain | arrays | tensors() | st.lists(st.text(max_size=3), min_size=14, max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.builds(Point, inner, inner)
        | st.builds(Boxes, inner, inner, inner)
    ),
    max_leaves=12,
)


@given(st.lists(trees, max_size=4))
@examples(100)
def test_any_tree_comes_back_bit_for_bit(predictions: list[Any]) -> None:
    envelope = Envelope(to_bytes(*predictions), "test")
    assert envelope.num_predictions == len(predictions)
    for position, prediction in enumerate(predictions):
        result = envelope.prediction(position)
        assert same(result, prediction), (result, prediction)


SAMPLE = ({"logits": torch.arange(40.0).reshape(4, 10), "text": [f"t{i}" for i in range(20)]}, [1, None, "x"])


def test_every_flipped_bit_is_noticed() -> None:
    raw = to_bytes(*SAMPLE, chunk=3)
    positions = random.Random(7).sample(range(len(raw) * 8), 400) + list(range(16 * 8))
    for position in positions:
        damaged = bytearray(raw)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(CorruptPartError, match="somefile"):
            Envelope(damaged, "somefile")


def test_every_truncation_and_every_tail_is_noticed() -> None:
    raw = to_bytes(*SAMPLE, chunk=3)
    for length in range(len(raw)):
        with pytest.raises(CorruptPartError, match="somefile"):
            Envelope(raw[:length], "somefile")
    with pytest.raises(CorruptPartError, match="bytes in place of"):
        Envelope(raw + b"\0", "somefile")


@given(st.data())
@examples(100)
def test_any_overwritten_stretch_is_noticed(data: st.DataObject) -> None:
    raw = to_bytes(*SAMPLE)
    start = data.draw(st.integers(0, len(raw) - 1))
    patch = data.draw(st.binary(min_size=1, max_size=64))
    damaged = bytearray(raw)
    damaged[start : start + len(patch)] = patch
    if damaged != raw:
        with pytest.raises(CorruptPartError):
            Envelope(damaged, "somefile")
