#!/usr/bin/env python3
"""Forward + backward of the partitioned MoE layer against other implementations, on a CPU.

Example: tools/bench/moe.py --repeats 20 --threads 2

Contenders, all with the same tokens, FLOPs and weight shapes:
  partitioned   this layer, 96 experts for text and ViT tokens, 32 for VAE tokens; 3/4 of the tokens are text, 1/4 VAE, mixed
  standard      this layer, one pool of 128 experts
  loop          nn.ModuleList of experts, boolean masks, index_add: usual research code
  transformers  Qwen3MoeSparseMoeBlock of the transformers package with its grouped_mm experts (its default in a model)
  dense         the limit: three matrices on all T*K rows and their backward, nothing else (no routing, no activation)
Routers are random, not balanced. Gradients of the input and of all parameters are computed and thrown away.

Times are medians over interleaved rounds; a ratio is the median of the rounds' ratios. Every contender sees one batch, so
that kernels compiled for its row counts are reused. --fresh gives a new batch in each round, as in training: then bf16 loops
compile kernels for new row counts all the time.

The last line is JSON. partitioned_over_standard, loop_over_partitioned and transformers_over_partitioned are quotients of
times, at the large shape in bf16; partitioned_over_dense there is dense time / partitioned time, the share of the limit that is
reached (0.72: 72 %). ``all`` has the same for every shape and dtype, ``times`` the milliseconds.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from bench_timing import interleave, machine, ratio, restart_with, summary
from torch import Tensor, nn

from symbiotic_titan.moe.experts import PartitionedMoE
from symbiotic_titan.moe.partition import ExpertGroup, MoEArgs
from symbiotic_titan.sequence.modality import TEXT, VAE, VIT

NUM_EXPERTS, TOP_K = 128, 8
PARTITION = (ExpertGroup("und", (TEXT, VIT), 96), ExpertGroup("gen", (VAE,), 32))
POOL = (ExpertGroup("all", (TEXT, VIT, VAE), NUM_EXPERTS),)

# Read when OpenMP and oneDNN are loaded. Spinning threads make every contender slower as soon as anything else uses a core;
# with the default cache oneDNN forgets the kernels of one contender while it runs the next.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16384"}


@dataclass(frozen=True)
class Shape:
    name: str
    tokens: int
    dim: int
    hidden_dim: int


SHAPES = (Shape("large", 4096, 512, 512), Shape("small", 1024, 256, 256))


class Expert(nn.Module):
    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class LoopMoE(nn.Module):
    """The baseline ``loop``."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.router = nn.Linear(dim, NUM_EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert(dim, hidden_dim) for _ in range(NUM_EXPERTS))

    def forward(self, x_TD: Tensor) -> Tensor:
        weights_TK, experts_TK = self.router(x_TD).float().softmax(-1).topk(TOP_K, dim=-1)
        weights_TK = (weights_TK / weights_TK.sum(-1, keepdim=True)).to(x_TD.dtype)
        out_TD = torch.zeros_like(x_TD)
        for index, expert in enumerate(self.experts):
            token, copy = torch.where(experts_TK == index)
            if token.numel():
                rows = expert(x_TD[token]) * weights_TK[token, copy, None]
                out_TD = out_TD.index_add(0, token, rows)
        return out_TD


