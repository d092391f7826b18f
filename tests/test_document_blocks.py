"""Python in the documentation compiles, names what there is, and the pages that begin a script run as they stand."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_gpuorch.config import OrchestratorConfig
from lightning_gpuorch.pytorch import GPUOrchStrategy

DOCS = Path(__file__).parents[1] / "docs"
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(DOCS)}-{number}")
    for page in sorted(DOCS.rglob("*.md"))
    for number, block in enumerate(_BLOCK.findall(page.read_text()))
]
_OPTIONS = {"output_dir", "length_fn", "parallelize_fn", "checkpoint", "strategy", "fabric", "model"}


def test_there_are_blocks() -> None:
    assert len(BLOCKS) > 20


@pytest.mark.parametrize("block", BLOCKS)
def test_it_compiles_and_names_what_there_is(block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_gpuorch"):
            module = importlib.import_module(str(node.module))
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "GPUOrchStrategy":
            known = _OPTIONS | set(OrchestratorConfig.__dataclass_fields__)
            assert {keyword.arg for keyword in node.keywords} <= known


class Model(pl.LightningModule):
    """What pages call ``model``."""

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """Twice the batch."""
        return batch * 2


class OneDevice(pl.Trainer):
    """What pages call ``Trainer``, on the one device that there is here."""

    def __init__(self, **options: object):
        super().__init__(**{**options, "devices": 1, "accelerator": "cpu", "logger": False})  # type: ignore[arg-type]


@pytest.mark.parametrize("page", ["index.md", "quickstart.md", "batching.md"])
@pytest.mark.filterwarnings("ignore")
def test_a_page_runs_from_top_to_bottom(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pl, "Trainer", OneDevice)
    names = {
        "__name__": "__main__", "Trainer": OneDevice, "GPUOrchStrategy": GPUOrchStrategy, "model": Model(),
        "dataloader": DataLoader(torch.arange(40.0).reshape(20, 2), batch_size=4),
    }  # fmt: skip
    OneDevice(strategy=GPUOrchStrategy(output_dir="predictions/run")).predict(Model(), names["dataloader"])
    for block in _BLOCK.findall((DOCS / page).read_text()):
        exec(compile(block, page, "exec"), names)
    (key,) = {"predictions"} & set(names)
    assert len(names[key]) >= 5  # type: ignore[arg-type]
