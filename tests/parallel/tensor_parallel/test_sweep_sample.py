"""A sample of the sweep over transformers' model types, one size each; ``sweep.py`` does all of them."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
import sweep

TYPES = [
    "albert",
    "bart",
    "beit",
    "bert",
    "blip",
    "bloom",
    "clip",
    "cohere",
    "deberta-v2",
    "deit",
    "dinov2",
    "distilbert",
    "electra",
    "falcon",
    "flava",
    "gemma2",
    "gemma3_text",
    "glm4",
    "gpt2",
    "gpt_oss",
    "gptj",
    "granitemoe",
    "hubert",
    "llama",
    "llava",
    "marian",
    "mbart",
    "mistral",
    "mpnet",
    "olmo2",
    "opt",
    "phi",
    "qwen2",
    "qwen2_moe",
    "roberta",
    "siglip",
    "stablelm",
    "starcoder2",
    "t5",
    "vit",
    "whisper",
    "xglm",
    "xlm-roberta",
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("index", "model_type"), list(enumerate(TYPES)), ids=TYPES)
def test_type(index: int, model_type: str) -> None:
    row = sweep.judge(model_type, sizes=(sweep.SIZES[index % len(sweep.SIZES)],))
    if row["status"] != "judged":
        pytest.skip(f"this transformers does not build it from the generic tiny config: {row['why']}")
    (result,) = row["sizes"].values()
    assert result["verdict"] == "equal", result
    assert result["sharded"] > 0.2
