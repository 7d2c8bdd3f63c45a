"""Tensors of a release in FP8 with scales, and what they are worth, computed in plain loops."""

from collections.abc import Callable, Mapping
from itertools import product

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
# Rows and columns of a block: no side of a tiny model's weights is a multiple of both.
BLOCK = (10, 12)


def block_fp8(block: tuple[int, int] = BLOCK, activation_scheme: str = "dynamic") -> dict:
    """``quantization_config`` of a release with a scale per block."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": activation_scheme,
        "weight_block_size": list(block),
        "modules_to_not_convert": ["lm_head", "model.visual"],
    }


def per_channel_fp8() -> dict:
    """``quantization_config`` of compressed-tensors with a scale per output channel."""
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*visual.*"],
        "sparsity_config": {},
    }


def is_quantised(name: str, tensor: Tensor) -> bool:
    """Linear layers of the decoder, as in released FP8 models; its router, embeddings and output stay as they are."""
    return ".layers." in name and tensor.dim() > 1 and "gate.weight" not in name


def quantise(
    tensors: Mapping[str, Tensor],
    blocks_of: Callable[[tuple[int, ...]], tuple[int, int]],
    suffix: str = "_scale_inv",
    scale_dtype: torch.dtype = torch.float32,
    squeeze: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(tensors of the release with FP8 and scales, their values). ``blocks_of``: shape -> rows and columns that share a scale.
    ``squeeze``: without the dims of scales that have one entry."""
    stored: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stored[name] = values[name] = tensor
        if not is_quantised(name, tensor):
            continue
        weight, scale, value = _in_blocks(tensor, blocks_of(tuple(tensor.shape)), scale_dtype)
        stored[name], values[name] = weight, value
        stored[name + suffix] = scale.squeeze(-1).clone() if squeeze else scale
    return stored, values


def _in_blocks(
    tensor: Tensor, block: tuple[int, int], scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    *experts, num_rows, num_columns = tensor.shape
    rows, columns = (range(0, n, b) for n, b in zip((num_rows, num_columns), block, strict=True))
    weight = torch.empty(tensor.shape, dtype=FP8)
    value = torch.empty(tensor.shape, dtype=torch.bfloat16)
    scale = torch.empty((*experts, len(rows), len(columns)), dtype=scale_dtype)
    for expert in product(*map(range, experts)):
        for (i, row), (j, column) in product(enumerate(rows), enumerate(columns)):
            place = (*expert, slice(row, row + block[0]), slice(column, column + block[1]))
            part = tensor[place].float()
            # A power of two where only the exponent is stored.
            exact = part.abs().max() / torch.finfo(FP8).max
            exact = 2 ** exact.log2().ceil() if scale_dtype.itemsize == 1 else exact
            scale[(*expert, i, j)] = exact
            factor = float(scale[(*expert, i, j)].float())
            weight[place] = (part / factor).to(FP8)
            value[place] = (weight[place].float() * factor).to(torch.bfloat16)
    return weight, scale, value
