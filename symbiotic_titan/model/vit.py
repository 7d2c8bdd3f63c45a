"""The image encoder: patches of images to be understood -> tokens of the decoder.

Numbered steps with their shapes: (1) patches (B, P, Q) -> (B, P, W), plus a learned position where there is a table of them;
(2) pre-norm blocks, full attention inside each image, two-dimensional rotary or none; (3) a projector makes tokens of it, (B, V, D),
and of what some of the blocks put out (``deepstack``), see ``model.projectors``.

Letters: B rows, P patches of a row, Q numbers in a patch, W width of the encoder, H heads, C head width, R frequencies,
V tokens of a row, D width of the decoder, A axes (row, column), X cells of a table.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.layers import RMSNorm, attend
from symbiotic_titan.model.masks import AttentionMask
from symbiotic_titan.model.projectors import PatchMerger, QueryIndices, projector
from symbiotic_titan.model.rope import RotaryTables, frequencies, rotary_tables, rotate
from symbiotic_titan.model.vit_args import PositionReading, VitArgs


def patch_rotary(coords_BPA: torch.Tensor, head_dim: int, theta: float) -> RotaryTables:
    """Tables whose first half of frequencies turns with the patch's row and the second half with its column."""
    num = head_dim // 4
    frequencies_R = frequencies(num, theta, coords_BPA.device).repeat(2)
    axes_R = torch.arange(2 * num, device=coords_BPA.device) // num
    return rotary_tables(coords_BPA, axes_R, frequencies_R)


def grid_sizes(coords_BPA: torch.Tensor, image_BP: torch.Tensor) -> torch.Tensor:
    """(B, P, A) int64: rows and columns of each patch's image, from the largest coordinates of its patches, which lie together.
    A maximum of integers: the same in any order, so deterministic on any device."""
    # Images are numbered from 0 or 1 anew: the numbers of their spans have no bound that is known here.
    number_BP = (image_BP != image_BP.roll(1, dims=1)).cumsum(1)
    number_BPA = number_BP.unsqueeze(-1).expand_as(coords_BPA)
    rows, num_patches, axes = coords_BPA.shape
    none = coords_BPA.new_zeros(rows, num_patches + 1, axes)
    return none.scatter_reduce(1, number_BPA, coords_BPA + 1, "amax").gather(1, number_BPA)


def cubic_weights(distance: torch.Tensor) -> torch.Tensor:
    """Cubic convolution with a = -0.75, which torch's bicubic resampling uses; 0 from a distance of 2 on."""
    d = distance
    inner, outer = (1.25 * d - 2.25) * d * d + 1, ((-0.75 * d + 3.75) * d - 6.0) * d + 3.0
    return torch.where(d <= 1, inner, outer).masked_fill(d >= 2, 0.0)


def table_entries(
    coords_BPA: torch.Tensor,
    sizes_BPA: torch.Tensor,
    side: int,
    reading: PositionReading = "bilinear",
) -> tuple[torch.Tensor, torch.Tensor]:
    """((B, P, X) int64 cells of a ``side`` x ``side`` table, row-major, their float32 weights): the table laid over each image's
    grid, corner on corner, and read bilinearly; or edge on edge, and read bicubically, its border repeated outside, or ``floor``: the
    one cell in which a patch begins. A weight of 0 may stand beside any cell of the table."""
    coords_BPA = coords_BPA.float()
    if reading == "floor":
        # In float32, step by step as the released models were trained: where a patch begins on the edge of a cell, rounding decides.
        edges = torch.arange(1 / side, 1.0, 1 / side, device=coords_BPA.device)
        starts_BPA = coords_BPA * (1.0 / sizes_BPA)
        row_BP, column_BP = torch.bucketize(starts_BPA, edges, right=True).unbind(-1)
        cells_BPN = (row_BP * side + column_BP).unsqueeze(-1)
        return cells_BPN, torch.ones_like(cells_BPN, dtype=torch.float32)
    if reading == "bilinear":
        at_BPA = coords_BPA * (side - 1) / (sizes_BPA - 1).clamp(min=1)
        near_BPAN = torch.stack([at_BPA.floor() + i for i in (0, 1)], dim=-1)
        weights_BPAN = 1 - (at_BPA.unsqueeze(-1) - near_BPAN).abs()
    else:
        at_BPA = (coords_BPA + 0.5) * side / sizes_BPA - 0.5
        near_BPAN = torch.stack([at_BPA.floor() + i for i in (-1, 0, 1, 2)], dim=-1)
        weights_BPAN = cubic_weights((at_BPA.unsqueeze(-1) - near_BPAN).abs())
    row_BPN, column_BPN = near_BPAN.long().clamp(0, side - 1).unbind(2)
    cells = row_BPN.unsqueeze(-1) * side + column_BPN.unsqueeze(-2)
    row_weights_BPN, column_weights_BPN = weights_BPAN.unbind(2)
    weights = row_weights_BPN.unsqueeze(-1) * column_weights_BPN.unsqueeze(-2)
    return cells.flatten(2), weights.flatten(2)


