"""What must be equal on a GPU, as functions of a device: the stage ``correctness`` of the GPU check and the tests marked ``gpu``.

Each returns ``errors``, the relative L2 distance to a plain reference by name, ``bound``, the largest that rounding explains, and
``passed``. On a CPU they run the same code where it has a kernel there: FlexAttention forward only, float8 emulated.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from symbiotic_titan.model.layers import attend
from symbiotic_titan.model.masks import (
    Columns,
    MaskRule,
    block_mask,
    dense_mask,
    patch_rule,
    query_rule,
    sequence_rule,
)
from symbiotic_titan.moe.experts import GroupedExperts, PartitionedMoE
from symbiotic_titan.moe.float8_matmul import emulated_float8_swiglu
from symbiotic_titan.moe.kernels import row_multiple
from symbiotic_titan.moe.partition import ExpertGroup, MoEArgs
from symbiotic_titan.parallel.float8 import FLOAT8_MULTIPLE, scaled_float8_swiglu
from symbiotic_titan.sequence.modality import PADDING, TEXT, VAE, VIT

GROUPS = (ExpertGroup("understanding", (TEXT, VIT), 6), ExpertGroup("generation", (VAE,), 4))
BF16_BOUND = 2e-2  # operands, intermediates and results are rounded to 8 bits
FLOAT32_BOUND = 1e-4
FLOAT8_BOUND = 0.1  # against unrounded operands: 3 bits of mantissa in each of two

Result = dict[str, Any]


def distance(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, in float64 on the CPU."""
    a, b = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def result(errors: dict[str, float], bound: float) -> Result:
    """``passed`` is false for NaN, too."""
    return {"errors": errors, "bound": bound, "passed": all(e <= bound for e in errors.values())}


def compare(names: list[str], found: list[Tensor], expected: list[Tensor], bound: float) -> Result:
    pairs = zip(names, found, expected, strict=True)
    return result({name: distance(a, b) for name, a, b in pairs}, bound)


def with_gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """``out`` and the gradients of a fixed random projection of it."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(out.shape, generator=generator).to(out.device, out.dtype)
    return [out, *torch.autograd.grad(out, inputs, weights)]


def random(*shape: int, device: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def looped_swiglu(rows_ND: Tensor, experts: GroupedExperts, counts: list[int]) -> Tensor:
    """(N, D), expert by expert through autograd."""
    outs = []
    for e, rows in enumerate(rows_ND.split(counts)):
        hidden = F.silu(rows @ experts.w1[e].t()) * (rows @ experts.w3[e].t())
        outs.append(hidden @ experts.w2[e].t())
    return torch.cat(outs)


def make_experts(num_experts: int, device: str, dtype: torch.dtype) -> GroupedExperts:
    experts = GroupedExperts(num_experts, 64, 96)
    for seed, parameter in enumerate(experts.parameters()):
        parameter.data = random(*parameter.shape, device=device, seed=seed + 2) / 8
    return experts.to(dtype)


def grouped_swiglu(device: str) -> Result:
    """Experts in bfloat16, two of them without rows, against a loop in float32."""
    multiple = max(row_multiple(torch.device(device), torch.bfloat16), 1)
    counts = [multiple * n for n in (40, 0, 7, 64, 0)]
    experts = make_experts(5, device, torch.bfloat16)
    rows_ND = random(sum(counts), 64, device=device).bfloat16().requires_grad_()
    out_ND = experts(rows_ND, torch.tensor(counts, device=device))
    found = with_gradients(out_ND, [rows_ND, *experts.parameters()])
    reference = make_experts(5, device, torch.bfloat16).float()
    plain_ND = rows_ND.detach().float().requires_grad_()
    expected = with_gradients(
        looped_swiglu(plain_ND, reference, counts), [plain_ND, *reference.parameters()]
    )
    names = ["out", "rows", *(name for name, _ in experts.named_parameters())]
    compared = compare(names, found, expected, BF16_BOUND)
    idle = max(float(grad[[1, 4]].abs().max()) for grad in found[2:])
    return {**compared, "passed": compared["passed"] and idle == 0, "gradient_without_rows": idle}


def make_layer(device: str, dtype: torch.dtype) -> PartitionedMoE:
    layer = PartitionedMoE(MoEArgs(64, 96, GROUPS, 2, shared_hidden_dim=64))
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data = random(*parameter.shape, device=device, seed=seed) / 4
    return layer.to(dtype)


def plain_layer(layer: PartitionedMoE, x_TD: Tensor, modality_T: Tensor) -> Tensor:
    """(T, D): every expert computes every token; weights are zero where the token is not routed to it."""
    args, out_TD = layer.args, torch.zeros_like(x_TD)
    for group, top_k in zip(args.groups, args.top_ks, strict=True):
        member_T = sum(modality_T == m for m in group.modalities)
        chances_TE = (x_TD @ layer.router[group.name].weight.t()).softmax(-1)  # type: ignore[operator]
        best = chances_TE.topk(top_k, dim=-1)
        kept = best.values / best.values.sum(-1, keepdim=True)
        weights_TE = torch.zeros_like(chances_TE).scatter(1, best.indices, kept)
        experts = layer.experts[group.name]
        assert isinstance(experts, GroupedExperts)
        for e in range(group.num_experts):
            rows = looped_swiglu(x_TD, _one(experts, e), [x_TD.shape[0]])
            out_TD = out_TD + rows * (weights_TE[:, e] * member_T)[:, None]
    shared = layer.shared_experts
    assert shared is not None
    return out_TD + shared(x_TD, modality_T, torch.ones((), device=x_TD.device))


def _one(experts: GroupedExperts, index: int) -> Any:
    class One:
        w1, w2, w3 = (w[index : index + 1] for w in (experts.w1, experts.w2, experts.w3))

    return One


def layer_inputs(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(x_TD, modality_T with every modality and padding, no shield)."""
    x_TD = random(300, 64, device=device).to(dtype).requires_grad_()
    modality_T = (torch.arange(300) % (PADDING + 1)).to(device)
    return x_TD, modality_T, torch.ones((), device=device)


