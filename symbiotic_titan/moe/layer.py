"""PartitionedMoE: router -> dispatch -> experts -> combine, plus the shared expert.

Letters: T tokens, D width, K experts per token.
"""

from torch import Tensor, nn

from symbiotic_titan.moe.dispatch import Dispatcher, LocalDispatcher
from symbiotic_titan.moe.experts import ExpertBank
from symbiotic_titan.moe.partition import MoEArgs
from symbiotic_titan.moe.precision import compute_dtype
from symbiotic_titan.moe.record import RoutingRecord
from symbiotic_titan.moe.router import Router
from symbiotic_titan.moe.shared_expert import SharedExpert


class PartitionedMoE(nn.Module):
    """A mixture of experts whose tokens route inside the group of their modality (arXiv 2604.07753).

    Parameters: ``router.<g>.weight``, ``experts.<g>.{w1,w2,w3}``, ``shared_experts.{w1,w2,w3}.weight`` and, with a gate,
    ``shared_experts.gate.weight``. Their values are uninitialised: they are set when the whole model is.
    """

    dispatcher: Dispatcher  # replaced as a whole by expert parallelism
    block_rows: int  # not 0 where the banks' kernel wants rows in blocks: see ``padded_counts``

    def __init__(self, args: MoEArgs) -> None:
        super().__init__()
        self.args = args
        self.router = Router(args)
        self.experts = nn.ModuleDict(
            {
                group.name: ExpertBank(group.num_experts, args.dim, args.hidden_dim)
                for group in args.groups
            }
        )
        self.shared_experts = SharedExpert(args) if args.shared_hidden_dim else None
        self.dispatcher = LocalDispatcher()
        self.block_rows = 0

    def forward(
        self, x_TD: Tensor, modality_T: Tensor, shield_scale: Tensor
    ) -> tuple[Tensor, RoutingRecord]:
        """((T, D) in the dtype of ``x_TD``, record).

        modality_T: integers of ``sequence.modality``. Padding is routed nowhere and counted nowhere; its routed output is 0.
        shield_scale: 0-dim float tensor, factor on the gradient of shielded tokens in the shared expert; 1 is no shield.
        """
        routing = self.router(x_TD, modality_T)
        dispatched, plan = self.dispatcher.dispatch(
            x_TD.to(compute_dtype(x_TD)),
            routing.experts_TK,
            routing.group_T,
            routing.record.counts.sum(0),
            self.args.group_sizes,
            self.block_rows,
        )
        rows = tuple(
            bank(rows_ND, counts_e)
            for bank, rows_ND, counts_e in zip(
                self.experts.values(), dispatched.rows, dispatched.counts, strict=True
            )
        )
        sent = self.dispatcher.send_back(rows, plan)
        # Between: under expert parallelism the shared expert computes while the rows travel.
        shared_TD = None
        if self.shared_experts is not None:
            shared_TD = self.shared_experts(x_TD, modality_T, shield_scale).to(x_TD.dtype)
        out_TD = self.dispatcher.combine(sent, routing.weights_TK, plan).to(x_TD.dtype)
        return out_TD if shared_TD is None else out_TD + shared_TD, routing.record
