"""Models and kinds of layers, tensor-parallel: each is built tiny and random, planned, sharded and compared.

Swept are every model type of transformers, the models of ``tp_models.py`` and the kinds of ``layer_kinds.py``.

Run from the repository root::

    python tests/parallel/tensor_parallel/sweep.py --results sweep.jsonl --table docs/tensor-parallel-models.md

Types whose result is in the file already are skipped, so an interrupted sweep goes on where it stopped. Ranks are
threads of one process with the real sharded layers; a result counts as equal if every output tensor of every rank is
within 1e-5 of the unsharded model's, relative to its largest value. Where float32's rounding does not allow that, the
judgement is made in float64; for a model that cannot run so, against its change when weights move by a rounding step.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import tp_models
from layer_kinds import KINDS
from test_layer_kinds import judge as judge_kind
from torch import nn
from tp_models import EXAMPLES, randomized
from tp_ranks import relative_error, sharded_outputs

from lightning_gpuorch.errors import TensorParallelError
from lightning_gpuorch.parallel.tensor_parallel import LayerKind, TensorParallelPlan, plan_tensor_parallel
from lightning_gpuorch.parallel.tensor_parallel.values import plain_outputs, tensors_within

SIZES = (2, 3, 4)
TOLERANCE = 1e-5
SECONDS_PER_TYPE = 120
"""Of CPU time, so that what else runs on the machine decides nothing."""

WIDTH, INNER, HEADS, LAYERS = 64, 128, 8, 2
SMALL: dict[str, Any] = {
    **dict.fromkeys(
        (
            "hidden_size",
            "d_model",
            "n_embd",
            "dim",
            "embed_dim",
            "hidden_dim",
            "encoder_hidden_size",
            "decoder_hidden_size",
            "embedding_size",
            "projection_dim",
            "projection_size",
            "proj_codevector_dim",
            "word_embed_proj_dim",
            "encoder_embed_dim",
            "decoder_embed_dim",
            "text_embed_dim",
            "d_embed",
            "attention_hidden_size",
            "pooler_hidden_size",
            "text_hidden_size",
            "emb_dim",
            "out_hidden_size",
            "d_inner_size",
            "lru_width",
            "mamba_d_inner",
            "fusion_hidden_size",
        ),
        WIDTH,
    ),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "encoder_ffn_dim",
            "decoder_ffn_dim",
            "d_ff",
            "n_inner",
            "d_inner",
            "mlp_dim",
            "ffn_hidden_size",
            "encoder_intermediate_size",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "encoder_feedforward_dim",
            "dim_feedforward",
            "moe_shared_expert_intermediate_size",
            "feed_forward_size",
            "mlp_hidden_size",
            "decoder_intermediate_size",
            "expert_ffn_hidden_size",
            "shared_intermediate_size",
        ),
        INNER,
    ),
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "encoder_layers",
            "decoder_layers",
            "num_decoder_layers",
            "num_encoder_layers",
            "depth",
            "num_hidden_groups",
            "num_blocks",
            "encoder_num_layers",
            "decoder_num_layers",
            "perceiver_depth",
            "num_block",
        ),
        LAYERS,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "encoder_attention_heads",
            "decoder_attention_heads",
            "encoder_num_attention_heads",
            "decoder_num_attention_heads",
            "attention_heads",
            "num_attn_heads",
        ),
        HEADS,
    ),
    **dict.fromkeys(
        (
            "num_key_value_heads",
            "num_kv_heads",
            "encoder_num_key_value_heads",
            "decoder_num_key_value_heads",
            "multi_query_group_num",
            "num_key_value_groups_",
        ),
        HEADS // 2,
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(
        (
            "max_position_embeddings",
            "n_positions",
            "max_source_positions",
            "max_target_positions",
            "n_ctx",
            "max_seq_len",
            "seq_length",
            "model_max_length",
        ),
        128,
    ),
    "vocab_size": 512,
    "head_dim": 8,
    "d_kv": 8,
    "kv_channels": 8,
    "attention_head_dim": 8,
    "v_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "image_size": 32,
    "patch_size": 4,
    "window_size": 4,
    "num_channels": 3,
    "num_mel_bins": 16,
    "num_labels": 3,
    "vocab_size_per_layer_input": 512,
    "hidden_size_per_layer_input": 16,
    "state_size": 8,
    "time_step_rank": 8,
    "conv_dim": [32, 32],
    "conv_kernel": [3, 3],
    "conv_stride": [2, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "codebook_size": 64,
    "num_codebooks": 2,
    "tubelet_size": 2,
    "num_frames": 4,
    "rotary_dim": 4,
    "num_queries": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


class TypeTookTooLongError(Exception):
    """A type took too long."""


def power_of_two(value: int) -> int:
    """The largest head count that divides the width."""
    return max(size for size in (1, 2, 4, HEADS) if size <= value)


def shrunk(config_class: Any, depth: int = 0) -> Any:
    """Build a config class with every size this module knows made small, in sub-configs too."""
    config = config_class()
    values: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, bool) or value is None:
            continue
        if name in SMALL and isinstance(value, (int, list, tuple)):
            small = SMALL[name]
            if name == "head_dim" and hasattr(config, "qk_rope_head_dim"):
                continue  # follows from the others
            if isinstance(value, int) and isinstance(small, int):
                # Head counts have to divide the width: 6 becomes 4.
                values[name] = value if value <= 0 else power_of_two(value) if small == HEADS else min(value, small)
            elif isinstance(value, (list, tuple)) and isinstance(small, int) and all(isinstance(v, int) for v in value):
                values[name] = type(value)(power_of_two(v) if small == HEADS else min(v, small) for v in value)
            elif isinstance(value, (list, tuple)) and isinstance(small, list):
                values[name] = small
        elif depth < 2 and hasattr(value, "to_dict") and hasattr(type(value), "model_type"):
            values[name] = shrunk(type(value), depth + 1).to_dict()
    if hasattr(config, "kv_lora_rank") and "num_key_value_heads" in values:
        values["num_key_value_heads"] = HEADS  # latent attention has as many as query heads
    derived = isinstance(getattr(config_class, "layer_types", None), property)
    if isinstance(getattr(config, "layer_types", None), (list, tuple)) and not derived:
        kinds = list(dict.fromkeys(config.layer_types))
        values["layer_types"] = (kinds * LAYERS)[: max(LAYERS, len(kinds))]
        values["num_hidden_layers"] = len(values["layer_types"])
    for name in ("rope_scaling", "rope_parameters"):
        rope = getattr(config, name, None)
        if isinstance(rope, dict) and "mrope_section" in rope:
            values[name] = {**rope, "mrope_section": [2, 1, 1]}
    return config_class(**values)


def model_classes(model_type: str, config_class: Any) -> list[str]:
    """Names of the classes to try for a type: with a head first, then the bare model."""
    from transformers.models.auto import modeling_auto

    tables = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "IMAGE_TEXT_TO_TEXT", "IMAGE_CLASSIFICATION")
    tables = (*tables, "SPEECH_SEQ_2_SEQ", "CTC", "AUDIO_CLASSIFICATION", "ZERO_SHOT_IMAGE_CLASSIFICATION")
    names: list[str] = []
    for table in (*(f"MODEL_FOR_{name}_MAPPING_NAMES" for name in tables), "MODEL_MAPPING_NAMES"):
        found = getattr(modeling_auto, table, {}).get(model_type)
        for name in found if isinstance(found, (tuple, list)) else [found]:
            if name and name not in names:
                names.append(name)
    return names


def ids(length: int, vocabulary: int = 500, seed: int = 1) -> torch.Tensor:
    return torch.randint(5, vocabulary, (2, length), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def candidate_inputs(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Ways to call a model, simple ones first."""
    config = model.config
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 32)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(vision, "num_channels", 3)
    text = getattr(config, "text_config", config)
    vocabulary = getattr(text, "vocab_size", None)
    vocabulary = min(500, vocabulary) if isinstance(vocabulary, int) and vocabulary > 10 else 500
    mels = getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", None) or 16
    frames = 2 * (getattr(config, "max_source_positions", None) or 64)
    known: dict[str, list[torch.Tensor]] = {
        "input_ids": [ids(16, vocabulary)],
        "pixel_values": [
            noise(2, channels, height, width),
            noise(2, getattr(vision, "num_frames", 4), channels, height, width),
        ],
        "input_features": [noise(2, mels, frames), noise(2, 64, mels)],
        "input_values": [noise(2, 800), noise(2, 1, 800), noise(2, 64, mels)],
        "decoder_input_ids": [ids(12, vocabulary, 3)],
    }
    parameters = list(inspect.signature(model.forward).parameters)
    main = getattr(model, "main_input_name", "input_ids")
    main = main[0] if isinstance(main, list) else main
    second = [
        name for name in ("input_ids", "pixel_values", "decoder_input_ids") if name in parameters and name != main
    ]
    for value in known.get(main, [ids(16, vocabulary)]):
        yield {main: value}
    for other in second:
        for value in known.get(main, [ids(16, vocabulary)]):
            for extra in known[other]:
                yield {main: value, other: extra}
    if main != "input_ids" and "input_ids" in parameters:
        yield {"input_ids": ids(16, vocabulary)}


