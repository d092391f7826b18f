"""Models whose sharded form could be wrong without a sign: each is right on every input, or refused before it runs."""

from __future__ import annotations

import collections
import copy
import random
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from tp_models import WIDTH, randomized
from tp_ranks import on_threads, relative_error

from lightning_gpuorch.errors import TensorParallelError
from lightning_gpuorch.parallel.tensor_parallel import (
    Communicator,
    LayerKind,
    TensorParallelPlan,
    apply_plan,
    plan_tensor_parallel,
)
from lightning_gpuorch.parallel.tensor_parallel.values import leaf_difference, output_leaves

INNER = 2 * WIDTH
GATHERED = {LayerKind.COLUMN_GATHER, LayerKind.ROW_SPLIT, LayerKind.REPLICATED, LayerKind.VOCABULARY}


def rows(num_rows: int = 2, length: int = 15, seed: int = 4) -> torch.Tensor:
    return torch.randn(num_rows, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def planned(model: nn.Module, example: Any, num_ranks: int = 2, method: str = "predict_step") -> TensorParallelPlan:
    return plan_tensor_parallel(model, (example,), num_ranks, method=method)


def assert_right(model: nn.Module, plan: TensorParallelPlan, *inputs: Any, method: str = "predict_step") -> None:
    """Run the inputs one after the other on the whole model and on every rank, as a single device would."""

    def steps(part: nn.Module) -> list[Any]:
        with torch.inference_mode():
            return [list(output_leaves(getattr(part, method)(one))) for one in inputs]

    expected = steps(copy.deepcopy(model))

    def work(communicator: Communicator) -> list[Any]:
        part = copy.deepcopy(model)
        apply_plan(part, plan, communicator.rank, communicator)
        return steps(part)

    for results in on_threads(plan.tensor_parallel_size, work):
        for own, whole in zip(results, expected, strict=True):
            assert [path for path, _ in own] == [path for path, _ in whole]
            for (path, value), (_, reference) in zip(own, whole, strict=True):
                assert not leaf_difference(value, reference), path


def kinds(plan: TensorParallelPlan) -> set[LayerKind]:
    return {layer.kind for layer in plan.layers.values()}


class TwoLayers(nn.Module):
    """Maps to more channels and back; ``between`` is what stands between, ``step`` what is called."""

    def __init__(self, between: Callable[[Any, torch.Tensor], Any] = lambda self, h: h.sigmoid()) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.between = between

    def predict_step(self, x: torch.Tensor) -> Any:
        return self.down(self.between(self, self.up(x)))


# -- a block that is not like the others -------------------------------------------------------------------------------


class Wide(nn.Module):
    """Blocks of one kind; one of them normalizes, over all channels, the first position of each sequence only."""

    width, num_blocks, odd = 512, 6, 4

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(self.width, 2 * self.width) for _ in range(self.num_blocks))
        self.down = nn.ModuleList(nn.Linear(2 * self.width, self.width) for _ in range(self.num_blocks))

    def predict_step(self, x: torch.Tensor) -> torch.Tensor:
        for index, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            h = up(x).sigmoid()
            if index == self.odd:
                h = torch.cat([F.normalize(h[:, :1], dim=-1), h[:, 1:]], 1)
            x = x + down(h)
        return x


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_one_block_of_many_that_treats_one_position_in_another_way(num_ranks: int) -> None:
    model = randomized(Wide())
    inputs = [torch.randn(2, 16, model.width, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    plan = planned(model, inputs[0], num_ranks)
    assert kinds(plan) <= GATHERED
    assert_right(model, plan, *inputs)


# -- sizes that fit by chance ------------------------------------------------------------------------------------------


class Hard(nn.Module):
    """Attention with sizes written into one of its views."""

    def __init__(self, split: Callable[[torch.Tensor, int, int], Any]) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.split = split

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q, k, v = self.split(self.qkv(x), b, t)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1))


class Stack(nn.Module):
    def __init__(self, split: Callable[[torch.Tensor, int, int], Any]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Hard(split), Hard(split))

    def predict_step(self, x: torch.Tensor) -> Any:
        return self.blocks(x)


