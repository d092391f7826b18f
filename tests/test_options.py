from __future__ import annotations

import sys
import typing

import pytest

from lightning_gpuorch import MultiGPUOrchestrator, OrchestratorConfig
from lightning_gpuorch.errors import ConfigurationError
from lightning_gpuorch.options import OrchestratorOptions
from lightning_gpuorch.pytorch import GPUOrchStrategy


def test_options_are_the_fields_of_the_configuration() -> None:
    fields = typing.get_type_hints(OrchestratorConfig)
    assert list(OrchestratorOptions.__annotations__) == list(fields)
    assert typing.get_type_hints(OrchestratorOptions) == fields


@pytest.mark.parametrize(
    ("given", "meant"),
    [("output_dirr", "output_dir"), ("chunksize", "chunk_size"), ("replay_output", "replay_outputs")],
)
def test_a_misspelt_argument_gets_the_nearest_name_of_all_arguments(given: str, meant: str) -> None:
    with pytest.raises(ConfigurationError, match=f"unknown argument '{given}'; did you mean '{meant}'"):
        GPUOrchStrategy(**{given: 1})  # type: ignore[arg-type]


def test_the_orchestrator_says_so_as_well() -> None:
    with pytest.raises(ConfigurationError, match="unknown argument 'call_backs'; did you mean 'callbacks'"):
        MultiGPUOrchestrator(call_backs=[])  # type: ignore[call-arg]


def test_lightning_cli_takes_options_as_init_args(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

    monkeypatch.setattr(sys, "argv", ["script"])
    strategy = {
        "class_path": "lightning_gpuorch.pytorch.GPUOrchStrategy",
        "init_args": {"enable_dynamic_batching": True, "max_batch_tokens": 512},
    }
    trainer = {"accelerator": "cpu", "devices": 1, "logger": False, "strategy": strategy}
    cli = LightningCLI(
        BoringModel, BoringDataModule, run=False, save_config_callback=None, seed_everything_default=False,
        args={"trainer": trainer},
    )  # fmt: skip
    config = cli.trainer.strategy.config
    assert (config.enable_dynamic_batching, config.max_batch_tokens) == (True, 512)
