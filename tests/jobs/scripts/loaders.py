"""trainer.predict over every kind of dataloader."""

import torch
from common import Doubler, Rows, parser, quiet_trainer, write_result
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler


class Stream(IterableDataset):
    def __init__(self, length):
        self.length = length

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        start, step = (info.id, info.num_workers) if info else (0, 1)
        for index in range(start, self.length, step):
            yield torch.tensor([float(index), 0.0])


class OddBatches:
    """A batch sampler that is none of torch's: batches of 1, 2, 3, 1, 2, 3 ..."""

    def __init__(self, length):
        self.length = length

    def __iter__(self):
        index, size = 0, 1
        while index < self.length:
            yield list(range(index, min(index + size, self.length)))
            index, size = index + size, size % 3 + 1

    def __len__(self):
        return sum(1 for _ in self)


class Reversed(SequentialSampler):
    def __iter__(self):
        return iter(range(len(self.data_source) - 1, -1, -1))


class Batches:
    """An iterable of ready batches that knows its length."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __iter__(self):
        return (torch.full((2, 2), float(i)) for i in range(self.count))


def first_column(predictions):
    return [[float(v) for v in batch.reshape(-1, 2)[:, 0]] for batch in predictions]


def main():
    options = parser().parse_args()
    n = 53
    rows = Rows(n)
    cases = {
        "plain": (DataLoader(rows, batch_size=5), {}),
        "workers": (DataLoader(rows, batch_size=5, num_workers=2), {}),
        "drop_last": (DataLoader(rows, batch_size=5, drop_last=True), {}),
        "limit_int": (DataLoader(rows, batch_size=5), {"limit_predict_batches": 4}),
        "limit_float": (DataLoader(rows, batch_size=5), {"limit_predict_batches": 0.5}),
        "shuffled": (DataLoader(rows, batch_size=5, shuffle=True), {}),
        "tiny": (DataLoader(Rows(1), batch_size=4), {}),
        "empty": (DataLoader(Rows(0), batch_size=4), {}),
        "custom_batches": (DataLoader(rows, batch_sampler=OddBatches(n)), {}),
        "custom_sampler": (DataLoader(rows, batch_size=5, sampler=Reversed(rows)), {}),
        "subclass": (DataLoader(rows, batch_sampler=BatchSampler(Reversed(rows), 7, False)), {}),
        "unbatched": (DataLoader(rows, batch_size=None), {}),
        "stream": (DataLoader(Stream(n), batch_size=5), {}),
        "stream_workers": (DataLoader(Stream(n), batch_size=5, num_workers=2), {}),
        "stream_limit": (DataLoader(Stream(n), batch_size=5), {"limit_predict_batches": 3}),
        "iterable": (Batches(9), {}),
        "two": ([DataLoader(rows, batch_size=5), DataLoader(Rows(3), batch_size=2)], {}),
    }
    verdict = {}
    for name, (loader, extra) in cases.items():
        model = Doubler()
        trainer = quiet_trainer("gpuorch", options.devices, **extra)
        got = trainer.predict(model, loader)
        loaders = loader if name == "two" else [loader]
        expected = []
        for one in loaders:
            limit = {"limit_int": 4, "limit_float": 5, "stream_limit": 3}.get(name, 10**9)
            if name in ("shuffled", "drop_last"):
                one = DataLoader(rows, batch_size=5)
            expected.append(first_column([b * 2 for i, b in enumerate(one) if i < limit]))
        got = [first_column(g or []) for g in (got if name == "two" else [got])]  # without data there is None, as ever
        verdict[name] = bool(trainer.strategy.reduce_boolean_decision(got == expected))
        if got != expected and trainer.is_global_zero:
            print(name, "got", got, "expected", expected)
    if trainer.is_global_zero:
        write_result(options, verdict)


if __name__ == "__main__":
    main()