SPLITS: dict[str, Callable[[torch.Tensor, int, int], Any]] = {
    "length open": lambda h, b, t: h.view(b, -1, 3, 8, 8).permute(2, 0, 3, 1, 4),
    "batch open": lambda h, b, t: h.view(-1, t, 3, 8, 8).permute(2, 0, 3, 1, 4),
    "width open": lambda h, b, t: h.view(b, t, 3, 8, -1).permute(2, 0, 3, 1, 4),
    "heads open": lambda h, b, t: h.view(b, t, 3, -1, 8).permute(2, 0, 3, 1, 4),
    "packed per head": lambda h, b, t: h.reshape(b, -1, 8, 24).transpose(1, 2).chunk(3, -1),
    "flat": lambda h, b, t: h.view(-1, 24, 8).view(b, -1, 3, 8, 8).permute(2, 0, 3, 1, 4),
    "chunks": lambda h, b, t: [part.reshape(b, -1, 8, 8).transpose(1, 2) for part in h.chunk(3, -1)],
    "unflatten": lambda h, b, t: h.unflatten(-1, (3, 8, -1)).permute(2, 0, 3, 1, 4),
}


@pytest.mark.parametrize("length", [15, 16])
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", SPLITS)
def test_sizes_that_fit_by_chance_of_the_length(name: str, num_ranks: int, length: int) -> None:
    model = randomized(Stack(SPLITS[name]))
    plan = planned(model, rows(length=length), num_ranks)
    assert_right(model, plan, *(rows(b, t) for b, t in ((2, 15), (2, 16), (3, 13), (1, 12), (4, 8))))


def test_hard_coded_sizes_with_an_open_one_are_cut() -> None:
    for name in ("length open", "batch open", "chunks"):
        for length in (15, 16):
            plan = planned(randomized(Stack(SPLITS[name])), rows(length=length))
            assert plan.shape_rules
            assert kinds(plan) == {LayerKind.COLUMN, LayerKind.ROW}, plan.describe()


def test_a_view_of_channels_that_fits_for_even_batches_only() -> None:
    model = randomized(TwoLayers(lambda self, h: F.gelu(h.view(-1, INNER)).view(h.shape)))
    for num_rows in (2, 3):
        assert_right(model, planned(model, rows(num_rows)), rows(3), rows(2), rows(1, 1))


# -- outputs of every type ---------------------------------------------------------------------------------------------


class Box:
    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held


class Pickles:
    """Says itself what it consists of."""

    def __init__(self, held: torch.Tensor) -> None:
        self.hidden = lambda: held
        self.back = weakref.ref(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"held": self.hidden(), "back": self.back}


class Counts(collections.Counter[str]):
    pass


OUTPUTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "array": lambda h: h.numpy(),
    "detached array": lambda h: h.detach().cpu().numpy(),
    "half array": lambda h: np.asarray(h, dtype=np.float16),
    "object array": lambda h: np.array([h[0], None], dtype=object),
    "list": lambda h: h.tolist(),
    "number": lambda h: float(h[0, 0].norm()),
    "count": lambda h: int((h > 0.5).sum()),
    "namespace": lambda h: types.SimpleNamespace(features=h, name="x"),
    "slots": lambda h: Box(h),
    "own state": lambda h: Pickles(h),
    "generator": lambda h: (part for part in h),
    "zip": lambda h: zip(h, range(len(h)), strict=True),
    "set": lambda h: {round(float(value), 3) for value in h[0, 0]},
    "deque": lambda h: collections.deque([h]),
    "counter": lambda h: Counts(a=int((h > 0.6).sum())),
    "closure": lambda h: lambda: h,
    "text": lambda h: " ".join(str(int(index)) for index in h.argmax(-1).flatten()),
    "bytes": lambda h: (h * 100).to(torch.uint8).numpy().tobytes(),
    "sparse": lambda h: h.flatten(1).to_sparse(),
    "distribution": lambda h: torch.distributions.Normal(h, 1.0),
    "branch": lambda h: "large" if h[0, 0, 0] + h[0, 0, -1] > 1 else "small",
}


