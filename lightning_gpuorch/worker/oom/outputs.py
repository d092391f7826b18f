"""Outputs of the parts of one batch: kept in order, moved out of the way, merged, and brought back to their device."""

from __future__ import annotations

from typing import Any

import torch

from lightning_gpuorch.predictions.samples import OutputLayout, map_arrays, merge_samples


class PartOutputs:
    """Outputs of consecutive parts.

    Args:
        to_host: Move each output to the host as it comes.
    """

    def __init__(self, *, to_host: bool = False):
        self.spans: list[tuple[int, int]] = []
        self._outputs: list[Any] = []
        self._to_host = to_host
        self._num_moved = 0
        self._devices: set[torch.device] = set()

    def __len__(self) -> int:
        return len(self._outputs)

    @property
    def sizes(self) -> list[int]:
        """Samples of each part."""
        return [stop - start for start, stop in self.spans]

    def keep(self, start: int, stop: int, output: Any) -> None:
        """Add the output of the next part."""
        self.spans.append((start, stop))
        self._outputs.append(output)
        if self._to_host:
            self.move_to_host()

    def drop_last(self) -> None:
        """Forget the last part."""
        self.spans.pop()
        self._outputs.pop()
        self._num_moved = min(self._num_moved, len(self._outputs))

    def move_to_host(self) -> bool:
        """Move what is on a device; later outputs follow as they come. Returns whether there was anything."""
        devices: set[torch.device] = set()
        for position in range(self._num_moved, len(self._outputs)):
            self._outputs[position] = map_arrays(self._outputs[position], lambda value: _on_host(value, devices))
        self._num_moved = len(self._outputs)
        self._devices |= devices
        anything = any(device.type != "cpu" for device in devices)
        self._to_host = self._to_host or anything
        return anything

    def learn(self, layout: OutputLayout) -> None:
        """Note how the only output is laid out, if it is that of a whole batch."""
        layout.learn(self._outputs[0], self.sizes[0])

    def merged(self, layout: OutputLayout) -> Any:
        """One output; see :func:`~lightning_gpuorch.predictions.samples.merge_samples` for what is raised."""
        return merge_samples(self._outputs, self.sizes, layout)

    def back(self, merged: Any) -> Any:
        """Put an output where the undisturbed step would have left it.

        Outputs that were on several devices, or partly on the host, stay on the host: what came from where is lost in
        the merge.
        """
        if len(self._devices) != 1 or self._devices == {torch.device("cpu")}:
            return merged
        (device,) = self._devices
        return map_arrays(merged, lambda value: value.to(device) if isinstance(value, torch.Tensor) else value)


def _on_host(value: Any, devices: set[torch.device]) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    devices.add(value.device)
    return value.detach().to("cpu")
