"""Kinds of layers and steps that people write, each in a small model.

Every kind is right when it is sharded, or refused before it runs; ``test_layer_kinds.py`` and ``sweep.py`` ask each.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

WIDTH, INNER, NUM_WORDS = 64, 128, 5000


def hidden(num_rows: int = 2, length: int = 15, seed: int = 4, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(num_rows, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def words(num_rows: int = 3, length: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(0, NUM_WORDS, (num_rows, length), generator=torch.Generator().manual_seed(seed))


def some_hidden() -> list[Tensor]:
    """The example, and what comes later: other sizes, larger and smaller numbers."""
    return [hidden(), hidden(4, 16, 5), hidden(1, 12, 6), hidden(3, 8, 7, 30.0), hidden(2, 15, 8, 0.01)]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A model with a ``predict_step``, and what it is called with; the first input is the example."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], list[Tensor]] = some_hidden
    tolerance: float = 1e-4

    def model(self) -> nn.Module:
        """Build it, with biases and scales that are not all alike."""
        torch.manual_seed(0)
        model = self.build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return model


class Two(nn.Module):
    """Maps to more channels and back; ``between`` stands between the layers."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor] | None = None, **modules: nn.Module) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        for name, module in modules.items():
            setattr(self, name, module)
        self._between = between

    def between(self, h: Tensor) -> Tensor:
        return h.sigmoid() if self._between is None else self._between(self, h)

    def predict_step(self, x: Tensor) -> Any:
        return self.down(self.between(self.up(x)))


# -- what stands between the layers ------------------------------------------------------------------------------------


def on_channels(module: nn.Module, h: Tensor) -> Tensor:
    return module(h.transpose(1, 2)).transpose(1, 2)


def each_time(self: Any, h: Tensor) -> Tensor:
    state, states = h.new_zeros(h.shape[0], INNER), []
    for step in range(h.shape[1]):
        state = self.m(h[:, step], state)
        states.append(state)
    return torch.stack(states, 1)


def in_place(self: Any, h: Tensor) -> Tensor:
    h[..., 5] = 0
    h[..., -1].mul_(2)
    return h


def reads_weight_if_it_can(self: Any, h: Tensor) -> Tensor:
    with contextlib.suppress(Exception):
        return h.sigmoid() * float(self.up.weight.norm())
    return h.sigmoid()


def takes_another_way_if_it_must(self: Any, h: Tensor) -> Tensor:
    try:
        return h.view(*h.shape[:2], 4, 32).softmax(-1).flatten(2)
    except RuntimeError:
        return h.sigmoid()