def dispatch(device: str) -> Result:
    """Router, dispatch, experts and combine in float32 against a layer without dispatch."""
    layer = make_layer(device, torch.float32)
    x_TD, modality_T, no_shield = layer_inputs(device, torch.float32)
    inputs = [x_TD, *layer.parameters()]
    found = with_gradients(layer(x_TD, modality_T, no_shield)[0], inputs)
    expected = with_gradients(plain_layer(layer, x_TD, modality_T), inputs)
    names = ["out", "x", *(name for name, _ in layer.named_parameters())]
    return compare(names, found, expected, FLOAT32_BOUND)


def layer_twice(device: str) -> Result:
    """The same forward and backward of a layer in bfloat16, twice: every bit must be equal."""
    layer = make_layer(device, torch.bfloat16)
    x_TD, modality_T, no_shield = layer_inputs(device, torch.bfloat16)
    runs = [
        with_gradients(layer(x_TD, modality_T, no_shield)[0], [x_TD, *layer.parameters()])
        for _ in range(2)
    ]
    names = ["out", "x", *(name for name, _ in layer.named_parameters())]
    differing = [n for n, a, b in zip(names, *runs, strict=True) if not torch.equal(a, b)]
    return {"differing": differing, "passed": not differing}


# ---- attention --------------------------------------------------------------------------------------------------------

NUM_QUERIES, NUM_KEYS, HEADS, KV_HEADS = 300, 340, 4, 2  # no multiples of Flex's blocks of 128


