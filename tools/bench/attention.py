#!/usr/bin/env python3
"""Mask building and attention over a packed row: SDPA with the dense mask against FlexAttention with the block mask.

Example: tools/bench/attention.py --length 512 1024 2048 --repeats 11

Rows hold documents of text with input and target images, packed as in training; forward and backward, 8
query heads, 4 key/value heads of width 64. ``causal`` is SDPA without a mask, the cost of plain causal attention. Flex runs
where FlexAttention has a backward (CUDA); elsewhere its columns are null and the reason is printed.
Float32 on a CPU, bfloat16 on a GPU, which is timed by its events (bench_timing.py).

One table per length, then one JSON line. A ratio is the median over interleaved rounds of the ratio within a round:
dense_over_causal, flex_over_dense, and mask_share: building the mask / (building it + ``--layers`` layers of attention).
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from bench_timing import (
    WAITING,
    add_device_option,
    default_device,
    interleave,
    machine,
    ratio,
    restart_with,
    summary,
    use_device,
)
from torch.nn.attention.flex_attention import BlockMask

from symbiotic_titan.model.layers import attend
from symbiotic_titan.model.masks import MaskRule, block_mask, dense_mask

HEADS, KV_HEADS, HEAD_DIM = 8, 4, 64
DOCUMENT, IMAGE = 192, 64  # tokens of a document, and of the image in the middle of it


@dataclass(frozen=True)
class Case:
    """One row length with its operands on the device."""

    rule: MaskRule
    shape: torch.Size
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def packed_rule(rows: int, length: int, device: str) -> MaskRule:
    """The attention rule of rows packed with documents of text, image, text; every other image is generated."""
    index = torch.arange(length, device=device).expand(rows, -1)
    document, offset = index // DOCUMENT, index % DOCUMENT
    start = (DOCUMENT - IMAGE) // 2
    in_image = (offset >= start) & (offset < start + IMAGE)
    generated = in_image & (document % 2 == 0)

    def sees(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        same = document[b, q] == document[b, k]
        same_image = same & in_image[b, q] & in_image[b, k]
        return (same & ((k <= q) | same_image) & (same_image | ~generated[b, k])) | (q == k)

    return sees


def make_case(rows: int, length: int, dtype: torch.dtype, device: str) -> Case:
    def random(heads: int) -> torch.Tensor:
        return torch.randn(rows, heads, length, HEAD_DIM, dtype=dtype, device=device)

    tensors = [random(heads).requires_grad_() for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return Case(packed_rule(rows, length, device), torch.Size((rows, length)), *tensors)


def contenders(case: Case) -> dict[str, Callable[[], Any]]:
    """Name -> what is timed: building a mask, or attention forward and backward over a ready mask."""
    device = case.q.device

    def train(run: Callable[[], torch.Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(run().sum(), (case.q, case.k, case.v))

    def over(mask: torch.Tensor | BlockMask) -> Callable[[], Any]:
        return train(lambda: attend(case.q, case.k, case.v, mask))

    entries: dict[str, Callable[[], Any]] = {
        "dense_mask": lambda: dense_mask(case.rule, case.shape, device),
        "dense": over(dense_mask(case.rule, case.shape, device)),
        "causal": train(
            lambda: F.scaled_dot_product_attention(
                case.q, case.k, case.v, is_causal=True, enable_gqa=True
            )
        ),
    }
    if device.type == "cuda":
        entries["flex_mask"] = lambda: block_mask(case.rule, case.shape, device)
        entries["flex"] = over(block_mask(case.rule, case.shape, device))
    return entries


def results_of(times: dict[str, list[float]], layers: int) -> dict[str, Any]:
    """Medians and ratios of one length."""
    has_flex = "flex" in times

    def mask_share(kind: str) -> float:
        mask = summary(times[f"{kind}_mask"])["median_ms"]
        return round(mask / (mask + layers * summary(times[kind])["median_ms"]), 4)

    return {
        "times": {name: summary(seconds) for name, seconds in times.items()},
        "dense_over_causal": round(ratio(times, "dense", "causal"), 3),
        "dense_mask_share": mask_share("dense"),
        "flex_over_dense": round(ratio(times, "flex", "dense"), 3) if has_flex else None,
        "flex_mask_share": mask_share("flex") if has_flex else None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--rows", type=int, default=2, help="packed rows (default 2)")
    parser.add_argument("--layers", type=int, default=8, help="layers that share one mask")
    parser.add_argument("--repeats", type=int, default=11, help="rounds that count (default 11)")
    add_device_option(parser)
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error(f"--repeats must be at least 2 to have a spread, got {args.repeats}")
    use_device(args.device)
    restart_with(WAITING)
    torch.manual_seed(0)
    device = default_device()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if device != "cuda":
        print("FlexAttention has no backward on this device: its columns are left empty")
    results = {}
    for length in args.length:
        case = make_case(args.rows, length, dtype, device)
        times = interleave(contenders(case), repeats=args.repeats)
        result = results_of(times, args.layers)
        results[length] = result
        print(f"length {length}, {args.rows} rows, {str(dtype).removeprefix('torch.')}")
        for name, row in result["times"].items():
            print(
                f"  {name:11s} {row['median_ms']:9.2f} ms  ({row['quartile_1_ms']:.2f} to {row['quartile_3_ms']:.2f})"
            )
        print("  " + "  ".join(f"{k} {v}" for k, v in result.items() if k != "times"))
    print(json.dumps({**machine(), "layers": args.layers, "lengths": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
