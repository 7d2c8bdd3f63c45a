#!/usr/bin/env python3
"""Forward + backward of the partitioned MoE layer against other implementations, and the time of its phases.

Example: tools/bench/moe.py --experts 16 128 --top-k 2 8 --repeats 20 --threads 2

Contenders, all with the same tokens, FLOPs and weight shapes:
  partitioned   this layer, 3/4 of the experts for text and ViT tokens, the rest for VAE tokens; 3/4 of the tokens are text,
                1/4 VAE, mixed. If a quarter of the experts is fewer than --top-k, VAE tokens have --top-k experts
  standard      this layer, one pool of all experts
  loop          nn.ModuleList of experts, boolean masks, index_add: usual research code
  torchtitan    torchtitan's own MoE with its grouped matmuls, which exist in bf16 on a GPU: elsewhere it is left out
  transformers  Qwen3MoeSparseMoeBlock of the transformers package with its grouped_mm experts (its default in a model)
  dense         the limit: three matrices on all T*K rows and their backward, nothing else (no routing, no activation)
Routers are random, not balanced. Gradients of the input and of all parameters are computed and thrown away.

Shapes: large T=4096 D=F=512, small T=1024 D=F=256, toy T=64 D=F=16; 1b and 30b are the layers of these flavors with the tokens of
their configs' micro-batches (with --experts 64 --top-k 6, and 128 and 8). Each is measured in each of --dtypes (by default both, on a
GPU bfloat16 alone) with each number of --experts and each --top-k.

--phases adds the phases of the partitioned layer: router, dispatch, experts and combine, forward and backward, and what is left.

Times are medians over interleaved rounds; a ratio is the median of the rounds' ratios. Every contender sees one batch, so
that kernels compiled for its row counts are reused. --fresh gives a new batch in each round, as in training: then bf16 loops
compile kernels for new row counts all the time.

The last line is JSON. partitioned_over_standard, loop_over_partitioned, torchtitan_over_partitioned and transformers_over_partitioned are
quotients of times; partitioned_over_dense is dense time / partitioned time, the share of the limit that is reached (0.72: 72 %). All
are those of the first case (by default the large shape in bf16); ``worst`` has the worst over all cases, ``all`` those of
every case, ``times`` the milliseconds.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from bench_timing import (
    WAITING,
    Clock,
    add_device_option,
    default_device,
    interleave,
    machine,
    ratio,
    restart_with,
    summary,
    use_device,
)
from stopwatch import Stopwatch
from torch import Tensor, nn

from symbiotic_titan.moe.experts import PartitionedMoE
from symbiotic_titan.moe.partition import ExpertGroup, MoEArgs
from symbiotic_titan.sequence.modality import TEXT, VAE, VIT

# Read when OpenMP and oneDNN are loaded. Spinning threads make every contender slower as soon as anything else uses a core;
# with the default cache oneDNN forgets the kernels of one contender while it runs the next.
ENVIRONMENT = {**WAITING, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16384"}


@dataclass(frozen=True)
class Shape:
    tokens: int
    dim: int
    hidden_dim: int


SHAPES = {
    "large": Shape(4096, 512, 512),
    "small": Shape(1024, 256, 256),
    "toy": Shape(64, 16, 16),
    "1b": Shape(4 * 4096, 768, 320),
    "30b": Shape(4096, 2048, 768),
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One layer: its size, the dtype of weights and tokens, and how many experts a token visits of how many."""

    shape: Shape
    dtype: torch.dtype
    num_experts: int
    top_k: int

    @property
    def partition(self) -> tuple[ExpertGroup, ...]:
        gen = max(self.num_experts // 4, self.top_k)
        return (
            ExpertGroup("und", (TEXT, VIT), self.num_experts - gen),
            ExpertGroup("gen", (VAE,), gen),
        )

    @property
    def pool(self) -> tuple[ExpertGroup, ...]:
        return (ExpertGroup("all", (TEXT, VIT, VAE), self.num_experts),)


def impossible(num_experts: int, top_k: int) -> str | None:
    """Why no layer can be built with these values, or None."""
    if num_experts < 4 or num_experts % 4:
        return f"--experts must be positive multiples of 4, a quarter for VAE tokens, got {num_experts}"
    if top_k < 1:
        return f"--top-k must be at least 1, got {top_k}"
    if 2 * top_k > num_experts:
        return (
            f"--top-k must be at most half of --experts, because a token visits experts of one of two groups, "
            f"got {top_k} of {num_experts}"
        )
    return None


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

    def __init__(self, case: Case) -> None:
        super().__init__()
        dim, hidden_dim = case.shape.dim, case.shape.hidden_dim
        self.top_k = case.top_k
        self.router = nn.Linear(dim, case.num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(dim, hidden_dim) for _ in range(case.num_experts))

    def forward(self, x_TD: Tensor) -> Tensor:
        weights_TK, experts_TK = self.router(x_TD).float().softmax(-1).topk(self.top_k, dim=-1)
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


def transformers_block(case: Case) -> nn.Module:
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
        "hidden_size": case.shape.dim,
        "moe_intermediate_size": case.shape.hidden_dim,
        "num_experts": case.num_experts,
        "num_experts_per_tok": case.top_k,
        "norm_topk_prob": True,
        "experts_implementation": "grouped_mm",
    }
    return Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**settings))


