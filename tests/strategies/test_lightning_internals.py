"""Private names of Lightning, torch and others that the package relies on: each exists and is what it is taken for.

One table. A name that a module begins to use without an entry here fails the test, as does an entry that nobody uses.
What the names do is tested where they are used; this tells, on a version that is new or old, which of them to look at.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.strategies import DDPStrategy as FabricDDPStrategy
from lightning.fabric.wrappers import _FabricDataLoader, _FabricModule
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed import ProcessGroup
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

import lightning_gpuorch

PACKAGE = Path(lightning_gpuorch.__file__).parent


def takes(*names: str) -> Callable[[Any], bool]:
    """It can be called with these arguments by position, and needs no others."""

    def check(function: Any) -> bool:
        parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
        required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        return [p.name for p in parameters[: len(names)]] == list(names) and len(required) <= len(names)

    return check


def is_a(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


def trainer() -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)


def storage() -> Any:
    return torch.empty(1).untyped_storage()


def parameter_like() -> torch.Tensor:
    tensor = torch.empty(1)
    tensor._is_param = True
    return tensor


def jagged() -> torch.Tensor:
    return torch.nested.nested_tensor_from_jagged(torch.ones(3, 1), torch.tensor([0, 1, 3]))


def nccl_options() -> Any:
    if not torch.distributed.is_nccl_available():
        pytest.skip("torch is built without NCCL")
    return torch.distributed.ProcessGroupNCCL.Options()


def checkpointed_storage() -> Any:
    """Of a tensor whose place in a file was looked up without reading it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    buffer = io.BytesIO()
    torch.save(torch.ones(3), buffer)
    buffer.seek(0)
    with FakeTensorMode():
        return torch.load(buffer).untyped_storage()


def module(name: str) -> Callable[[], Any]:
    return lambda: importlib.import_module(name)


def hugging_face_stream() -> Any:
    datasets = pytest.importorskip("datasets")
    from datasets.distributed import split_dataset_by_node

    stream = datasets.IterableDataset.from_generator(lambda shards: iter(shards), gen_kwargs={"shards": [{"x": 1}]})
    return split_dataset_by_node(stream, rank=1, world_size=2)


FETCHERS = "lightning.pytorch.loops.fetchers"
PREDICTION_LOOP = "lightning.pytorch.loops.prediction_loop"
DATA_CONNECTOR = "lightning.pytorch.trainer.connectors.data_connector"

