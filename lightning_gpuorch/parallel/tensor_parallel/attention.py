"""``nn.MultiheadAttention`` with some of its heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from lightning_gpuorch.errors import TensorParallelError
from lightning_gpuorch.parallel.tensor_parallel.intervals import Intervals, RankIntervals, length, shift, split_evenly
from lightning_gpuorch.parallel.tensor_parallel.layers import refuse_gradient
from lightning_gpuorch.parallel.tensor_parallel.plan import LayerKind, LayerPlan, ParameterPlan, dtype_name

if TYPE_CHECKING:
    from lightning_gpuorch.parallel.tensor_parallel.communicator import Communicator


def plan_attention(module: nn.MultiheadAttention, num_ranks: int) -> tuple[LayerPlan, dict[str, ParameterPlan]]:
    """Plan an ``nn.MultiheadAttention``: heads are dealt out, projections follow.

    Returns:
        The layer's role and the plan of each of its parameters that is cut, by name inside the module.
    """
    if module.bias_k is not None or module.add_zero_attn:
        return LayerPlan(LayerKind.REPLICATED, reason="bias_k and add_zero_attn are not sharded", source="handler"), {}
    if module.num_heads < num_ranks:
        reason = f"{module.num_heads} heads for {num_ranks} ranks"
        return LayerPlan(LayerKind.REPLICATED, reason=reason, source="handler"), {}
    heads = split_evenly(module.num_heads, num_ranks)
    channels: RankIntervals = split_evenly(module.embed_dim, num_ranks, unit=module.head_dim)
    packed = tuple(
        tuple(part for block in range(3) for part in shift(own, block * module.embed_dim)) for own in channels
    )
    cuts: dict[str, tuple[int, RankIntervals]] = {
        "in_proj_weight": (0, packed),
        "in_proj_bias": (0, packed),
        "q_proj_weight": (0, channels),
        "k_proj_weight": (0, channels),
        "v_proj_weight": (0, channels),
        "out_proj.weight": (1, channels),
    }
    parameters = {
        name: ParameterPlan(tuple(parameter.shape), dtype_name(parameter.dtype), *cuts[name])
        for name, parameter in module.named_parameters()
        if name in cuts
    }
    return LayerPlan(LayerKind.HEADS, heads, source="handler"), parameters


def drops_out(module: nn.MultiheadAttention) -> bool:
    """Tell whether an attention's next call draws random masks over its heads."""
    return module.training and module.dropout > 0


class HeadShardedAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with this rank's heads.

    Parameters keep their names and hold the rank's rows; the output projection is row-wise. Averaged attention weights
    cost a second all-reduce, weights per head an all-gather.
    """

    layer_plan: LayerPlan
    communicator: Communicator

    def bind(self, layer_plan: LayerPlan, communicator: Communicator) -> None:
        """Tell the layer its role and its group."""
        self.layer_plan = layer_plan
        self.communicator = communicator

    @property
    def _own_heads(self) -> Intervals:
        return self.layer_plan.intervals[self.communicator.rank]

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend, as ``nn.MultiheadAttention.forward`` does.

        Args:
            query: ``(L, E)``, ``(L, N, E)`` or, with ``batch_first``, ``(N, L, E)``; ``key`` and ``value`` alike.
            key: Keys.
            value: Values.
            key_padding_mask: ``(N, S)`` or ``(S,)``; true or ``-inf`` where a key is to be ignored.
            need_weights: Whether to return attention weights.
            attn_mask: ``(L, S)`` or ``(N * num_heads, L, S)``, boolean or additive.
            average_attn_weights: Whether to average the weights over the heads.
            is_causal: A hint that ``attn_mask`` is causal; the mask itself is what counts.

        Returns:
            The output in the shape of ``query``, and the weights or None.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        if drops_out(self):
            raise TensorParallelError(
                "an nn.MultiheadAttention that is cut by heads was put into train mode, and its dropout would draw other "
                "masks than a whole one. Put it into train mode before planning as well, where the step does so itself."
            )
        refuse_gradient(self, query)
        batched = query.dim() == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = self._project(query, key, value)
        mask = self._merge_masks(attn_mask, key_padding_mask, q)
        weights: torch.Tensor | None = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            probabilities = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            attended = probabilities @ v
            weights = self._join_weights(probabilities, average_attn_weights)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        output = self.communicator.all_reduce(F.linear(attended.transpose(1, 2).flatten(2), self.out_proj.weight))
        if self.out_proj.bias is not None:
            output = output + self.out_proj.bias
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return (output if self.batch_first else output.transpose(0, 1)), weights

    def _project(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self._qkv_same_embed_dim:
            projections = self.in_proj_weight.chunk(3)
        else:
            projections = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(source, weight, bias).view(*source.shape[:2], -1, self.head_dim).transpose(1, 2)
            for source, weight, bias in zip((query, key, value), projections, biases, strict=True)
        )
        return q, k, v

    def _merge_masks(
        self, attn_mask: torch.Tensor | None, key_padding_mask: torch.Tensor | None, q: torch.Tensor
    ) -> torch.Tensor | None:
        """Join both masks into one additive mask that broadcasts over ``(N, local heads, L, S)``."""
        mask: torch.Tensor | None = None
        if attn_mask is not None:
            mask = _additive(attn_mask, q.dtype)
            if mask.dim() == 2:
                mask = mask[None, None]
            else:
                ((start, stop),) = self._own_heads
                mask = mask.view(q.shape[0], self.num_heads, *mask.shape[1:])[:, start:stop]
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q.dtype)[:, None, None, :]
            mask = padding if mask is None else mask + padding
        return mask

    def _join_weights(self, probabilities: torch.Tensor, average: bool) -> torch.Tensor:
        if average:
            averaged: torch.Tensor = self.communicator.all_reduce(probabilities.sum(1)).div(self.num_heads)
            return averaged
        sizes = [length(own) for own in self.layer_plan.intervals]
        return self.communicator.all_gather_last(probabilities.movedim(1, -1), sizes).movedim(-1, 1)


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, float("-inf"))
    return mask.to(dtype)