def torchtitan_layer(case: Case) -> nn.Module:
    """The baseline ``torchtitan``: weights after the experts, as here, and no selection bias."""
    from torchtitan.models.moe.moe import MoE
    from torchtitan.models.moe.moe import MoEArgs as Args

    settings: dict[str, Any] = {
        "score_func": "softmax",
        "route_norm": True,
        "num_shared_experts": 0,
    }
    args = Args(
        num_experts=case.num_experts,
        top_k=case.top_k,
        score_before_experts=False,
        load_balance_coeff=None,
        **settings,
    )
    return MoE(args, case.shape.dim, case.shape.hidden_dim)


def runs_here(name: str, case: Case, device: str) -> bool:
    """Whether a contender has kernels for this dtype and device."""
    return name != "torchtitan" or (device == "cuda" and case.dtype == torch.bfloat16)


def our_layer(case: Case, groups: tuple[ExpertGroup, ...]) -> PartitionedMoE:
    return PartitionedMoE(MoEArgs(case.shape.dim, case.shape.hidden_dim, groups, case.top_k))


def step(module: nn.Module, x: Tensor, forward: Callable[[Tensor], Tensor | tuple]) -> None:
    """One forward and one backward pass, gradients thrown away."""
    x = x.detach().requires_grad_()
    out = forward(x)
    outs = out if isinstance(out, tuple) else (out,)
    grads = [torch.ones_like(o) for o in outs]
    torch.autograd.grad(outs, [x, *module.parameters()], grads)


def modalities(shape: Shape, device: str) -> Tensor:
    """(T,): a quarter VAE tokens, mixed with text."""
    return torch.where(torch.randperm(shape.tokens) % 4 == 0, VAE, TEXT).to(device)


def filled(module: nn.Module, case: Case, device: str) -> nn.Module:
    """``module`` with random weights in the case's dtype on the device."""
    module.to(device)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    return module.to(case.dtype)


def contenders(case: Case, skip: list[str], fresh: bool) -> dict[str, Callable[[], None]]:
    """Name -> one forward and backward pass."""
    shape, device = case.shape, default_device()
    makers: dict[str, Callable[[], nn.Module]] = {
        "partitioned": lambda: our_layer(case, case.partition),
        "standard": lambda: our_layer(case, case.pool),
        "loop": lambda: LoopMoE(case),
        "torchtitan": lambda: torchtitan_layer(case),
        "transformers": lambda: transformers_block(case),
        "dense": lambda: DenseLimit(shape.dim, shape.hidden_dim),
    }
    modality_T, no_shield = modalities(shape, device), torch.tensor(1.0, device=device)

    def make(name: str) -> Callable[[], None]:
        module = filled(makers[name](), case, device)
        rows = shape.tokens * case.top_k if name == "dense" else shape.tokens
        batch = torch.randn(rows, shape.dim, device=device).to(case.dtype)

        def forward(x: Tensor) -> Tensor | tuple:
            if isinstance(module, PartitionedMoE):
                return module(x, modality_T, no_shield)[0]
            return module(x[None])[0] if name in ("transformers", "torchtitan") else module(x)

        def run() -> None:
            step(module, torch.randn_like(batch) if fresh else batch, forward)

        return run

    names = [name for name in makers if name not in skip and runs_here(name, case, device)]
    return {name: make(name) for name in names}


PHASES = ("router", "dispatch", "experts", "combine", "other")