class VitBlock(nn.Module):
    def __init__(self, args: VitArgs) -> None:
        super().__init__()
        self.head_dim, self.activation = args.head_dim, args.activation
        norm = nn.LayerNorm if args.norm == "layer" else RMSNorm
        self.attention_norm = norm(args.dim, eps=args.norm_eps)
        self.wqkv = nn.Linear(args.dim, 3 * args.dim, bias=args.bias)
        self.wo = nn.Linear(args.dim, args.dim, bias=args.bias)
        self.ffn_norm = norm(args.dim, eps=args.norm_eps)
        self.w1 = nn.Linear(args.dim, args.hidden_dim, bias=args.bias)
        self.w2 = nn.Linear(args.hidden_dim, args.dim, bias=args.bias)
        if args.activation == "swiglu":
            self.w3 = nn.Linear(args.dim, args.hidden_dim, bias=args.bias)

    def forward(
        self, x_BPS: torch.Tensor, rotary: RotaryTables | None, mask: AttentionMask
    ) -> torch.Tensor:
        qkv_BPUC = self.wqkv(self.attention_norm(x_BPS)).unflatten(-1, (-1, self.head_dim))
        q_BUPC, k_BUPC, v_BUPC = qkv_BPUC.transpose(1, 2).chunk(3, dim=1)
        if rotary is not None:
            q_BUPC, k_BUPC = rotate(q_BUPC, rotary, False), rotate(k_BUPC, rotary, False)
        x_BPS = x_BPS + self.wo(attend(q_BUPC, k_BUPC, v_BUPC, mask))
        return x_BPS + self.w2(self._hidden(self.ffn_norm(x_BPS)))

    def _hidden(self, x_BPS: torch.Tensor) -> torch.Tensor:
        if self.activation == "swiglu":
            return F.silu(self.w1(x_BPS)) * self.w3(x_BPS)
        approximate = "tanh" if self.activation == "gelu_tanh" else "none"
        return F.gelu(self.w1(x_BPS), approximate=approximate)


class VitOutput(NamedTuple):
    """Both in the dtype of the computation; unused tokens are finite and mean nothing.

    tokens:   (B, V, D) what the decoder reads.
    deepstack: (B, V, D) each, what is added behind its first layers.
    """

    tokens: torch.Tensor
    deepstack: tuple[torch.Tensor, ...]


class VisionTransformer(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        vit = args.vit
        self.args, self.channels = vit, args.geometry.vit_channels
        values = args.geometry.vit_patch_values * vit.temporal_patch
        self.patch_embedding = nn.Linear(values, vit.dim)
        if vit.position_grid:
            self.position_embedding = nn.Embedding(vit.position_grid**2, vit.dim)
        self.layers = nn.ModuleDict({str(i): VitBlock(vit) for i in range(vit.num_layers)})
        if vit.outer_norms:
            self.patch_norm = RMSNorm(vit.dim, eps=vit.norm_eps)
            self.last_norm = RMSNorm(vit.dim, eps=vit.norm_eps)
        self.merger = projector(vit, args.dim)
        self.deepstack_mergers = nn.ModuleDict(
            {str(i): PatchMerger(vit, args.dim, norm_joined=True) for i in vit.deepstack}
        )

    def forward(
        self,
        patches_BPQ: torch.Tensor,
        coords_BPA: torch.Tensor,
        sizes_BPA: torch.Tensor,
        mask: AttentionMask,
        places: QueryIndices | None = None,
    ) -> VitOutput:
        """``sizes``: rows and columns of the image that each patch is of. ``places``: where queries read it."""
        x_BPS = self._embed(patches_BPQ, coords_BPA, sizes_BPA)
        rotary = None
        if self.args.rope_theta:
            rotary = patch_rotary(coords_BPA, self.args.head_dim, self.args.rope_theta)
        deepstack = []
        for name, block in self.layers.items():
            x_BPS = block(x_BPS, rotary, mask)
            if name in self.deepstack_mergers:
                deepstack.append(self.deepstack_mergers[name](x_BPS))
        if self.args.outer_norms:
            x_BPS = self.last_norm(x_BPS)
        tokens_BID = self.merger(x_BPS) if places is None else self.merger(x_BPS, places)
        return VitOutput(tokens_BID, tuple(deepstack))

    def _embed(
        self, patches_BPQ: torch.Tensor, coords_BPA: torch.Tensor, sizes_BPA: torch.Tensor
    ) -> torch.Tensor:
        frames, side = self.args.temporal_patch, self.args.position_grid
        patches_BPQ = patches_BPQ.to(self.patch_embedding.weight.dtype)
        if frames > 1:
            # Each colour's frames one behind the other, as the kernel of a 3-D convolution has them.
            frame = patches_BPQ.unflatten(-1, (self.channels, 1, -1))
            patches_BPQ = frame.expand(-1, -1, -1, frames, -1).flatten(2)
        x_BPS = self.patch_embedding(patches_BPQ)
        if self.args.outer_norms:
            x_BPS = self.patch_norm(x_BPS)
        if not side:
            return x_BPS
        reading = self.args.position_reading
        cells_BPN, weights_BPN = table_entries(coords_BPA, sizes_BPA, side, reading)
        read = zip(cells_BPN.unbind(-1), weights_BPN.unbind(-1), strict=True)
        # One cell after the other: all at once would be as many times the size of x.
        place_BPS = sum(self.position_embedding(cell) * weight[..., None] for cell, weight in read)
        return x_BPS + place_BPS.to(x_BPS.dtype)
