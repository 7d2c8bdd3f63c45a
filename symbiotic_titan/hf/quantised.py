"""Quantised releases: FP8 weights are multiplied by their scales as they are read; any other kind is refused in words.

Beside a weight W lies a tensor of scales, ``W_scale_inv`` (DeepSeek, Qwen, transformers) or ``W_scale`` (compressed-tensors, ModelOpt),
and the value is weight * scale in either case: one scale per block of rows and columns, per output channel, per expert or per tensor.
The products are in bfloat16, what these releases were quantised from.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from symbiotic_titan.config.rows import check_value
from symbiotic_titan.hf.architectures.base import Config, Shape
from symbiotic_titan.weights.reader import Box, PartReader, TensorSpec, cut

_KEYS = ("quantization_config", "compression_config", "quantization")  # the last is MLX's
_REMEDY = "use the release in bfloat16"
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# What comes after the name of a weight; the longer ones are of experts in one tensor, whose names do not end in "weight".
_SCALES = ("_scale_inv", "_scale", "_weight_scale_inv", "_weight_scale")
# Scales of activations and of the cache of keys and values: a run in bfloat16 has no use for them.
_ACTIVATION_SCALES = ("input_scale", "output_scale", "q_scale", "k_scale", "v_scale")
# Tensors that only these kinds have, for files whose config.json says nothing.
_SIGNS = {
    "gptq or awq": (".qweight",),
    "compressed-tensors (packed)": (".weight_packed",),
    "bitsandbytes": (".absmax", ".weight.quant_map"),
    "mxfp4": ("_proj_blocks", ".weight_blocks"),
}


@dataclass(frozen=True)
class Quantization:
    """``block``: rows and columns of a weight that share a scale; None where a scale belongs to a channel, an expert or a tensor."""

    block: tuple[int, int] | None


def without_quantization(config: Config) -> dict[str, Any]:
    """``config`` as if the release were not quantised."""
    plain = {key: value for key, value in config.items() if key not in _KEYS}
    return {
        key: {k: v for k, v in value.items() if k not in _KEYS} if _is_table(value) else value
        for key, value in plain.items()
    }


def quantization_of(config: Config) -> Quantization | None:
    """What ``quantization_config`` of a config.json says, at its top level or in one of its tables; None where it says nothing.

    Raises:
        ValueError: the release is quantised in a format that is not dequantised here.
    """
    tables = {"": config, **{f"{key}.": value for key, value in config.items() if _is_table(value)}}
    for prefix, table in tables.items():
        for key in _KEYS:
            if table.get(key):
                return _read(f"config.json: {prefix}{key}", table[key])
    return None


def _is_table(value: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping)


def _read(name: str, stated: Any) -> Quantization:
    if not _is_table(stated):
        raise ValueError(f"{name}: must be a table, got {stated!r}")
    method = stated.get("quant_method")
    if method == "fp8":
        return Quantization(_block(f"{name}.weight_block_size", stated.get("weight_block_size")))
    if method == "compressed-tensors":
        return _compressed(name, stated)
    if method == "modelopt" and stated.get("quant_algo") == "FP8":
        return Quantization(None)
    details = [
        f"{key} {stated[key]}" for key in ("quant_algo", "format", "bits") if stated.get(key)
    ]
    more = f" ({', '.join(details)})" if details else ""
    raise _refused(name, f"{method or 'unknown'}{more}")


def _refused(name: str, kind: str) -> ValueError:
    return ValueError(
        f"{name}: quantised release of kind {kind}; only FP8 with a scale per block, channel or tensor is read; {_REMEDY}"
    )


def _compressed(name: str, stated: Config) -> Quantization:
    """compressed-tensors, where each group of layers may have its own format."""
    groups = stated.get("config_groups") or {}
    check_value(f"{name}.config_groups", groups, dict[str, Any])
    blocks = set()
    for key, group in groups.items():
        where = f"{name}.config_groups.{key}"
        weights = group.get("weights") if _is_table(group) else None
        if not _is_table(weights):
            raise ValueError(f"{where}: must be a table with a table of weights, got {group!r}")
        kind = group.get("format") or stated.get("format")
        bits, number = weights.get("num_bits"), weights.get("type")
        strategy = weights.get("strategy")
        if (bits, number) != (8, "float") or strategy not in ("tensor", "channel", "block"):
            raise _refused(where, f"compressed-tensors {kind} ({bits}-bit {number} per {strategy})")
        stated_block = weights.get("block_structure") if strategy == "block" else None
        blocks.add(_block(f"{where}.weights.block_structure", stated_block))
    sparsity = stated.get("sparsity_config") or {}
    if _is_table(sparsity) and sparsity.get("format") not in (None, "dense"):
        raise _refused(name, f"compressed-tensors {sparsity['format']}")
    stated_blocks = sorted(block for block in blocks if block is not None)
    if len(stated_blocks) > 1:
        raise ValueError(f"{name}: its groups have blocks of {stated_blocks}; {_REMEDY}")
    return Quantization(stated_blocks[0] if stated_blocks else None)


def _block(name: str, value: Any) -> tuple[int, int] | None:
    """Rows and columns, from [128, 128] or "128x128"."""
    if value is None:
        return None
    if isinstance(value, str) and all(part.isdecimal() for part in value.split("x")):
        value = [int(part) for part in value.split("x")]
    check_value(name, value, list[int])
    if len(value) != 2 or min(value) < 1:
        raise ValueError(f"{name}: must be two positive numbers, rows and columns, got {value}")
    return value[0], value[1]


class DequantizingReader:
    """The tensors of ``reader`` where FP8 weights with scales are bfloat16 and the scales are left out. FP8 weights without scales
    stay as they are. One tensor is in memory at a time, of grouped experts one expert in float32.

    Raises:
        ValueError: scales that do not fit their weight, or tensors of a format that is not dequantised here.
    """

    def __init__(self, reader: PartReader, quantization: Quantization | None) -> None:
        self._reader = reader
        self._block = quantization.block if quantization else None
        stored = reader.tensors
        _check_no_other_kind(stored)
        self._scale_of = {
            name: scale
            for name, spec in stored.items()
            if spec.dtype in _FP8 and (scale := _scale_of(name, stored)) is not None
        }
        for name, scale in self._scale_of.items():
            _check_scales(name, stored[name], scale, stored[scale], self._block)
        hidden = set(self._scale_of.values())
        if self._scale_of:
            hidden |= {name for name in stored if name.endswith(_ACTIVATION_SCALES)}
        self.tensors: Mapping[str, TensorSpec] = {
            name: TensorSpec(spec.shape, torch.bfloat16) if name in self._scale_of else spec
            for name, spec in stored.items()
            if name not in hidden
        }

    def read(self, name: str, box: Box | None = None) -> Tensor:
        if name not in self._scale_of:
            return self._reader.read(name, box)
        if box is not None:  # whole blocks share a scale
            return cut(self.read(name), box)
        weight = self._reader.read(name)
        scale = _as_float(self._reader.read(self._scale_of[name]))
        shape = _shape_of_scales(tuple(weight.shape), tuple(scale.shape), self._block)
        assert shape is not None, name  # checked above
        scale = scale.view(shape)
        if weight.dim() == 2:
            return self._dequantized(weight, scale)
        out = torch.empty(weight.shape, dtype=torch.bfloat16)
        for i in range(len(weight)):  # an expert at a time: float32 takes four times the memory
            out[i] = self._dequantized(weight[i], scale[i % len(scale)])
        return out

    def _dequantized(self, weight_NK: Tensor, scale: Tensor) -> Tensor:
        """``scale``: as many rows and columns as the weight, one, or one per block."""
        for dim, size in enumerate(weight_NK.shape):
            if scale.shape[dim] not in (1, size):
                assert self._block is not None
                scale = scale.repeat_interleave(self._block[dim], dim).narrow(dim, 0, size)
        return (weight_NK.to(torch.float32) * scale).to(torch.bfloat16)


def _as_float(scale: Tensor) -> Tensor:
    """Scales in float32. Bytes are exponents of two (ue8m0)."""
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.to(torch.float32)


def _scale_of(name: str, stored: Mapping[str, TensorSpec]) -> str | None:
    return next((name + end for end in _SCALES if name + end in stored), None)


def _shape_of_scales(weight: Shape, scale: Shape, block: tuple[int, int] | None) -> Shape | None:
    """The shape, with as many dims as ``weight``, in which the scales broadcast or have an entry per block; None: they do not fit."""
    experts, matrix = weight[:-2], weight[-2:]
    if math.prod(scale) == 1:
        return (1,) * len(weight)
    candidates: list[tuple[Shape, Shape]] = []  # (as stored, as it broadcasts)
    if block is not None:
        blocks = tuple(math.ceil(size / b) for size, b in zip(matrix, block, strict=True))
        candidates.append(((*experts, *blocks), (*experts, *blocks)))
    per_expert = (*experts, 1, 1)
    per_row, per_column = (*experts, matrix[0], 1), (*experts, 1, matrix[1])
    candidates += [(per_expert, per_expert), (per_row, per_row), (per_column, per_column)]
    candidates += [((*experts, matrix[0]), per_row)]
    candidates += [(experts, per_expert)]
    return next((shape for stored, shape in candidates if stored == scale), None)


def _check_scales(
    name: str, weight: TensorSpec, scale: str, stored: TensorSpec, block: tuple[int, int] | None
) -> None:
    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8)
    fits = len(weight.shape) in (2, 3) and _shape_of_scales(weight.shape, stored.shape, block)
    if fits and stored.dtype in floats:
        return
    blocks = (
        f"blocks of {block[0]} x {block[1]} as config.json says"
        if block
        else "rows, experts or the tensor; config.json states no blocks in quantization_config.weight_block_size"
    )
    raise ValueError(
        f"{scale} has shape {stored.shape} and dtype {_dtype_name(stored.dtype)}, which does not fit {name} of shape {weight.shape}: "
        f"expected scales of {blocks}"
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_no_other_kind(stored: Mapping[str, TensorSpec]) -> None:
    for kind, ends in _SIGNS.items():
        for name in stored:
            if name.endswith(ends):
                raise ValueError(
                    f"holds {name}, as in quantised releases of kind {kind}; {_REMEDY}"
                )
