"""Generation with equal tokens on all ranks of a group: they start from the same inputs and the same random state.

The ranks of a tensor-parallel group compute the same logits. If one of them sampled another token, or stopped a step
earlier, the others would wait in a collective for ever; so what decides about tokens is taken from the group's first
rank.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_gpuorch.errors import TensorParallelError
from lightning_gpuorch.parallel.tensor_parallel.apply import communicator_of
from lightning_gpuorch.parallel.tensor_parallel.communicator import Communicator


def from_first_rank(value: Any, communicator: Communicator) -> Any:
    """Give every rank the value of the group's first rank (any picklable value; tensors keep the local device type)."""
    held = [value if communicator.rank == 0 else None]
    dist.broadcast_object_list(held, group=communicator.process_group, group_src=0)
    return held[0]


def synchronize_random_state(communicator: Communicator, device: torch.device | None = None) -> None:
    """Give every rank the first rank's random state, of the CPU and of its own accelerator.

    Args:
        communicator: The group.
        device: The accelerator in use; None or the CPU synchronises the CPU's generator only.
    """
    cuda = device if device is not None and device.type == "cuda" else None
    states = (torch.get_rng_state(), None if cuda is None else torch.cuda.get_rng_state(cuda))
    cpu_state, cuda_state = from_first_rank(states, communicator)
    torch.set_rng_state(cpu_state)
    if cuda is not None and cuda_state is not None:
        torch.cuda.set_rng_state(cuda_state, cuda)


def random_state_digest(device: torch.device | None = None) -> int:
    """A checksum of the random state that :func:`synchronize_random_state` gives to all ranks."""
    running = zlib.crc32(torch.get_rng_state().numpy().tobytes())
    if device is not None and device.type == "cuda":
        running = zlib.crc32(torch.cuda.get_rng_state(device).numpy().tobytes(), running)
    return running


def generate(model: nn.Module, inputs: torch.Tensor | Mapping[str, Any], **options: Any) -> Any:
    """Generate with a transformers model; every rank that shares it calls this and gets the same tokens.

    Greedy search, sampling and beam search work with every kind of key/value cache; each rank caches its own heads. A
    model that is whole on this rank generates by itself.

    Args:
        model: A model with a ``generate`` method.
        inputs: Token ids ``(batch, length)``, or keyword tensors as a tokenizer returns them. The first rank's count.
        **options: Options of ``generate``. The first rank's count.

    Returns:
        What ``generate`` returns.

    Raises:
        TensorParallelError: If the model cannot generate, or an option would let ranks stop at different times.
    """
    run = getattr(model, "generate", None)
    if run is None:
        raise TensorParallelError(f"{type(model).__name__} has no generate method.")
    device = next(model.parameters()).device
    arguments = {"inputs": inputs} if isinstance(inputs, torch.Tensor) else dict(inputs)
    communicator = communicator_of(model)
    if communicator is not None:
        if options.get("max_time") is not None:
            raise TensorParallelError(
                "max_time stops each rank by its own clock, and ranks that stop at different steps wait for each other for "
                "ever. Use max_new_tokens."
            )
        arguments, options = from_first_rank((arguments, options), communicator)
        synchronize_random_state(communicator, device)
    arguments = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in arguments.items()
    }
    with torch.no_grad():
        return run(**arguments, **options)
