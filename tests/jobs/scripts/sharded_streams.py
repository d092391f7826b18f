"""trainer.predict over streams that shard themselves by whatever tells them that they are one of several.

Each kind gives the numbers 0 to LENGTH - 1 to whoever reads it alone.
"""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from common import Doubler, parser, quiet_trainer, write_result
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed import get_rank, get_world_size
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_gpuorch.pytorch import GPUOrchStrategy

LENGTH = 61


class Sharded(IterableDataset):
    """Takes every n-th number, by rank and by worker."""

    def place(self):
        raise NotImplementedError

    def __iter__(self):
        (rank, world_size), worker = self.place(), get_worker_info()
        worker_id, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for index in range(rank * workers + worker_id, LENGTH, world_size * workers):
            yield torch.tensor([float(index), 0.0])


class ByEnvironment(Sharded):
    def place(self):
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class ByLocalRank(Sharded):
    def place(self):
        return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


class ByProcessGroup(Sharded):
    def place(self):
        return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class ByProcessGroupUnasked(Sharded):
    """As under ddp, where there always is one."""

    def place(self):
        return dist.get_rank(), dist.get_world_size()


class ByImportedFunctions(Sharded):
    """They were bound before anybody could replace them in their module."""

    def place(self):
        return get_rank(), get_world_size()


class ByRankZeroOnly(Sharded):
    """Lightning's own notion of the rank."""

    def place(self):
        return rank_zero_only.rank, 1 + rank_zero_only.rank


class ByTrainer(Sharded):
    trainer = None

    def place(self):
        return self.trainer.global_rank, self.trainer.world_size


class BuiltWithRank(Sharded):
    """Was told its share before anybody could hide the others from it."""

    def __init__(self):
        self.share = ByEnvironment().place()

    def place(self):
        return self.share


class Numbers:
    """An iterable of ready batches that is no DataLoader."""

    def __iter__(self):
        return (number[None] for number in ByEnvironment())


def hugging_face(split):
    import datasets
    from datasets.distributed import split_dataset_by_node

    def rows(shards):
        for shard in shards:
            yield from ({"x": [float(index), 0.0]} for index in range(shard, LENGTH, 3))

    stream = datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": [0, 1, 2]})
    if split:
        stream = split_dataset_by_node(stream, *ByEnvironment().place())
    return stream.with_format("torch")


def web_dataset(directory, nodesplitter):
    import webdataset

    shards = []
    for shard in range(4):
        path = Path(directory) / f"shard-{os.getpid()}-{shard}.tar"
        with webdataset.TarWriter(str(path)) as writer:
            for index in range(shard, LENGTH, 4):
                writer.write({"__key__": f"{index:06d}", "x.pth": torch.tensor([float(index), 0.0])})
        final = path.with_name(f"shard-{shard}.tar")
        path.rename(final)
        shards.append(str(final))
    options = {"nodesplitter": webdataset.split_by_node} if nodesplitter else {}
    return webdataset.WebDataset(shards, shardshuffle=False, **options).decode().to_tuple("x.pth").map(first)


def first(sample):
    return sample[0]


def litdata_stream(directory, workers):
    import litdata

    data = Path(directory) / "litdata"
    dataset = litdata.StreamingDataset(str(data), shuffle=False)
    return litdata.StreamingDataLoader(dataset, batch_size=4, num_workers=workers)


def litdata_row(index):
    return {"x": torch.tensor([float(index), 0.0])}


class Model(Doubler):
    def __init__(self, dies):
        super().__init__()
        self.dies = dies

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        batch = batch["x"] if isinstance(batch, dict) else batch
        if self.dies and self.trainer.global_rank == 1 and batch_idx >= 4 and not os.path.exists(self.dies):
            Path(self.dies).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().predict_step(batch, batch_idx)


def build(kind, workers, directory):
    if kind.startswith("litdata"):
        return litdata_stream(directory, workers)
    if kind == "numbers":
        return Numbers()
    if kind == "stateful":
        from torchdata.stateful_dataloader import StatefulDataLoader

        return StatefulDataLoader(ByEnvironment(), batch_size=4, num_workers=workers)
    if kind == "hugging_face":
        dataset = hugging_face(split=True)
    elif kind == "web_dataset":
        dataset = web_dataset(directory, nodesplitter=True)
    elif kind == "web_dataset_unsplit":
        dataset = web_dataset(directory, nodesplitter=False)
    else:
        dataset = globals()[kind]()
    return DataLoader(dataset, batch_size=4, num_workers=workers)


def main():
    options = parser()
    options.add_argument("--kinds", nargs="+", required=True)
    options.add_argument("--workers", type=int, nargs="+", default=[0])
    options.add_argument("--directory", default=".")
    options.add_argument("--dynamic", action="store_true")
    options.add_argument("--dies", default="")
    options = options.parse_args()
    verdict = {}
    for kind in options.kinds:
        for workers in options.workers:
            directory = Path(options.directory) / f"{kind}-{workers}"
            directory.mkdir(parents=True, exist_ok=True)
            loader = build(kind, workers, directory)
            strategy = GPUOrchStrategy(
                tensor_parallel_size=options.tp,
                output_dir=options.output and f"{options.output}/{kind}-{workers}",
                enable_dynamic_batching=options.dynamic,
                length_fn=(lambda sample: 1) if options.dynamic else None,
            )
            trainer = quiet_trainer(strategy, options.devices)
            ByTrainer.trainer = trainer
            got = trainer.predict(Model(options.dies and str(directory / "died")), loader)
            rows = [int(row[0]) // 2 for batch in got for row in batch]
            verdict[f"{kind}-{workers}"] = rows
            if os.environ.get("RANK") is None and options.devices > 1:
                sys.exit("the environment of the script must show its rank again")
    if trainer.is_global_zero:
        write_result(options, verdict)


if __name__ == "__main__":
    main()
