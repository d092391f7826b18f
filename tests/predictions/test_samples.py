"""The sample dimension: cutting a tree and merging the pieces gives the tree back, and what is unclear is refused."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import types
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gpuorch.predictions.samples import (
    AmbiguousStructureError,
    CannotMergeError,
    CannotSplitError,
    OutputLayout,
    batch_size_of,
    iter_samples,
    merge_samples,
    slice_samples,
)
from lightning_gpuorch.predictions.samples.kinds import Node, node_of
from tests.support.examples import examples

Pair = collections.namedtuple("Pair", "scores names")


@dataclasses.dataclass
class Record:
    values: Any
    names: Any = None
    version: str = "v"


@dataclasses.dataclass(frozen=True)
class Frozen:
    values: torch.Tensor
    count: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", len(self.values))


@dataclasses.dataclass(slots=True)
class Slotted:
    values: torch.Tensor
    names: list[str]


def equal(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and bool(np.array_equal(one, other))
    if isinstance(one, (dict, collections.abc.Mapping)):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if dataclasses.is_dataclass(one):
        return all(equal(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def leaves(size: int) -> st.SearchStrategy[Any]:
    """Things with one entry per sample, none of which reads as something else at any part size up to 12."""
    rows = torch.arange(size)
    return st.sampled_from(
        [
            rows,
            rows[:, None].expand(size, 17).float(),
            np.arange(size * 19.0).reshape(size, 19),
            np.array([f"s{i}" for i in range(size)]),
            [f"sample {i}" for i in range(size)],
            [float(i) for i in range(size)],
            [{"label": i, "score": torch.tensor(float(i))} for i in range(size)],
            [torch.arange(20 + i) for i in range(size)],
            [None if i % 2 else b"x" for i in range(size)],
        ]
    )


def trees(size: int) -> st.SearchStrategy[Any]:
    constants = st.sampled_from([None, "text", 2.5, True, torch.float16])
    return st.recursive(
        leaves(size),
        lambda inner: st.one_of(
            st.dictionaries(st.sampled_from(["a", "b", 3]), st.one_of(inner, constants), min_size=1, max_size=3),
            st.builds(collections.OrderedDict, st.dictionaries(st.sampled_from("ab"), inner, min_size=1)),
            st.builds(Pair, inner, inner),
            st.builds(Record, inner, inner),
            st.builds(lambda x, y: (x, y, None, "c"), inner, inner),
            st.builds(lambda x, y: [x, y, y], inner, inner),
        ),
        max_leaves=5,
    )


@given(st.data(), st.integers(5, 12))
@examples(150)
def test_pieces_of_a_tree_merge_into_the_tree(data: st.DataObject, size: int) -> None:
    tree = {"rows": torch.arange(size), "tree": data.draw(trees(size))}
    layout = OutputLayout()
    layout.learn(tree, size)
    cuts = sorted(data.draw(st.sets(st.integers(1, size - 1), max_size=4)) | {0, size})
    spans = list(itertools.pairwise(cuts))
    pieces = [slice_samples(tree, start, stop, size, layout) for start, stop in spans]
    merged = merge_samples(pieces, [stop - start for start, stop in spans], layout)
    assert equal(merged, tree)


@given(st.data(), st.integers(5, 12))
@examples(100)
def test_a_tree_walked_by_sample_gives_each_sample(data: st.DataObject, size: int) -> None:
    tree = {"rows": torch.arange(size), "tree": data.draw(trees(size))}
    samples = list(iter_samples(tree, size))
    assert [int(sample["rows"]) for sample in samples] == list(range(size))
    for position, sample in enumerate(samples):
        piece = slice_samples(tree, position, position + 1, size, OutputLayout())
        assert equal(next(iter_samples(piece["rows"], 1)), sample["rows"])


@given(st.data(), st.integers(5, 12))
@examples(60)
def test_merging_without_a_layout_is_right_or_refused(data: st.DataObject, size: int) -> None:
    tree = {"rows": torch.arange(size), "tree": data.draw(trees(size))}
    cuts = sorted(data.draw(st.sets(st.integers(1, size - 1), min_size=1, max_size=4)) | {0, size})
    spans = list(itertools.pairwise(cuts))
    pieces = [slice_samples(tree, start, stop, size, OutputLayout()) for start, stop in spans]
    try:
        merged = merge_samples(pieces, [stop - start for start, stop in spans])
    except AmbiguousStructureError:
        return
    assert equal(merged, tree)


class TestCutting:
    def test_tensors_are_views(self) -> None:
        tree = {"x": torch.arange(6)}
        assert slice_samples(tree, 2, 4, 6)["x"].data_ptr() == tree["x"][2:].data_ptr()

    def test_the_whole_is_the_tree_itself(self) -> None:
        tree = [torch.zeros(2, 2), torch.zeros(2, 2)]
        assert slice_samples(tree, 0, 2, 2) is tree

    @pytest.mark.parametrize(
        "batch",
        [
            [torch.zeros(2, 3), torch.zeros(2, 3)],
            (torch.zeros(3, 8, 8), torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)),
            [torch.zeros(2), torch.zeros(5)],
            [["a", "b"], ["c", "d"]],
        ],
    )
    def test_a_list_that_may_be_columns_or_samples_is_refused(self, batch: Any) -> None:
        with pytest.raises(AmbiguousStructureError, match="columns"):
            slice_samples(batch, 0, 1, len(batch))

    def test_entries_of_different_kinds_are_columns(self) -> None:
        features, labels = slice_samples((torch.zeros(2, 3), torch.tensor([1, 2])), 1, 2, 2)
        assert features.shape == (1, 3)
        assert labels.tolist() == [2]

    def test_a_column_beside_none_stays_open(self) -> None:
        with pytest.raises(AmbiguousStructureError):
            slice_samples((torch.zeros(2, 3), None), 0, 1, 2)

    def test_a_layout_closes_the_question(self) -> None:
        layout = OutputLayout()
        layout.learn((torch.zeros(4, 3), torch.zeros(4, 3)), 4)
        one, other = slice_samples((torch.zeros(2, 3), torch.ones(2, 3)), 0, 1, 2, layout)
        assert (one.shape, other.shape) == ((1, 3), (1, 3))

    def test_a_list_of_images_is_cut_by_image(self) -> None:
        class Image:
            pass

        images = [Image(), Image(), Image()]
        assert slice_samples(images, 1, 3, 3) == images[1:]

    @pytest.mark.parametrize(
        "value",
        [
            object(),
            {1, 2},
            torch.nn.utils.rnn.pack_sequence([torch.zeros(2), torch.zeros(1)]),
            torch.eye(2).to_sparse(),
        ],
        ids=["object", "set", "packed", "sparse"],
    )
    def test_an_object_beside_tensors_is_refused_by_name(self, value: Any) -> None:
        with pytest.raises(AmbiguousStructureError, match=r"batch\['other'\] is a"):
            slice_samples({"x": torch.zeros(2), "other": value}, 0, 1, 2)

    def test_nothing_to_cut_is_an_error(self) -> None:
        with pytest.raises(CannotSplitError, match="3 entries"):
            slice_samples({"x": torch.zeros(4)}, 0, 1, 3)
        with pytest.raises(CannotSplitError, match="not known"):
            slice_samples(torch.zeros(4), 0, 1, None)

    def test_derived_fields_belong_to_the_piece(self) -> None:
        piece = slice_samples(Frozen(torch.arange(5)), 1, 4, 5)
        assert piece.count == 3
        assert piece.values.tolist() == [1, 2, 3]

    def test_slots_and_read_only_mappings(self) -> None:
        piece = slice_samples(Slotted(torch.arange(3), ["a", "b", "c"]), 1, 3, 3)
        assert piece.names == ["b", "c"]
        frozen = slice_samples(types.MappingProxyType({"x": torch.arange(3)}), 0, 1, 3)
        assert isinstance(frozen, types.MappingProxyType)

    def test_result_types_of_torch(self) -> None:
        result = torch.arange(12.0).reshape(4, 3).max(1)
        piece = slice_samples(result, 1, 3, 4)
        assert type(piece) is type(result)
        assert piece.indices.shape == (2,)
        assert equal(merge_samples([slice_samples(result, 0, 1, 4), slice_samples(result, 1, 4, 4)], [1, 3]), result)


class TestTransformers:
    def test_batch_encoding_keeps_its_encodings(self) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import BatchEncoding, PreTrainedTokenizerFast

        core = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
        core.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")
        batch = tokenizer(["a", "a b", "b b b", "x"], padding=True, return_tensors="pt")
        pieces = [slice_samples(batch, 0, 1, 4), slice_samples(batch, 1, 4, 4)]
        assert type(pieces[1]) is BatchEncoding
        assert pieces[1].tokens(0) == batch.tokens(1)
        assert pieces[1].n_sequences == 1
        merged = merge_samples(pieces, [1, 3], OutputLayout())
        assert merged.tokens(3) == batch.tokens(3)
        assert torch.equal(merged["input_ids"], batch["input_ids"])

    def test_model_output_keeps_items_and_attributes(self) -> None:
        from transformers.modeling_outputs import SequenceClassifierOutput

        output = SequenceClassifierOutput(
            logits=torch.arange(12.0).reshape(4, 3), hidden_states=(torch.zeros(4, 5),) * 2
        )
        pieces = [slice_samples(output, 0, 3, 4), slice_samples(output, 3, 4, 4)]
        assert pieces[1].logits is pieces[1]["logits"]
        merged = merge_samples(pieces, [3, 1])
        assert type(merged) is SequenceClassifierOutput
        assert torch.equal(merged.logits, output.logits)
        assert merged.loss is None
        assert len(merged.hidden_states) == 2


class TestMerging:
    @pytest.mark.parametrize(
        ("output", "name"),
        [
            (lambda x: {"y": x, "loss": x.mean()}, r"output\['loss'\]"),
            (lambda x: {"y": x, "loss": float(x.mean())}, r"output\['loss'\]"),
            (lambda x: Record(x, [x.sum(0, keepdim=True).expand(7)]), r"output\.names\[0\]"),
            (lambda x: x.mean(), "output has shape"),
            (lambda x: np.float64(x.mean()), "output is"),
            (lambda x: (x, x, len(x)), r"output\[2\] is 4"),
        ],
    )
    def test_a_reduction_is_refused_by_name(self, output: Any, name: str) -> None:
        parts = [output(torch.arange(4.0)), output(torch.arange(4.0, 8.0))]
        with pytest.raises(CannotMergeError, match=name):
            merge_samples(parts, [4, 4], OutputLayout())

    def test_similarities_within_the_batch_are_refused(self) -> None:
        def similarity(x: torch.Tensor) -> torch.Tensor:
            return x @ x.T

        whole = torch.randn(8, 16)
        with pytest.raises(AmbiguousStructureError, match="batch once more"):
            merge_samples([similarity(whole[:4]), similarity(whole[4:])], [4, 4], OutputLayout())
        with pytest.raises(CannotMergeError, match="differs in shape"):
            merge_samples([similarity(whole[:5]), similarity(whole[5:])], [5, 3], OutputLayout())

    def test_as_many_classes_as_samples_is_fine_once_known(self) -> None:
        layout = OutputLayout()
        layout.learn(torch.zeros(8, 4), 8)
        assert merge_samples([torch.zeros(4, 4), torch.zeros(4, 4)], [4, 4], layout).shape == (8, 4)

    def test_parts_of_unequal_size_answer_what_equal_ones_leave_open(self) -> None:
        def step(x: torch.Tensor) -> list[Any]:
            return [x, x + 1]

        whole, layout = torch.arange(8.0), OutputLayout()
        with pytest.raises(AmbiguousStructureError):
            merge_samples([step(part) for part in whole.split(2)], [2, 2, 2, 2], layout)
        sizes = [2, 2, 2, 1, 1]
        merged = merge_samples([step(part) for part in whole.split(sizes)], sizes, layout)
        assert equal(merged, step(whole))
        again = merge_samples([step(part) for part in whole.split(2)], [2, 2, 2, 2], layout)
        assert equal(again, step(whole))

    def test_a_proof_overrides_what_was_thought(self) -> None:
        layout = OutputLayout()
        layout.learn([0.5, 0.25], 2)
        layout.learn([0.5, 0.25], 7)
        with pytest.raises(CannotMergeError, match=r"output\[0\] is 0.1"):
            merge_samples([[0.1, 0.2], [0.3, 0.2]], [2, 2], layout)

    def test_constants_and_fixed_tensors_stay(self) -> None:
        part = {"y": torch.zeros(2), "anchors": torch.arange(9), "nan": float("nan"), "name": "m", "none": None}
        merged = merge_samples([part, dict(part)], [2, 2])
        assert torch.equal(merged["anchors"], torch.arange(9))
        assert merged["name"] == "m"
        assert merged["none"] is None
        assert merged["y"].shape == (4,)

    @pytest.mark.parametrize(
        ("parts", "match"),
        [
            ([{"a": torch.zeros(2)}, {"b": torch.zeros(2)}], "different entries"),
            ([torch.zeros(2), [0.0, 0.0]], "differs in type"),
            ([torch.zeros(2, 3), torch.zeros(2, 4)], "padded"),
            ([torch.zeros(2), torch.zeros(2, dtype=torch.int64)], "dtype"),
            ([["a", "b", "c"], ["a"]], "neither one per sample"),
            ([object(), object()], "object, which cannot"),
        ],
    )
    def test_parts_that_do_not_match_are_refused(self, parts: list[Any], match: str) -> None:
        with pytest.raises(CannotMergeError, match=match):
            merge_samples(parts, [2, 2])

    @pytest.mark.parametrize("other", [{"a": None}, {"b": 2.5}, {"a": 2.5}])
    def test_columns_of_which_some_hold_no_samples(self, other: Any) -> None:
        """As many columns as samples, so that they could be taken for samples."""
        parts = [[{"a": torch.arange(3 * start, 3 * start + 3)}, other, other] for start in (0, 1)]
        with pytest.raises(AmbiguousStructureError):
            merge_samples(parts, [3, 3])

    def test_samples_of_which_one_is_as_long_as_the_batch(self) -> None:
        boxes = [[{"boxes": torch.zeros(length, 4)} for length in lengths] for lengths in ((3, 1, 0), (5, 3, 2))]
        assert len(merge_samples(boxes, [3, 3])) == 6

    def test_masked_arrays_keep_their_mask(self) -> None:
        part = np.ma.masked_array([1, 2], mask=[True, False])
        merged = merge_samples([part, part], [2, 2])
        assert merged.mask.tolist() == [True, False, True, False]

    def test_sizes_must_match(self) -> None:
        with pytest.raises(ValueError, match="1 parts and 2 sizes"):
            merge_samples([torch.zeros(2)], [1, 1])


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(5, 2), 5),
        ({"x": torch.zeros(5, 2), "y": np.zeros(5), "scale": torch.tensor(2.0)}, 5),
        ([torch.zeros(5, 2), torch.zeros(5)], 5),
        (["a", "b", "c"], 3),
        ([torch.zeros(2), torch.zeros(7), torch.zeros(3)], 3),
        ([{"id": 1}, {"id": 2}], 2),
        ({"names": ["a", "b"], "x": torch.zeros(2, 2)}, 2),
    ],
)
def test_batch_size(batch: Any, size: int) -> None:
    assert batch_size_of(batch) == size


@pytest.mark.parametrize(
    "batch", [{"x": torch.zeros(5), "y": torch.zeros(4)}, [torch.zeros(3, 8)] * 2, [["a", "b", "c"]] * 2]
)
def test_an_unclear_batch_size_is_refused(batch: Any) -> None:
    with pytest.raises(AmbiguousStructureError):
        batch_size_of(batch)


def test_a_batch_without_samples_is_refused() -> None:
    with pytest.raises(CannotSplitError):
        batch_size_of({"scale": torch.tensor(1.0)})


def test_a_matrix_of_scipy_that_is_a_dict_is_no_mapping() -> None:
    scipy_sparse = pytest.importorskip("scipy.sparse")
    for kind in (scipy_sparse.dok_matrix, scipy_sparse.dok_array):
        assert node_of(kind(np.eye(3))) is Node.OPAQUE