BETWEEN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "softmax": lambda self, h: h.softmax(-1),
    "cumulative sum": lambda self, h: h.cumsum(-1),
    "sort": lambda self, h: h.sort(-1)[0],
    "largest channels": lambda self, h: torch.where(h >= h.topk(16, -1)[0][..., -1:], h, 0.0),
    "roll": lambda self, h: h.roll(1, -1),
    "flip": lambda self, h: h.flip(-1),
    "fft": lambda self, h: torch.fft.rfft(h, dim=-1, n=254).abs(),
    "normalize": lambda self, h: F.normalize(h, dim=-1),
    "standard deviation": lambda self, h: h / h.std(),
    "median": lambda self, h: h - h.median(),
    "quantile": lambda self, h: h.clamp(max=h.quantile(0.99)),
    "scale by shape": lambda self, h: h / h.shape[-1] ** 0.5,
    "scale by features": lambda self, h: h.sigmoid() / self.up.out_features**0.5,
    "scale by shape of weight": lambda self, h: h.sigmoid() / self.up.weight.shape[0],
    "scale by length of bias": lambda self, h: h.sigmoid() / len(self.up.bias),
    "scale by number of parameters": lambda self, h: h.sigmoid() / math.log(sum(p.numel() for p in self.parameters())),
    "scale by text of layer": lambda self, h: h.sigmoid() * int(str(self.up).split("out_features=")[1].split(",")[0]),
    "maxout": lambda self, h: h.unflatten(-1, (-1, 2)).amax(-1).repeat_interleave(2, -1),
    "gate of interleaved channels": lambda self, h: (h[..., ::2] * h[..., 1::2].sigmoid()).repeat(1, 1, 2),
    "gate of halves": lambda self, h: torch.cat([h.chunk(2, -1)[0]] * 2, -1) * h.chunk(2, -1)[1].repeat(1, 1, 2),
    "some channels": lambda self, h: torch.cat([h[..., :10].exp(), h[..., 10:]], -1),
    "filled channels": lambda self, h: h.index_fill(-1, torch.tensor([3, 77]), 0.0),
    "permuted channels": lambda self, h: h[..., torch.randperm(INNER, generator=torch.Generator().manual_seed(0))],
    "quantized to the largest": lambda self, h: (h / h.abs().max() * 7).round() * h.abs().max() / 7,
    "quantized by row": lambda self, h: (h / h.abs().amax(-1, keepdim=True) * 7).round(),
    "bytes": lambda self, h: (h * 10).to(torch.int8).float(),
    "branch on any": lambda self, h: h * 2 if (h > 3).any() else h,
    "branch on largest": lambda self, h: h.tanh() if h.max().item() > 2.5 else h,
    "branch on sum": lambda self, h: h.sigmoid() * (1 if float(h.abs().sum()) < 1e4 else 0.5),
    "number of nonzero": lambda self, h: h * len(h.nonzero()) / 1000,
    "share of positive": lambda self, h: h.relu() / (h > 0).sum(-1, keepdim=True).clamp(min=1),
    "complex": lambda self, h: torch.complex(h, h.tanh()).abs(),
    "sparse": lambda self, h: h.relu().to_sparse().to_dense(),
    "order by a channel": lambda self, h: h.gather(1, h[..., 0].argsort(-1)[..., None].expand_as(h)),
    "in place": in_place,
    "weight if it can": reads_weight_if_it_can,
    "another way": takes_another_way_if_it_must,
}
MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor]]] = {
    "LSTM": (lambda: nn.LSTM(INNER, INNER, batch_first=True), lambda self, h: self.m(h)[0]),
    "GRU": (
        lambda: nn.GRU(INNER, INNER // 2, batch_first=True, bidirectional=True),
        lambda self, h: self.m(h)[0],
    ),
    "GRUCell": (lambda: nn.GRUCell(INNER, INNER), each_time),
    "RMSNorm": (lambda: nn.RMSNorm(INNER), lambda self, h: self.m(h)),
    "LayerNorm": (lambda: nn.LayerNorm(INNER), lambda self, h: self.m(h)),
    "PReLU": (lambda: nn.PReLU(), lambda self, h: self.m(h)),
    **{
        name: (build, lambda self, h: on_channels(self.m, h))
        for name, build in {
            "GroupNorm 8": lambda: nn.GroupNorm(8, INNER),
            "GroupNorm 1": lambda: nn.GroupNorm(1, INNER),
            "InstanceNorm": lambda: nn.InstanceNorm1d(INNER, affine=True),
            "BatchNorm": lambda: nn.BatchNorm1d(INNER),
            "LocalResponseNorm": lambda: nn.LocalResponseNorm(5),
            "depthwise Conv1d": lambda: nn.Conv1d(INNER, INNER, 3, padding=1, groups=INNER),
            "grouped Conv1d": lambda: nn.Conv1d(INNER, INNER, 3, padding=1, groups=4),
            "Conv1d": lambda: nn.Conv1d(INNER, INNER, 3, padding=1),
            "PReLU by channel": lambda: nn.PReLU(INNER),
        }.items()
    },
}

# -- layers whose weight is computed, shared, watched or replaced ------------------------------------------------------


class Ramp(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * torch.linspace(0.5, 1.5, len(weight))[:, None]


def parametrized(name: str, by: Callable[[], nn.Module]) -> Callable[[nn.Module], Any]:
    return lambda layer: parametrize.register_parametrization(layer, name, by())


def both_layers(change: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = Two()
        change(model.up)
        change(model.down)
        return model

    return build


def hooked_up() -> nn.Module:
    model = Two()
    model.up.register_forward_hook(
        lambda module, args, output: output * torch.linspace(0.5, 2, INNER)[: output.shape[-1]]
    )
    return model


LAYERS: dict[str, Callable[[Any], Any]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "parametrized weight": parametrized("weight", Ramp),
    "parametrized bias": parametrized("bias", nn.Softplus),
    "pruned": lambda layer: prune.remove(prune.l1_unstructured(layer, "weight", 0.3), "weight"),
    "hook before": lambda layer: layer.register_forward_pre_hook(lambda module, args: F.normalize(args[0], dim=-1)),
}


class SharedWeight(Two):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(WIDTH, INNER)
        self.other.weight = self.up.weight

    def predict_step(self, x: Tensor) -> Tensor:
        return self.down(self.other(self.down(self.up(x).sigmoid())).tanh())


class Transposed(Two):
    def predict_step(self, x: Tensor) -> Tensor:
        return F.linear(self.up(x).sigmoid(), self.up.weight.t())


class Addmm(Two):
    def predict_step(self, x: Tensor) -> Tensor:
        h = torch.addmm(self.up.bias, x.reshape(-1, WIDTH), self.up.weight.t())
        return self.down(h.sigmoid()).view_as(x)


class Regularized(Two):
    def predict_step(self, x: Tensor) -> Any:
        return super().predict_step(x), sum(p.pow(2).sum() for p in self.parameters())


class StateDict(Two):
    def predict_step(self, x: Tensor) -> Any:
        return super().predict_step(x) * sum(value.norm() for value in self.state_dict().values())


class Copies(Two):
    def predict_step(self, x: Tensor) -> Tensor:
        return self.down(copy.deepcopy(self.up)(x).sigmoid())


class FunctionalCall(Two):
    def predict_step(self, x: Tensor) -> Tensor:
        moved = {name: value * 1.5 for name, value in self.up.named_parameters()}
        return self.down(torch.func.functional_call(self.up, moved, (x,)).sigmoid())


class Vmap(Two):
    def predict_step(self, x: Tensor) -> Any:
        return torch.func.vmap(super().predict_step)(x)


class Checkpointed(Two):
    def predict_step(self, x: Tensor) -> Any:
        return checkpoint(super().predict_step, x, use_reentrant=False)


class Autocast(Two):
    def predict_step(self, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return super().predict_step(x).float()


class Compiled(Two):
    def __init__(self) -> None:
        super().__init__()
        self.activation = torch.compile(torch.sigmoid, backend="eager")

    def between(self, h: Tensor) -> Tensor:
        return self.activation(h)


class UnboundForward(Two):
    def predict_step(self, x: Tensor) -> Tensor:
        return nn.Linear.forward(self.down, nn.Linear.forward(self.up, x).sigmoid())


class DataOfWeight(Two):
    def predict_step(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.up.weight.data, self.up.bias.data).sigmoid(), self.down.weight.data)


class Kept(Two):
    """A hook keeps what a layer returns, and the step returns it."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Tensor] = {}
        self.up.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.kept["hidden"] = output

    def predict_step(self, x: Tensor) -> Any:
        return super().predict_step(x), self.kept["hidden"]


class CachedTable(Two):
    @functools.cache  # noqa: B019 - as people write it
    def table(self, size: int) -> Tensor:
        return torch.linspace(0, 1, size)

    def between(self, h: Tensor) -> Tensor:
        return h * self.table(h.shape[-1])


class Holders(Two):
    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterDict(
            {"whole": nn.Parameter(torch.rand(INNER)), "heads": nn.Parameter(torch.rand(8, 16))}
        )
        self.shifts = nn.ParameterList([nn.Parameter(torch.rand(INNER))])

    def between(self, h: Tensor) -> Tensor:
        return ((h * self.scales["whole"] + self.shifts[0]).unflatten(-1, (8, 16)) * self.scales["heads"]).flatten(-2)


class LowRank(Two):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 8, bias=False), nn.Linear(8, INNER, bias=False)

    def predict_step(self, x: Tensor) -> Tensor:
        return self.down((self.up(x) + self.b(self.a(x))).sigmoid())


class MeanBeside(Two):
    def predict_step(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(h.sigmoid()) + h.mean(-1, keepdim=True)


class EarlyExit(Two):
    def predict_step(self, x: Tensor) -> Any:
        y = super().predict_step(x)
        for _ in range(5):
            if y.norm() < 6:
                break
            y = super().predict_step(y * 0.3)
        return y


class InThread(Two):
    def predict_step(self, x: Tensor) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(super().predict_step, x).result()


class CatchesAll(Two):
    def predict_step(self, x: Tensor) -> Any:
        h = self.up(x)
        try:
            return self.down(F.normalize(h, dim=-1))
        except Exception:  # noqa: BLE001 - as people write it
            return x


def feed_forward() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH))


class Wrapped(nn.Module):
    def __init__(self, wrapper: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.inner = wrapper(feed_forward())

    def predict_step(self, x: Tensor) -> Any:
        return self.inner(x)


STEPS: dict[str, Callable[[], nn.Module]] = {
    "shared weight": SharedWeight,
    "transposed weight": Transposed,
    "addmm": Addmm,
    "regularized": Regularized,
    "state dict": StateDict,
    "copies a layer": Copies,
    "functional call": FunctionalCall,
    "vmap": Vmap,
    "checkpoint": Checkpointed,
    "compiled function": Compiled,
    "unbound forward": UnboundForward,
    "data of weight": DataOfWeight,
    "kept by a hook": Kept,
    "cached table": CachedTable,
    "parameter holders": Holders,
    "low rank": LowRank,
    "mean beside": MeanBeside,
    "early exit": EarlyExit,
    "in a thread": InThread,
    "catches all": CatchesAll,
    "AveragedModel": lambda: Wrapped(AveragedModel),
    "DataParallel": lambda: Wrapped(nn.DataParallel),
}

# -- attention and embeddings ------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(
        self, cls: type[nn.MultiheadAttention] = nn.MultiheadAttention, maps: bool = False, **options: Any
    ) -> None:
        super().__init__()
        self.attention = cls(WIDTH, 4, batch_first=True, **options)
        self.maps, self.out = maps, nn.Linear(WIDTH, WIDTH)

    def predict_step(self, x: Tensor) -> Any:
        other = torch.cat([x, x], -1) if self.attention.kdim != WIDTH else x
        y, maps = self.attention(x, other, other, need_weights=self.maps, average_attn_weights=False)
        return (self.out(y), maps) if self.maps else self.out(y)


class Doubled(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y, maps = super().forward(*args, **kwargs)
        return 2 * y, maps


class Bags(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bags, self.inner = nn.EmbeddingBag(NUM_WORDS, WIDTH, mode=mode), feed_forward()

    def predict_step(self, x: Tensor) -> Any:
        return self.inner(self.bags(x))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.joined = nn.Bilinear(INNER, INNER, 16)

    def predict_step(self, x: Tensor) -> Any:
        return self.joined(self.a(x), self.b(x))


class Translates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Transformer(WIDTH, 4, 2, 2, INNER, batch_first=True)

    def predict_step(self, x: Tensor) -> Any:
        return self.inner(x, x.flip(1))


def some_words() -> list[Tensor]:
    return [words(), words(4, 7), words(1, 3)]


KINDS: dict[str, Kind] = {
    **{name: Kind(functools.partial(Two, between)) for name, between in BETWEEN.items()},
    **{name: Kind(lambda b=build, f=between: Two(f, m=b())) for name, (build, between) in MODULES.items()},
    **{name: Kind(both_layers(change)) for name, change in LAYERS.items()},
    "hook by position": Kind(hooked_up),
    **{name: Kind(build) for name, build in STEPS.items()},
    "autocast": Kind(Autocast, tolerance=2e-2),
    "MultiheadAttention": Kind(Attention),
    "MultiheadAttention with maps": Kind(lambda: Attention(maps=True)),
    "MultiheadAttention with a key more": Kind(lambda: Attention(add_bias_kv=True)),
    "MultiheadAttention with a zero more": Kind(lambda: Attention(add_zero_attn=True)),
    "MultiheadAttention of two widths": Kind(lambda: Attention(kdim=2 * WIDTH, vdim=2 * WIDTH)),
    "MultiheadAttention, subclass": Kind(lambda: Attention(Doubled)),
    "EmbeddingBag": Kind(lambda: Bags("mean"), some_words),
    "EmbeddingBag of the largest": Kind(lambda: Bags("max"), some_words),
    "Bilinear": Kind(TwoInputs),
    "Transformer": Kind(Translates),
}