RELIED_ON: list[tuple[str, Callable[[], Any], Callable[[Any], bool]]] = [
    # Lightning, in _compat
    ("_DataLoaderIterDataFetcher", module(FETCHERS), lambda kind: hasattr(kind(), "_batch")),
    ("_batch", lambda: importlib.import_module(FETCHERS)._DataLoaderIterDataFetcher(), lambda batch: batch is None),
    (
        "_PrefetchDataFetcher",
        module(FETCHERS),
        lambda kind: {"prefetch_batches", "length", "done"} <= vars(kind()).keys(),
    ),
    (
        "_IndexBatchSamplerWrapper",
        module("lightning.pytorch.overrides.distributed"),
        lambda kind: list(iter(kind(BatchSampler(RandomSampler([0]), 1, False))).seen_batch_indices) == [],
    ),
    ("_auto_add_worker_init_fn", module(DATA_CONNECTOR), takes("dataloader", "rank")),
    ("_IS_INTERACTIVE", module("lightning.fabric.utilities.imports"), is_a(bool)),
    (
        "_data_connector",
        trainer,
        lambda connector: takes("dataloader", "shuffle", "mode")(connector._prepare_dataloader),
    ),
    ("_accelerator_connector", trainer, lambda connector: connector.use_distributed_sampler is True),
    ("_prepare_dataloader", lambda: trainer()._data_connector, callable),
    (
        "_data_source",
        lambda: trainer().predict_loop,
        lambda source: takes()(source.dataloader) and takes()(source.is_defined),
    ),
    ("_data_fetcher", lambda: trainer().predict_loop, lambda fetcher: fetcher is None),
    ("_predictions", lambda: trainer().predict_loop, lambda predictions: predictions == []),
    ("_combined_loader", lambda: trainer().predict_loop, lambda loader: loader is None),
    ("_select_data_fetcher", module(PREDICTION_LOOP), callable),
    ("_apply_batch_transfer_handler", lambda: pl.LightningModule, takes("batch", "device", "dataloader_idx")),
    # Lightning, in the strategies and callbacks
    ("_configure_launcher", lambda: FabricDDPStrategy, takes()),
    ("_configure_launcher", lambda: DDPStrategy, takes()),
    ("_launcher", FabricDDPStrategy, lambda launcher: launcher is None),
    ("_launcher", DDPStrategy, lambda launcher: launcher is None),
    ("_setup_distributed", lambda: FabricDDPStrategy, takes()),
    ("_set_world_ranks", lambda: FabricDDPStrategy, takes()),
    ("_device_mesh", pl.LightningModule, lambda mesh: mesh is None),
    ("_trainer", pl.LightningModule, lambda trainer: trainer is None),
    ("_original_module", lambda: _FabricModule(nn.Linear(1, 1), FabricDDPStrategy()), is_a(nn.Linear)),
    ("_do_nothing", module("lightning.fabric.fabric"), callable),
    ("_dataloader", lambda: _FabricDataLoader(DataLoader([0])), is_a(DataLoader)),
    # datasets
    ("_distributed", lambda: hugging_face_stream(), lambda split: (split.rank, split.world_size) == (1, 2)),
    # torch.distributed
    ("_world", module("torch.distributed.distributed_c10d"), lambda world: world.default_pg is None),
    ("_plugins", lambda: torch.distributed.Backend, is_a(dict)),
    ("_set_default_backend", lambda: ProcessGroup, callable),
    ("_register_backend", lambda: ProcessGroup, callable),
    ("_set_sequence_number_for_group", lambda: torch.distributed.ProcessGroupGloo, callable),
    ("_timeout", nccl_options, lambda timeout: hasattr(timeout, "total_seconds")),
    ("_source_rank", lambda: torch.distributed.Work, callable),
    ("_get_backend_name", lambda: ProcessGroup, callable),
    ("_set_group_name", lambda: ProcessGroup, callable),
    ("_set_group_desc", lambda: ProcessGroup, callable),
    ("_device_types", lambda: ProcessGroup, is_a(property)),
    ("_get_backend", lambda: ProcessGroup, callable),
    ("_has_hooks", lambda: ProcessGroup, callable),
    ("_allgather_base", lambda: ProcessGroup, callable),
    ("_reduce_scatter_base", lambda: ProcessGroup, callable),
    # torch
    ("_utils", module("torch.utils.data"), lambda utils: hasattr(utils, "signal_handling")),
    ("_set_SIGCHLD_handler", module("torch.utils.data._utils.signal_handling"), takes()),
    (
        "_shutdown_workers",
        lambda: importlib.import_module("torch.utils.data.dataloader")._MultiProcessingDataLoaderIter,
        callable,
    ),
    (
        "_functorch",
        lambda: torch._C,
        lambda functorch: not functorch.is_functorch_wrapped_tensor(torch.ones(1)),
    ),
    ("_pytree", module("torch.utils"), lambda pytree: pytree.tree_leaves([1, {"a": 2}]) == [1, 2]),
    (
        "_python_dispatch",
        module("torch.utils"),
        lambda dispatch: callable(dispatch.TorchDispatchMode.__torch_dispatch__),
    ),
    ("_subclasses", lambda: torch, lambda subclasses: issubclass(subclasses.fake_tensor.FakeTensor, torch.Tensor)),
    ("_cdata", storage, is_a(int)),
    ("_C", lambda: torch, lambda _C: inspect.isclass(_C.DisableTorchFunctionSubclass)),
    ("_accelerator_setAllocatorSettings", lambda: torch._C, callable),
    ("_make_subclass", lambda: torch.Tensor, callable),
    ("_is_param", parameter_like, lambda _: isinstance(parameter_like(), nn.Parameter)),
    ("_indices", lambda: torch.eye(2).to_sparse(), lambda indices: indices().shape == (2, 2)),
    ("_values", lambda: torch.eye(2).to_sparse(), lambda values: values().shape == (2,)),
    ("_make_per_tensor_quantized_tensor", lambda: torch, callable),
    ("_make_per_channel_quantized_tensor", lambda: torch, callable),
    ("_ragged_idx", jagged, lambda dim: dim == 1),
    ("_parameters", lambda: nn.Linear(1, 1), lambda found: list(found) == ["weight", "bias"]),
    ("_modules", lambda: nn.Sequential(nn.Linear(1, 1)), lambda found: list(found) == ["0"]),
    ("_DisableTorchDispatch", lambda: torch._C, lambda guard: hasattr(guard, "__enter__")),
    (
        "_slice_file",
        lambda: importlib.import_module("torch.distributed.checkpoint").FileSystemReader,
        takes("file", "sinfo"),
    ),
    ("_checkpoint_offset", checkpointed_storage, is_a(int)),
    ("_compiled_call_impl", lambda: nn.Module, lambda compiled: compiled is None),
    ("_forward_hooks", lambda: nn.Linear(1, 1), lambda hooks: not hooks),
    ("_forward_pre_hooks", lambda: nn.Linear(1, 1), lambda hooks: not hooks),
    ("_ConvNd", lambda: nn.modules.conv, lambda kind: issubclass(nn.Conv2d, kind)),
    ("_NormBase", lambda: nn.modules.batchnorm, lambda kind: issubclass(nn.BatchNorm1d, kind)),
    ("_qkv_same_embed_dim", lambda: nn.MultiheadAttention(4, 2), is_a(bool)),
    # Python and pynvml
    ("_args_from_interpreter_flags", module("subprocess"), takes()),
    ("_shutdown", module("threading"), takes()),
    ("_run_exitfuncs", module("atexit"), callable),
    ("_exit", module("os"), callable),
]