def phases(case: Case, repeats: int, warmup: int = 2) -> dict[str, float]:
    """Milliseconds of each phase of the partitioned layer's forward and backward, medians; ``other`` is what is left of the whole."""
    device = default_device()
    clock = Clock(device)
    layer = filled(our_layer(case, case.partition), case, device)
    assert isinstance(layer, PartitionedMoE)
    watch = Stopwatch(clock)
    watch.watch(layer.router, "forward", "router")
    watch.watch(layer.dispatcher, "dispatch", "dispatch")
    watch.watch(layer.dispatcher, "combine", "combine")
    for experts in layer.experts.values():
        watch.watch(experts, "forward", "experts")
    modality_T, no_shield = modalities(case.shape, device), torch.tensor(1.0, device=device)
    x_TD = torch.randn(case.shape.tokens, case.shape.dim, device=device).to(case.dtype)
    rows = []
    for _ in range(warmup + repeats):
        clock.empty_cache()
        begin = clock.now()
        step(layer, x_TD, lambda x: layer(x, modality_T, no_shield)[0])
        row = {"whole": clock.seconds(begin, clock.now()), **watch.take()}
        row["other"] = row["whole"] - sum(row.get(phase, 0.0) for phase in PHASES[:-1])
        rows.append(row)
    medians = {p: statistics.median(r.get(p, 0.0) for r in rows[warmup:]) for p in PHASES}
    return {phase: round(1e3 * seconds, 3) for phase, seconds in medians.items()}


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """The quotients of the last line, for one case."""
    pairs = {
        "partitioned_over_standard": ("partitioned", "standard"),
        "loop_over_partitioned": ("loop", "partitioned"),
        "torchtitan_over_partitioned": ("torchtitan", "partitioned"),
        "transformers_over_partitioned": ("transformers", "partitioned"),
        "partitioned_over_dense": ("dense", "partitioned"),
    }
    return {
        key: round(ratio(times, over, under), 3)
        for key, (over, under) in pairs.items()
        if over in times and under in times
    }


def worst(all_ratios: dict[str, dict[str, float]]) -> dict[str, float]:
    """The worst value of each ratio over all cases."""
    every = list(all_ratios.values())
    return {
        key: (max if key == "partitioned_over_standard" else min)(row[key] for row in every)
        for key in every[0]
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["large", "small"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--experts", nargs="+", type=int, default=[128], help="default 128")
    parser.add_argument("--top-k", nargs="+", type=int, default=[8], help="default 8")
    parser.add_argument("--repeats", type=int, default=11, help="rounds that count (default 11)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's choice)")
    add_device_option(parser)
    parser.add_argument("--phases", action="store_true", help="the time of the layer's phases, too")
    parser.add_argument("--fresh", action="store_true", help="a new batch in every round")
    parser.add_argument(
        "--skip",
        action="append",
        default=[],
        choices=["standard", "loop", "torchtitan", "transformers", "dense"],
        help="leave a contender out; may be given several times",
    )
    args = parser.parse_args(argv)
    args.dtypes = args.dtypes or (["bfloat16"] if args.device == "cuda" else list(DTYPES))
    if args.repeats < 2:
        parser.error(f"--repeats must be at least 2 to have a spread, got {args.repeats}")
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    for num_experts, top_k in product(args.experts, args.top_k):
        problem = impossible(num_experts, top_k)
        if problem is not None:
            parser.error(problem)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    use_device(args.device)
    restart_with(ENVIRONMENT)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    times, all_ratios, by_phase = {}, {}, {}
    for choice in product(args.shapes, args.dtypes, args.experts, args.top_k):
        shape, dtype, num_experts, top_k = choice
        case = Case(SHAPES[shape], DTYPES[dtype], num_experts, top_k)
        name = f"{shape}_{dtype}_E{num_experts}_K{top_k}"
        measured = interleave(contenders(case, args.skip, args.fresh), repeats=args.repeats)
        times[name] = {contender: summary(seconds) for contender, seconds in measured.items()}
        all_ratios[name] = ratios(measured)
        print(f"{name}: {case.shape}")
        for contender, row in times[name].items():
            print(
                f"  {contender:13s} {row['median_ms']:9.1f} ms  "
                f"({row['quartile_1_ms']:.1f} to {row['quartile_3_ms']:.1f})"
            )
        print("  " + "  ".join(f"{key} {value}" for key, value in all_ratios[name].items()))
        if args.phases:
            by_phase[name] = phases(case, args.repeats)
            print("  " + "  ".join(f"{phase} {ms} ms" for phase, ms in by_phase[name].items()))
    first, *_ = all_ratios.values()
    result = {**machine(), **first, "worst": worst(all_ratios), "all": all_ratios, "times": times}
    result |= {"phases": by_phase} if by_phase else {}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
