"""Projectors from the image encoder's output to tokens of the decoder's width.

Shape letters: sequence/shapes.py. N is the joined width of the patches of one token.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from symbiotic_titan.model.layers import FeedForward, attend
from symbiotic_titan.model.masks import AttentionMask
from symbiotic_titan.model.vit_args import VitArgs


class PatchMerger(nn.Module):
    """A window of merge x merge adjacent patches -> one token. The norm is taken per patch or, with ``norm_joined``, over the whole
    window."""

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
    """A window of merge x merge adjacent patches -> one token, through a linear layer with norm and GELU and a gated feed-forward of
    width ``projector_hidden_dim``."""

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
    """Which learned query each ViT token uses, and which patches it attends to.

    query: (B, I) int64, the token's index within its image, from 0; any valid index for an unused token.
    mask:  (B, 1, I, P) the patches that a token attends to.
    """

    query: torch.Tensor
    mask: AttentionMask


class QueryProjector(nn.Module):
    """Learned queries attend to all patches of an image and become its tokens, whatever its size; then a feed-forward
    (arXiv 2410.05993, section 2.2)."""

    def __init__(self, vit: VitArgs, dim: int) -> None:
        super().__init__()
        width, self.head_dim = vit.dim, vit.head_dim
        self.queries = nn.Embedding(vit.queries[-1], width)
        # eps 1e-5 whatever vit.norm_eps is, as in the released model.
        self.query_norm, self.patch_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        # Two linear layers in a row, mathematically one, because the released weights store both.
        self.wq, self.wk, self.wv = (
            nn.Sequential(nn.Linear(width, width, bias=False), nn.Linear(width, width))
            for _ in range(3)
        )
        self.wo = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
        self.last_norm = nn.LayerNorm(width)
        self.w1 = nn.Linear(width, dim, bias=False)
        self.w2 = nn.Linear(dim, dim, bias=False)

    def forward(self, x_BPS: torch.Tensor, indices: QueryIndices) -> torch.Tensor:
        x_BPS = self.patch_norm(x_BPS)
        q_BIS = self.wq(self.query_norm(self.queries(indices.query)))
        q_BUIC, k_BUPC, v_BUPC = (
            projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projected in (q_BIS, self.wk(x_BPS), self.wv(x_BPS))
        )
        read_BIS = self.wo(attend(q_BUIC, k_BUPC, v_BUPC, indices.mask))
        hidden_BID = F.gelu(self.w1(self.last_norm(read_BIS)), approximate="tanh")
        return self.w2(hidden_BID)


def projector(vit: VitArgs, dim: int) -> nn.Module:
    """The projector that ``vit`` configures."""
    if vit.queries:
        return QueryProjector(vit, dim)
    return GatedMerger(vit, dim) if vit.projector_hidden_dim else PatchMerger(vit, dim)