def tensors_of(output: Any) -> list[torch.Tensor]:
    return [value for _, value in plain_outputs(output) if value.is_floating_point()]


def runnable(model_type: str, config_class: Any) -> tuple[Any, dict[str, torch.Tensor]] | str:
    """Build a model of a type that runs; else why there is none."""
    import transformers

    names = model_classes(model_type, config_class)
    if not names:
        return "no model class in the auto mappings"
    problem = ""
    for name in names:
        model_class = getattr(transformers, name, None)
        if model_class is None:
            continue
        try:
            torch.manual_seed(0)
            config = shrunk(config_class)
            model = model_class(config)
            if sum(parameter.numel() for parameter in model.parameters()) > 30_000_000:
                problem = "not tiny with these settings"
                continue
            model = randomized(model)
        except TypeTookTooLongError:
            raise
        except Exception as error:  # noqa: BLE001 - any type may refuse these sizes
            problem = f"{type(error).__name__}: {str(error)[:120]}"
            continue
        for inputs in candidate_inputs(model):
            try:
                with torch.no_grad():
                    first, second = tensors_of(model(**inputs)), tensors_of(model(**inputs))
            except TypeTookTooLongError:
                raise
            except Exception as error:  # noqa: BLE001 - the inputs do not suit the model
                problem = f"{type(error).__name__}: {str(error)[:120]}"
                continue
            if not first:
                problem = "no floating-point outputs"
            elif not all(bool(value.isfinite().all()) for value in first):
                problem = "outputs are not finite with random weights"
            elif not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, second, strict=True)):
                problem = "not deterministic"
            else:
                return model, inputs
    return problem or "nothing builds"


