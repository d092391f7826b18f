"""transformers' models: real processes, checkpoints as transformers writes them, generation with a cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from tp_models import randomized
from tp_ranks import ProcessRanks, relative_error, sharded_outputs

from lightning_gpuorch.errors import TensorParallelError
from lightning_gpuorch.parallel.tensor_parallel import (
    LayerKind,
    ModelCall,
    apply_plan,
    empty_parameters,
    generate,
    load_sharded,
    plan_tensor_parallel,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:transformers.*"
)
pytest.importorskip("transformers")

TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclasses.dataclass(frozen=True)
class Case:
    config: str
    model: str
    options: dict[str, Any]
    fully_cut: bool = True


CASES = {
    "llama": Case("LlamaConfig", "LlamaForCausalLM", {**TINY, **TOKENS, "num_key_value_heads": 2}),
    "gpt2": Case(
        "GPT2Config", "GPT2LMHeadModel", {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 8, **TOKENS}
    ),
    "phi3": Case("Phi3Config", "Phi3ForCausalLM", {**TINY, **TOKENS, "num_key_value_heads": 4}),
    "falcon": Case(
        "FalconConfig", "FalconForCausalLM", {**TINY, **TOKENS, "num_kv_heads": 4, "new_decoder_architecture": True}
    ),
    "bloom": Case("BloomConfig", "BloomForCausalLM", {**TINY, **TOKENS, "n_layer": 2, "n_head": 8}, False),
    "mixtral": Case(
        "MixtralConfig", "MixtralForCausalLM", {**TINY, **TOKENS, "num_key_value_heads": 4, "num_local_experts": 4}
    ),
    "gpt_oss": Case(
        "GptOssConfig",
        "GptOssForCausalLM",
        {**TINY, **TOKENS, "num_key_value_heads": 4, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "mamba": Case(
        "MambaConfig", "MambaForCausalLM", {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, **TOKENS}
    ),
    "t5": Case(
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "vocab_size": 512,
            "d_model": 64,
            "d_kv": 8,
            "d_ff": 128,
            "num_layers": 2,
            "num_heads": 8,
            "decoder_start_token_id": 0,
        },
    ),
    "bert": Case("BertConfig", "BertForMaskedLM", TINY),
}
ENCODERS = {"bert"}


def build(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    import transformers

    case = CASES[name]
    torch.manual_seed(0)
    model = getattr(transformers, case.model)(getattr(transformers, case.config)(**case.options))
    ids = torch.randint(5, 500, (2, 16), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids}
    if name == "t5":
        inputs["decoder_input_ids"] = ids[:, :12]
    return randomized(model, seed), inputs


@pytest.mark.parametrize("name", list(CASES))
def test_sharded_equals_whole(name: str) -> None:
    model, inputs = build(name)
    with torch.no_grad():
        expected = model(**inputs).logits
    for num_ranks in (2, 3, 4):
        plan = plan_tensor_parallel(model, inputs, num_ranks)
        for output in sharded_outputs(model, plan, lambda part: part(**inputs).logits):
            assert relative_error(output, expected) < 1e-5
        kinds = [role.kind for name, role in plan.layers.items() if not name.startswith(("lm_head", "cls"))]
        assert (LayerKind.COLUMN_GATHER in kinds) is not CASES[name].fully_cut


def load_from_directory(rank: int, name: str, folder: str) -> tuple[float, int, int]:
    import transformers

    model, inputs = build(name)
    with torch.no_grad():
        expected = model(**inputs).logits
    case = CASES[name]
    config = transformers.AutoConfig.from_pretrained(folder)
    with empty_parameters():
        part = getattr(transformers, case.model)(config).eval()
    plan = plan_tensor_parallel(part, inputs, 2)
    apply_plan(part, plan, rank)
    report = load_sharded(part, folder, plan, rank)
    assert report.missing == ()
    with torch.inference_mode():
        error = relative_error(part(**inputs).logits, expected)
    return error, report.bytes_read, plan.bytes_on(rank)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "bert", "t5"])
def test_directories_as_transformers_writes_them(two_ranks: ProcessRanks, tmp_path: Path, name: str) -> None:
    model, _ = build(name)
    model.save_pretrained(tmp_path, max_shard_size="100KB")  # type: ignore[operator]
    for error, bytes_read, rank_bytes in two_ranks.run(load_from_directory, name, str(tmp_path)):
        assert error < 1e-5
        assert bytes_read <= 1.02 * rank_bytes  # also where experts are merged from many tensors


SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 40},
    "beam": {"num_beams": 3, "do_sample": False},
    "static_cache": {"do_sample": False, "cache_implementation": "static"},
}


def generate_on_rank(rank: int, name: str, search: str) -> tuple[list[list[int]], list[list[int]]]:
    model, inputs = build(name)
    ids = {"input_ids": inputs["input_ids"]}
    options = {**SEARCHES[search], "max_new_tokens": 8, "min_new_tokens": 4}
    torch.manual_seed(5)
    with torch.no_grad():
        expected = model.generate(**ids, **options)  # type: ignore[operator]
    plan = plan_tensor_parallel(model, inputs, 2)
    apply_plan(model, plan, rank)
    torch.manual_seed(5 + 100 * rank)
    # The second rank's own inputs must not count.
    tokens = generate(model, ids if rank == 0 else {"input_ids": ids["input_ids"][:1]}, **options)
    return tokens.tolist(), expected.tolist()


@pytest.mark.parametrize(
    ("name", "search"),
    [
        ("llama", "greedy"),
        ("llama", "sampling"),
        ("llama", "beam"),
        ("llama", "static_cache"),
        ("gpt2", "sampling"),
        ("phi3", "beam"),
        ("falcon", "greedy"),
        ("mixtral", "greedy"),
        ("mamba", "greedy"),
        ("t5", "beam"),
        ("bloom", "greedy"),
    ],
)
def test_all_ranks_generate_the_same_tokens(two_ranks: ProcessRanks, name: str, search: str) -> None:
    results = two_ranks.run(generate_on_rank, name, search)
    for tokens, expected in results:
        assert tokens == expected


def refuse_clock(rank: int) -> str:
    model, inputs = build("llama")
    ids = inputs["input_ids"]
    assert torch.equal(generate(model, ids, max_new_tokens=1), model.generate(ids, max_new_tokens=1))  # type: ignore[operator]
    apply_plan(model, plan_tensor_parallel(model, inputs, 2), rank)
    with pytest.raises(TensorParallelError) as caught:
        generate(model, inputs, max_time=1.0)
    return str(caught.value)


def test_options_that_make_ranks_diverge_are_refused(two_ranks: ProcessRanks) -> None:
    assert all("max_time" in message for message in two_ranks.run(refuse_clock))


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "mixtral", "mamba", "t5"])
def test_plans_can_be_verified_for_generation(name: str) -> None:
    """Steps with a key/value cache run other code than the first; a whole ``generate`` is one more call to check."""
    model, inputs = build(name)
    options = {"input_ids": inputs["input_ids"], "max_new_tokens": 3, "do_sample": False}
    calls = [ModelCall(kwargs=options, method="generate")]
    assert plan_tensor_parallel(model, inputs, 2, also=calls) == plan_tensor_parallel(model, inputs, 2)


def test_a_call_that_breaks_a_cut_makes_it_gathered() -> None:
    from tp_models import WIDTH, Separate, hidden

    class Maps(Separate):
        """Gives its heads' attention maps away, if asked."""

        def forward(self, x: torch.Tensor, maps: bool = False) -> Any:
            b, n, _ = x.shape
            shape = (b, n, self.num_heads, WIDTH // 8)
            q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.query, self.key, self.value))
            weights = (q @ k.transpose(-1, -2)).softmax(-1)
            output = self.out((weights @ v).transpose(1, 2).reshape(b, n, -1))
            return (output, weights) if maps else output

    model = randomized(Maps())
    assert plan_tensor_parallel(model, hidden(), 2).layers["out"].kind is LayerKind.ROW
    calls = [ModelCall((hidden(),), {"maps": True})]
    plan = plan_tensor_parallel(model, hidden(), 2, also=calls)
    assert plan.layers["out"].kind is LayerKind.COLUMN_GATHER
    with torch.no_grad():
        expected = model(hidden(), maps=True)
    for output in sharded_outputs(model, plan, lambda part: part(hidden(), maps=True)):
        assert relative_error(output[1], expected[1]) < 1e-5


class HeadlessAttention(TorchFunctionMode):
    """Counts calls of attention in which a tensor has no elements."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            self.num_calls += not all(operand.numel() for operand in args[:3])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("version", "tried"), [("2.13.0", True), ("2.11.0", False)])
def test_attention_without_heads_is_not_tried_where_it_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, version: str, tried: bool
) -> None:
    """torch 2.11 divides by the number of heads; such attention comes up while cuts are searched."""
    if tried and torch.__version__ < "2.13":
        pytest.skip("would end this process")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    model, inputs = build("phi3")
    with HeadlessAttention() as watched:
        plan = plan_tensor_parallel(model, inputs, 3)
    assert bool(watched.num_calls) is tried
    assert plan.layers
