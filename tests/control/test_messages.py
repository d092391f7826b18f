"""Every message survives the way between two processes, and nothing else gets through."""

from __future__ import annotations

import collections
import signal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gpuorch import errors
from lightning_gpuorch.control import codec
from lightning_gpuorch.control.codec import ANSWER_TYPES, ANSWERS_OF, REQUEST_TYPES
from lightning_gpuorch.control.coordinator import Coordinator
from lightning_gpuorch.control.messages.base import Done, Sender
from lightning_gpuorch.control.messages.leases import ChunkDone, GetProgress, Lease, NextChunk, OpenJob, Stop
from lightning_gpuorch.control.messages.nodes import EndGeneration, LeaveNode
from lightning_gpuorch.control.messages.ranks import DrainJob, Publish
from lightning_gpuorch.errors import ControlPlaneError, ProtocolError
from lightning_gpuorch.predictions.storage.layout import LoaderLayout
from lightning_gpuorch.predictions.storage.manifest import Manifest
from tests.support.examples import examples

SENDER = Sender(rank=1, replica=0, generation=2)
NEXT = NextChunk(sender=SENDER, job=0, loader=0, sequence=7, block=True)
INTEGERS = st.integers(-(2**63), 2**64 - 1)
TEXT = st.text(max_size=20)
PLAIN = st.recursive(
    st.none() | st.booleans() | INTEGERS | st.floats(allow_nan=False) | TEXT,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(TEXT, values, max_size=3),
    max_leaves=6,
)


def _values(kind: msgspec.inspect.Type) -> st.SearchStrategy:
    """Values of a field's type."""
    match kind:
        case msgspec.inspect.IntType():
            return INTEGERS
        case msgspec.inspect.FloatType():
            return st.floats(allow_nan=False)
        case msgspec.inspect.BoolType():
            return st.booleans()
        case msgspec.inspect.LiteralType(values):
            return st.sampled_from(values)
        case msgspec.inspect.StrType():
            return TEXT
        case msgspec.inspect.BytesType():
            return st.binary(max_size=50)
        case msgspec.inspect.NoneType():
            return st.none()
        case msgspec.inspect.AnyType():
            return PLAIN
        case msgspec.inspect.UnionType(types):
            return st.one_of(*map(_values, types))
        case msgspec.inspect.ListType(item):
            return st.lists(_values(item), max_size=3)
        case msgspec.inspect.VarTupleType(item):
            return st.lists(_values(item), max_size=3).map(tuple)
        case msgspec.inspect.TupleType(items):
            return st.tuples(*map(_values, items))
        case msgspec.inspect.DictType(key, value):
            return st.dictionaries(_values(key), _values(value), max_size=3)
        case msgspec.inspect.StructType(cls):
            fields = {field.name: _values(field.type) for field in kind.fields}
            return st.fixed_dictionaries(fields).map(lambda values: cls(**values))
    raise AssertionError(kind)


def _messages(types: tuple[type, ...]) -> st.SearchStrategy:
    return st.one_of(*(_values(msgspec.inspect.type_info(kind)) for kind in types))


def _encode(message: object) -> bytes:
    buffer = bytearray()
    codec.encode_into(message, buffer)
    return bytes(buffer)


@given(_messages(REQUEST_TYPES))
@examples(300)
def test_requests_come_back_as_they_were_sent(request):
    assert codec.decode_request(_encode(request)) == request


def _exchanges(kind: type) -> st.SearchStrategy:
    answers = tuple(answer for answer in ANSWER_TYPES if issubclass(answer, ANSWERS_OF[kind]))
    return st.tuples(_messages((kind,)), _messages(answers))


@given(st.sampled_from(REQUEST_TYPES).flatmap(_exchanges))
@examples(300)
def test_answers_come_back_as_they_were_sent(exchange):
    request, answer = exchange
    assert codec.decode_answer(_encode(answer), request) == answer


@given(st.binary(max_size=200) | PLAIN.map(msgspec.msgpack.encode))
@examples(500)
def test_garbage_is_refused_with_an_error_of_our_own(data):
    with pytest.raises(ProtocolError, match="malformed"):
        codec.decode_request(data)
    with pytest.raises(ProtocolError, match="malformed"):
        codec.decode_answer(data, NEXT)


@given(st.data())
@examples(200)
def test_a_damaged_message_is_read_or_refused(data):
    whole = bytearray(_encode(data.draw(_messages(REQUEST_TYPES))))
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] ^= data.draw(st.integers(1, 255))
    try:
        codec.decode_request(bytes(whole))
    except ProtocolError:
        return


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"sequence": "seven"}, r"NextChunk\.sequence: Expected `int`, got `str`; the value is 'seven'"),
        ({"sender": {"rank": None, "replica": 0, "generation": 0}}, r"NextChunk\.sender\.rank: .*; the value is None"),
        ({"type": "NextChunks"}, r"NextChunks\.type: Invalid value 'NextChunks'; the value is 'NextChunks'"),
        ({"color": "red"}, r"NextChunk: Object contains unknown field `color`"),
        ({"job": 1.5}, r"NextChunk\.job: .*; the value is 1\.5"),
    ],
)
def test_a_malformed_request_is_refused_by_field_and_value(changes, text):
    raw = msgspec.msgpack.decode(_encode(NEXT))
    with pytest.raises(ProtocolError, match=text):
        codec.decode_request(msgspec.msgpack.encode({**raw, **changes}))