def mask_rules(device: str) -> dict[str, tuple[MaskRule, int, int]]:
    """Mask -> (its rule, queries, keys): two rows of documents with input and target images and padding at the end."""
    index = torch.arange(NUM_QUERIES, device=device).expand(2, -1)
    document, offset = index // 100, index % 100
    in_image = (offset >= 30) & (offset < 70)
    span = torch.where(in_image, document, -1)
    modality = torch.where(in_image, torch.where(document % 2 == 0, VIT, VAE), TEXT)
    padding = index >= NUM_QUERIES - 20
    columns = Columns(
        document.masked_fill(padding, -1), span.masked_fill(padding, -1), modality.clone()
    )
    columns.modality[padding] = PADDING
    key = torch.arange(NUM_KEYS, device=device).expand(2, -1)
    image_of_key = torch.where(key < 320, key // 40, -1)
    image_of_token = torch.where(index < 280, index // 35, -1)
    return {
        "sequence": (sequence_rule(columns), NUM_QUERIES, NUM_QUERIES),
        "patches": (patch_rule(image_of_key), NUM_KEYS, NUM_KEYS),
        "queries": (query_rule(image_of_token, image_of_key), NUM_QUERIES, NUM_KEYS),
    }


def flex_against_sdpa(device: str, mask: str, head_dim: int = 64) -> Result:
    """FlexAttention, in bfloat16 on a GPU and forward only on a CPU, against SDPA in float32 over the same rule."""
    rule, num_queries, num_keys = mask_rules(device)[mask]
    on_gpu, where, shape = device == "cuda", torch.device(device), (2, num_queries)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    heads = ((HEADS, num_queries), (KV_HEADS, num_keys), (KV_HEADS, num_keys))
    rounded = [random(2, *h, head_dim, device=device, seed=i) for i, h in enumerate(heads)]
    rounded = [x.to(dtype).requires_grad_(on_gpu) for x in rounded]
    plain = [x.detach().float().requires_grad_(on_gpu) for x in rounded]
    (q, k, v), (plain_q, plain_k, plain_v) = rounded, plain
    flex = attend(q, k, v, block_mask(rule, shape, where, num_keys))
    dense = dense_mask(rule, shape, where, num_keys=num_keys)
    sdpa = attend(plain_q, plain_k, plain_v, dense)
    if not on_gpu:
        return compare(["out"], [flex], [sdpa], FLOAT32_BOUND)
    found, expected = with_gradients(flex, rounded), with_gradients(sdpa, plain)
    return compare(["out", "q", "k", "v"], found, expected, BF16_BOUND)


# ---- float8 -----------------------------------------------------------------------------------------------------------


def has_float8_kernels(device: str) -> bool:
    return device == "cuda" and torch.cuda.get_device_capability()[0] in (9, 10)


def float8_experts(device: str) -> dict[str, Result]:
    """Emulation against unrounded operands and, on a GPU that has it, the kernel against the emulation."""
    counts = [2 * FLOAT8_MULTIPLE, FLOAT8_MULTIPLE, 4 * FLOAT8_MULTIPLE]
    experts = make_experts(3, device, torch.bfloat16)
    rows_ND = random(sum(counts), 64, device=device).bfloat16().requires_grad_()
    inputs, counts_E = [rows_ND, *experts.parameters()], torch.tensor(counts, device=device)
    names = ["out", "rows", "w1", "w2", "w3"]
    plain = with_gradients(looped_swiglu(rows_ND, experts, counts), inputs)

    def run(kernel: Callable[..., Tensor]) -> list[Tensor]:
        out_ND = kernel(rows_ND, experts.w1, experts.w2, experts.w3, counts_E)
        return with_gradients(out_ND, inputs)

    emulated = run(emulated_float8_swiglu)
    found = {"emulation_against_bfloat16": compare(names, emulated, plain, FLOAT8_BOUND)}
    if has_float8_kernels(device):
        kernel = run(scaled_float8_swiglu())
        found["kernel_against_emulation"] = compare(names, kernel, emulated, 0.03)
    return found


def float8_linear(device: str, scaling: str = "rowwise") -> dict[str, Result]:
    """torchao's linear layer, as ``float8_experts``."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    x_TD = random(64, 64, device=device).bfloat16().requires_grad_()
    runs: dict[str, list[Tensor]] = {}
    for kind in ("plain", "emulated", "kernel"):
        if kind == "kernel" and not has_float8_kernels(device):
            continue
        model = nn.Sequential(nn.Linear(64, 96, bias=False, device=device, dtype=torch.bfloat16))
        [weight] = model.parameters()
        weight.data = random(96, 64, device=device, seed=1).bfloat16() / 8
        if kind != "plain":
            config = Float8LinearConfig.from_recipe_name(scaling)
            config = replace(config, emulate=kind == "emulated")
            convert_to_float8_training(model, config=config)
        runs[kind] = with_gradients(model(x_TD), [x_TD, *model.parameters()])
    names = ["out", "x", "weight"]
    pairs = {"emulation_against_bfloat16": ("emulated", "plain", FLOAT8_BOUND)}
    if "kernel" in runs:
        pairs["kernel_against_emulation"] = ("kernel", "emulated", 0.03)
    return {key: compare(names, runs[a], runs[b], bound) for key, (a, b, bound) in pairs.items()}