class Outputs(TwoLayers):
    def __init__(self, seen: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.seen = seen

    def predict_step(self, x: torch.Tensor) -> Any:
        hidden = self.up(x).sigmoid()
        return {"seen": self.seen(hidden), "logits": self.down(hidden)}


@pytest.mark.parametrize("name", OUTPUTS)
def test_hidden_channels_of_any_type_are_whole(name: str) -> None:
    model = randomized(Outputs(OUTPUTS[name]))
    assert_right(model, planned(model, rows()), rows(), rows(3, 8, 5))


def test_what_cannot_be_compared_is_refused_by_name() -> None:
    import threading

    model = randomized(Outputs(lambda h: threading.Lock()))
    with pytest.raises(TensorParallelError, match=r"output\['seen'\] is a _thread.lock, which cannot be compared"):
        planned(model, rows())


def test_times_in_the_output_are_no_reason_to_refuse() -> None:
    import time

    model = randomized(Outputs(lambda h: time.perf_counter()))
    assert kinds(planned(model, rows())) == {LayerKind.COLUMN, LayerKind.ROW}


# -- functions of all channels that the usual numbers do not reach -----------------------------------------------------


def clipped(self: Any, h: torch.Tensor) -> torch.Tensor:
    return h * (100 / h.norm(dim=-1, keepdim=True)).clamp(max=1.0)


THRESHOLDS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "norm is clipped": clipped,
    "branch on the norm": lambda self, h: h / h.norm() if h.norm() > 2000 else h,
    "largest channel": lambda self, h: h - (h.amax(-1, keepdim=True) - 50).clamp(min=0),
    "mean square": lambda self, h: h / h.square().mean(-1, keepdim=True).clamp(min=1e3).sqrt(),
    "small norm": lambda self, h: torch.where(h.norm(dim=-1, keepdim=True) < 0.05, torch.zeros_like(h), h),
    "branch on a small norm": lambda self, h: h if h.norm() > 40 else h * 0,
    "sum": lambda self, h: h - F.relu(h.abs().sum(-1, keepdim=True) - 500) / INNER,
}


@pytest.mark.parametrize("name", THRESHOLDS)
def test_thresholds_over_all_channels(name: str) -> None:
    model = randomized(TwoLayers(THRESHOLDS[name]))
    plan = planned(model, rows())
    assert_right(model, plan, rows(), 300 * rows(), 1e-4 * rows())
    assert kinds(plan) <= GATHERED


class Experts(nn.Module):
    """Fused experts that limit the norm of their inner channels, in a range no usual input reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, WIDTH, INNER) / 8)
        self.down = nn.Parameter(torch.randn(4, INNER, WIDTH) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = torch.einsum("btw,ewi->ebti", x, self.up)
        inner = inner * (200 / inner.norm(dim=-1, keepdim=True)).clamp(max=1.0)
        return torch.einsum("ebti,eiw->btw", inner, self.down)


def test_thresholds_inside_of_fused_experts() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts, self.out = Experts(), nn.Linear(WIDTH, WIDTH)

        def predict_step(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.experts(x))

    model = randomized(Mixture())
    plan = planned(model, rows())
    assert plan.layers["experts"].kind is LayerKind.REPLICATED
    assert_right(model, plan, rows(), 300 * rows())


def test_clamping_channel_by_channel_is_cut() -> None:
    model = randomized(TwoLayers(lambda self, h: h.clamp(-50, 50)))
    plan = planned(model, rows())
    assert kinds(plan) == {LayerKind.COLUMN, LayerKind.ROW}
    assert_right(model, plan, rows(), 300 * rows())


# -- random numbers ----------------------------------------------------------------------------------------------------


class Noisy(TwoLayers):
    def __init__(self, noise: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.noise = noise
        self.drop = nn.Dropout(0.01)

    def predict_step(self, x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        self.drop.train()
        return self.down(self.noise(self, self.up(x)))  # type: ignore[call-arg,arg-type]


NOISES: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "dropout module": lambda self, h: self.drop(h),
    "F.dropout": lambda self, h: F.dropout(h, 0.005),
    "rand_like": lambda self, h: h + 1e-7 * torch.rand_like(h),
    "bernoulli": lambda self, h: h * torch.bernoulli(torch.full_like(h, 0.999)),
    "multinomial": lambda self, h: h + torch.multinomial(h[:, 0].softmax(-1), 1)[..., None],
    "generator": lambda self, h: h + torch.randn(h.shape, generator=torch.Generator().manual_seed(1)),
    "normal_": lambda self, h: h + torch.empty_like(h).normal_(),
    "rrelu": lambda self, h: F.rrelu(h, training=True),
    "numpy": lambda self, h: h + torch.from_numpy(np.random.rand(*h.shape)).float(),
    "python": lambda self, h: h + torch.tensor([random.random() for _ in range(h.shape[-1])]),
}


@pytest.mark.parametrize("name", NOISES)
def test_random_numbers_of_a_ranks_own_shape(name: str) -> None:
    if name in ("numpy", "python"):  # threads that stand for ranks share these generators; only the plan is looked at
        assert kinds(planned(randomized(Noisy(NOISES[name])), rows())) <= GATHERED  # type: ignore[arg-type]
        return
    model = randomized(Noisy(NOISES[name]))  # type: ignore[arg-type]
    plan = planned(model, rows())
    assert kinds(plan) <= GATHERED, plan.describe()


def test_random_numbers_for_whole_tensors_leave_the_cut() -> None:
    model = randomized(Noisy(lambda self, h: h * torch.rand(()) + random.random() + np.random.rand()))  # type: ignore[call-arg,arg-type,misc]
    assert kinds(planned(model, rows())) == {LayerKind.COLUMN, LayerKind.ROW}


def test_random_numbers_that_nobody_seeded_are_named() -> None:
    model = randomized(Noisy(lambda self, h: h + float(np.random.default_rng().random())))  # type: ignore[call-arg,arg-type,misc]
    with pytest.raises(TensorParallelError, match=r"computes something else in every run.*Seed its generators"):
        planned(model, rows())


def test_attention_that_drops_out_stays_whole() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, 8, dropout=0.1, batch_first=True)

        def predict_step(self, x: torch.Tensor) -> torch.Tensor:
            self.attention.train()
            return self.attention(x, x, x)[0]

    plan = planned(randomized(Attention()), rows())
    assert plan.layers["attention"].kind is LayerKind.REPLICATED
    quiet = randomized(Attention())
    quiet.attention.dropout = 0.0  # type: ignore[union-attr]
    assert planned(quiet, rows()).layers["attention"].kind is LayerKind.HEADS


# -- layers with more than a weight ------------------------------------------------------------------------------------


class Scaled(nn.Linear):
    scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias) * self.scale


class ThroughSuper(nn.Linear):
    cap: float | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y if self.cap is None else y.clamp(-self.cap, self.cap)


class Activated(nn.Linear):
    activation: Callable[[torch.Tensor], torch.Tensor] = staticmethod(lambda y: y)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(F.linear(x, self.weight, self.bias))


class Transposed(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Unscaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight / self.weight.norm(), self.bias)


class Odd(nn.Linear):
    """Adds its bias twice, once by hand."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias) + self.bias


