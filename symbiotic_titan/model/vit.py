"""The image encoder: patches of input images -> tokens of the decoder.

1. Patches (B, P, Q) -> (B, P, S), plus a learned position if there is a table of them.
2. Pre-norm blocks, full attention inside each image, two-dimensional rotary positions or none.
3. A projector turns the result, and the output of some blocks (``deepstack``), into tokens (B, I, D): ``projector`` chooses it.

Shape letters: sequence/shapes.py. N are the table entries that one position is interpolated from, in
projectors the joined width of the patches of one token.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.layers import FeedForward, LayerNorm, RMSNorm, attend
from symbiotic_titan.model.masks import AttentionMask
from symbiotic_titan.model.rope import RotaryTables, frequencies, rotary_tables, rotate
from symbiotic_titan.model.vit_args import PositionReading, VitArgs


def patch_rotary(coords_BPA: torch.Tensor, head_dim: int, theta: float) -> RotaryTables:
    """Rotary tables whose first half of frequencies rotates with the patch's row and the second half with its column."""
    num = head_dim // 4
    frequencies_R = frequencies(num, theta, coords_BPA.device).repeat(2)
    axes_R = torch.arange(2 * num, device=coords_BPA.device) // num
    return rotary_tables(coords_BPA, axes_R, frequencies_R)


def grid_sizes(coords_BPA: torch.Tensor, image_BP: torch.Tensor) -> torch.Tensor:
    """(B, P, A) int64: rows and columns of each patch's image, from the largest coordinates of its patches, which are adjacent."""
    # Renumbered by position, because span numbers have no static bound. An integer maximum does not depend on order, so the scatter is
    # deterministic on any device.
    number_BP = (image_BP != image_BP.roll(1, dims=1)).cumsum(1)
    number_BPA = number_BP.unsqueeze(-1).expand_as(coords_BPA)
    rows, num_patches, axes = coords_BPA.shape
    none = coords_BPA.new_zeros(rows, num_patches + 1, axes)
    return none.scatter_reduce(1, number_BPA, coords_BPA + 1, "amax").gather(1, number_BPA)


def cubic_weights(distance: torch.Tensor) -> torch.Tensor:
    """Kernel of cubic convolution with a = -0.75, as in torch's bicubic interpolation; 0 from a distance of 2 on."""
    d = distance
    inner, outer = (1.25 * d - 2.25) * d * d + 1, ((-0.75 * d + 3.75) * d - 6.0) * d + 3.0
    return torch.where(d <= 1, inner, outer).masked_fill(d >= 2, 0.0)


def table_entries(
    coords_BPA: torch.Tensor,
    sizes_BPA: torch.Tensor,
    side: int,
    reading: PositionReading = "bilinear",
) -> tuple[torch.Tensor, torch.Tensor]:
    """((B, P, N) int64 entries of a ``side`` x ``side`` table, row-major, their float32 weights) for a table resampled to each image's
    grid of patches.

    ``bilinear`` aligns the corners of table and grid. ``bicubic`` aligns their edges and repeats the border outside. ``floor`` takes
    the one entry in which a patch begins. An entry with weight 0 may be any entry of the table.
    """
    coords_BPA = coords_BPA.float()
    if reading == "floor":
        # In float32 and in the released models' order of operations, because rounding decides for a patch on the edge of an entry.
        edges = torch.arange(1 / side, 1.0, 1 / side, device=coords_BPA.device)
        starts_BPA = coords_BPA * (1.0 / sizes_BPA)
        row_BP, column_BP = torch.bucketize(starts_BPA, edges, right=True).unbind(-1)
        entries_BPN = (row_BP * side + column_BP).unsqueeze(-1)
        return entries_BPN, torch.ones_like(entries_BPN, dtype=torch.float32)
    if reading == "bilinear":
        # A side of one patch reads the first entry; the clamp avoids 0 / 0.
        at_BPA = coords_BPA * (side - 1) / (sizes_BPA - 1).clamp(min=1)
        near_BPAN = torch.stack([at_BPA.floor() + i for i in (0, 1)], dim=-1)
        weights_BPAN = 1 - (at_BPA.unsqueeze(-1) - near_BPAN).abs()
    else:
        at_BPA = (coords_BPA + 0.5) * side / sizes_BPA - 0.5
        near_BPAN = torch.stack([at_BPA.floor() + i for i in (-1, 0, 1, 2)], dim=-1)
        weights_BPAN = cubic_weights((at_BPA.unsqueeze(-1) - near_BPAN).abs())
    row_BPN, column_BPN = near_BPAN.long().clamp(0, side - 1).unbind(2)
    entries = row_BPN.unsqueeze(-1) * side + column_BPN.unsqueeze(-2)
    row_weights_BPN, column_weights_BPN = weights_BPAN.unbind(2)
    weights = row_weights_BPN.unsqueeze(-1) * column_weights_BPN.unsqueeze(-2)
    return entries.flatten(2), weights.flatten(2)


def block_norm(args: VitArgs) -> nn.Module:
    """A norm of the kind that the blocks have."""
    norm = LayerNorm if args.norm == "layer" else RMSNorm
    return norm(args.dim, eps=args.norm_eps)


