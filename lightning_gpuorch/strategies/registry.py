"""Puts "gpuorch" and its variants into Lightning's registries, without importing Lightning.

Lightning is heavy and may never be used by a process that imports this package. So the names are entered as soon as a
registry's module has been imported, by any module; and the strategies are made by factories that import late.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_REGISTRIES = {
    "lightning.fabric.strategies": ("STRATEGY_REGISTRY", "lightning_gpuorch.fabric"),
    "lightning.pytorch.strategies": ("StrategyRegistry", "lightning_gpuorch.pytorch"),
    # The stand-alone packages are full copies whose objects are refused by lightning's, and the other way round.
    "lightning_fabric.strategies": ("STRATEGY_REGISTRY", "lightning_gpuorch.lightning_fabric"),
    "pytorch_lightning.strategies": ("StrategyRegistry", "lightning_gpuorch.pytorch_lightning"),
}
_NAMES: dict[str, dict[str, Any]] = {"gpuorch": {}, "gpuorch_notebook": {"start_method": "fork"}}
_TRAINER_NAMES: dict[str, dict[str, Any]] = {**_NAMES, "gpuorch_replay_outputs": {"replay_outputs": True}}


def register() -> None:
    """Enter the names in every registry, now or when it comes into being. Safe to call again."""
    for name in _REGISTRIES:
        module = sys.modules.get(name)
        if module is not None and hasattr(module, _REGISTRIES[name][0]):
            _enter(module)
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _factory(home: str) -> Callable[..., Any]:
    def gpuorch_strategy(**options: Any) -> Any:
        chosen = os.environ.get("LT_STRATEGY")
        strategy = importlib.import_module(home).GPUOrchStrategy(**options)
        if chosen is not None:  # a strategy that a script makes itself takes the place of the launcher's choice
            os.environ["LT_STRATEGY"] = chosen
        return strategy

    return gpuorch_strategy


def _enter(module: ModuleType) -> None:
    attribute, home = _REGISTRIES[module.__name__]
    registry = getattr(module, attribute)
    names = _NAMES if attribute == "STRATEGY_REGISTRY" else _TRAINER_NAMES
    for name, options in names.items():
        if name not in registry:
            factory = _factory(home)
            registry.register(name, factory, description="Orchestrated multi-GPU inference.", **options)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Enters the names right after a registry's module has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _REGISTRIES:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_enter(module: ModuleType) -> None:
            execute(module)
            _enter(module)

        spec.loader.exec_module = execute_and_enter  # type: ignore[method-assign]
        return spec