class Blocks(nn.Module):
    def __init__(self, cls: type[nn.Linear], **attributes: Any) -> None:
        super().__init__()
        self.up = nn.ModuleList(cls(WIDTH, INNER) for _ in range(3))
        self.down = nn.ModuleList(cls(INNER, WIDTH) for _ in range(3))
        for name, value in attributes.items():
            setattr(self.up[1], name, value)
            setattr(self.down[2], name, value)

    def predict_step(self, x: torch.Tensor) -> torch.Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(x).sigmoid())
        return x


LAYERS: dict[str, tuple[type[nn.Linear], dict[str, Any], bool]] = {
    "instance attribute": (Scaled, {"scale": 0.5}, True),
    "clamp through super": (ThroughSuper, {"cap": 0.1}, True),
    "fused activation": (Activated, {"activation": F.gelu}, True),
    "softmax over channels": (Activated, {"activation": lambda y: y.softmax(-1)}, False),
    "transposed by hand": (Transposed, {}, True),
    "weight is normalised": (Unscaled, {}, False),
    "bias twice": (Odd, {}, False),
}


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_subclasses_and_attributes_of_layers_count(name: str, num_ranks: int) -> None:
    cls, attributes, is_cut = LAYERS[name]
    model = randomized(Blocks(cls, **attributes))
    plan = planned(model, rows(), num_ranks)
    if is_cut:
        assert kinds(plan) == {LayerKind.COLUMN, LayerKind.ROW}, plan.describe()
    assert_right(model, plan, rows(), rows(3, 4))


def test_type_checks_in_the_models_code_hold() -> None:
    class Checks(TwoLayers):
        def predict_step(self, x: torch.Tensor) -> torch.Tensor:
            assert type(self) is Checks
            for part in (self.up, self.down):
                x = part(x) * (2 if type(part) is nn.Linear else 3)
            return x

    model = randomized(Checks())
    assert_right(model, planned(model, rows()), rows())


class Words(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(5000, WIDTH, **options)
        self.body = TwoLayers()

    def predict_step(self, ids: torch.Tensor) -> torch.Tensor:
        return self.body.predict_step(self.words(ids))


def ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 5000, (2, 12), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", [{"max_norm": 0.5}, {"max_norm": 0.3, "norm_type": 1.0}, {"padding_idx": 3}])
def test_options_of_embeddings_count(options: dict[str, Any]) -> None:
    model = randomized(Words(**options))
    plan = planned(model, ids())
    assert plan.layers["words"].kind is LayerKind.VOCABULARY
    assert_right(model, plan, ids(), ids(1), ids(2))


def test_an_embedding_with_max_norm_is_not_cut_by_channels() -> None:
    class Gains(TwoLayers):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Embedding(4, INNER, max_norm=0.5)

        def predict_step(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x) * self.gain(torch.zeros(x.shape[:2], dtype=torch.long)))

    model = randomized(Gains())
    plan = planned(model, rows())
    assert plan.layers["gain"].kind is not LayerKind.COLUMN
    assert_right(model, plan, rows(), rows(seed=8))


