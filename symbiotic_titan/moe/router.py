"""The router: score functions, and top-k inside a token's group. Shape letters: sequence/shapes.py."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from symbiotic_titan.config.experts import ROUTER_SCORES
from symbiotic_titan.moe.partition import ExpertGroup, MoEArgs
from symbiotic_titan.moe.record import RoutingRecord
from symbiotic_titan.sequence.modality import NUM_MODALITIES

RouterScore = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(logits_TE float32, allowed_TE bool: the expert is in the token's group) -> (scores_TE, probabilities_TE), both float32.

Scores are positive inside the group and 0 outside it. The top-k experts by score are chosen, and their scores become their weights
(divided by their sum with ``normalize_weights``). The balancing loss reads the probabilities: scores divided by their sum over the
group. Padding is allowed every expert; its scores are unused but must be finite.
"""


def check_score(name: str) -> None:
    """Try the score function ``name`` on a few tokens, before a model is built with it.

    Raises:
        ValueError: it breaks the contract of ``RouterScore``; names the function and the rule.
    """
    logits_TE = torch.linspace(-8, 8, 12, requires_grad=True).view(3, 4).float()
    allowed_TE = torch.tensor([[True, True, False, False], [False, False, True, True], [True] * 4])
    result = ROUTER_SCORES[name](logits_TE, allowed_TE)
    problem = _broken_rule(result, logits_TE, allowed_TE)
    if problem is not None:
        raise ValueError(
            f"experts.score_function = {name!r}: {problem}; see RouterScore in symbiotic_titan/moe/router.py"
        )


def _broken_rule(result: object, logits_TE: Tensor, allowed_TE: Tensor) -> str | None:
    """What is wrong with what a score function returned, or None."""
    if not isinstance(result, tuple) or [type(part) for part in result] != [Tensor, Tensor]:
        return f"must return two tensors, scores and probabilities, got {type(result).__name__}"
    scores_TE, probabilities_TE = result
    for what, value in (("scores", scores_TE), ("probabilities", probabilities_TE)):
        if value.shape != logits_TE.shape or value.dtype != torch.float32:
            return (
                f"{what} must be float32 of the logits' shape, got {value.dtype} of shape {tuple(value.shape)} for "
                f"{tuple(logits_TE.shape)}"
            )
        if not bool(value.isfinite().all()):
            return f"{what} must be finite, also those of experts outside the token's group"
    rules = (
        ("scores must be positive inside the token's group", scores_TE[allowed_TE] > 0),
        ("scores must be 0 outside the token's group", scores_TE[~allowed_TE] == 0),
        ("probabilities must lie in [0, 1]", (probabilities_TE >= 0) & (probabilities_TE <= 1)),
        (
            "probabilities must sum to 1 over the token's group",
            (probabilities_TE.sum(-1) - 1).abs() < 1e-4,
        ),
    )
    broken = [rule for rule, holds in rules if not bool(holds.all())]
    if not broken and not scores_TE.requires_grad:
        broken = ["scores must be differentiable by the logits, or the router never learns"]
    return broken[0] if broken else None


@dataclass(frozen=True)
class Routing:
    """The router's choice for every token.

    experts_TK (T, K) int64    expert of each copy, group-major numbering; meaningless for padding. K is the largest top_k of the
                               groups: the last places of a token whose group chooses fewer hold E, which is no expert.
    weights_TK (T, K) float32  weight of each copy; 0 in those places.
    group_T    (T,) int64      the token's group; G for padding.
    record                     counts and probabilities for losses and metrics.
    """

    experts_TK: Tensor
    weights_TK: Tensor
    group_T: Tensor
    record: RoutingRecord


def is_any_modality(modality_T: Tensor, modalities: tuple[int, ...]) -> Tensor:
    """(T,) bool: the token's modality is one of ``modalities``."""
    # Comparisons, because a lookup table could be on the wrong device or be lost when a model is built on ``meta``.
    hit_T = torch.zeros_like(modality_T, dtype=torch.bool)
    for modality in modalities:
        hit_T = hit_T | (modality_T == modality)
    return hit_T


