"""Projectors: what the image encoder puts out -> tokens of the decoder's width.

Letters: B rows, P patches of a row, W width of the encoder, H heads, C head width, M patches of one token, J = M * W, V tokens of a
row, D width of the decoder.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from symbiotic_titan.model.layers import FeedForward, attend
from symbiotic_titan.model.masks import AttentionMask
from symbiotic_titan.model.vit_args import VitArgs


class PatchMerger(nn.Module):
    """M adjacent patches -> one vector of the decoder's width. The norm is of each patch or, with ``norm_joined``, of all M as one
    vector."""

    def __init__(self, vit: VitArgs, dim: int, *, norm_joined: bool = False) -> None:
        super().__init__()
        self.num_patches = vit.merge**2
        self.norm_joined = norm_joined
        joined = vit.dim * self.num_patches
        self.norm = nn.LayerNorm(joined if norm_joined else vit.dim, eps=vit.norm_eps)
        self.w1 = nn.Linear(joined, joined)
        self.w2 = nn.Linear(joined, dim)

    def forward(self, x_BPS: torch.Tensor) -> torch.Tensor:
        if not self.norm_joined:
            x_BPS = self.norm(x_BPS)
        joined_BIN = x_BPS.unflatten(1, (-1, self.num_patches)).flatten(2)
        if self.norm_joined:
            joined_BIN = self.norm(joined_BIN)
        return self.w2(F.gelu(self.w1(joined_BIN)))


class GatedMerger(nn.Module):
    """M adjacent patches -> one vector of the decoder's width, then a layer with norm and GELU, then a
    gated feed-forward of width ``projector_hidden_dim``."""

    def __init__(self, vit: VitArgs, dim: int) -> None:
        super().__init__()
        self.num_patches = vit.merge**2
        self.join = nn.Linear(vit.dim * self.num_patches, dim)
        self.project = nn.Linear(dim, dim, bias=False)
        self.norm = nn.LayerNorm(dim, eps=vit.norm_eps)
        self.feed_forward = FeedForward(dim, vit.projector_hidden_dim)

    def forward(self, x_BPS: torch.Tensor) -> torch.Tensor:
        x_BID = self.join(x_BPS.unflatten(1, (-1, self.num_patches)).flatten(2))
        return self.feed_forward(F.gelu(self.norm(self.project(x_BID))))


class QueryIndices(NamedTuple):
    """Which query each ViT token is, and what it reads.

    number: (B, V) int64, the token's place within its image, from 0; any query's where a token is unused.
    mask:   (B, 1, V, P) which patches a token sees.
    """

    number: torch.Tensor
    mask: AttentionMask


class QueryProjector(nn.Module):
    """Learned queries read all patches of an image by cross-attention and become its tokens, whatever its size; then a feed-forward
    (arXiv 2410.05993, section 2.2). Queries, keys, values and output each pass through two linear layers without anything between,
    as the released weights have it."""

    def __init__(self, vit: VitArgs, dim: int) -> None:
        super().__init__()
        width, self.head_dim = vit.dim, vit.head_dim
        self.queries = nn.Embedding(vit.queries[-1], width)
        # Norms with 1e-5 whatever vit.norm_eps is, as the released weights have it.
        self.query_norm, self.patch_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.wq, self.wk, self.wv = (
            nn.Sequential(nn.Linear(width, width, bias=False), nn.Linear(width, width))
            for _ in range(3)
        )
        self.wo = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
        self.last_norm = nn.LayerNorm(width)
        self.w1 = nn.Linear(width, dim, bias=False)
        self.w2 = nn.Linear(dim, dim, bias=False)

    def forward(self, x_BPS: torch.Tensor, places: QueryIndices) -> torch.Tensor:
        x_BPS = self.patch_norm(x_BPS)
        q_BIS = self.wq(self.query_norm(self.queries(places.number)))
        q_BUIC, k_BUPC, v_BUPC = (
            projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projected in (q_BIS, self.wk(x_BPS), self.wv(x_BPS))
        )
        read_BIS = self.wo(attend(q_BUIC, k_BUPC, v_BUPC, places.mask))
        hidden_BID = F.gelu(self.w1(self.last_norm(read_BIS)), approximate="tanh")
        return self.w2(hidden_BID)


def projector(vit: VitArgs, dim: int) -> nn.Module:
    """The one that ``vit`` asks for."""
    if vit.queries:
        return QueryProjector(vit, dim)
    return GatedMerger(vit, dim) if vit.projector_hidden_dim else PatchMerger(vit, dim)
