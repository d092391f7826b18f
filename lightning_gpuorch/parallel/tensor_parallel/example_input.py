"""What is a model called with, if nobody says? Its own example, what its configuration tells, or a batch cut small."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lightning_gpuorch.errors import TensorParallelError

NUM_SAMPLES = 2
NUM_TOKENS = 32
"""Enough tokens that no channel of a ReLU is dead for all of them, few enough to be quick."""


def find_example_input(model: nn.Module, batch: Any = None) -> tuple[Any, str]:
    """Find an example input for :func:`plan_tensor_parallel`.

    Args:
        model: The model.
        batch: A real batch, used if the model itself says nothing.

    Returns:
        The example, and where it comes from: ``example_input_array``, ``config``, ``dummy_inputs`` or ``batch``.

    Raises:
        TensorParallelError: If there is none.
    """
    declared = getattr(model, "example_input_array", None)
    if declared is not None:
        return declared, "example_input_array"
    configured = _from_config(model)
    if configured is not None:
        return configured, "config"
    dummy = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, Mapping) and dummy and getattr(model, "main_input_name", next(iter(dummy))) in dummy:
        return dict(dummy), "dummy_inputs"
    if batch is not None:
        return cut_small(batch), "batch"
    raise TensorParallelError(
        f"Nothing says what {type(model).__name__} is called with. Pass example_input, or set example_input_array on "
        "the module."
    )


def _from_config(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """Make inputs for a transformers model of text or images from its configuration."""
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or not isinstance(main, str):
        return None
    generator = torch.Generator().manual_seed(0)
    if main == "input_ids":
        vocabulary = getattr(getattr(config, "text_config", config), "vocab_size", None)
        if not isinstance(vocabulary, int):
            return None
        shape = (NUM_SAMPLES, NUM_TOKENS // NUM_SAMPLES)
        inputs = {"input_ids": torch.randint(vocabulary // 100, vocabulary, shape, generator=generator)}
        parameters = inspect.signature(model.forward).parameters
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
            inputs["decoder_input_ids"] = torch.randint(vocabulary // 100, vocabulary, shape, generator=generator)
        return inputs
    if main == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size, channels = getattr(vision, "image_size", None), getattr(vision, "num_channels", 3)
        if isinstance(size, int):
            return {"pixel_values": torch.randn(NUM_SAMPLES, channels, size, size, generator=generator)}
    return None


def cut_small(batch: Any) -> Any:
    """Cut a batch to its first samples, and token sequences to their first tokens.

    Args:
        batch: Tensors, and containers of them; lists as long as the batch are cut too.

    Returns:
        The same structure.
    """
    tensors = list(_tensors(batch))
    if not tensors:
        return batch
    num_samples = tensors[0].shape[0]
    lengths = {tensor.shape[1] for tensor in tensors if tensor.dim() == 2 and not tensor.is_floating_point()}
    # A length that shows up in any other place (a square mask) is left alone: the pieces would not fit any more.
    elsewhere = {size for tensor in tensors if tensor.dim() > 2 for size in tensor.shape[1:]}
    length = lengths.pop() if len(lengths) == 1 else None
    if length in elsewhere:
        length = None

    def cut(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if value.dim() == 0 or value.shape[0] != num_samples:
                return value
            value = value[:NUM_SAMPLES]
            return value[:, :NUM_TOKENS] if value.dim() == 2 and value.shape[1] == length else value
        if isinstance(value, Mapping):
            return {key: cut(item) for key, item in value.items()}
        if isinstance(value, tuple):
            items = [cut(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if isinstance(value, list):
            if any(True for _ in _tensors(value)):
                return [cut(item) for item in value]
            return value[:NUM_SAMPLES] if len(value) == num_samples else value
        return value

    return cut(batch)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.dim():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