NOT_REQUIRED = {
    "_name_": "of a member of an enum, which documents it",
    "_value_": "of a member of an enum, which documents it",
    "_fields": "of a namedtuple, which documents it",
    "_fingerprint": "of a Hugging Face dataset, where it has one",
    "_tp_plan": "of a transformers model, where it has one",
    "_gpuorch": "ours, on a foreign object",
    "_gpuorch_stub": "ours, on a foreign object",
    "_gpuorch_swap": "ours, on a foreign object",
    "_layer": "ours, on a tensor",
    "_readings": "ours, on a tensor",
    **dict.fromkeys(
        (
            "_WorkerEnv",
            "_associate",
            "_create_cache",
            "_create_shuffler",
            "_ex_iterable",
            "_extract_keys",
            "_log_keys",
            "_map_dict",
            "_map_tuple",
            "_rename",
            "_rename_keys",
            "_select",
            "_shuffle",
            "_starting_state_dict",
            "_state_dict",
            "_to_tuple",
            "_worker_info",
            "_xdecode",
        ),
        "of streams of litdata, webdataset and Hugging Face, which are read as a whole where it is missing",
    ),
    "_created": "how the names of some of Prometheus' samples end",
    "_cuda_cudaCachingAllocator_set_allocator_settings": "asked for where the newer name is missing",
}


@pytest.mark.parametrize(("name", "owner", "check"), RELIED_ON, ids=[entry[0] for entry in RELIED_ON])
def test_a_private_name_is_what_it_is_taken_for(
    name: str, owner: Callable[[], Any], check: Callable[[Any], bool]
) -> None:
    assert check(getattr(owner(), name))


def test_the_predict_loop_selects_its_fetcher_when_it_is_reset() -> None:
    # _compat puts another function in its place for the time of reset().
    loop = type(trainer().predict_loop)
    assert "_select_data_fetcher" in loop.reset.__code__.co_names
    assert isinstance(trainer().predict_loop.max_batches, list)


def _used() -> set[str]:
    """Private names that are read from objects, imported or asked for, and are not defined in the package."""
    trees = [ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    ours, used = set(), set()
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            ours.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            ours.add(node.id)
        elif isinstance(node, ast.Attribute):
            # An attribute that a method sets is its own, one that is set on something else is not.
            is_own = isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self"
            (ours if is_own else used).add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("lightning_gpuorch"):
            used.update(node.module.split("."), (alias.name for alias in node.names))
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(r"_(?!GPUORCH)[A-Za-z]\w*[A-Za-z0-9]", node.value)
        ):
            used.add(node.value)
    modules = {path.stem for path in PACKAGE.rglob("*.py")}
    return {name for name in used - ours - modules if re.match(r"_[A-Za-z]", name)}


def _overridden() -> set[str]:
    """Private names of foreign base classes that a class of the package defines as well, on purpose or not."""
    found = set()
    for info in pkgutil.walk_packages(lightning_gpuorch.__path__, "lightning_gpuorch."):
        if info.name.endswith("__main__"):
            continue
        for kind in vars(importlib.import_module(info.name)).values():
            if not inspect.isclass(kind) or kind.__module__ != info.name:
                continue
            foreign = [base for base in kind.__mro__ if base.__module__.split(".")[0] in ("torch", "lightning")]
            ours = {n for base in kind.__mro__ if base.__module__.startswith("lightning_gpuorch") for n in vars(base)}
            found |= {n for n in ours if re.match(r"_[A-Za-z]", n) and any(n in vars(base) for base in foreign)}
    return found - {"_abc_impl", "_should_skip_dynamo"}  # set by the machinery of the base class


def test_every_private_name_in_use_has_an_entry() -> None:
    entries = {name for name, *_ in RELIED_ON}
    used, overridden = _used(), _overridden()
    assert used - entries - NOT_REQUIRED.keys() == set(), "used, and not in RELIED_ON"
    assert overridden - entries == set(), "defined over a private name of a base class, and not in RELIED_ON"
    source = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    unused = {name for name in entries if not re.search(rf"\b{name}\b", source)}
    assert not unused, "in RELIED_ON, and not used"
