"""One block of the decoder: attention, then a dense feed-forward or the partitioned MoE. Shape letters: sequence/shapes.py."""

import torch
from torch import nn

from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.kv_cache import LayerCache
from symbiotic_titan.model.layers import Attention, FeedForward, RMSNorm
from symbiotic_titan.model.masks import AttentionMask
from symbiotic_titan.model.rope import RotaryTables
from symbiotic_titan.moe.experts import PartitionedMoE
from symbiotic_titan.moe.record import RoutingRecord


class TransformerBlock(nn.Module):
    """Pre-norm block number ``layer`` of the decoder; the first ``num_dense_layers`` blocks have no MoE."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.moe_enabled = layer >= args.num_dense_layers
        self.attention_norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.attention = Attention(args)
        self.ffn_norm = RMSNorm(args.dim, eps=args.norm_eps)
        if self.moe_enabled:
            self.moe = PartitionedMoE(args.moe_args)
        else:
            self.feed_forward = FeedForward(args.dim, args.dense_hidden_dim)

    def forward(
        self,
        h_BTD: torch.Tensor,
        rotary: RotaryTables,
        mask: AttentionMask,
        modality_BT: torch.Tensor,
        shield_scale: torch.Tensor,
        cache: LayerCache | None = None,
    ) -> tuple[torch.Tensor, RoutingRecord | None]:
        """((B, T, D) output, routing record or None for a dense block)."""
        h_BTD = self.attend(h_BTD, rotary, mask, cache)
        if not self.moe_enabled:
            return self.feed(h_BTD), None
        x_TD = self.ffn_norm(h_BTD).flatten(0, 1)
        out_TD, record = self.moe(x_TD, modality_BT.flatten(), shield_scale)
        return h_BTD + out_TD.view_as(h_BTD), record

    # The dense halves are methods of their own, so that each compiles to one graph: the MoE between them has collectives and sizes
    # that depend on the data. See ``parallel.compile``.

    def attend(
        self,
        h_BTD: torch.Tensor,
        rotary: RotaryTables,
        mask: AttentionMask,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        """``h`` plus the attention of its norm."""
        return h_BTD + self.attention(self.attention_norm(h_BTD), rotary, mask, cache)

    def feed(self, h_BTD: torch.Tensor) -> torch.Tensor:
        """``h`` plus the dense feed-forward of its norm."""
        return h_BTD + self.feed_forward(self.ffn_norm(h_BTD))
