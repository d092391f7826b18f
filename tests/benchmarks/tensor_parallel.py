"""What tensor parallelism costs and saves: planning time, CPU time per rank, bytes and memory when a checkpoint is loaded.

    python tests/benchmarks/tensor_parallel.py planning
    python tests/benchmarks/tensor_parallel.py compute
    python tests/benchmarks/tensor_parallel.py loading --directory /somewhere/with/4GB

``compute`` runs the whole model and its half on the same two processes, in turns. ``loading`` writes a random checkpoint
of about 1.8 GB, loads it on two ranks, by part and with ``from_pretrained``, as it is and converted to bfloat16, each in
processes of its own, in turns, and removes it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

import lightning_gpuorch
from lightning_gpuorch.errors import ModelDoesNotFitError
from lightning_gpuorch.parallel.tensor_parallel import (
    apply_plan,
    empty_parameters,
    plan_on_first_rank,
    plan_tensor_parallel,
    smallest_tensor_parallel_size,
)

GIB, MIB = 2**30, 2**20
LLAMA_70B = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
MEDIUM = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "num_attention_heads": 16,
    "num_key_value_heads": 8, "vocab_size": 8192,
}  # fmt: skip
LARGE = {
    "hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 14, "num_attention_heads": 12,
    "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
TOKENS = {"input_ids": torch.arange(100, 132).view(2, 16)}


def llama(settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    config = transformers.LlamaConfig(**settings)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def memory_mib(field: str) -> float:
    """A field of this process's status (``RssAnon``), in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"the kernel does not report {field}")


# Planning


def planning(options: argparse.Namespace) -> None:
    transformers.logging.set_verbosity_error()
    print("model                                    ranks  CPU s   peak MiB")

    def plan(name: str, model: Any, example: Any, size: int) -> Any:
        started = time.process_time()
        found = plan_tensor_parallel(model, example, size)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{name:<40} {size:>5} {time.process_time() - started:>6.2f} {peak:>10.0f}", flush=True)
        return found

    with empty_parameters():
        models = {
            "Llama, 32 layers": llama({**LLAMA_70B, "hidden_size": 4096, "intermediate_size": 14336,
                                       "num_hidden_layers": 32, "num_attention_heads": 32}, torch.bfloat16),
            "GPT-2 (Conv1D, packed), 32 layers": transformers.GPT2LMHeadModel(
                transformers.GPT2Config(n_layer=32, n_embd=2048, n_head=16)),
            "BERT, 32 layers": transformers.BertModel(
                transformers.BertConfig(num_hidden_layers=32, hidden_size=1024, num_attention_heads=16)),
            "nn.TransformerEncoder, 32 layers": torch.nn.TransformerEncoder(
                torch.nn.TransformerEncoderLayer(1024, 16, 4096, batch_first=True), 32, enable_nested_tensor=False),
        }  # fmt: skip
    for name, model in models.items():
        example = torch.randn(2, 16, 1024) if name.startswith("nn.") else TOKENS
        for size in (2, 8):
            plan(name, model.eval(), example, size)
    del models
    with empty_parameters():
        model = llama(LLAMA_70B, torch.bfloat16)
    found = plan("Llama, 70B", model, TOKENS, 8)
    print(f"Llama, 70B at 8 ranks: {', '.join(f'{found.bytes_on(rank) / GIB:.2f}' for rank in range(8))} GiB by rank")
    for budget in (24, 80, 8):
        started = time.process_time()
        try:
            choice = smallest_tensor_parallel_size(model, budget * GIB, TOKENS)
            verdict = f"degree {choice.tensor_parallel_size}, {choice.rank_bytes / GIB:.2f} GiB each"
        except ModelDoesNotFitError as error:
            verdict = f"refused: {str(error).splitlines()[0]}"
        print(
            f"Llama, 70B on devices of {budget} GiB: {verdict} ({time.process_time() - started:.1f} CPU s)", flush=True
        )


# Compute


def compute_rank(options: argparse.Namespace) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rank = dist.get_rank()
    whole = llama(MEDIUM)
    batch = {"input_ids": torch.randint(0, 8192, (options.batch, options.length))}
    part = llama(MEDIUM)
    part.load_state_dict(whole.state_dict())
    plan = plan_on_first_rank(part, TOKENS)
    apply_plan(part, plan, rank)

    def cpu_seconds(model: Any) -> float:
        started = time.process_time()
        with torch.inference_mode():
            model(**batch)
        return time.process_time() - started

    with torch.inference_mode():
        error = (part(**batch).logits - whole(**batch).logits).abs().max().item()
    alone, shared = [], []
    for _ in range(options.rounds):
        for turn in range(dist.get_world_size()):  # one whole model at a time: it would not have to share the machine
            dist.barrier()
            if turn == rank:
                alone.append(cpu_seconds(whole))
        dist.barrier()
        shared.append(cpu_seconds(part))
    own = {
        "alone": statistics.median(alone),
        "shared": statistics.median(shared),
        "ratios": [b / a for a, b in zip(alone, shared, strict=True)],
    }
    gathered: list[Any] = [None, None]
    dist.all_gather_object(gathered, own)
    if rank == 0:
        millions = sum(value.numel() for value in whole.parameters()) / 1e6
        print(f"Llama of {millions:.0f} M parameters, float32, {options.batch} x {options.length} tokens; largest "
              f"difference {error:.1e}")  # fmt: skip
        for index, one in enumerate(gathered):
            print(f"rank {index}: whole {one['alone']:.3f}, half {one['shared']:.3f} CPU s; ratio median "
                  f"{statistics.median(one['ratios']):.3f}, from {min(one['ratios']):.3f} to {max(one['ratios']):.3f} "
                  f"over {len(one['ratios'])} rounds")  # fmt: skip
    dist.destroy_process_group()


