"""Expert groups: which experts belong to which group, and which modalities route there.

Experts are numbered in group-major order: all of group 0, then all of group 1. Under expert parallelism a *slot* is an
expert's index in rank-major order: rank r holds the r-th 1/ep of every group, so its experts are one contiguous range of slots and
one all-to-all serves all groups.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from symbiotic_titan.config.experts import ROUTER_SCORES
from symbiotic_titan.sequence.modality import MODALITY_NAMES, NUM_MODALITIES

SHIELD_MODES = ("output", "weights")


@dataclass(frozen=True)
class ExpertGroup:
    """Experts reserved for the tokens of some modalities.

    name:        part of parameter names (``router.<name>.weight``, ``experts.<name>.w1``).
    modalities:  integers of ``sequence.modality`` whose tokens are routed within this group.
    num_experts: size of the group.
    hidden_dim:  width of its experts; None: the model's.
    top_k:       experts per token of the group; None: the model's.
    """

    name: str
    modalities: tuple[int, ...]
    num_experts: int
    hidden_dim: int | None = None
    top_k: int | None = None


@dataclass(frozen=True)
class MoEArgs:
    """Hyperparameters of one partitioned MoE layer. One group with all modalities is the standard MoE.

    dim, hidden_dim:   width of a token and of a routed expert, in groups that have no width of their own.
    top_k:             experts per token inside its group, in groups that have no top_k of their own.
    score_function:    a name registered in ``config.experts.ROUTER_SCORES``, such as ``softmax`` over the group's experts.
    selection_bias:    add a bias per expert to choose the top-k, but not to the weights (arXiv 2408.15664).
    normalize_weights: divide the top-k weights by their sum.
    route_scale:       factor on the weights, after normalization.
    shared_hidden_dim: width of the shared expert; 0 means no shared expert.
    shared_gate:       a sigmoid gate per token on the shared expert's output.
    shield_modalities: tokens whose gradient in the shared expert is scaled, see ``moe.gradient_shield``.
    shield_mode:       ``output`` or ``weights``.

    Raises:
        ValueError: groups that overlap, miss a modality or are smaller than top_k, unusable names, unknown choices, sizes
            below one.
    """

    dim: int
    hidden_dim: int
    groups: tuple[ExpertGroup, ...]
    top_k: int
    score_function: str = "softmax"
    selection_bias: bool = False
    normalize_weights: bool = True
    route_scale: float = 1.0
    shared_hidden_dim: int = 0
    shared_gate: bool = False
    shield_modalities: tuple[int, ...] = ()
    shield_mode: Literal["output", "weights"] = "output"

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check_names([group.name for group in self.groups])
        _check_modalities(self.groups)
        _check_choices(self)

    @property
    def num_experts(self) -> int:
        return sum(group.num_experts for group in self.groups)

    @property
    def group_sizes(self) -> tuple[int, ...]:
        return tuple(group.num_experts for group in self.groups)

    @property
    def top_ks(self) -> tuple[int, ...]:
        """Experts per token, by group."""
        return tuple(self.top_k if g.top_k is None else g.top_k for g in self.groups)

    @property
    def hidden_dims(self) -> tuple[int, ...]:
        """Width of an expert, by group."""
        return tuple(self.hidden_dim if g.hidden_dim is None else g.hidden_dim for g in self.groups)


def tokens_of_groups(tokens_M: Tensor, groups: Sequence[ExpertGroup]) -> Tensor:
    """(G,) float32 tokens of each group, from those of each modality."""
    counts = [torch.stack([tokens_M[m] for m in group.modalities]).sum() for group in groups]
    return torch.stack(counts).float()


def batches_of_groups(sets_S: Tensor, groups: Sequence[ExpertGroup]) -> Tensor:
    """(G,) float32 batches in which each group has tokens, from the number of batches with each set of modalities (``modality_set``)."""
    counts = [
        [n for s, n in enumerate(sets_S.unbind()) if any(s >> m & 1 for m in group.modalities)]
        for group in groups
    ]
    return torch.stack([torch.stack(found).sum() for found in counts]).float()


def _check_sizes(args: MoEArgs) -> None:
    for key in ("dim", "hidden_dim", "top_k"):
        if getattr(args, key) < 1:
            raise ValueError(f"{key} must be at least 1, got {getattr(args, key)}")
    if args.shared_hidden_dim < 0:
        raise ValueError(
            f"shared_hidden_dim must be 0 (no shared expert) or more, got {args.shared_hidden_dim}"
        )
    for group, hidden_dim, top_k in zip(args.groups, args.hidden_dims, args.top_ks, strict=True):
        for key, value in (("hidden_dim", hidden_dim), ("top_k", top_k)):
            if value < 1:
                raise ValueError(
                    f"expert group {group.name!r}: {key} must be at least 1, got {value}"
                )
        if group.num_experts < top_k:
            raise ValueError(
                f"expert group {group.name!r}: top_k = {top_k} does not fit into num_experts = "
                f"{group.num_experts}; every group needs at least top_k experts"
            )


def _check_names(names: list[str]) -> None:
    for name in names:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(
                f"expert group {name!r}: a name is lower-case letters, digits and underscores and starts with a letter, "
                f"because it becomes part of parameter names"
            )
        # ``Router`` is a ModuleDict with the groups as attributes: a group "keys" or "forward" would hide the method.
        if hasattr(nn.ModuleDict, name) or name == "training":
            raise ValueError(
                f"expert group {name!r}: torch modules have an attribute of this name; choose another"
            )
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"expert group {name!r} is given {names.count(name)} times; names are unique"
            )


def _check_modalities(groups: Sequence[ExpertGroup]) -> None:
    if not groups:
        raise ValueError("an expert partition needs at least one group, got none")
    owner: dict[int, str] = {}
    for group in groups:
        for modality in group.modalities:
            if not 0 <= modality < NUM_MODALITIES:
                raise ValueError(
                    f"expert group {group.name!r}: {modality} is no modality; choose from 0 to {NUM_MODALITIES - 1}"
                )
            if modality in owner:
                raise ValueError(
                    f"modality {MODALITY_NAMES[modality]!r} is in expert groups {owner[modality]!r} and "
                    f"{group.name!r}; it must be in exactly one"
                )
            owner[modality] = group.name
    missing = [MODALITY_NAMES[m] for m in range(NUM_MODALITIES) if m not in owner]
    if missing:
        raise ValueError(
            f"no expert group for {', '.join(missing)}; every modality must be in exactly one group"
        )


def _check_choices(args: MoEArgs) -> None:
    _ = ROUTER_SCORES[args.score_function]  # raises if the name is not registered
    if args.shield_mode not in SHIELD_MODES:
        raise ValueError(
            f"shield_mode must be one of {', '.join(SHIELD_MODES)}, got {args.shield_mode!r}"
        )
    for modality in args.shield_modalities:
        if not 0 <= modality < NUM_MODALITIES:
            raise ValueError(
                f"shield_modalities: {modality} is no modality; choose from 0 to {NUM_MODALITIES - 1}"
            )
    if args.shared_gate and not args.shared_hidden_dim:
        raise ValueError("shared_gate has no effect without a shared expert; set shared_hidden_dim")


def check_expert_parallel_degree(groups: Sequence[ExpertGroup], degree: int) -> None:
    """Check that every group can be cut into ``degree`` equal shares.

    Raises:
        ValueError: names the group, its size, the degree, and the nearest degrees that divide every group.
    """
    if degree < 1:
        raise ValueError(f"expert_parallel_degree must be at least 1, got {degree}")
    # Equal shares only: slots are then the same arithmetic on every rank, and DTensor shards need no padding.
    usable = [
        d
        for d in range(1, min(group.num_experts for group in groups) + 1)
        if all(group.num_experts % d == 0 for group in groups)
    ]
    for group in groups:
        if group.num_experts % degree:
            below = [d for d in usable if d < degree][-1:]
            above = [d for d in usable if d > degree][:1]
            nearest = " and ".join(str(d) for d in below + above)
            raise ValueError(
                f"expert_parallel_degree = {degree} does not divide expert group {group.name!r} "
                f"(num_experts = {group.num_experts}); nearest degrees that divide every group: {nearest}"
            )