def test_a_missing_field_is_named():
    raw = msgspec.msgpack.decode(_encode(NEXT))
    del raw["block"]
    with pytest.raises(ProtocolError, match="missing required field `block`"):
        codec.decode_request(msgspec.msgpack.encode(raw))


def test_a_nested_value_is_shown():
    request = ChunkDone(sender=SENDER, job=0, loader=0, chunk=1, won=True, quarantined=((1, 2, "why"),))
    raw = msgspec.msgpack.decode(_encode(request))
    raw["quarantined"][0][1] = "two"
    with pytest.raises(ProtocolError, match=r"ChunkDone\.quarantined\[0\]\[1\]: .*; the value is 'two'"):
        codec.decode_request(msgspec.msgpack.encode(raw))


def test_an_answer_to_something_else_is_refused():
    assert codec.decode_answer(_encode(Stop()), NEXT) == Stop()
    with pytest.raises(ProtocolError, match="NextChunk was answered with Done"):
        codec.decode_answer(_encode(Done()), NEXT)
    with pytest.raises(ProtocolError, match="DrainJob was answered with Lease"):
        codec.decode_answer(_encode(Lease(chunk=1)), DrainJob())


class Version(str):
    pass


def test_subclasses_of_plain_types_are_sent_as_those():
    request = Publish(key=Version("k"), value=[Version("2.11"), collections.OrderedDict(a=signal.SIGTERM)])
    assert codec.decode_request(_encode(request)) == Publish(key="k", value=["2.11", {"a": 15}])


@pytest.mark.parametrize("value", [2**70, object(), 1j, "a path with \udc80"])
def test_a_value_that_cannot_be_sent_is_refused(value):
    with pytest.raises(ProtocolError, match="Publish cannot be sent"):
        _encode(Publish(key="k", value=value))


def test_keys_of_dictionaries_keep_their_types():
    request = EndGeneration(replica=0, generation=1, blamed={(0, 1): 5}, positions={(0, 1): (20, 24)})
    assert codec.decode_request(_encode(request)) == request
    assert codec.decode_request(_encode(LeaveNode(node=1, supervisor="a", codes={2: -9}))).codes == {2: -9}


OURS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.GPUOrchError)]


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_errors_come_back_as_what_they_were(kind):
    if kind is errors.ModelDoesNotFitError:
        error = kind("too large", 2, 1, None)
    elif kind is errors.JobMismatchError:
        error = kind("another job", ["the length"])
    elif kind is errors.MissingPredictionsError:
        error = kind("missing", [3, 4])
    else:
        error = kind("what was wrong: \udc80")
    with pytest.raises(errors.GPUOrchError) as caught:
        codec.decode_answer(_encode(codec.refused(error)), NEXT)
    assert type(caught.value) is (ControlPlaneError if kind is errors.ModelDoesNotFitError else kind)
    assert getattr(caught.value, "differences", ()) == getattr(error, "differences", ())
    assert list(getattr(caught.value, "indices", ())) == list(getattr(error, "indices", ()))


def test_every_request_has_one_service_that_answers_it():
    assert set(Coordinator(1).routes) == set(REQUEST_TYPES)


def test_a_request_is_the_same_request_when_it_is_repeated(tmp_path):
    events = []
    coordinator = Coordinator(1, on_event=lambda kind, **fields: events.append(kind))
    layout = LoaderLayout(unit="sample", num_units=8, batch_size=2, chunk_size=4)
    manifest = Manifest(loaders=[layout]).to_dict()
    sender = Sender(rank=0, replica=0, generation=0)
    place = {"sender": sender, "job": 0, "loader": 0}
    done = ChunkDone(**place, chunk=0, won=True, samples=3, quarantined=((1, 2, "no memory"),))
    requests = [
        OpenJob(
            sender=sender,
            job=0,
            directory=str(tmp_path),
            storage_options={},
            ephemeral=False,
            manifest=manifest,
            part_bytes=2**26,
            part_seconds=30.0,
            resume_check="all",
        ),
        NextChunk(**place, sequence=0, block=False),
        NextChunk(**place, sequence=1, block=False),
        done,
        Publish(key="k", value=1),
        GetProgress(job=0),
    ]
    for request in requests:
        first, again = (coordinator.handle(request).result(10) for _ in range(2))
        assert first == again, request
    assert (again.samples_done, again.chunks_done) == (3, 1)
    assert events.count("quarantine") == events.count("job") == 1
    assert len(coordinator.jobs[0].queues[0].quarantined) == 1


@pytest.mark.parametrize(
    ("request_", "text"),
    [(NEXT, r"predict call 0 is not open; open are \[\]"), (GetProgress(job=4), "predict call 4 is not open")],
)
def test_a_predict_call_that_is_not_open_is_named(request_, text):
    with pytest.raises(ControlPlaneError, match=text):
        Coordinator(1).handle(request_).result(0)
