"""The way out for an image to be generated: decoder state -> velocity of its latent patch.

Letters: B rows, L latent tokens of a row, Z numbers in a latent patch, D width.

The way into the decoder for an image to be generated: noised latent patch + place + time -> width D.

Letters: B rows, L latent tokens of a row, Z numbers in a latent patch, A axes, D width, S sinusoid width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.layers import RMSNorm

_PERIOD = 10_000.0


def sinusoids(x: torch.Tensor, width: int) -> torch.Tensor:
    """(..., width) float32 cosines and sines of ``x`` (...) at ``width / 2`` frequencies (arXiv 1706.03762, section 3.5)."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=x.device)
    angles = x.float().unsqueeze(-1) * _PERIOD ** (-steps / half)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def grid_positions(coords_BLA: torch.Tensor, width: int) -> torch.Tensor:
    """(B, L, width) float32: half the channels encode the row, half the column."""
    return sinusoids(coords_BLA, width // 2).flatten(-2)


class LatentEmbedding(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.timestep_width = args.timestep_width
        self.patch_embedding = nn.Linear(args.geometry.vae_token_values, args.dim)
        self.timestep_w1 = nn.Linear(args.timestep_width, args.dim)
        self.timestep_w2 = nn.Linear(args.dim, args.dim)

    def forward(
        self, noised_BLZ: torch.Tensor, coords_BLA: torch.Tensor, timesteps_BL: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """((B, L, D) tokens, (B, L, D) timestep condition for the flow head). ``timesteps`` lie in [0, 1], float32."""
        dtype = self.patch_embedding.weight.dtype
        time_BLN = sinusoids(1000.0 * timesteps_BL, self.timestep_width).to(dtype)
        condition_BLD = self.timestep_w2(F.silu(self.timestep_w1(time_BLN)))
        tokens_BLD = self.patch_embedding(noised_BLZ.to(dtype)) + condition_BLD
        place_BLD = grid_positions(coords_BLA, tokens_BLD.shape[-1]).to(dtype)
        return tokens_BLD + place_BLD, condition_BLD


class FlowHead(nn.Module):
    """Norm, scaled and shifted by the timestep (arXiv 2212.09748, section 3.2), then one linear. Both linears start at
    zero: the first velocity is zero and the decoder is not disturbed by a random head."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.modulation = nn.Linear(args.dim, 2 * args.dim)
        self.output = nn.Linear(args.dim, args.geometry.vae_token_values)

    def forward(self, h_BLD: torch.Tensor, condition_BLD: torch.Tensor) -> torch.Tensor:
        """(B, L, Z) float32."""
        scale_BLD, shift_BLD = self.modulation(F.silu(condition_BLD)).chunk(2, dim=-1)
        return self.output(self.norm(h_BLD) * (1 + scale_BLD) + shift_BLD).float()
