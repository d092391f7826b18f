"""Quantised checkpoints are refused: their values mean something only together with scales that lie beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from lightning_gpuorch.errors import TensorParallelError

REMEDY = (
    "Save it with full values first, with transformers: from_pretrained(..., quantization_config=...(dequantize=True)) or "
    "model.dequantize(), then save_pretrained; or load the original checkpoint."
)
_SCALES = re.compile(
    r"(?:^|[._])(?:weight_scale(?:_inv|_2)?|scale_inv|SCB|weight_format|qweight|qzeros|g_idx|absmax|quant_map"
    r"|nested_absmax|nested_quant_map|quant_state\.\w+|weight_packed|weight_zero_point)$"
)
"""Names of what only quantisers keep beside a weight, or in its place: fp8, bitsandbytes, GPTQ, AWQ, compressed."""
_PERHAPS_SCALES = re.compile(r"[._](?:(?:input_|activation_|q)?scales?|zero_point|zeros)$")
"""Names that other layers have too."""
_NARROW_FLOATS = frozenset(
    dtype for name, dtype in vars(torch).items() if name.startswith(("float8", "float4")) and type(dtype) is torch.dtype
)


def refuse_quantized_config(directory: Path) -> None:
    """Refuse a transformers directory whose configuration says that its weights are quantised.

    Raises:
        TensorParallelError: ``config.json`` has a ``quantization_config``.
    """
    path = directory / "config.json"
    if not path.is_file():
        return
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise TensorParallelError(f"{path} is damaged: {error}.") from error
    parts = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    for part in parts:
        for name in ("quantization_config", "compression_config"):
            if part.get(name):
                method = part[name].get("quant_method", "unknown") if isinstance(part[name], Mapping) else part[name]
                raise TensorParallelError(
                    f"{path} says that the weights are quantised ({name}, method {method!r}); they would be read without "
                    f"their scales. {REMEDY}"
                )


def refuse_quantized(
    location: str, loaded: Mapping[str, tuple[torch.dtype | None, torch.dtype]], unused: Iterable[str]
) -> None:
    """Refuse a checkpoint whose values would be taken for the weights themselves.

    Args:
        location: Where it lies, for messages.
        loaded: By key: the dtype it is stored in, None if that is not known, and the dtype the model wants.
        unused: Keys the model has no place for.

    Raises:
        TensorParallelError: Integers would become floating-point weights, or scales would be left behind.
    """
    for key, (stored, wanted) in loaded.items():
        if (
            stored is not None
            and wanted.is_floating_point
            and wanted not in _NARROW_FLOATS
            and not _holds_numbers(stored)
        ):
            raise TensorParallelError(
                f"{key} in {location} is stored as {stored} and the model wants {wanted}: the checkpoint is quantised. "
                f"{REMEDY}"
            )
    narrow = any(stored in _NARROW_FLOATS and wanted not in _NARROW_FLOATS for stored, wanted in loaded.values())
    scales = sorted(
        key
        for key in unused
        if _SCALES.search(key)
        or ((match := _PERHAPS_SCALES.search(key)) is not None and (narrow or key[: match.start()] in loaded))
    )
    if scales:
        raise TensorParallelError(
            f"{location} holds scales that the model has no place for, {scales[0]} and {len(scales) - 1} more: the "
            f"checkpoint is quantised. {REMEDY}"
        )


def _holds_numbers(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex
