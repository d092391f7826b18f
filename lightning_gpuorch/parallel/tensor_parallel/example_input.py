"""What a model is called with: its real batch, its own example, what its configuration tells, or a batch cut small."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_gpuorch.errors import TensorParallelError
from lightning_gpuorch.parallel.tensor_parallel.anatomy import ModelCall

NUM_SAMPLES = 2
NUM_TOKENS = 32
"""Enough tokens that no channel of a ReLU is dead for all of them, few enough to be quick."""

MAX_CHECKED_ELEMENTS = 1 << 16
"""Batches with at most so many elements are checked whole, besides their first samples."""
MAX_CHECKED_TOKENS = 1 << 11
"""The same for integers: every one of them becomes a row of channels."""

Calls = tuple[ModelCall, ...]
BatchSource = Callable[[], Sequence[Any]]


def planned_calls(
    model: nn.Module, example_input: Any = None, batches: BatchSource | None = None, step: str | Callable[..., Any] = ""
) -> list[Calls]:
    """Say how a model is going to be called.

    Args:
        model: The model.
        example_input: What the user says it is called with; None if nothing.
        batches: Gives the first batch of every dataloader, where there are any.
        step: What is called with a batch: ``predict_step``, or a function; empty for the model itself.

    Returns:
        Alternatives, the next to be taken if the model fails on one; of each, the call to plan for and further ones to
        verify.

    Raises:
        TensorParallelError: If nothing says what the model is called with.
    """
    takes_batch = bool(step) and (callable(step) or hasattr(model, step))
    if takes_batch and batches is not None:
        real = [batch for batch in batches() if batch is not None]
        if real:
            declared = _declared_call(model, example_input)
            return _batch_calls(model, step, real, declared)
    example = example_input
    if example is None:
        try:
            example, _ = find_example_input(model)
        except TensorParallelError:
            real = [batch for batch in batches() if batch is not None] if batches is not None else []
            if not real:
                raise
            choices = (cut_small(real[0]), real[0])
            return [(ModelCall.of(tuple(one) if isinstance(one, list) else one),) for one in choices]
    call = _declared_call(model, example)
    assert call is not None
    if call.method == "predict_step" or not hasattr(model, "predict_step"):
        return [(call,)]
    return [(call, _step_call(model, "predict_step", example)), (call,)]  # a step that takes the same is checked too


def _declared_call(model: nn.Module, example: Any) -> ModelCall | None:
    """Call the model itself with an example; one without a forward of its own is called through its predict_step."""
    if example is None:
        return None
    forward = getattr(type(model), "forward", None)
    bare = forward is nn.Module.forward or getattr(forward, "__module__", "").startswith("lightning.")
    if bare and hasattr(model, "predict_step"):
        return _step_call(model, "predict_step", example)
    return ModelCall.of(example)


def _batch_calls(
    model: nn.Module, step: str | Callable[..., Any], batches: Sequence[Any], declared: ModelCall | None
) -> list[Calls]:
    several = len(batches) > 1
    whole = [_step_call(model, step, batch, index, several) for index, batch in enumerate(batches)]
    small = [_step_call(model, step, cut_small(batch), index, several) for index, batch in enumerate(batches)]
    checked = tuple(call for call, batch in zip(whole, batches, strict=True) if _is_quick(batch))
    with_declared = [] if declared is None else [(*small, *checked, declared), (*whole, declared)]
    return [*with_declared, (*small, *checked), tuple(whole)]


def _step_call(
    model: nn.Module, step: str | Callable[..., Any], batch: Any, loader: int = 0, several: bool = False
) -> ModelCall:
    if callable(step):
        return ModelCall((batch,), {}, step)
    parameters = inspect.signature(getattr(model, step)).parameters
    if "dataloader_iter" in parameters:
        return ModelCall((iter([(batch, 0, loader)]),), {}, step)
    if several:
        return ModelCall((batch, 0, loader), {}, step)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [one for one in parameters.values() if one.default is one.empty and one.kind in positional]
    return ModelCall((batch, *[0] * (len(needed) - 1)), {}, step)


def _is_quick(batch: Any) -> bool:
    tensors = list(_tensors(batch))
    tokens = sum(tensor.numel() for tensor in tensors if not tensor.is_floating_point())
    return tokens <= MAX_CHECKED_TOKENS and sum(tensor.numel() for tensor in tensors) <= MAX_CHECKED_ELEMENTS


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