def group_of_token(modality_T: Tensor, groups: tuple[ExpertGroup, ...]) -> Tensor:
    """(T,) int64: index of the token's group; ``len(groups)`` for padding."""
    group_T = torch.full_like(modality_T, len(groups))
    for index, group in enumerate(groups):
        group_T = group_T.masked_fill(is_any_modality(modality_T, group.modalities), index)
    return group_T


def allowed_experts(group_T: Tensor, group_sizes: tuple[int, ...]) -> Tensor:
    """(T, E) bool: experts inside the token's group. Padding is allowed all, so that its unused scores stay finite."""
    padding_T1 = (group_T == len(group_sizes)).unsqueeze(-1)
    return torch.cat(
        [
            ((group_T == index).unsqueeze(-1) | padding_T1).expand(-1, size)
            for index, size in enumerate(group_sizes)
        ],
        dim=-1,
    )


def count_assignments(experts_TK: Tensor, modality_T: Tensor, num_experts: int) -> Tensor:
    """(M, E) int64: copies per modality and expert."""
    # scatter_add of integers is deterministic on any device, because integer sums do not depend on order. Unlike bincount it has a
    # static output shape, so it does not break a compiled graph. Padding is counted in an extra row and unused places in an extra
    # column, which are cut off.
    columns = num_experts + 1
    index_N = (modality_T.unsqueeze(-1) * columns + experts_TK).flatten()
    counts = torch.zeros((NUM_MODALITIES + 1) * columns, dtype=torch.int64, device=index_N.device)
    counts = counts.scatter_add(0, index_N, torch.ones_like(index_N))
    return counts.view(NUM_MODALITIES + 1, columns)[:NUM_MODALITIES, :num_experts].contiguous()


def unused_places(group_T: Tensor, top_ks: tuple[int, ...]) -> Tensor | None:
    """(T, K) bool: places beyond the top_k of the token's group, K being the largest; None if there are none."""
    most = max(top_ks)
    if min(top_ks) == most:
        return None
    place_K = torch.arange(most, device=group_T.device)
    unused_TK = torch.zeros(len(group_T), most, dtype=torch.bool, device=group_T.device)
    for index, top_k in enumerate(top_ks):
        unused_TK = unused_TK | ((group_T == index).unsqueeze(-1) & (place_K >= top_k))
    return unused_TK


# FSDP finds the tensors of a unit's output through pytree.
pytree.register_dataclass(Routing)


def uniform_by_fan_in(weight: Tensor) -> None:
    """Fill with the values that ``nn.Linear`` gives its matrix, for matrices stacked on the first dim too. Nothing on ``meta``."""
    bound = weight.shape[-1] ** -0.5
    nn.init.uniform_(weight, -bound, bound)