def compare(model: nn.Module, inputs: dict[str, torch.Tensor], plan: TensorParallelPlan) -> float:
    """Largest relative error of any output of any rank."""
    with torch.no_grad():
        expected = tensors_of(model(**inputs))
    worst = 0.0
    for values in sharded_outputs(model, plan, lambda part: tensors_of(part(**inputs))):
        if [value.shape for value in values] != [value.shape for value in expected]:
            return float("inf")
        for value, whole in zip(values, expected, strict=True):
            error = relative_error(value, whole)
            worst = max(worst, float("inf") if error != error else error)
    return worst


def compare_in_float64(model: nn.Module, inputs: dict[str, torch.Tensor], plan: TensorParallelPlan) -> float | None:
    """As :func:`compare`, where float32's own rounding is too coarse; None if the model cannot run so."""
    doubled = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    try:
        return compare(model.double(), doubled, plan)
    except RuntimeError:  # code that creates float32 tensors itself
        return None
    finally:
        model.float()


def rounding_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> float:
    """How much a model's outputs move when its weights move by a float32 rounding step."""
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in moved.parameters():
            if parameter.is_floating_point():
                parameter.mul_(1 + 6e-8 * torch.randint(-1, 2, parameter.shape, generator=generator).double())
        pairs = zip(tensors_of(moved(**inputs)), tensors_of(model(**inputs)), strict=True)
        return max(relative_error(value, whole) for value, whole in pairs)


OWN = {**{f"kind: {name}": name for name in KINDS}, **{f"model: {name}": name for name in EXAMPLES}}
"""What is swept besides the types of transformers."""


