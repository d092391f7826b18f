"""Does the verifier ever accept a plan that is wrong? Plans right and broken on purpose, judged and run on two processes.

    python tests/benchmarks/verifier_campaign.py --plans-per-model 20

Both processes take the same plans in the same order. The verifier judges each without weights; then the plan is applied and
run with real weights over gloo, in a group of its own, and the outputs of both ranks are compared with the whole model's.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import pickle
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel" / "tensor_parallel"))

from test_verify import MODELS, mutate
from tp_models import build
from tp_ranks import relative_error

from lightning_gpuorch.parallel.tensor_parallel import Communicator, apply_plan, plan_tensor_parallel, verify_plan
from lightning_gpuorch.parallel.tensor_parallel.values import tensors_within

PATIENCE = datetime.timedelta(seconds=10)


class OwnGroup(Communicator):
    """Collectives over a gloo group that is nobody else's, so that a broken run cannot disturb the next."""

    def __init__(self, group: Any, rank: int):
        super().__init__(None, rank, 2)
        self.own = group

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.contiguous()
        self.own.allreduce([tensor]).wait()
        return tensor

    def all_gather_last(self, tensor: torch.Tensor, sizes: Any) -> torch.Tensor:
        tensor = tensor.contiguous()
        pieces = [tensor.new_empty((*tensor.shape[:-1], size)) for size in sizes]
        if len(set(sizes)) == 1:
            self.own.allgather([pieces], [tensor]).wait()
            return torch.cat(pieces, -1)
        padded = [tensor.new_zeros((*tensor.shape[:-1], max(sizes))) for _ in sizes]
        mine = torch.nn.functional.pad(tensor, (0, max(sizes) - tensor.shape[-1]))
        self.own.allgather([padded], [mine.contiguous()]).wait()
        return torch.cat([piece[..., :size] for piece, size in zip(padded, sizes, strict=True)], -1)


def is_right(model: Any, plan: Any, inputs: Any, rank: int, store: Any) -> bool:
    group = dist.ProcessGroupGloo(store, rank, 2, PATIENCE)
    # Nobody takes the group down before both are in it: a broken plan may fail at once.
    store.set(f"in/{rank}", "")
    store.get(f"in/{1 - rank}")
    with torch.no_grad():
        expected = list(tensors_within(model(*inputs)))
    try:
        part = copy.deepcopy(model)
        apply_plan(part, plan, rank, OwnGroup(group, rank))
        with torch.no_grad():
            values = list(tensors_within(part(*inputs)))
        return len(values) == len(expected) and all(
            a.shape == b.shape and relative_error(a, b) < 1e-5 for a, b in zip(values, expected, strict=True)
        )
    except Exception:  # noqa: BLE001 - a broken plan may fail in any way
        return False


def run_rank(rank: int, store_file: str, plans_per_model: int, results: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(store_file, 2)
    verdicts: Counter[tuple[bool, bool]] = Counter()
    wrong: list[str] = []
    for name in MODELS:
        model, inputs = build(name)
        chooser = random.Random(f"{name} on processes")
        for index in range(plans_per_model):
            plan = plan_tensor_parallel(model, inputs, 2)
            for _ in range(chooser.choice([0, 1, 1, 1, 2])):
                plan = mutate(model, plan, chooser)
            accepted = verify_plan(model, plan, inputs).ok
            key = f"{name}-{index}"
            right = is_right(model, plan, inputs, rank, dist.PrefixStore(key, store))
            store.set(f"{key}/{rank}", pickle.dumps((accepted, right, plan.to_json())))
            other = pickle.loads(store.get(f"{key}/{1 - rank}"))
            assert other[0] == accepted, "the ranks judge differently"
            assert other[2] == plan.to_json(), "the ranks made different plans"
            right = right and other[1]  # right on both
            verdicts[accepted, right] += 1
            if accepted and not right:
                wrong.append(f"{name}, plan {index}:\n{plan.describe()}")
        if rank == 0:
            print(f"{name}: {verdicts.total()} plans so far, {len(wrong)} wrong ones accepted", flush=True)
    if rank == 0:
        Path(results).write_bytes(pickle.dumps((verdicts, wrong)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--plans-per-model", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = str(Path(folder, "results"))
        mp.spawn(run_rank, (str(Path(folder, "store")), options.plans_per_model, results), nprocs=2)
        verdicts, wrong = pickle.loads(Path(results).read_bytes())
    print(
        f"{verdicts.total()} plans of {len(MODELS)} models on two processes: {verdicts[True, True]} accepted and right, "
        f"{verdicts[False, False]} rejected and wrong, {verdicts[False, True]} rejected though right, "
        f"{verdicts[True, False]} accepted though wrong"
    )
    for text in wrong:
        print(text)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
