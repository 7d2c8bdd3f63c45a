"""Folds the shared expert into the routed experts, for released architectures that have no shared expert.

A routed expert k computes ``w2_k (silu(w1_k x) * w3_k x)``. With the hidden units of the shared expert S appended to its own, and S's
w2 divided by s, it computes ``E_k(x) + S(x) / s``. A token's routing weights are normalised and sum to s = ``route_scale``, so the
weighted sum over its experts is the routed output plus S(x). This is exact in real arithmetic; in floating point the sums have another
order, and where an engine rounds the routing weights to bfloat16, their sum differs from s by that rounding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.weights.compatibility import SHARED
from symbiotic_titan.weights.reader import TensorReader, TensorSpec


@dataclass(frozen=True)
class Folding:
    """What a fold does: routed experts get ``shared_dim`` hidden units more. ``added``: parameters that this adds to the model, those of
    the shared experts subtracted."""

    shared_dim: int
    added: int


def folding_text(folding: Folding) -> str:
    """What the fold did, and what it costs."""
    return (
        f"the shared expert, which the release does not have, is folded into the routed experts: each is {folding.shared_dim} wider, "
        f"{folding.added:,} parameters in all; the model computes the same"
    )


def check_foldable(args: ModelArgs) -> None:
    """Pass if the shared expert of ``args`` can be folded.

    Raises:
        ValueError: names the setting that makes the routing weights, or the factor of the shared expert, depend on the token.
    """
    if not args.normalize_weights:
        raise ValueError(
            "normalize_weights = false: a token's routing weights have no constant sum, so its shared expert cannot be folded into the "
            "routed experts"
        )
    if args.shared_gate:
        raise ValueError(
            "shared_gate = true: the shared expert has a factor for every token, so it cannot be folded into the routed experts"
        )


def folded(args: ModelArgs) -> ModelArgs:
    """The ModelArgs of the model that a fold makes."""
    more = args.shared_hidden_dim
    groups = tuple(
        replace(group, hidden_dim=group.hidden_dim and group.hidden_dim + more)
        for group in args.groups
    )
    width = args.expert_hidden_dim + more
    return replace(args, expert_hidden_dim=width, groups=groups, shared_hidden_dim=0)


class FoldingReader:
    """The tensors of ``reader`` with the shared experts folded into the routed experts of ``groups``: a ``TensorReader``. The shared
    experts themselves are left out.

    route_scale  sum of a token's routing weights.
    """

    def __init__(self, reader: TensorReader, groups: Sequence[str], route_scale: float) -> None:
        self._reader = reader
        self._route_scale = route_scale
        shared = [name for name in reader.tensors if SHARED in name]
        self._shared_of = {_routed_name(name, group): name for name in shared for group in groups}
        self.tensors: Mapping[str, TensorSpec] = {
            name: self._spec(name) for name in reader.tensors if SHARED not in name
        }

    def _spec(self, name: str) -> TensorSpec:
        routed = self._reader.tensors[name]
        if name not in self._shared_of:
            return routed
        shared = self._reader.tensors[self._shared_of[name]]
        dim = _hidden_dim(name)
        shape = list(routed.shape)
        shape[dim] += shared.shape[dim - 1]  # without the dimension of the experts
        return TensorSpec(tuple(shape), torch.promote_types(routed.dtype, shared.dtype))

    def read(self, name: str) -> Tensor:
        routed = self._reader.read(name)
        if name not in self._shared_of:
            return routed
        shared = self._reader.read(self._shared_of[name])
        if name.endswith(".w2") and self._route_scale != 1.0:
            shared = (shared.float() / self._route_scale).to(shared.dtype)
        both = [routed, shared.expand(len(routed), -1, -1)]
        return torch.cat([part.to(self.tensors[name].dtype) for part in both], _hidden_dim(name))

    @property
    def folding(self) -> Folding:
        w1 = next(name for name in self._shared_of.values() if name.endswith(".w1.weight"))
        before, after = (
            sum(spec.num_values for spec in tensors.values())
            for tensors in (self._reader.tensors, self.tensors)
        )
        return Folding(self._reader.tensors[w1].shape[0], after - before)


def _routed_name(name: str, group: str) -> str:
    """The routed experts' tensor that a tensor of the shared expert is appended to."""
    return name.replace(SHARED, f".moe.experts.{group}.").removesuffix(".weight")


def _hidden_dim(name: str) -> int:
    """The dimension of the hidden units in stacked weights: w1 and w3 are (E, F, D), w2 is (E, D, F)."""
    return 2 if name.endswith(".w2") else 1
