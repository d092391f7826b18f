"""The text generation example runs as its docstring says, and every way of running it gives the same tokens."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[3]
EXAMPLE = str(ROOT / "examples/generate_text.py")


def run(*command: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def lines_of_tokens(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("[") and line[1:2].isdigit()]


def test_generate_text_with_a_random_model() -> None:
    example = runpy.run_path(EXAMPLE)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**example["RANDOM_CONFIG"])).eval()
    expected = model.generate(torch.arange(5, 21).view(2, 8), max_new_tokens=4, do_sample=False).tolist()
    gpuorch = (str(Path(sys.executable).parent / "gpuorch"), "run", "--devices", "2", EXAMPLE)
    output = run(*gpuorch, "--max-new-tokens", "4")
    assert "Tensor-parallel plan for 2 ranks" in output
    assert lines_of_tokens(output) == [str(tokens) for tokens in expected]


def test_generate_text_from_a_directory(tmp_path: Path) -> None:
    write_model(tmp_path)
    arguments = (str(tmp_path), "--prompt", "a b c", "--prompt", "c d", "--max-new-tokens", "5", "--sample")
    output = run(sys.executable, EXAMPLE, "--devices", "2", *arguments)
    assert "Tensor-parallel plan for 2 ranks" in output
    texts = output.splitlines()[-2:]
    assert texts[0].startswith("a b c ")
    assert texts[1].startswith("c d ")


def write_model(directory: Path) -> None:
    """A small random Llama with a tokenizer of single words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: index for index, word in enumerate(["<pad>", "<unk>", "<eos>", *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(directory)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=None, bos_token_id=None, dtype="bfloat16",
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
