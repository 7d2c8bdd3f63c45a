"""The image encoder: patches of images to be understood -> tokens of the decoder.

Numbered steps with their shapes: (1) patches (B, P, Q) -> (B, P, W); (2) pre-norm blocks, full attention inside each image,
two-dimensional rotary; (3) the M adjacent patches of a token are joined and projected, (B, V, D).

Letters: B rows, P patches of a row, Q numbers in a patch, W width of the encoder, H heads, C head width, R frequencies,
M patches of one token, V tokens of a row, D width of the decoder.
"""

import torch
import torch.nn.functional as F
from torch import nn

from symbiotic_titan.model.args import ModelArgs, VitArgs
from symbiotic_titan.model.attention import attend
from symbiotic_titan.model.masks import AttentionMask
from symbiotic_titan.model.rope import RotaryTables, frequencies, rotary_tables, rotate


def patch_rotary(coords_BPA: torch.Tensor, head_dim: int, theta: float) -> RotaryTables:
    """Tables whose first half of frequencies turns with the patch's row and the second half with its column."""
    num = head_dim // 4
    frequencies_R = frequencies(num, theta, coords_BPA.device).repeat(2)
    axes_R = torch.arange(2 * num, device=coords_BPA.device) // num
    return rotary_tables(coords_BPA, axes_R, frequencies_R)


class VitBlock(nn.Module):
    def __init__(self, args: VitArgs) -> None:
        super().__init__()
        self.head_dim = args.head_dim
        self.attention_norm = nn.LayerNorm(args.dim, eps=args.norm_eps)
        self.wqkv = nn.Linear(args.dim, 3 * args.dim)
        self.wo = nn.Linear(args.dim, args.dim)
        self.ffn_norm = nn.LayerNorm(args.dim, eps=args.norm_eps)
        self.w1 = nn.Linear(args.dim, args.hidden_dim)
        self.w2 = nn.Linear(args.hidden_dim, args.dim)

    def forward(
        self, x_BPW: torch.Tensor, rotary: RotaryTables, mask: AttentionMask
    ) -> torch.Tensor:
        qkv_BPHC = self.wqkv(self.attention_norm(x_BPW)).unflatten(-1, (-1, self.head_dim))
        q_BHPC, k_BHPC, v_BHPC = qkv_BPHC.transpose(1, 2).chunk(3, dim=1)
        q_BHPC, k_BHPC = rotate(q_BHPC, rotary, False), rotate(k_BHPC, rotary, False)
        x_BPW = x_BPW + self.wo(attend(q_BHPC, k_BHPC, v_BHPC, mask))
        hidden_BPF = F.gelu(self.w1(self.ffn_norm(x_BPW)), approximate="tanh")
        return x_BPW + self.w2(hidden_BPF)


class PatchMerger(nn.Module):
    """The projector: M adjacent patches, each normed -> one vector of the decoder's width."""

    def __init__(self, vit: VitArgs, dim: int) -> None:
        super().__init__()
        self.num_patches = vit.merge**2
        joined = vit.dim * self.num_patches
        self.norm = nn.LayerNorm(vit.dim, eps=vit.norm_eps)
        self.w1 = nn.Linear(joined, joined)
        self.w2 = nn.Linear(joined, dim)

    def forward(self, x_BPW: torch.Tensor) -> torch.Tensor:
        joined_BVX = self.norm(x_BPW).unflatten(1, (-1, self.num_patches)).flatten(2)
        return self.w2(F.gelu(self.w1(joined_BVX)))


class VisionTransformer(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        vit = args.vit
        self.head_dim, self.rope_theta = vit.head_dim, vit.rope_theta
        self.patch_embedding = nn.Linear(args.geometry.vit_patch_values, vit.dim)
        self.layers = nn.ModuleDict({str(i): VitBlock(vit) for i in range(vit.num_layers)})
        self.merger = PatchMerger(vit, args.dim)

    def forward(
        self, patches_BPQ: torch.Tensor, coords_BPA: torch.Tensor, mask: AttentionMask
    ) -> torch.Tensor:
        """(B, V, D) in the dtype of the computation. Unused patches come out finite and mean nothing."""
        x_BPW = self.patch_embedding(patches_BPQ.to(self.patch_embedding.weight.dtype))
        rotary = patch_rotary(coords_BPA, self.head_dim, self.rope_theta)
        for block in self.layers.values():
            x_BPW = block(x_BPW, rotary, mask)
        return self.merger(x_BPW)