class VitBlock(nn.Module):
    """Pre-norm block of the image encoder."""

    def __init__(self, args: VitArgs) -> None:
        super().__init__()
        self.head_dim, self.activation = args.head_dim, args.activation
        self.attention_norm = block_norm(args)
        self.wqkv = nn.Linear(args.dim, 3 * args.dim, bias=args.bias)
        self.wo = nn.Linear(args.dim, args.dim, bias=args.bias)
        self.ffn_norm = block_norm(args)
        self.w1 = nn.Linear(args.dim, args.hidden_dim, bias=args.bias)
        self.w2 = nn.Linear(args.hidden_dim, args.dim, bias=args.bias)
        if args.activation == "swiglu":
            self.w3 = nn.Linear(args.dim, args.hidden_dim, bias=args.bias)

    def forward(
        self, x_BPS: torch.Tensor, rotary: RotaryTables | None, mask: AttentionMask
    ) -> torch.Tensor:
        # One matmul for all three, as most released encoders store them.
        qkv_BPUC = self.wqkv(self.attention_norm(x_BPS)).unflatten(-1, (-1, self.head_dim))
        q_BUPC, k_BUPC, v_BUPC = qkv_BPUC.transpose(1, 2).chunk(3, dim=1)
        if rotary is not None:
            q_BUPC, k_BUPC = rotate(q_BUPC, rotary, False), rotate(k_BUPC, rotary, False)
        x_BPS = x_BPS + self.wo(attend(q_BUPC, k_BUPC, v_BUPC, mask))
        return x_BPS + self.w2(self._hidden(self.ffn_norm(x_BPS)))

    def _hidden(self, x_BPS: torch.Tensor) -> torch.Tensor:
        if self.activation == "swiglu":
            return F.silu(self.w1(x_BPS)) * self.w3(x_BPS)
        if self.activation == "quick_gelu":
            hidden = self.w1(x_BPS)
            return hidden * torch.sigmoid(1.702 * hidden)
        approximate = "tanh" if self.activation == "gelu_tanh" else "none"
        return F.gelu(self.w1(x_BPS), approximate=approximate)


class PatchMerger(nn.Module):
    """A window of merge x merge adjacent patches -> one token. The norm is taken per patch or, with ``norm_joined``, over the whole
    window."""

    def __init__(self, vit: VitArgs, dim: int, *, norm_joined: bool = False) -> None:
        super().__init__()
        self.num_patches = vit.merge**2
        self.norm_joined = norm_joined
        joined = vit.dim * self.num_patches
        self.norm = LayerNorm(joined if norm_joined else vit.dim, eps=vit.norm_eps)
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
        self.norm = LayerNorm(dim, eps=vit.norm_eps)
        self.feed_forward = FeedForward(dim, vit.projector_hidden_dim)

    def forward(self, x_BPS: torch.Tensor) -> torch.Tensor:
        x_BID = self.join(x_BPS.unflatten(1, (-1, self.num_patches)).flatten(2))
        return self.feed_forward(F.gelu(self.norm(self.project(x_BID))))


class ResamplerStage(nn.Module):
    """Linear, GELU, linear, LayerNorm."""

    def __init__(self, width: int, dim: int, eps: float) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, dim)
        self.w2 = nn.Linear(dim, dim)
        self.norm = LayerNorm(dim, eps=eps)

    def forward(self, x_BIN: torch.Tensor) -> torch.Tensor:
        return self.norm(self.w2(F.gelu(self.w1(x_BIN))))


class Resampler(nn.Module):
    """A window of merge x merge adjacent patches -> one token, in two stages: the first joins the patches, the second the frames of a
    video. An image is one frame, repeated. ``eps``: of the norm of the tokens."""

    def __init__(self, vit: VitArgs, dim: int, eps: float) -> None:
        super().__init__()
        self.num_patches, self.frames = vit.merge**2, vit.resampled_frames
        joined = vit.dim * self.num_patches
        self.spatial = ResamplerStage(joined, joined, vit.norm_eps)
        self.temporal = ResamplerStage(self.frames * joined, joined, vit.norm_eps)
        self.project = nn.Linear(joined, dim)
        self.last_norm = RMSNorm(dim, eps=eps)

    def forward(self, x_BPS: torch.Tensor) -> torch.Tensor:
        x_BIN = self.spatial(x_BPS.unflatten(1, (-1, self.num_patches)).flatten(2))
        x_BIN = self.temporal(torch.cat([x_BIN] * self.frames, dim=-1))
        return self.last_norm(self.project(x_BIN))


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
        self.query_norm, self.patch_norm = LayerNorm(width), LayerNorm(width)
        # Two linear layers in a row, mathematically one, because the released weights store both.
        self.wq, self.wk, self.wv = (
            nn.Sequential(nn.Linear(width, width, bias=False), nn.Linear(width, width))
            for _ in range(3)
        )
        self.wo = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
        self.last_norm = LayerNorm(width)
        self.w1 = nn.Linear(width, dim, bias=False)
        self.w2 = nn.Linear(dim, dim, bias=False)

    def forward(self, x_BPS: torch.Tensor, indices: QueryIndices) -> torch.Tensor:
        x_BPS = self.patch_norm(x_BPS)
        q_BIS = self.wq(self.query_norm(self.queries(indices.query).to(x_BPS.dtype)))
        q_BUIC, k_BUPC, v_BUPC = (
            projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projected in (q_BIS, self.wk(x_BPS), self.wv(x_BPS))
        )
        read_BIS = self.wo(attend(q_BUIC, k_BUPC, v_BUPC, indices.mask))
        hidden_BID = F.gelu(self.w1(self.last_norm(read_BIS)), approximate="tanh")
        return self.w2(hidden_BID)


