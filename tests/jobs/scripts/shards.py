"""trainer.predict over streams that are read by shard; what is read of their source is counted."""

import fcntl
import os
import signal
import struct
from pathlib import Path

import torch
from common import Doubler, parser, quiet_trainer, write_result
from torch.utils.data import DataLoader

from lightning_gpuorch import ArrowShards, FileShards
from lightning_gpuorch.pytorch import GPUOrchStrategy

SHARDS = 6
ROW = struct.Struct("<d504x")
"""A row of a file: a number, and as many bytes that a system call gets more than one of them."""


def rows_of(shard):
    """Each shard has another number of rows; one has none."""
    return range(1000 * shard, 1000 * shard + (37 * shard) % 90)


EXPECTED = [row for shard in range(SHARDS) for row in rows_of(shard)]


def note(directory, line):
    """One line, whole, by whatever process."""
    with open(Path(directory) / "notes.txt", "a") as file:
        file.write(line + "\n")


def read_file(path):
    """The rows of a file, by number; each that is read is noted."""
    with open(path, "rb", buffering=0) as file:
        while row := file.read(ROW.size):
            note(path.parent, str(len(row)))
            yield torch.tensor([ROW.unpack(row)[0], 0.0])
    damage = path.with_suffix(".damaged")
    if damage.exists():
        raise OSError(f"{path.name} ends in the middle of a row")


def make_once(directory, make):
    """By the first of all ranks and runs."""
    directory.mkdir(exist_ok=True)
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / "made").exists():
            make(directory)
            (directory / "made").touch()


def make_files(directory):
    for shard in range(SHARDS):
        path = directory / f"shard-{shard}.bin"
        path.write_bytes(b"".join(ROW.pack(row) for row in rows_of(shard)))


def row_files(directory):
    return FileShards(sorted(directory.glob("*.bin")), read_file)


class Noted:
    """Notes each sample that passes, and gives its number as a row."""

    def __init__(self, directory):
        self.directory = directory

    def __call__(self, sample):
        note(self.directory, "1")
        if isinstance(sample, dict):
            sample = sample["x"]
        return torch.tensor([float(sample), 0.0])


def make_archives(directory):
    import webdataset

    for shard in range(SHARDS):
        with webdataset.TarWriter(str(directory / f"shard-{shard}.tar")) as writer:
            for row in rows_of(shard):
                writer.write({"__key__": f"{row:06d}", "x.cls": row})


def web_dataset(directory):
    import webdataset

    urls = sorted(map(str, directory.glob("*.tar")))
    stream = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    return stream.decode().to_tuple("x.cls").map(lambda sample: sample[0]).map(Noted(directory))


def hugging_face(directory):
    import datasets

    def rows(shards):
        for shard in shards:
            yield from ({"x": row} for row in rows_of(shard))

    stream = datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": list(range(SHARDS))})
    return stream.map(lambda row: note(directory, "1") or row)


def make_nothing(directory):
    """It is made beforehand, or in memory."""


def lit_data(directory):
    import litdata

    return litdata.StreamingDataset(str(directory / "litdata"), transform=Noted(directory))


def make_parquet(directory):
    import pyarrow
    from pyarrow import parquet

    for shard in range(SHARDS):
        table = pyarrow.table(
            {"x": pyarrow.array(list(rows_of(shard)), pyarrow.float64()), "y": [None] * len(rows_of(shard))}
        )
        parquet.write_table(table, directory / f"{shard}.parquet", row_group_size=20)


def arrow(directory):
    return ArrowShards(sorted(directory.glob("*.parquet")), columns=["x"])


KINDS = {
    "row_files": (make_files, row_files),
    "web_dataset": (make_archives, web_dataset),
    "hugging_face": (make_nothing, hugging_face),
    "lit_data": (make_nothing, lit_data),
    "arrow": (make_parquet, arrow),
}


def as_rows(samples):
    return torch.stack([torch.tensor([float(s["x"]), 0.0]) if isinstance(s, dict) else s for s in samples])


class Model(Doubler):
    def __init__(self, dies, at):
        super().__init__()
        self.dies, self.at, self.steps = dies, at, 0

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        self.steps += 1
        if self.dies and self.trainer.global_rank == 1 and self.steps == self.at and not os.path.exists(self.dies):
            Path(self.dies).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().predict_step(batch, batch_idx)


def main():
    options = parser()
    options.add_argument("--kind", default="row_files")
    options.add_argument("--workers", type=int, default=0)
    options.add_argument("--directory", default="source")
    options.add_argument("--dynamic", action="store_true")
    options.add_argument("--dies", default="")
    options.add_argument("--at", type=int, default=7)
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--chunk", type=int, default=4)
    options = options.parse_args()
    directory = Path(options.directory)
    made, opened = KINDS[options.kind]
    make_once(directory, made)
    dataset = opened(directory)
    loader = DataLoader(dataset, batch_size=options.batch, num_workers=options.workers, collate_fn=as_rows)
    strategy = GPUOrchStrategy(
        tensor_parallel_size=options.tp,
        output_dir=options.output,
        chunk_size=options.chunk,
        enable_dynamic_batching=options.dynamic,
        length_fn=(lambda sample: 1) if options.dynamic else None,
    )
    trainer = quiet_trainer(strategy, options.devices)
    got = trainer.predict(Model(options.dies, options.at), loader)
    if trainer.is_global_zero:
        write_result(options, [int(row[0]) // 2 for batch in got for row in batch])


if __name__ == "__main__":
    main()