def judge_own(key: str) -> dict[str, Any]:
    """Sweep a kind of layer, or one of the models that the tests use."""
    name = OWN[key]
    sizes: dict[str, Any] = {}
    for size in SIZES:
        if key.startswith("kind"):
            verdict, found = judge_kind(name, size)
            sizes[str(size)] = {"verdict": verdict, **({} if verdict == "equal" else {"why": str(found)[:300]})}
            continue
        model, inputs = tp_models.build(name)
        try:
            plan = plan_tensor_parallel(model, inputs, size)
        except TensorParallelError as error:
            sizes[str(size)] = {"verdict": "refused", "why": str(error)[:300]}
            continue
        with torch.no_grad():
            expected = list(tensors_within(model(*inputs)))
        outputs = sharded_outputs(model, plan, lambda part, inputs=inputs: list(tensors_within(part(*inputs))))
        worst = max(
            relative_error(own, whole) for values in outputs for own, whole in zip(values, expected, strict=True)
        )
        sizes[str(size)] = {"verdict": "equal" if worst <= TOLERANCE else "WRONG", "error": worst}
    return {"type": key, "status": "judged", "sizes": sizes}


def judge(model_type: str, sizes: tuple[int, ...] = SIZES) -> dict[str, Any]:
    """Sweep one type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    row: dict[str, Any] = {"type": model_type, "sizes": {}}
    built = runnable(model_type, CONFIG_MAPPING[model_type])
    if isinstance(built, str):
        return {**row, "status": "not built", "why": built}
    model, inputs = built
    row["class"] = type(model).__name__
    row["inputs"] = sorted(inputs)
    for size in sizes:
        started = time.monotonic()
        result: dict[str, Any] = {}
        row["sizes"][str(size)] = result
        try:
            plan = plan_tensor_parallel(model, inputs, size)
        except TensorParallelError as error:
            result.update(verdict="refused", why=str(error)[:300])
            continue
        finally:
            result["plan_seconds"] = round(time.monotonic() - started, 3)
        kinds = Counter(role.kind.value for role in plan.layers.values())
        inner = [
            role for role in plan.layers.values() if role.kind in (LayerKind.COLUMN, LayerKind.HEADS, LayerKind.EXPERTS)
        ]
        result.update(sharded=round(plan.sharded_fraction, 4), kinds=dict(kinds), cut=bool(inner))
        error, limit = compare(model, inputs, plan), TOLERANCE
        if TOLERANCE < error < 1e-2:
            exact = compare_in_float64(model, inputs, plan)
            if exact is None:
                result["float32_rounding"] = rounding_of(model, inputs)
                limit = 3 * result["float32_rounding"]
            else:
                error = exact
        result.update(verdict="equal" if error <= limit else "WRONG", error=error)
    return {**row, "status": "judged"}


def serve(types: list[str], results: Path) -> None:
    """Judge types one after another, one JSON line each."""

    def too_long(*_: Any) -> None:
        raise TypeTookTooLongError

    signal.signal(signal.SIGPROF, too_long)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    for model_type in types:
        started = time.monotonic()
        signal.setitimer(signal.ITIMER_PROF, SECONDS_PER_TYPE)
        try:
            row = judge_own(model_type) if model_type in OWN else judge(model_type)
        except TypeTookTooLongError:
            row = {"type": model_type, "status": "not built", "why": f"more than {SECONDS_PER_TYPE} CPU s", "sizes": {}}
        except Exception as error:  # noqa: BLE001 - one type must not end the sweep; it shows in the table
            row = {
                "type": model_type,
                "status": "error",
                "why": f"{type(error).__name__}: {str(error)[:200]}",
                "sizes": {},
            }
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        row["seconds"] = round(time.monotonic() - started, 2)
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_results(results: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    return {row["type"]: row for row in rows}


def verdict_of(row: dict[str, Any]) -> str:
    """One word for a type over all sizes."""
    if row["status"] != "judged":
        return row["status"]
    verdicts = {size["verdict"] for size in row["sizes"].values()}
    return next(word for word in ("WRONG", "refused", "equal") if word in verdicts)


def _counted(judged: list[dict[str, Any]]) -> str:
    """Count models and plans by verdict."""
    models = Counter(verdict_of(row) for row in judged)
    plans = Counter(size["verdict"] for row in judged for size in row["sizes"].values())
    return (
        f"{models['equal']} are equal at all sizes, {models['refused']} are refused at some size, {models['WRONG']} are "
        f"wrong; {sum(plans.values())} plans, {plans['equal']} equal, {plans['refused']} refused, {plans['WRONG']} wrong"
    )


def table(rows: dict[str, dict[str, Any]], version: str) -> str:
    """Write the results as a Markdown page."""
    own = {name: rows.pop(name) for name in list(rows) if name in OWN}
    judged = [row for row in rows.values() if row["status"] == "judged"]
    fractions = sorted(row["sizes"]["2"].get("sharded", 0.0) for row in judged)
    lines = [
        "# Models, tensor-parallel",
        "",
        f"Written by `tests/parallel/tensor_parallel/sweep.py` with transformers {version} and torch {torch.__version__}. "
        f"Every model is built tiny and random, planned for {', '.join(map(str, SIZES))} ranks, sharded, and compared with "
        "the unsharded model. Equal means every output of every rank is within 1e-5 (kinds of layers: 1e-4).",
        "",
        f"- {len(judged)} of {len(rows)} types of transformers build and run here: {_counted(judged)}.",
        f"- {len(own)} kinds of layers and models of the tests: {_counted(list(own.values()))}.",
        f"- Median share of the parameters that is cut at 2 ranks, transformers: "
        f"{100 * fractions[len(fractions) // 2]:.1f}%.",
        "",
        "Kinds of layers (`layer_kinds.py`): "
        + ", ".join(name.removeprefix("kind: ") for name in own if name.startswith("kind"))
        + ".",
        "",
        "| Type | Class | Inputs | Ranks 2 / 3 / 4 | Cut at 2 ranks | Layers at 2 ranks |",
        "|---|---|---|---|---|---|",
    ]
    for name in sorted(rows):
        row = rows[name]
        if row["status"] != "judged":
            continue
        sizes = row["sizes"]
        verdicts = " / ".join(sizes[str(size)]["verdict"] for size in SIZES)
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(sizes["2"].get("kinds", {}).items()))
        cut = f"{100 * sizes['2'].get('sharded', 0):.1f}%"
        lines.append(f"| {name} | {row['class']} | {', '.join(row['inputs'])} | {verdicts} | {cut} | {kinds} |")
    lines += [
        "",
        "Types that do not build or run from a generic tiny config here, and so say nothing about planning:",
        "",
    ]
    others = [f"`{name}`" for name in sorted(rows) if rows[name]["status"] != "judged"]
    return "\n".join([*lines, ", ".join(others) + "."]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--results", type=Path, required=True, help="JSON lines, one per type; extended, not overwritten"
    )
    parser.add_argument("--table", type=Path, help="where to write the page")
    parser.add_argument("--types", nargs="*", help="types to judge; all by default")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    types = options.types or [*OWN, *sorted(CONFIG_MAPPING_NAMES)]
    if options.serve:
        serve(types, options.results)
        return 0
    while rest := [name for name in types if name not in read_results(options.results)]:
        before = len(read_results(options.results))
        # A process per batch: a type that crashes it costs that type only, and memory does not grow.
        command = [sys.executable, __file__, "--results", str(options.results), "--serve", "--types", *rest[:40]]
        code = subprocess.run(command, check=False).returncode
        done = read_results(options.results)
        if code and len(done) < before + len(rest[:40]):
            lost = next(name for name in rest if name not in done)
            row = {"type": lost, "status": "error", "why": f"the process ended with {code}", "sizes": {}}
            with options.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
        print(f"{len(done)} of {len(types)}", flush=True)
    rows = {name: row for name, row in read_results(options.results).items() if name in set(types)}
    if options.table:
        options.table.write_text(table(rows, transformers.__version__))
    print(Counter(verdict_of(row) for row in rows.values()))
    return int(any(verdict_of(row) in ("WRONG", "error") for row in rows.values()))


if __name__ == "__main__":
    raise SystemExit(main())
