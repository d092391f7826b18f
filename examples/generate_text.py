"""Generate text with a causal language model that is spread over several ranks.

From a directory with a transformers checkpoint; each rank reads only its part::

    torchrun --nproc-per-node 2 examples/generate_text.py /path/to/model --prompt "The lighthouse"

Without a path, a small random model shows the same steps, with token ids for text::

    torchrun --nproc-per-node 2 examples/generate_text.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

from lightning_gpuorch.tensor_parallel import (
    apply_plan,
    check_first_batch,
    empty_parameters,
    generate,
    load_sharded,
    plan_on_first_rank,
)

RANDOM_CONFIG = {
    "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", type=Path, help="directory of a transformers checkpoint")
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--sample", action="store_true", help="sample instead of taking the likeliest token")
    parser.add_argument("--dtype", default="bfloat16")
    return parser.parse_args()


def main() -> None:
    options = parse()
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.manual_seed(0)

    tokenizer: Any = None
    if options.path is not None:
        config = transformers.AutoConfig.from_pretrained(options.path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.path)
        with empty_parameters():
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).eval()
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**RANDOM_CONFIG)).eval()

    example = {"input_ids": torch.randint(5, 1000, (2, 16))}
    plan = plan_on_first_rank(model, example)
    apply_plan(model, plan, rank)
    if options.path is not None:
        report = load_sharded(model, options.path, plan, rank, device=device)
        print(f"rank {rank}: {report.describe()}", flush=True)
    model.to(device)  # the buffers, and the weights of the random model
    if rank == 0:
        print(plan.describe(), flush=True)

    if tokenizer is not None:
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        tokenizer.padding_side = "left"
        inputs = dict(tokenizer(options.prompt or ["The lighthouse"], return_tensors="pt", padding=True))
    else:
        inputs = {"input_ids": torch.arange(5, 21).view(2, 8)}
    check_first_batch(model)
    tokens = generate(model, inputs, max_new_tokens=options.max_new_tokens, do_sample=options.sample)
    if rank == 0:
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True) if tokenizer is not None else tokens.tolist()
        for text in texts:
            print(text, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