def projector(args: ModelArgs) -> nn.Module:
    """The projector that ``args.vit`` configures."""
    vit, dim = args.vit, args.dim
    if vit.queries:
        return QueryProjector(vit, dim)
    if vit.resampled_frames:
        return Resampler(vit, dim, args.norm_eps)
    return GatedMerger(vit, dim) if vit.projector_hidden_dim else PatchMerger(vit, dim)


class VitOutput(NamedTuple):
    """Encoded images, in the dtype of the computation. The values of unused tokens are finite but meaningless.

    tokens:    (B, I, D) input of the decoder.
    deepstack: (B, I, D) each, added to the image tokens after the decoder's first layers.
    """

    tokens: torch.Tensor
    deepstack: tuple[torch.Tensor, ...]


class VisionTransformer(nn.Module):
    """Patches of input images -> ``VitOutput``."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        vit = args.vit
        self.args, self.channels = vit, args.geometry.vit_channels
        values = args.geometry.vit_patch_values * vit.temporal_patch
        self.patch_embedding = nn.Linear(values, vit.dim, bias=vit.patch_bias)
        if vit.position_grid:
            self.position_embedding = nn.Embedding(vit.position_grid**2, vit.dim)
        self.layers = nn.ModuleDict({str(i): VitBlock(vit) for i in range(vit.num_layers)})
        if vit.outer_norms:
            self.patch_norm = RMSNorm(vit.dim, eps=vit.norm_eps)
            self.last_norm: nn.Module = RMSNorm(vit.dim, eps=vit.norm_eps)
        elif vit.last_norm:
            self.last_norm = block_norm(vit)
        self.merger = projector(args)
        self.deepstack_mergers = nn.ModuleDict(
            {str(i): PatchMerger(vit, args.dim, norm_joined=True) for i in vit.deepstack}
        )

    def forward(
        self,
        patches_BPQ: torch.Tensor,
        coords_BPA: torch.Tensor,
        sizes_BPA: torch.Tensor,
        mask: AttentionMask,
        indices: QueryIndices | None = None,
    ) -> VitOutput:
        """``sizes``: rows and columns of each patch's image. ``indices``: only for a projector with learned queries."""
        x_BPS = self._embed(patches_BPQ, coords_BPA, sizes_BPA)
        rotary = None
        if self.args.rope_theta:
            rotary = patch_rotary(coords_BPA, self.args.head_dim, self.args.rope_theta)
        deepstack = []
        for name, block in self.layers.items():
            x_BPS = block(x_BPS, rotary, mask)
            if name in self.deepstack_mergers:
                deepstack.append(self.deepstack_mergers[name](x_BPS))
        if self.args.outer_norms or self.args.last_norm:
            x_BPS = self.last_norm(x_BPS)
        tokens_BID = self.merger(x_BPS) if indices is None else self.merger(x_BPS, indices)
        return VitOutput(tokens_BID, tuple(deepstack))

    def _embed(
        self, patches_BPQ: torch.Tensor, coords_BPA: torch.Tensor, sizes_BPA: torch.Tensor
    ) -> torch.Tensor:
        frames, side = self.args.temporal_patch, self.args.position_grid
        patches_BPQ = patches_BPQ.to(self.patch_embedding.weight.dtype)
        if frames > 1:
            # (channel, frame, row, column), the order of a 3-D convolution's kernel, with the one frame of an image repeated.
            frame = patches_BPQ.unflatten(-1, (self.channels, 1, -1))
            patches_BPQ = frame.expand(-1, -1, -1, frames, -1).flatten(2)
        x_BPS = self.patch_embedding(patches_BPQ)
        if self.args.outer_norms:
            x_BPS = self.patch_norm(x_BPS)
        if not side:
            return x_BPS
        reading = self.args.position_reading
        entries_BPN, weights_BPN = table_entries(coords_BPA, sizes_BPA, side, reading)
        entries = zip(entries_BPN.unbind(-1), weights_BPN.unbind(-1), strict=True)
        # One entry after the other: together their embeddings would take N times the memory of x.
        # Look-ups are not autocast; without the cast they would not be rounded as FSDP rounds the table.
        position_BPS = sum(
            self.position_embedding(e).to(x_BPS.dtype) * weight[..., None] for e, weight in entries
        )
        return x_BPS + position_BPS.to(x_BPS.dtype)
