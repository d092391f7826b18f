"""The two packages that Lightning comes in: ``lightning``, and ``pytorch_lightning`` with ``lightning_fabric``.

They are full copies of each other, and objects of one are refused by the other. What is ours is written once, and asks the
package it serves for the classes and modules that it needs.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class LightningPackage:
    """One of them.

    Attributes:
        pytorch: Name of the module that has ``Trainer``.
        fabric: Name of the module that has ``Fabric``.
    """

    pytorch: str
    fabric: str

    def of_pytorch(self, module: str) -> ModuleType:
        """A module of the Trainer's side."""
        return importlib.import_module(f"{self.pytorch}.{module}")

    def of_fabric(self, module: str) -> ModuleType:
        """A module of Fabric's side."""
        return importlib.import_module(f"{self.fabric}.{module}")

    @property
    def version(self) -> str:
        """Its version."""
        return str(importlib.import_module(self.pytorch).__version__)

    @cached_property
    def mapped_checkpoint_io(self) -> type[Any]:
        """Its ``TorchCheckpointIO``, which maps local checkpoints into memory instead of reading them."""
        from lightning_gpuorch.strategies.mapped_checkpoint import MappedLoading

        return type("MappedCheckpointIO", (MappedLoading, self.torch_checkpoint_io), {})

    @property
    def torch_checkpoint_io(self) -> type[Any]:
        """What reads checkpoints unless the user has another one."""
        return self.of_fabric("plugins.io").TorchCheckpointIO  # type: ignore[no-any-return]


LIGHTNING = LightningPackage("lightning.pytorch", "lightning.fabric")
STANDALONE = LightningPackage("pytorch_lightning", "lightning_fabric")


def package_of(instance: object) -> LightningPackage:
    """The package that an object's class comes from."""
    homes = {kind.__module__.split(".")[0] for kind in type(instance).__mro__}
    return STANDALONE if homes & {"pytorch_lightning", "lightning_fabric"} else LIGHTNING
