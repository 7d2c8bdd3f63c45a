"""PartitionedMoE: router -> dispatch -> grouped experts -> combine, plus the shared expert that every token visits.

Shape letters: sequence/shapes.py. N are rows sorted by expert.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from symbiotic_titan.moe.dispatch import Dispatcher, LocalDispatcher
from symbiotic_titan.moe.gradient_shield import (
    scale_gradient,
    scaled_weight_linear,
    token_factors,
)
from symbiotic_titan.moe.kernels import (
    grouped_swiglu,
    local_tensor,
)
from symbiotic_titan.moe.partition import MoEArgs
from symbiotic_titan.moe.record import RoutingRecord
from symbiotic_titan.moe.router import Router, is_any_modality, uniform_by_fan_in

# (rows (N, D), w1, w2, w3, rows of each expert) -> (N, D), as ``grouped_swiglu``.
SwiGLUKernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class GroupedExperts(nn.Module):
    """One group's SwiGLU experts ``w2(silu(w1 x) * w3 x)`` with stacked weights: w1, w3 (E, F, D) and w2 (E, D, F).

    Created with the values that ``nn.Linear`` would give each expert; ``model.initialize`` sets those of a run.
    """

    swiglu: SwiGLUKernel  # the float8 converter and torch.compile replace it

    def __init__(self, num_experts: int, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.swiglu = grouped_swiglu
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.w3 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.w1, self.w2, self.w3):
            uniform_by_fan_in(weight)

    def forward(self, rows_ND: Tensor, counts_e: Tensor) -> Tensor:
        """(N, D). ``counts_e``: rows of each expert on this rank; they sum to N."""
        # Autocast applies neither to grouped matmuls nor inside an autograd function.
        w1, w2, w3 = (local_tensor(w).to(rows_ND.dtype) for w in (self.w1, self.w2, self.w3))
        return self.swiglu(rows_ND, w1, w2, w3, counts_e)


class SharedExpert(nn.Module):
    """SwiGLU ``w2(silu(w1 x) * w3 x)``, optionally times ``sigmoid(gate x)``, whose gradient can be shielded from some modalities.

    The shield's ``weights`` mode uses the weights directly, so converting these linear layers to float8 would have no effect.
    """

    def __init__(self, args: MoEArgs) -> None:
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.shared_hidden_dim, bias=False)
        self.w2 = nn.Linear(args.shared_hidden_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.shared_hidden_dim, bias=False)
        self.gate = nn.Linear(args.dim, 1, bias=False) if args.shared_gate else None
        self.shield_modalities = args.shield_modalities
        self.shield_mode = args.shield_mode

    def forward(
        self, x_TD: Tensor, modality_T: Tensor, shield_scale: Tensor | float | None
    ) -> Tensor:
        """(T, D). ``shield_scale``: see ``PartitionedMoE``."""
        if not self.shield_modalities:
            return self._swiglu(x_TD, lambda layer, y: layer(y))
        if shield_scale is None:
            raise ValueError(
                f"shield_modalities = {self.shield_modalities} needs a shield_scale in every call: 0 stops the gradient of these "
                "tokens in the shared expert, 1 lets all of it through; without a shield, leave shield_modalities empty"
            )
        shielded_T = is_any_modality(modality_T, self.shield_modalities)
        factors_T = token_factors(shielded_T, shield_scale)
        if self.shield_mode == "output":
            return scale_gradient(self._swiglu(x_TD, lambda layer, y: layer(y)), factors_T)

        def linear(layer: nn.Linear, y: Tensor) -> Tensor:
            # autocast does not apply inside an autograd function
            return scaled_weight_linear(y, layer.weight.to(y.dtype), factors_T)

        return self._swiglu(x_TD, linear)

    def _swiglu(self, x_TD: Tensor, linear: Callable[[nn.Linear, Tensor], Tensor]) -> Tensor:
        out_TD = linear(self.w2, F.silu(linear(self.w1, x_TD)) * linear(self.w3, x_TD))
        return out_TD if self.gate is None else out_TD * linear(self.gate, x_TD).sigmoid()


class PartitionedMoE(nn.Module):
    """A mixture of experts in which a token is routed inside the group of its modality (arXiv 2604.07753).

    Parameters: ``router.<g>.weight``, ``experts.<g>.{w1,w2,w3}``, ``shared_experts.{w1,w2,w3}.weight`` and, with a gate,
    ``shared_experts.gate.weight``. Each matrix begins as that of an ``nn.Linear``; built on ``meta``, every module that owns some has
    ``reset_parameters`` for after ``to_empty``.
    """

    dispatcher: Dispatcher  # expert parallelism replaces it
    block_rows: (
        int  # block size if the experts' kernel needs rows in blocks, else 0: see ``padded_counts``
    )

    def __init__(self, args: MoEArgs) -> None:
        super().__init__()
        self.args = args
        self.router = Router(args)
        self.experts = nn.ModuleDict(
            {
                group.name: GroupedExperts(group.num_experts, args.dim, hidden_dim)
                for group, hidden_dim in zip(args.groups, args.hidden_dims, strict=True)
            }
        )
        self.shared_experts = SharedExpert(args) if args.shared_hidden_dim else None
        self.dispatcher = LocalDispatcher()
        self.block_rows = 0

    def forward(
        self,
        x_TD: Tensor,
        modality_T: Tensor,
        shield_scale: Tensor | float | None = None,
        *,
        modality_counts: tuple[int, ...] | None = None,
    ) -> tuple[Tensor, RoutingRecord]:
        """((T, D) in the dtype of ``x_TD``, record).

        modality_T: integers of ``sequence.modality``. Padding is neither routed nor counted; its routed output is 0.
        shield_scale: factor on the gradient that tokens of ``shield_modalities`` send through the shared expert; 1 means no shield.
            Needed only where there are such modalities. As a 0-dim tensor, it can change without a recompilation.
        modality_counts: tokens of each modality in ``modality_T``; without it the host waits for the device to count them.

        Raises:
            ValueError: there are ``shield_modalities``, and no ``shield_scale``.
        """
        group_tokens = None
        if modality_counts is not None:
            group_tokens = tuple(
                sum(modality_counts[m] for m in group.modalities) for group in self.args.groups
            )
        routing = self.router(x_TD, modality_T)
        # The record's counts exclude padding, as ``dispatch`` expects.
        dispatched, layout = self.dispatcher.dispatch(
            x_TD,
            routing.experts_TK,
            routing.group_T,
            routing.record.counts.sum(0),
            self.args.group_sizes,
            self.args.top_ks,
            self.block_rows,
            group_tokens,
        )
        rows = tuple(
            experts(rows_ND, counts_e)
            for experts, rows_ND, counts_e in zip(
                self.experts.values(), dispatched.rows, dispatched.counts, strict=True
            )
        )
        sent = self.dispatcher.start_combine(rows, layout)
        # Under expert parallelism the shared expert computes here while the rows travel back.
        shared_TD = None
        if self.shared_experts is not None:
            shared_TD = self.shared_experts(x_TD, modality_T, shield_scale)
        out_TD = self.dispatcher.combine(sent, routing.weights_TK, layout)
        return out_TD if shared_TD is None else out_TD + shared_TD, routing.record