class GroupRouter(nn.Module):
    """One group's part of the router: ``weight (E, D)`` and, for choosing only, a float32 buffer ``bias (E,)``."""

    bias: Tensor | None

    def __init__(self, num_experts: int, dim: int, selection_bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        bias = torch.empty(num_experts, dtype=torch.float32) if selection_bias else None
        self.register_buffer("bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        uniform_by_fan_in(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Router(nn.ModuleDict):
    """One ``GroupRouter`` per group. Scores are computed in float32, also under autocast.

    All groups are scored in one matmul and masked: this is cheaper than gathering each group's tokens, and makes a token's logits
    independent of the partition.

    measures_z: the record has what the z-loss needs, and the logits are kept for the backward.
    """

    measures_z = False  # ``parallelize`` sets it where losses.z_loss has a weight

    def __init__(self, args: MoEArgs) -> None:
        super().__init__(
            {
                group.name: GroupRouter(group.num_experts, args.dim, args.selection_bias)
                for group in args.groups
            }
        )
        self._args = args
        self._scores = ROUTER_SCORES[args.score_function]

    def _groups(self) -> list[GroupRouter]:
        return [router for router in self.values() if isinstance(router, GroupRouter)]

    def forward(self, x_TD: Tensor, modality_T: Tensor) -> Routing:
        args = self._args
        group_T = group_of_token(modality_T, args.groups)
        # float32, because in bfloat16 nearly equal scores would tie, and rounding would decide the top-k. FSDP's mixed precision leaves
        # the weights in float32 too, see ``parallel.fsdp``.
        with torch.autocast(x_TD.device.type, enabled=False):
            weight_ED = torch.cat([router.weight for router in self._groups()]).float()
            logits_TE = x_TD.float() @ weight_ED.t()
            allowed_TE = allowed_experts(group_T, args.group_sizes)
            scores_TE, probabilities_TE = self._scores(logits_TE, allowed_TE)
            experts_TK = self._choose(scores_TE, allowed_TE)
            unused_TK = unused_places(group_T, args.top_ks)
            weights_TK = self._weights(logits_TE, scores_TE, experts_TK, unused_TK)
            if unused_TK is not None:
                experts_TK = experts_TK.masked_fill(unused_TK, args.num_experts)
            # One vector-matrix product for all groups: a token's probability is 0 outside its group, and padding has weight 0.
            routed_T = (group_T < len(args.groups)).float()
            prob_sum_E = routed_T @ probabilities_TE
            z_sum_G = self._z_sum(logits_TE, allowed_TE, group_T) if self.measures_z else None
        counts = count_assignments(experts_TK, modality_T, args.num_experts)
        group_counts = counts.sum(0).split(args.group_sizes)
        record = RoutingRecord(
            counts=counts,
            prob_sum=prob_sum_E.split(args.group_sizes),
            num_tokens=torch.stack(
                [c.sum() // k for c, k in zip(group_counts, args.top_ks, strict=True)]
            ),
            z_sum=z_sum_G,
        )
        return Routing(experts_TK, weights_TK, group_T, record)

    def _z_sum(self, logits_TE: Tensor, allowed_TE: Tensor, group_T: Tensor) -> Tensor:
        """(G,) see ``RoutingRecord``. Of a token's own group: the logits of others are noise to it."""
        z_T = logits_TE.masked_fill(~allowed_TE, float("-inf")).logsumexp(-1).square()
        groups_G = torch.arange(len(self._args.groups), device=group_T.device)
        return z_T @ (group_T.unsqueeze(-1) == groups_G).float()

    def _choose(self, scores_TE: Tensor, allowed_TE: Tensor) -> Tensor:
        choice_TE = scores_TE.detach()  # top-k has no gradient; weights get theirs in ``_weights``
        if self._args.selection_bias:
            biases = [router.bias for router in self._groups() if router.bias is not None]
            choice_TE = choice_TE + torch.cat(biases).float()
        most = max(self._args.top_ks)
        return choice_TE.masked_fill(~allowed_TE, float("-inf")).topk(most, dim=-1).indices

    def _weights(
        self, logits_TE: Tensor, scores_TE: Tensor, experts_TK: Tensor, unused_TK: Tensor | None
    ) -> Tensor:
        if self._args.score_function == "softmax" and self._args.normalize_weights:
            # The softmax over the chosen logits equals the renormalised softmax, but does not read the other experts: the weights are
            # bitwise equal in a partition and in a single pool of experts.
            weights_TK = logits_TE.gather(-1, experts_TK)
            if unused_TK is not None:
                weights_TK = weights_TK.masked_fill(unused_TK, float("-inf"))
            weights_TK = weights_TK.softmax(-1)
        else:
            weights_TK = scores_TE.gather(-1, experts_TK)
            if unused_TK is not None:
                weights_TK = weights_TK.masked_fill(unused_TK, 0.0)
            if self._args.normalize_weights:
                weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return weights_TK * self._args.route_scale


def softmax(logits_TE: Tensor, allowed_TE: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax over the group's experts."""
    # Masked before the softmax, so that experts of other groups are not in its denominator.
    scores_TE = logits_TE.masked_fill(~allowed_TE, float("-inf")).softmax(-1)
    return scores_TE, scores_TE


def sigmoid(logits_TE: Tensor, allowed_TE: Tensor) -> tuple[Tensor, Tensor]:
    """The sigmoid of each logit (arXiv 2412.19437, eq. 15)."""
    # All scores of a token may underflow at once: the clamp keeps their sum, a divisor, above 0.
    scores_TE = logits_TE.sigmoid().clamp(min=torch.finfo(torch.float32).tiny)
    scores_TE = scores_TE.masked_fill(~allowed_TE, 0.0)
    return scores_TE, scores_TE / scores_TE.sum(-1, keepdim=True)