class DenseLimit(nn.Module):
    """The limit ``dense``: the nine matmuls of forward and backward on all rows at once."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(hidden_dim, dim))
        self.w2 = nn.Parameter(torch.empty(dim, hidden_dim))
        self.w3 = nn.Parameter(torch.empty(hidden_dim, dim))

    def forward(self, x_RD: Tensor) -> tuple[Tensor, Tensor]:
        return (x_RD @ self.w1.t()) @ self.w2.t(), x_RD @ self.w3.t()


def transformers_block(shape: Shape) -> nn.Module:
    """The baseline ``transformers``."""
    try:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
    except ImportError as error:
        raise SystemExit(
            f"the baseline 'transformers' needs the transformers package, version 5 ({error}): "
            "pip install 'transformers>=5,<6', or leave it out with --skip transformers"
        ) from error
    settings: dict[str, Any] = {
        "hidden_size": shape.dim,
        "moe_intermediate_size": shape.hidden_dim,
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": TOP_K,
        "norm_topk_prob": True,
        "experts_implementation": "grouped_mm",
    }
    return Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**settings))


def our_layer(shape: Shape, groups: tuple[ExpertGroup, ...]) -> PartitionedMoE:
    return PartitionedMoE(MoEArgs(shape.dim, shape.hidden_dim, groups, TOP_K))


def step(module: nn.Module, x: Tensor, forward: Callable[[Tensor], Tensor | tuple]) -> None:
    """One forward and one backward pass, gradients thrown away."""
    x = x.detach().requires_grad_()
    out = forward(x)
    outs = out if isinstance(out, tuple) else (out,)
    grads = [torch.ones_like(o) for o in outs]
    torch.autograd.grad(outs, [x, *module.parameters()], grads)


def contenders(
    shape: Shape, dtype: torch.dtype, skip: list[str], fresh: bool
) -> dict[str, Callable[[], None]]:
    """Name -> one forward and backward pass."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "partitioned": lambda: our_layer(shape, PARTITION),
        "standard": lambda: our_layer(shape, POOL),
        "loop": lambda: LoopMoE(shape.dim, shape.hidden_dim),
        "transformers": lambda: transformers_block(shape),
        "dense": lambda: DenseLimit(shape.dim, shape.hidden_dim),
    }
    modality_T = torch.where(torch.randperm(shape.tokens) % 4 == 0, VAE, TEXT)
    no_shield = torch.tensor(1.0)

    def make(name: str) -> Callable[[], None]:
        module = makers[name]()
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.02)
        module.to(dtype)
        rows = shape.tokens * TOP_K if name == "dense" else shape.tokens
        batch = torch.randn(rows, shape.dim).to(dtype)

        def forward(x: Tensor) -> Tensor | tuple:
            if isinstance(module, PartitionedMoE):
                return module(x, modality_T, no_shield)[0]
            return module(x[None])[0] if name == "transformers" else module(x)

        def run() -> None:
            step(module, torch.randn_like(batch) if fresh else batch, forward)

        return run

    return {name: make(name) for name in makers if name not in skip}


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """The quotients of the last line, for one shape and dtype."""
    pairs = {
        "partitioned_over_standard": ("partitioned", "standard"),
        "loop_over_partitioned": ("loop", "partitioned"),
        "transformers_over_partitioned": ("transformers", "partitioned"),
        "partitioned_over_dense": ("dense", "partitioned"),
    }
    return {
        key: round(ratio(times, over, under), 3)
        for key, (over, under) in pairs.items()
        if over in times and under in times
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=11, help="rounds that count (default 11)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's choice)")
    parser.add_argument("--fresh", action="store_true", help="a new batch in every round")
    parser.add_argument(
        "--skip",
        action="append",
        default=[],
        choices=["standard", "loop", "transformers", "dense"],
        help="leave a contender out; may be given several times",
    )
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error(f"--repeats must be at least 2 to have a spread, got {args.repeats}")
    restart_with(ENVIRONMENT)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    times, all_ratios = {}, {}
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            case = f"{shape.name}_{str(dtype).removeprefix('torch.')}"
            measured = interleave(
                contenders(shape, dtype, args.skip, args.fresh), repeats=args.repeats
            )
            times[case] = {name: summary(seconds) for name, seconds in measured.items()}
            all_ratios[case] = ratios(measured)
            print(f"{case}: T={shape.tokens} D={shape.dim} F={shape.hidden_dim} E=128 K=8")
            for name, row in times[case].items():
                print(
                    f"  {name:13s} {row['median_ms']:9.1f} ms  "
                    f"({row['quartile_1_ms']:.1f} to {row['quartile_3_ms']:.1f})"
                )
            print("  " + "  ".join(f"{key} {value}" for key, value in all_ratios[case].items()))
    print(
        json.dumps({**machine(), **all_ratios["large_bfloat16"], "all": all_ratios, "times": times})
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
