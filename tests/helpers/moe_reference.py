"""A partitioned MoE written as plainly as possible, and small layers to compare it with."""

import torch
import torch.nn.functional as F
from torch import Tensor

from symbiotic_titan.moe.experts import PartitionedMoE
from symbiotic_titan.moe.partition import ExpertGroup, MoEArgs
from symbiotic_titan.sequence.modality import PADDING, TEXT, VAE, VIT

# Unequal sizes, no powers of two.
GROUPS = (ExpertGroup("understanding", (TEXT, VIT), 7), ExpertGroup("generation", (VAE,), 5))
# Width and top_k of their own; a group smaller than the largest top_k.
UNEQUAL = (
    ExpertGroup("understanding", (TEXT,), 7, top_k=4),
    ExpertGroup("vision", (VIT,), 3, hidden_dim=8, top_k=2),
    ExpertGroup("generation", (VAE,), 5, hidden_dim=40),
)
POOL = (ExpertGroup("all", (TEXT, VIT, VAE), 12),)


def make_args(groups=GROUPS, **changes) -> MoEArgs:
    return MoEArgs(**({"dim": 16, "hidden_dim": 24, "groups": groups, "top_k": 3} | changes))


def make_layer(args: MoEArgs, dtype: torch.dtype = torch.float32) -> PartitionedMoE:
    layer = PartitionedMoE(args)
    for name, parameter in layer.named_parameters():
        torch.nn.init.normal_(parameter, std=1.0 if "router" in name else 0.3)
    return layer.to(dtype)


def make_tokens(num_tokens: int = 50, dim: int = 16, dtype: torch.dtype = torch.float32):
    """(x_TD that requires grad, modality_T with every modality and padding)."""
    x_TD = torch.randn(num_tokens, dim).to(dtype).requires_grad_()
    return x_TD, torch.arange(num_tokens) % (PADDING + 1)


def swiglu(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    return (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T


def route(layer: PartitionedMoE, x_TD: Tensor, modality: int):
    """(group, (T, K) experts inside it, (T, K) weights, (T, E_g) probabilities) as if every token had this modality."""
    args = layer.args
    group = next(g for g in args.groups if modality in g.modalities)
    router = layer.router[group.name]
    logits = x_TD.float() @ router.weight.float().T
    scores = logits.sigmoid() if args.score_function == "sigmoid" else logits.softmax(-1)
    choice = scores if router.bias is None else scores + router.bias
    experts = choice.topk(args.top_ks[args.groups.index(group)]).indices
    weights = scores.gather(-1, experts)
    if args.normalize_weights:
        weights = weights / weights.sum(-1, keepdim=True)
    return group, experts, weights * args.route_scale, scores / scores.sum(-1, keepdim=True)


def routed_output(layer: PartitionedMoE, x_TD: Tensor, modality_T: Tensor) -> Tensor:
    """What the routed experts give, token by token and expert by expert, through autograd alone."""
    rows = []
    for x_1D, modality in zip(x_TD.split(1), modality_T.tolist(), strict=True):
        if modality == PADDING:
            rows.append(torch.zeros_like(x_1D))
            continue
        group, experts, weights, _ = route(layer, x_1D, modality)
        module = layer.experts[group.name]
        outs = [
            weight * swiglu(x_1D, module.w1[e], module.w2[e], module.w3[e]).float()
            for e, weight in zip(experts[0].tolist(), weights[0], strict=True)
        ]
        rows.append(torch.stack(outs).sum(0).to(x_1D.dtype))
    return torch.cat(rows)


def grads(loss: Tensor, layer: torch.nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss by name; every one must exist."""
    names = [name for name, _ in layer.named_parameters()]
    tensors = [*layer.parameters(), *inputs]
    found = torch.autograd.grad(loss, tensors)
    return dict(zip([*names, *(f"input{i}" for i in range(len(inputs)))], found, strict=True))


def assert_close_with_gradients(
    out_TD: Tensor, expected_TD: Tensor, layer: torch.nn.Module, x_TD: Tensor
) -> None:
    """Two outputs of ``layer`` for the input ``x_TD`` are close, and so are the gradients of a random projection of each."""
    torch.testing.assert_close(out_TD, expected_TD)
    direction_TD = torch.randn_like(out_TD)
    expected = grads((expected_TD * direction_TD).sum(), layer, x_TD)
    for name, grad in grads((out_TD * direction_TD).sum(), layer, x_TD).items():
        torch.testing.assert_close(grad, expected[name], atol=1e-4, rtol=1e-4, msg=name)
