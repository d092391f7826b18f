"""Generate text with a causal language model that is spread over several ranks.

From a directory with a transformers checkpoint; each rank reads only its part::

    gpuorch run --devices 2 examples/generate_text.py /path/to/model --prompt "The lighthouse"

Without a path, a small random model shows the same steps, with token ids for text::

    python examples/generate_text.py --devices 2
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning.fabric import Fabric

from lightning_gpuorch import GPUOrchStrategy, MultiGPUOrchestrator
from lightning_gpuorch.parallel.tensor_parallel import applied_plan, generate

RANDOM_CONFIG = {
    "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", type=Path, help="directory of a transformers checkpoint")
    parser.add_argument("--devices", default="auto", help="ignored when a launcher has chosen them")
    parser.add_argument("--tensor-parallel-size", type=int, help="ranks that share the model; default all of them")
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--sample", action="store_true", help="sample instead of taking the likeliest token")
    return parser.parse_args()


def main() -> None:
    options = parse()
    size = options.tensor_parallel_size
    sizes = {"data_parallel_size": 1} if size is None else {"tensor_parallel_size": size}
    fabric = Fabric(strategy=GPUOrchStrategy(**sizes), devices=options.devices)
    fabric.launch()
    orchestrator = MultiGPUOrchestrator(fabric=fabric)
    torch.manual_seed(0)

    tokenizer: Any = None
    if options.path is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.path)
        model = orchestrator.load_distributed_model(options.path).module
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        tokenizer.padding_side = "left"
        inputs = dict(tokenizer(options.prompt or ["The lighthouse"], return_tensors="pt", padding=True))
    else:
        whole = transformers.LlamaForCausalLM(transformers.LlamaConfig(**RANDOM_CONFIG))
        model = orchestrator.load_distributed_model(whole).module
        inputs = {"input_ids": torch.arange(5, 21).view(2, 8)}

    sharded = applied_plan(model)
    if sharded is not None:
        fabric.print(sharded[0].describe(), flush=True)
    tokens = generate(model, inputs, max_new_tokens=options.max_new_tokens, do_sample=options.sample)
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True) if tokenizer is not None else tokens.tolist()
    for text in texts:
        fabric.print(text, flush=True)


if __name__ == "__main__":
    main()
