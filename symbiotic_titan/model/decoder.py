"""One block of the decoder: attention, then a dense feed-forward or the partitioned MoE. Shape letters: sequence/shapes.py."""

import torch
from torch import nn

from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.kv_cache import KeyValueSource
from symbiotic_titan.model.layers import FeedForward, RMSNorm, attend
from symbiotic_titan.model.masks import AttentionMask
from symbiotic_titan.model.rope import RotaryTables, rotate
from symbiotic_titan.moe.experts import PartitionedMoE
from symbiotic_titan.moe.record import RoutingRecord


class Attention(nn.Module):
    """Grouped-query attention with optional biases and QK norm, see ``ModelArgs``."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.head_dim = args.head_dim
        self.interleaved = args.rotary_interleaved
        self.qk_norm = args.qk_norm
        heads, kv_heads = args.num_heads * args.head_dim, args.num_kv_heads * args.head_dim
        self.wq = nn.Linear(args.dim, heads, bias=args.qkv_bias)
        self.wk = nn.Linear(args.dim, kv_heads, bias=args.qkv_bias)
        self.wv = nn.Linear(args.dim, kv_heads, bias=args.qkv_bias)
        self.wo = nn.Linear(heads, args.dim, bias=args.o_bias)
        if args.qk_norm != "none":
            self.q_norm = RMSNorm(args.head_dim, eps=args.norm_eps)
            self.k_norm = RMSNorm(args.head_dim, eps=args.norm_eps)

    def forward(
        self,
        x_BTD: torch.Tensor,
        rotary: RotaryTables,
        mask: AttentionMask,
        others: KeyValueSource | None = None,
    ) -> torch.Tensor:
        """(B, T, D). The tokens attend to each other and to those of ``others``."""
        q_BUTC, k_BuTC, v_BuTC = (
            projection(x_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.wq, self.wk, self.wv)
        )
        # Released models disagree on the order: Qwen3 normalizes before rotary, Hunyuan after it.
        if self.qk_norm == "before":
            q_BUTC, k_BuTC = self.q_norm(q_BUTC), self.k_norm(k_BuTC)
        q_BUTC = rotate(q_BUTC, rotary, self.interleaved)
        k_BuTC = rotate(k_BuTC, rotary, self.interleaved)
        if self.qk_norm == "after":
            q_BUTC, k_BuTC = self.q_norm(q_BUTC), self.k_norm(k_BuTC)
        if others is not None:
            # Keys are cached, or sent, after norm and rotary, which need not be repeated because a token's position never changes.
            k_BuTC, v_BuTC = others.complete(k_BuTC, v_BuTC)
        return self.wo(attend(q_BUTC, k_BuTC, v_BuTC, mask))


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
        others: KeyValueSource | None = None,
        modality_counts: tuple[int, ...] | None = None,
    ) -> tuple[torch.Tensor, RoutingRecord | None]:
        """((B, T, D) output, routing record or None for a dense block). ``modality_counts``: see ``PackedBatch``."""
        h_BTD = self.attend(h_BTD, rotary, mask, others)
        if not self.moe_enabled:
            return self.feed(h_BTD), None
        # Routing is per token, so the batch is flattened to one list of tokens.
        x_TD = self.ffn_norm(h_BTD).flatten(0, 1)
        out_TD, record = self.moe(
            x_TD, modality_BT.flatten(), shield_scale, modality_counts=modality_counts
        )
        return h_BTD + out_TD.view_as(h_BTD), record

    # The dense halves are separate methods, so that each compiles to one graph: the MoE between them has collectives and sizes
    # that depend on the data. See ``parallel.compile``.

    def attend(
        self,
        h_BTD: torch.Tensor,
        rotary: RotaryTables,
        mask: AttentionMask,
        others: KeyValueSource | None = None,
    ) -> torch.Tensor:
        """``h + attention(norm(h))``."""
        return h_BTD + self.attention(self.attention_norm(h_BTD), rotary, mask, others)

    def feed(self, h_BTD: torch.Tensor) -> torch.Tensor:
        """``h + feed_forward(norm(h))`` of a dense block."""
        return h_BTD + self.feed_forward(self.ffn_norm(h_BTD))