@pytest.mark.parametrize("wrong", [5000, -1, 10_000])
def test_ids_outside_of_the_vocabulary_raise(wrong: int) -> None:
    model = randomized(Words())
    plan = planned(model, ids())
    assert plan.layers["words"].kind is LayerKind.VOCABULARY
    bad = ids()
    bad[1, 3] = wrong

    def work(communicator: Communicator) -> str:
        part = copy.deepcopy(model)
        apply_plan(part, plan, communicator.rank, communicator)
        with pytest.raises(IndexError) as caught, torch.no_grad():
            part.predict_step(bad)
        return str(caught.value)

    with pytest.raises(IndexError) as alone:
        model.predict_step(bad)
    assert on_threads(2, work) == [str(alone.value)] * 2


def test_a_gradient_through_a_sharded_layer_is_refused() -> None:
    model = randomized(TwoLayers())
    plan = planned(model, rows())

    def work(communicator: Communicator) -> None:
        part = copy.deepcopy(model)
        apply_plan(part, plan, communicator.rank, communicator)
        with pytest.raises(TensorParallelError, match="a gradient is taken through a sharded layer"):
            part.predict_step(rows().requires_grad_())

    on_threads(2, work)


# -- state -------------------------------------------------------------------------------------------------------------


class Merging(nn.Linear):
    """Adds an adapter to its weight in ``eval()`` and takes it off in ``train()``."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.low, self.high = nn.Parameter(torch.randn(sizes[1], 4)), nn.Parameter(torch.randn(4, sizes[0]))
        self.merged = False

    def train(self, mode: bool = True) -> Merging:
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * (self.low @ self.high)
            self.merged = not mode
        return super().train(mode)


def test_planning_calls_no_eval_and_merges_nothing() -> None:
    model = nn.Sequential(Merging(WIDTH, INNER), nn.Sigmoid(), nn.Linear(INNER, WIDTH))
    before = copy.deepcopy(model.state_dict())
    plan_tensor_parallel(model, rows(), 2)
    assert not model[0].merged
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    plan = plan_tensor_parallel(model, rows(), 2)
    assert_right(model, plan, rows(), method="forward")


class Keeps(TwoLayers):
    """Keeps state in every way, and changes it in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(WIDTH))
        self.mean = torch.zeros(WIDTH)
        self.alias = self.mean[:4]
        self.array = np.zeros(3)
        self.cache: dict[str, Any] = {"seen": [], "deep": {"x": torch.zeros(2)}}
        self.pair = (torch.zeros(2), [1])
        self.holder = types.SimpleNamespace(count=0, last=None, queue=collections.deque([1], maxlen=4))
        self.generator = torch.Generator().manual_seed(1)
        self.random, self.numpy_random = random.Random(1), np.random.default_rng(1)

    def predict_step(self, x: torch.Tensor) -> Any:
        y = self.down(self.up(x - self.mean).sigmoid())
        with torch.no_grad():
            self.mean.lerp_(y.mean((0, 1)), 0.1)
        self.total += self.mean
        self.array += 1
        self.cache["seen"].append(y.mean((0, 1)))
        self.cache["deep"]["x"].add_(1)
        self.pair[0].mul_(2).add_(1)
        self.pair[1].append(2)
        self.holder.count += 1
        self.holder.last = y.detach()
        self.holder.queue.append(3)
        noise = torch.rand((), generator=self.generator) + self.random.random() + self.numpy_random.random()
        return y * noise + self.total + torch.stack(self.cache["seen"]).sum(0), self.alias.clone()


class SharesState(TwoLayers):
    calls, seen, table = 0, [0], {"last": torch.zeros(2)}

    def predict_step(self, x: torch.Tensor) -> Any:
        type(self).calls += 1
        self.seen.append(self.calls)
        self.table["last"].add_(1)
        self.table["new"] = x
        return super().predict_step(x)