def compute(options: argparse.Namespace) -> None:
    on_two_ranks("compute-rank", "--rounds", options.rounds, "--batch", options.batch, "--length", options.length)


# Loading


class PeakMemory:
    """The largest anonymous and resident memory of this process while it is open, sampled every two milliseconds."""

    def __enter__(self) -> PeakMemory:
        self.before = self.peak = memory_mib("RssAnon")
        self.resident_before = self.resident = memory_mib("VmRSS")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, memory_mib("RssAnon"))
            self.resident = max(self.resident, memory_mib("VmRSS"))

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


def loading_rank(options: argparse.Namespace) -> None:
    """Load in one of the ways, on one rank, and write down what it took."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    orchestrator = lightning_gpuorch.MultiGPUOrchestrator(
        tensor_parallel_size=2, example_input=TOKENS, plan_cache="off"
    )
    orchestrator.initialize()
    rank = orchestrator.global_rank
    small = {**LARGE, "hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 256}
    plan_tensor_parallel(llama(small), TOKENS, 2)  # what is imported on the way is not what loading takes
    started, cpu = time.monotonic(), time.process_time()
    dtype = torch.bfloat16 if "bfloat16" in options.way else torch.float32
    with PeakMemory() as memory:
        if options.way.startswith("by part"):
            with empty_parameters():
                model = llama(LARGE, dtype)
            model = orchestrator.load_distributed_model(options.checkpoint, model)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=dtype)
            model = orchestrator.load_distributed_model(model)
    report = orchestrator.model_setup.load_report
    with torch.inference_mode():
        logits = model(**TOKENS).logits
    plan = lightning_gpuorch.parallel.tensor_parallel.applied_plan(model)[0]
    result = {
        "way": options.way,
        "rank": rank,
        "seconds": time.monotonic() - started,
        "cpu_seconds": time.process_time() - cpu,
        "read_mib": None if report is None else report.bytes_read / MIB,
        "part_mib": sum(row.local_bytes(rank) // row.itemsize * 4 for _, row in plan.unique_parameters()) / MIB,
        "shard_mib": plan.bytes_on(rank) / MIB,
        "replicated_mib": plan.replicated_bytes / MIB,
        "before_mib": memory.before,
        "peak_mib": memory.peak,
        "resident_mib": memory.resident - memory.resident_before,
        "logits": float(logits.double().square().mean()),
    }
    Path(options.results, f"{options.way}-{options.round}-{rank}.json").write_text(json.dumps(result))
    orchestrator.cleanup()


def loading(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        checkpoint, results = Path(folder, "checkpoint"), Path(folder, "results")
        results.mkdir()
        torch.manual_seed(0)
        model = llama(LARGE)
        model.save_pretrained(checkpoint, max_shard_size="700MB")
        del model
        size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
        print(f"checkpoint of {size / 1e9:.2f} GB in {len(list(checkpoint.glob('*.safetensors')))} files", flush=True)
        ways = ("by part", "from_pretrained", "by part, to bfloat16", "from_pretrained, to bfloat16")
        for number in range(options.rounds):
            for way in ways:
                on_two_ranks(
                    "loading-rank", "--checkpoint", checkpoint, "--way", way, "--results", results, "--round", number
                )
        rows = [json.loads(file.read_text()) for file in sorted(results.glob("*.json"))]
        for way in ways:
            values = [row["logits"] for row in rows if row["way"] == way]
            print(f"{way}: mean squared logit from {min(values):.9g} to {max(values):.9g}")
            for rank in range(2):
                own = [row for row in rows if row["way"] == way and row["rank"] == rank]
                shard = own[0]["shard_mib"]
                peak = max(row["peak_mib"] - row["before_mib"] for row in own)
                read = own[0]["read_mib"] or size / MIB  # from_pretrained does not say: every tensor, whole
                print(f"  rank {rank}: keeps {shard:.0f} MiB ({own[0]['replicated_mib']:.1f} of them on every rank); read "
                      f"{read:.1f} MiB = {read / own[0]['part_mib']:.4f} x its part of the file; anonymous memory "
                      f"{peak:.0f} MiB more at its peak = {peak / shard:.3f} x what it keeps, resident "
                      f"{max(row['resident_mib'] for row in own):.0f} MiB more; "
                      f"{statistics.median(row['cpu_seconds'] for row in own):.1f} CPU s")  # fmt: skip


def on_two_ranks(*arguments: Any) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GPUORCH_LOG_LEVEL": "WARNING",
        "TOKENIZERS_PARALLELISM": "false",
    }
    subprocess.run([*command, *map(str, arguments)], check=True, env=environment, timeout=900)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(required=True)
    what.add_parser("planning").set_defaults(run=planning)
    for name, run in (("compute", compute), ("compute-rank", compute_rank)):
        own = what.add_parser(name)
        own.set_defaults(run=run)
        own.add_argument("--rounds", type=int, default=7)
        own.add_argument("--batch", type=int, default=4)
        own.add_argument("--length", type=int, default=128)
    own = what.add_parser("loading")
    own.set_defaults(run=loading)
    own.add_argument("--directory", default=None, help="where the checkpoint is written for the time of the run")
    own.add_argument("--rounds", type=int, default=2)
    own = what.add_parser("loading-rank")
    own.set_defaults(run=loading_rank)
    for option in ("--checkpoint", "--way", "--results", "--round"):
        own.add_argument(option)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
