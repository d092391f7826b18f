"""Tensors and numpy arrays of every layout; sparse matrices of scipy and images of PIL by their arrays."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lightning_gpuorch.errors import UnsupportedPredictionError
from lightning_gpuorch.predictions.storage.values.base import (
    Decode,
    Decoder,
    Encode,
    Encoder,
    Finder,
    Node,
    add_bytes,
    decode_as,
    is_instance,
    loaded_class,
    refuse,
    take,
)

_SAFETENSORS_DTYPES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}
_OPAQUE_DTYPES = {
    name: getattr(torch, name) for name in ("complex128", "complex32", "float8_e8m0fnu", "float4_e2m1fn_x2")
}
"""Dtypes stored as plain bytes, since not every reader of safetensors knows them; the node names the dtype."""

_TORCH_DTYPES = {name: dtype for dtype, name in _SAFETENSORS_DTYPES.items()}
_OPAQUE_NAMES = {dtype: name for name, dtype in _OPAQUE_DTYPES.items()}
_NUMPY_KINDS = frozenset("biufcmMUS")
_NUMPY_DTYPES = {
    name: np.dtype(f"<{code}")
    for name, code in zip(
        ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "F32", "F64", "C64"),
        ("b1", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "c8"),
        strict=True,
    )
}
_NUMPY_NAMES = {dtype.str: name for name, dtype in _NUMPY_DTYPES.items()}


# --- Tensors ----------------------------------------------------------------------------------------------------------


def _encode_tensor(encoder: Encoder, value: torch.Tensor, path: str, depth: int) -> Node:
    value = value.detach()
    if value.device.type == "meta":
        raise UnsupportedPredictionError(f"{path} is a tensor on the meta device: it has no values to store.")
    if value.is_nested:
        return ["nested", [_encode_tensor(encoder, item, path, depth) for item in value.unbind()], str(value.dtype)[6:]]
    if value.layout is not torch.strided:
        return _encode_sparse(encoder, value, path, depth)
    if value.is_quantized:
        return _encode_quantized(encoder, value, path, depth)
    name = _SAFETENSORS_DTYPES.get(value.dtype)
    if name is not None:
        return ["tensor", encoder.add(name, value.shape, value)]
    opaque = _OPAQUE_NAMES.get(value.dtype)
    if opaque is None:
        raise UnsupportedPredictionError(f"{path} is a tensor of {value.dtype}, which cannot be stored. Convert it.")
    return ["tensor", encoder.add("U8", (value.nbytes,), value), opaque, list(value.shape)]


def _decode_tensor(
    decoder: Decoder, column: int, opaque: str | None = None, shape: Sequence[int] | None = None
) -> torch.Tensor:
    dtype = _TORCH_DTYPES[decoder.dtype(column)] if opaque is None else _OPAQUE_DTYPES[opaque]
    size = decoder.shape(column) if shape is None else _checked_shape(shape)
    buffer = take(decoder, column, math.prod(size) * dtype.itemsize)
    tensor = torch.empty(size, dtype=dtype)
    if tensor.numel():
        tensor.reshape(-1).view(torch.uint8).numpy()[:] = np.frombuffer(buffer, np.uint8)
    return tensor


def _checked_shape(shape: Any) -> tuple[int, ...]:
    if type(shape) is not list or not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError("a shape is no list of lengths")
    return tuple(shape)


def _encode_sparse(encoder: Encoder, value: torch.Tensor, path: str, depth: int) -> Node:
    name = str(value.layout).removeprefix("torch.")
    if value.layout is torch.sparse_coo:
        parts: list[Any] = [value._indices(), value._values()]
        more: list[Any] = [value.is_coalesced()]
    elif value.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts, more = [value.crow_indices(), value.col_indices(), value.values()], []
    elif value.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts, more = [value.ccol_indices(), value.row_indices(), value.values()], []
    else:
        raise UnsupportedPredictionError(f"{path} is a tensor of layout {value.layout}. Return {path}.to_dense().")
    return ["sparse", name, [_encode_tensor(encoder, part, path, depth) for part in parts], list(value.shape), *more]


def _decode_sparse(
    decoder: Decoder, layout: str, nodes: list[Node], shape: list[int], coalesced: bool = False
) -> torch.Tensor:
    parts: Any = [decode_as(decoder, torch.Tensor, node) for node in nodes]
    size: Any = shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "in beta state": known to the author of the step
        if layout == "sparse_coo":
            made = torch.sparse_coo_tensor(parts[0], parts[1], size, check_invariants=True, is_coalesced=coalesced)
        else:
            made = torch.sparse_compressed_tensor(
                parts[0], parts[1], parts[2], size, layout=vars(torch)[layout], check_invariants=True
            )
    return made


def _encode_quantized(encoder: Encoder, value: torch.Tensor, path: str, depth: int) -> Node:
    scheme = value.qscheme()
    if value.dtype not in (torch.quint8, torch.qint8, torch.qint32) or scheme not in (
        torch.per_tensor_affine,
        torch.per_channel_affine,
    ):
        raise UnsupportedPredictionError(f"{path} is a tensor of {value.dtype}, {scheme}. Return {path}.dequantize().")
    if scheme is torch.per_tensor_affine:
        scale: list[Node] = [encoder.encode_part(value.q_scale(), path, depth), value.q_zero_point()]
    else:
        parts = (value.q_per_channel_scales(), value.q_per_channel_zero_points())
        scale = [*(_encode_tensor(encoder, part, path, depth) for part in parts), value.q_per_channel_axis()]
    return ["quantized", _encode_tensor(encoder, value.int_repr(), path, depth), *scale]


def _decode_quantized(decoder: Decoder, node: Node, *scale: Node) -> torch.Tensor:
    # From the integers themselves: quantizing the dequantized values would round once more.
    parts = [decoder.decode(part) for part in scale]
    make = torch._make_per_tensor_quantized_tensor if len(parts) == 2 else torch._make_per_channel_quantized_tensor
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "deprecated": known to the author of the step
        return make(decode_as(decoder, torch.Tensor, node), *parts)


def _decode_nested(decoder: Decoder, nodes: list[Node], dtype: str) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "in prototype stage"
        parts = [decode_as(decoder, torch.Tensor, node) for node in nodes]
        return torch.nested.nested_tensor(parts, dtype=vars(torch)[dtype])  # getattr could import a part of torch


def _encode_jagged(encoder: Encoder, value: Any, path: str, depth: int) -> Node:
    parts = (value.values(), value.offsets(), value.lengths())
    nodes = [None if part is None else _encode_tensor(encoder, part, path, depth) for part in parts]
    return ["jagged", *nodes, value._ragged_idx]


def _decode_jagged(decoder: Decoder, *nodes: Node) -> torch.Tensor:
    *tensors, dim = nodes
    values, offsets, lengths = (None if node is None else decode_as(decoder, torch.Tensor, node) for node in tensors)
    if values is None or offsets is None or type(dim) is not int:
        raise ValueError("a jagged tensor has no values or no offsets")
    ends = offsets[:-1] + lengths if lengths is not None else offsets[1:]
    if int(offsets[0]) < 0 or bool((ends < offsets[:-1]).any()) or int(ends.max()) > values.shape[dim - 1]:
        raise ValueError("offsets lie outside of the values")
    made: torch.Tensor = torch.nested.nested_tensor_from_jagged(values, offsets, lengths, dim)
    return made


# --- numpy ------------------------------------------------------------------------------------------------------------


def _encode_dtype(value: Any, dtype: np.dtype[Any], path: str) -> Node:
    """The dtype as JSON; what numpy itself writes into a header of .npy."""
    # Other packages define dtypes of kind V (bfloat16 of ml_dtypes) that this would take for raw bytes.
    known = dtype.kind in _NUMPY_KINDS or dtype.type is np.void
    if dtype.hasobject or not known:
        raise UnsupportedPredictionError(f"{path} is a numpy value of dtype {dtype}. Return a list instead.")
    return dtype.str if dtype.names is None else np.lib.format.dtype_to_descr(dtype)


def _decode_dtype(descr: Any) -> np.dtype[Any]:
    def tuples(fields: Any) -> Any:
        if isinstance(fields, str):
            return fields
        named = [field[0] if isinstance(field[0], str) else tuple(field[0]) for field in fields]
        return [
            (name, tuples(field[1]), *(tuple(shape) for shape in field[2:]))
            for name, field in zip(named, fields, strict=True)
        ]

    dtype = np.dtype(descr) if isinstance(descr, str) else np.lib.format.descr_to_dtype(tuples(descr))
    if dtype.hasobject:
        raise ValueError("objects have no bytes")
    return dtype


def _encode_ndarray(encoder: Encoder, value: np.ndarray[Any, Any], path: str, depth: int) -> Node:
    if value.dtype.kind == "O" or (value.dtype.kind == "T" and not hasattr(value.dtype, "na_object")):
        nodes = [
            encoder.encode_part(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value.reshape(-1).tolist())
        ]
        return ["objects", value.dtype.kind, list(value.shape), nodes]
    name = _NUMPY_NAMES.get(value.dtype.str)
    if name is not None:
        return ["ndarray", encoder.add(name, value.shape, value)]
    descr = _encode_dtype(value, value.dtype, path)
    # Of structured arrays the bytes: not every kind of them can be seen as numbers.
    source: Any = value if value.dtype.names is None else value.tobytes()
    return ["ndarray", encoder.add("U8", (value.nbytes,), source), descr, list(value.shape)]


def _decode_ndarray(
    decoder: Decoder, column: int, descr: Any = None, shape: Sequence[int] | None = None
) -> np.ndarray[Any, Any]:
    element = _NUMPY_DTYPES[decoder.dtype(column)] if descr is None else _decode_dtype(descr)
    size = decoder.shape(column) if shape is None else _checked_shape(shape)
    buffer = take(decoder, column, math.prod(size) * element.itemsize)
    # An element may have no bytes (dtype "<U0"): there is nothing to read then.
    if 0 in size or element.itemsize == 0:
        return np.zeros(size, element)
    array: np.ndarray[Any, Any] = np.frombuffer(buffer, element).reshape(size).copy()
    return array


def _decode_objects(decoder: Decoder, kind: str, shape: list[int], nodes: list[Node]) -> np.ndarray[Any, Any]:
    if math.prod(_checked_shape(shape)) != len(nodes):
        raise ValueError(f"{len(nodes)} entries for shape {shape}")
    array = np.empty(len(nodes), {"O": np.dtype(object), "T": np.dtypes.StringDType()}[kind])
    for position, node in enumerate(nodes):
        array[position] = decoder.decode(node)
    return array.reshape(shape)


def _encode_masked(encoder: Encoder, value: Any, path: str, depth: int) -> Node:
    mask = None if value.mask is np.ma.nomask else _encode_ndarray(encoder, np.asarray(value.mask), path, depth)
    fill = encoder.encode_part(np.asarray(value.fill_value), path, depth)
    return ["masked", _encode_ndarray(encoder, value.data, path, depth), mask, fill, bool(value.hardmask)]


def _decode_masked(decoder: Decoder, data: Node, mask: Node, fill: Node, hard: bool) -> Any:
    data, fill = decode_as(decoder, np.ndarray, data), decode_as(decoder, np.ndarray, fill)[()]
    mask = None if mask is None else decode_as(decoder, np.ndarray, mask)
    made: Any = np.ma.MaskedArray(data, np.ma.nomask if mask is None else mask, fill_value=fill, hard_mask=hard)
    return made


def _encode_numpy_scalar(encoder: Encoder, value: np.generic, path: str, _depth: int) -> Node:
    return ["numpy", _encode_dtype(value, value.dtype, path), value.tobytes().hex()]


def _decode_numpy_scalar(_decoder: Decoder, descr: Any, raw: str) -> np.generic:
    element = _decode_dtype(descr)
    scalar: np.generic = np.frombuffer(bytes.fromhex(raw), element)[0] if element.itemsize else element.type()
    return scalar.copy() if isinstance(scalar, np.void) else scalar


# --- scipy and PIL ----------------------------------------------------------------------------------------------------

_SPARSE_PARTS = {
    "csr": ("data", "indices", "indptr"),
    "csc": ("data", "indices", "indptr"),
    "bsr": ("data", "indices", "indptr"),
    "coo": ("data", "coords"),
    "dia": ("data", "offsets"),
}
_MAX_LIL_ROWS = 2**20
"""Of one that an earlier version has stored, without something for each row."""
_SCIPY = tuple(f"scipy.sparse:{name}" for name in ("sparray", "spmatrix"))


def _encode_scipy(encoder: Encoder, value: Any, path: str, depth: int) -> Node:
    name = type(value).__name__
    if type(value) is not getattr(sys.modules["scipy.sparse"], name, None):
        raise refuse(value, path, "Return a matrix of scipy's own class.")
    # lil and dok grow, and are not made of arrays. A lil has lists for every row: so has the file something for each.
    stored = value if value.format in _SPARSE_PARTS else value.tocsr() if value.format == "lil" else value.tocoo()
    parts = [getattr(stored, part) for part in _SPARSE_PARTS[stored.format]]
    nodes = [encoder.encode_part(part, path, depth + 1) for part in parts]
    return ["scipy", name, stored.format, nodes, list(value.shape)]


def _decode_scipy(decoder: Decoder, name: str, form: str, nodes: list[Node], shape: list[int]) -> Any:
    names = _SPARSE_PARTS[form]
    if name[:3] not in (form, "lil", "dok") or (name[:3] == "lil" and form != "csr" and shape[0] > _MAX_LIL_ROWS):
        raise ValueError(f"a {name} of shape {shape} is not stored as {form}")
    parts = [_decode_scipy_part(decoder, node) for node in nodes]
    suffix = "matrix" if name.endswith("matrix") else "array"
    module = sys.modules.get("scipy.sparse")
    if module is None or name.removesuffix(f"_{suffix}") not in (*_SPARSE_PARTS, "lil", "dok"):
        return {"format": form, "shape": tuple(shape), **dict(zip(names, parts, strict=True))}
    places = [array for part in parts[1:] for array in (part if isinstance(part, tuple) else (part,))]
    if any(array.dtype.kind not in "iu" for array in places):
        raise ValueError("the places of a sparse matrix are no integers")
    is_compressed = form in ("csr", "csc", "bsr")
    # scipy does not look at them where the last one is 0, and then writes beyond its arrays.
    if is_compressed and (parts[2][1:] < parts[2][:-1]).any():
        raise ValueError("the row pointers of a sparse matrix do not ascend")
    made = getattr(module, f"{form}_{suffix}")(tuple(parts), shape=tuple(shape))
    if is_compressed:
        made.check_format(full_check=True)
    return made if form == name[:3] else getattr(module, name)(made)


def _decode_scipy_part(decoder: Decoder, node: Node) -> Any:
    """An array; of coo the coordinates are a tuple of them."""
    part = decoder.decode(node)
    if not all(isinstance(array, np.ndarray) for array in (part if isinstance(part, tuple) else (part,))):
        raise ValueError("a sparse matrix is made of something else than arrays")
    return part


def _encode_image(encoder: Encoder, value: Any, path: str, depth: int) -> Node:
    palette = value.palette
    entries = None if palette is None else [palette.mode, encoder.encode_part(bytes(palette.palette), path, depth)]
    # What the file it was read from has told beside the pixels: as far as it can be stored.
    info = encoder.encode_attributes({f"_{key}": item for key, item in value.info.items()}, path, depth)
    return [
        "image", value.mode, list(value.size), add_bytes(encoder, value.tobytes()), entries, list(info), list(info.values())
    ]  # fmt: skip


def _decode_image(
    decoder: Decoder, mode: str, size: list[int], column: int, palette: Node, names: list[str], info: list[Node]
) -> Any:
    width, height = size
    content = bytes(decoder.buffer(column))
    per_byte = 8 if mode == "1" else 1
    if width < 0 or height < 0 or width * height > per_byte * len(content) or max(width, height) > 2**31 - 1:
        raise ValueError(f"{len(content)} bytes for {width} x {height} pixels")
    details = {name[1:]: decoder.decode(node) for name, node in zip(names, info, strict=True)}
    if loaded_class("PIL.Image:Image") is None:
        return {"mode": mode, "size": (width, height), "data": content, "info": details}
    image = sys.modules["PIL.Image"].frombytes(mode, (width, height), content)
    if palette is not None:
        image.putpalette(decoder.decode(palette[1]), palette[0])
    image.info.update({name: value for name, value in details.items() if value is not None})
    return image


def _is_jagged(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_nested and value.layout is torch.jagged


def _encode_recarray(encoder: Encoder, value: Any, path: str, depth: int) -> Node:
    return ["recarray", _encode_ndarray(encoder, value.view(np.ndarray).view(_plain_record(value.dtype)), path, depth)]


def _plain_record(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype((np.void, dtype)) if dtype.type is np.record else dtype


ENCODERS: dict[type, Encode] = {
    torch.Tensor: _encode_tensor,
    torch.nn.Parameter: _encode_tensor,
    np.ndarray: _encode_ndarray,
    np.memmap: _encode_ndarray,
    np.recarray: _encode_recarray,
    np.ma.MaskedArray: _encode_masked,
}

FINDERS: list[Finder] = [
    (_is_jagged, _encode_jagged),
    (lambda value: value is np.ma.masked, lambda _e, _v, _p, _d: ["npmasked"]),
    (lambda value: isinstance(value, np.generic), _encode_numpy_scalar),
    (lambda value: is_instance(value, *_SCIPY), _encode_scipy),
    (lambda value: is_instance(value, "PIL.Image:Image"), _encode_image),
]

DECODERS: dict[str, Decode] = {
    "tensor": _decode_tensor,
    "sparse": _decode_sparse,
    "quantized": _decode_quantized,
    "nested": _decode_nested,
    "jagged": _decode_jagged,
    "ndarray": _decode_ndarray,
    "objects": _decode_objects,
    "recarray": lambda decoder, node: decode_as(decoder, np.ndarray, node).view(np.recarray),
    "masked": _decode_masked,
    "npmasked": lambda _d: np.ma.masked,
    "numpy": _decode_numpy_scalar,
    "scipy": _decode_scipy,
    "image": _decode_image,
}
