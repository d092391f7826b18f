"""Hand-written models in many styles: how people write attention, MLPs and what stands between them."""

from __future__ import annotations

import dataclasses
import inspect
import math
import random
import re
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

WIDTH, HEADS, INNER, VOCABULARY = 64, 8, 128, 512


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter random values, so that zero biases and unit norms hide nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.7 / math.sqrt(parameter.shape[-1]) if parameter.dim() > 1 else 0.1
            offset = 1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0
            parameter.copy_(offset + scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return torch.softmax(scores if bias is None else scores + bias, -1) @ v


class Separate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, WIDTH // HEADS
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.value, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q = self.query(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.key(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2)
        v = self.value(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2)
        return self.out(attend(q, k, v).transpose(1, 2).reshape(b, n, self.num_heads * self.head_dim))


class PackedThirds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n_head, self.n_embd = HEADS, WIDTH
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (t.view(b, n, self.n_head, c // HEADS).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, n, self.n_embd))


class PackedStacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, WIDTH // HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = nn.LayerNorm(self.head_dim), nn.LayerNorm(self.head_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(x.transpose(1, 2).flatten(2))


class PackedPerHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.qkv, self.dense = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, self.heads, 3 * (WIDTH // HEADS)).transpose(1, 2).chunk(3, -1)
        return self.dense(attend(q, k, v).transpose(1, 2).reshape(b, n, -1))


class HardCoded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, HEADS, WIDTH // HEADS).transpose(1, 2) for f in (self.a, self.b, self.c))
        return self.d(attend(q, k, v).transpose(1, 2).reshape(b, n, WIDTH))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = HEADS, HEADS // 2, WIDTH // HEADS
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, WIDTH // 2), nn.Linear(WIDTH, WIDTH // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k(x).view(b, n, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v(x).view(b, n, self.num_kv_heads, self.head_dim).transpose(1, 2)
        repeats = self.num_heads // self.num_kv_heads
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        return self.o(attend(q, k, v).transpose(1, 2).reshape(b, n, -1))


class PackedGrouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_size, self.kv_size, self.head_dim, self.kv_heads = WIDTH, WIDTH // 2, WIDTH // HEADS, HEADS // 2
        self.qkv, self.o = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).split([self.q_size, self.kv_size, self.kv_size], -1)
        q = q.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        k, v = (t.unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


class MultiQuery(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.width = HEADS, WIDTH // HEADS
        self.to_q, self.to_kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH // HEADS)
        self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q = self.to_q(x).view(b, n, self.heads, self.width).transpose(1, 2)
        k, v = self.to_kv(x).chunk(2, -1)
        return self.to_out(attend(q, k.unsqueeze(1), v.unsqueeze(1)).transpose(1, 2).reshape(b, n, -1))


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.to_qkv, self.to_out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.temperature = nn.Parameter(torch.ones(HEADS, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = (t.reshape(b, n, self.heads, -1) for t in self.to_qkv(x).chunk(3, -1))
        weights = (torch.einsum("bihd,bjhd->bhij", q, k) * self.temperature).softmax(-1)
        return self.to_out(torch.einsum("bhij,bjhd->bihd", weights, v).reshape(b, n, -1))


class RelativeTable(Separate):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(63, HEADS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = (
            f(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        distance = torch.arange(n)[:, None] - torch.arange(n)[None, :] + 31
        bias = self.table(distance).permute(2, 0, 1).unsqueeze(0)
        return self.out(attend(q, k, v, bias).transpose(1, 2).reshape(b, n, -1))


class Slopes(Separate):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slopes", torch.linspace(0.1, 1.0, HEADS), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = (
            f(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        distance = -(torch.arange(n)[:, None] - torch.arange(n)[None, :]).abs()
        bias = self.slopes[:, None, None] * distance
        return self.out(attend(q, k, v, bias).transpose(1, 2).reshape(b, n, -1))


class Configured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(heads=HEADS, width=WIDTH, layers=2)
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.config.heads, self.config.width // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return self.o(attend(q, k, v).transpose(1, 2).reshape(b, n, self.config.heads * (self.config.width // HEADS)))


class LinearAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h = HEADS
        self.q, self.k, self.v, self.g = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm, self.o = nn.GroupNorm(HEADS, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, self.h, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        y = q @ (k.transpose(-1, -2) @ v) / (q @ k.sum(2).unsqueeze(-1))
        y = self.norm(y.transpose(1, 2).reshape(b * n, -1)).view(b, n, -1)
        return self.o(y * F.silu(self.g(x)))


class TalkingHeads(Separate):
    """Mixes the heads: cannot be cut by heads."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(HEADS, HEADS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = (
            f(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        weights = torch.einsum("bhij,hg->bgij", (q @ k.transpose(-1, -2)), self.mix).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, n, -1))


class NormAcrossHeads(Separate):
    """Normalises over all heads: cannot be cut by heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k = self.norm(self.query(x)), self.norm(self.key(x))
        q, k, v = (t.view(b, n, self.num_heads, self.head_dim).transpose(1, 2) for t in (q, k, self.value(x)))
        return self.out(attend(q, k, v).transpose(1, 2).reshape(b, n, -1))


class StateSpace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.state, self.rank = INNER, 4, 8
        self.in_proj, self.out_proj = nn.Linear(WIDTH, 2 * INNER, bias=False), nn.Linear(INNER, WIDTH)
        self.conv = nn.Conv1d(INNER, INNER, 3, padding=2, groups=INNER)
        self.x_proj, self.dt_proj = nn.Linear(INNER, 8 + 8, bias=False), nn.Linear(8, INNER)
        self.a_log, self.skip = nn.Parameter(torch.zeros(INNER, 4)), nn.Parameter(torch.ones(INNER))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        u, gate = self.in_proj(x).chunk(2, -1)
        u = F.silu(self.conv(u.transpose(1, 2))[..., :n].transpose(1, 2))
        dt, key, query = self.x_proj(u).split([self.rank, self.state, self.state], -1)
        dt = F.softplus(self.dt_proj(dt))
        decay = torch.exp(-torch.exp(self.a_log) * dt.unsqueeze(-1))
        state = torch.zeros(b, u.shape[-1], self.state)
        out = []
        for step in range(n):
            state = decay[:, step] * state + (dt * u)[:, step].unsqueeze(-1) * key[:, step].unsqueeze(1)
            out.append((state * query[:, step].unsqueeze(1)).sum(-1))
        return self.out_proj((torch.stack(out, 1) + self.skip * u) * F.silu(gate))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


class GatedPairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * INNER), nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        return self.down(F.silu(y[..., ::2]) * y[..., 1::2])


class GatedHalves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.up(x).split(self.up.weight.shape[0] // 2, -1)
        return self.down(F.silu(gate) * value)


class ListedExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 4), nn.ModuleList(Mlp() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            batch, token, slot = torch.where(chosen == index)
            if batch.numel():
                y[batch, token] += expert(x[batch, token]) * weights[batch, token, slot].unsqueeze(-1)
        return y


class StackedExperts(nn.Module):
    def __init__(self, interleaved: bool = False) -> None:
        super().__init__()
        self.interleaved = interleaved
        self.w1, self.b1 = nn.Parameter(torch.empty(4, WIDTH, 2 * INNER)), nn.Parameter(torch.empty(4, 2 * INNER))
        self.w2, self.b2 = nn.Parameter(torch.empty(4, INNER, WIDTH)), nn.Parameter(torch.empty(4, WIDTH))

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        for index in range(4):
            batch, token, slot = torch.where(chosen == index)
            inner = x[batch, token] @ self.w1[index] + self.b1[index]
            gate, value = (inner[..., ::2], inner[..., 1::2]) if self.interleaved else inner.chunk(2, -1)
            out = (F.silu(gate) * (value + 1)) @ self.w2[index] + self.b2[index]
            y[batch, token] += out * weights[batch, token, slot].unsqueeze(-1)
        return y


class RoutedStack(nn.Module):
    def __init__(self, interleaved: bool = False) -> None:
        super().__init__()
        self.router, self.bank = nn.Linear(WIDTH, 4), StackedExperts(interleaved)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        return self.bank(x, chosen, weights)


class ParallelBlock(nn.Module):
    """Attention and MLP side by side, from one packed projection into one output projection each."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.sizes = HEADS, (WIDTH, WIDTH, WIDTH, INNER)
        self.fused = nn.Linear(WIDTH, 3 * WIDTH + INNER)
        self.attn_out, self.mlp_out = nn.Linear(WIDTH, WIDTH), nn.Linear(INNER, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v, inner = self.fused(x).split(self.sizes, -1)
        q, k, v = (t.reshape(b, n, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        return self.attn_out(attend(q, k, v).transpose(1, 2).flatten(2)) + self.mlp_out(F.gelu(inner))


class Nothing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


class Network(nn.Module):
    """Two pre-norm blocks of given parts."""

    def __init__(self, mixer: Callable[[], nn.Module], mlp: Callable[[], nn.Module] = Mlp) -> None:
        super().__init__()
        self.mixers, self.mlps = nn.ModuleList(mixer() for _ in range(2)), nn.ModuleList(mlp() for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            x = x + mixer(self.norms[2 * index](x))
            x = x + mlp(self.norms[2 * index + 1](x))
        return self.head(x)


class ScaledEmbedding(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        return super().forward(input) * math.sqrt(self.embedding_dim)


class Language(nn.Module):
    """Token ids in, logits out; the output layer shares the embedding's weight."""

    def __init__(self, mixer: Callable[[], nn.Module], read_weight: bool = False) -> None:
        super().__init__()
        self.embed = ScaledEmbedding(VOCABULARY, WIDTH)
        self.body, self.norm = Network(mixer), nn.LayerNorm(WIDTH)
        self.body.head = nn.Identity()
        self.read_weight = read_weight
        if not read_weight:
            self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.body(self.embed(ids)))
        return F.linear(x, self.embed.weight) if self.read_weight else self.lm_head(x)


class Translator(nn.Module):
    """nn.Transformer with masks; several inputs, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.Transformer(WIDTH, HEADS, 2, 2, INNER, batch_first=True)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, source: torch.Tensor, target: torch.Tensor, padding: torch.Tensor) -> dict[str, torch.Tensor]:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        y = self.core(source, target, tgt_mask=mask, src_key_padding_mask=padding, memory_key_padding_mask=padding)
        return {"hidden": y, "logits": self.head(y)}


class Encoder(nn.Module):
    def __init__(self, batch_first: bool = True, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, batch_first=batch_first, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x))


class AttentionMap(nn.Module):
    """nn.MultiheadAttention that returns its weights, with another width for keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, kdim=48, vdim=32, batch_first=True)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mask = torch.zeros(q.shape[0] * HEADS, q.shape[1], k.shape[1])
        mask[:, :, -1] = torch.linspace(-3, 0, q.shape[0] * HEADS)[:, None]
        averaged = self.attention(q, k, v, attn_mask=mask)
        each = self.attention(q, k, v, average_attn_weights=False)
        return *averaged, *each


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 8, 8)
        self.cls, self.position = nn.Parameter(torch.zeros(1, 1, WIDTH)), nn.Parameter(torch.zeros(1, 17, WIDTH))
        self.body = Network(PackedStacked)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.body(x)[:, 0]


def hidden(seed: int = 4, width: int = WIDTH, length: int = 16) -> torch.Tensor:
    return torch.randn(2, length, width, generator=torch.Generator().manual_seed(seed))


def tokens(seed: int = 1, length: int = 16) -> torch.Tensor:
    return torch.randint(3, VOCABULARY - 1, (2, length), generator=torch.Generator().manual_seed(seed))


@dataclasses.dataclass(frozen=True)
class Example:
    """A model, how it is called, whether its blocks are expected to be cut without gathering, and how much of it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]] = lambda: (hidden(),)
    cut: bool = True
    min_sharded: float = 0.7


def _padding() -> torch.Tensor:
    padding = torch.zeros(2, 16, dtype=torch.bool)
    padding[1, -4:] = True
    return padding


EXAMPLES: dict[str, Example] = {
    "separate": Example(lambda: Network(Separate)),
    "packed_thirds": Example(lambda: Network(PackedThirds, GatedHalves)),
    "packed_stacked": Example(lambda: Network(PackedStacked, GatedPairs)),
    "packed_per_head": Example(lambda: Network(PackedPerHead)),
    "hard_coded": Example(lambda: Network(HardCoded)),
    "grouped": Example(lambda: Network(Grouped)),
    "packed_grouped": Example(lambda: Network(PackedGrouped)),
    "multi_query": Example(lambda: Network(MultiQuery)),
    "einsum": Example(lambda: Network(Einsum)),
    "relative_table": Example(lambda: Network(RelativeTable)),
    "slopes": Example(lambda: Network(Slopes)),
    "configured": Example(lambda: Network(Configured)),
    "linear_attention": Example(lambda: Network(LinearAttention)),
    "talking_heads": Example(lambda: Network(TalkingHeads), cut=False),
    "norm_across_heads": Example(lambda: Network(NormAcrossHeads), cut=False),
    "state_space": Example(lambda: Network(StateSpace, Nothing)),
    "parallel_block": Example(lambda: Network(ParallelBlock, Nothing)),
    "listed_experts": Example(lambda: Network(Separate, ListedExperts)),
    "stacked_experts": Example(lambda: Network(Separate, RoutedStack)),
    "interleaved_experts": Example(lambda: Network(Grouped, lambda: RoutedStack(True))),
    "language": Example(lambda: Language(PackedThirds), lambda: (tokens(),)),
    "language_hard_coded": Example(lambda: Language(HardCoded), lambda: (tokens(),)),
    "language_reads_weight": Example(lambda: Language(Separate, True), lambda: (tokens(),), min_sharded=0.6),
    "nn_transformer": Example(Translator, lambda: (hidden(1), hidden(2)[:, :12], _padding())),
    "nn_encoder": Example(Encoder),
    "nn_encoder_sequence_first": Example(lambda: Encoder(False, True), lambda: (hidden().transpose(0, 1),)),
    "attention_map": Example(AttentionMap, lambda: (hidden(1), hidden(2, 48), hidden(3, 32))),
    "vision": Example(Vision, lambda: (torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)),)),
}


def build(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """Build an example with random weights, and its inputs."""
    torch.manual_seed(0)
    example = EXAMPLES[name]
    return randomized(example.build()), example.inputs()


def with_random_names(cls: type[nn.Module], seed: int) -> type[nn.Module]:
    """Give a class the same code with every attribute of ``self`` under a random name."""
    chooser = random.Random(seed)
    bases = cls.__mro__[1:]
    lineage = [c for c in (cls, *bases) if c.__module__ == __name__]
    sources = "\n".join(inspect.getsource(c) for c in reversed(lineage))
    assigned = {
        name
        for line in re.findall(r"^\s+((?:self\.\w+,? ?)+)=", sources, re.M)
        for name in re.findall(r"self\.(\w+)", line)
    }
    buffers = set(re.findall(r"register_buffer\(\"(\w+)\"", sources))
    names = {name: "z" + "".join(chooser.choices("abcdefghijkl", k=9)) for name in sorted(assigned | buffers)}
    for old, new in names.items():
        sources = re.sub(rf"\bself\.{old}\b", f"self.{new}", sources)
        sources = sources.replace(f'register_buffer("{old}"', f'register_buffer("{new}"')
    namespace = dict(vars(sys.modules[__name__]))
    exec(compile(sources, f"<renamed {cls.__name__}>", "exec"), namespace)
    renamed: type[nn.Module] = namespace[cls.__name__]
    return renamed