def test_planning_leaves_data_of_classes_as_it_was() -> None:
    planned(randomized(SharesState()), rows())
    assert (SharesState.calls, SharesState.seen, list(SharesState.table)) == (0, [0], ["last"])
    assert not SharesState.table["last"].any()


def state_of(model: Keeps) -> list[Any]:
    kept = {key: value for key, value in vars(model).items() if not key.startswith("_") and "random" not in key}
    states = [model.generator.get_state(), model.random.getstate(), str(model.numpy_random.bit_generator.state)]
    return list(
        output_leaves([kept.pop("between").__qualname__, states, kept.pop("generator") is None, kept, model.total])
    )


def test_planning_leaves_every_attribute_as_it_was() -> None:
    model = randomized(Keeps())
    before, identity = copy.deepcopy(state_of(model)), id(model.mean)
    plan = planned(model, rows())
    after = state_of(model)
    assert [path for path, _ in before] == [path for path, _ in after]
    assert all(not leaf_difference(one, other) for (_, one), (_, other) in zip(after, before, strict=True))
    assert id(model.mean) == identity
    assert model.alias.data_ptr() == model.mean.data_ptr()
    assert not model.mean.requires_grad
    assert kinds(plan) == {LayerKind.COLUMN, LayerKind.ROW}
    assert_right(model, plan, rows(), rows(seed=5), rows(seed=6))


def test_state_that_only_the_next_step_shows() -> None:
    class Delayed(TwoLayers):
        """Returns the hidden channels of the step before."""

        def __init__(self) -> None:
            super().__init__()
            self.last: torch.Tensor | None = None

        def predict_step(self, x: torch.Tensor) -> Any:
            hidden = self.up(x).sigmoid()
            last, self.last = self.last, hidden.mean((0, 1))
            return self.down(hidden), last

    model = randomized(Delayed())
    assert_right(model, planned(model, rows()), rows(), rows(seed=5), rows(seed=6))


# -- how the step is run -----------------------------------------------------------------------------------------------


class Decorated(TwoLayers):
    @torch.inference_mode()
    def predict_step(self, x: torch.Tensor) -> Any:
        return super().predict_step(x)


class WithoutGradients(TwoLayers):
    @torch.no_grad()
    def predict_step(self, x: torch.Tensor) -> Any:
        return super().predict_step(x).numpy()


class Counting(TwoLayers):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("mean", torch.zeros(WIDTH))

    def predict_step(self, x: torch.Tensor) -> Any:
        self.calls += 1
        self.mean.mul_(0.9).add_(x.mean((0, 1)))
        return super().predict_step(x - self.mean) / self.calls


class Asks(TwoLayers):
    def predict_step(self, x: torch.Tensor) -> Any:
        assert not torch.is_grad_enabled() or x.shape[0] < 2
        return super().predict_step(x)


@pytest.mark.parametrize("cls", [Decorated, WithoutGradients, Counting])
def test_steps_that_run_without_gradients_are_cut(cls: type[TwoLayers]) -> None:
    model = randomized(cls())
    plan = planned(model, rows())
    assert kinds(plan) == {LayerKind.COLUMN, LayerKind.ROW}, plan.describe()
    assert_right(model, plan, rows(), rows(3))


def test_a_step_that_refuses_gradients_is_planned_without_its_graph() -> None:
    model = randomized(Asks())
    assert_right(model, planned(model, rows()), rows())


def test_a_step_that_needs_gradients_of_its_own() -> None:
    class Forces(TwoLayers):
        def predict_step(self, x: torch.Tensor) -> Any:
            with torch.enable_grad():
                place = x.detach().clone().requires_grad_()
                (force,) = torch.autograd.grad(place.square().sum(), place)
            return super().predict_step(x) + force

    model = randomized(Forces())
    plan = planned(model, rows())
    with torch.no_grad():
        expected = model.predict_step(rows())

    def work(communicator: Communicator) -> torch.Tensor:
        part = copy.deepcopy(model)
        apply_plan(part, plan, communicator.rank, communicator)
        with torch.no_grad():
            return part.predict_step(rows())

    assert all(relative_error(output, expected) < 1e-5 for output in on_threads(2, work))


def test_an_input_that_the_layers_would_not_take_is_named() -> None:
    with pytest.raises(TensorParallelError, match="mat1 and mat2 shapes cannot be multiplied"):
        planned(randomized(TwoLayers()), torch.zeros(2, 3, WIDTH - 1))
    with pytest.raises(TensorParallelError, match="index out of range"):
        planned(randomized(Words()), torch.full((1, 2), 5000))
