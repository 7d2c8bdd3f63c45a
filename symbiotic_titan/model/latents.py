"""Target images in and out of the decoder: noised latent patches -> token embeddings, and decoder states -> velocities.

Shape letters: sequence/shapes.py. N are the sinusoids of a timestep.
"""

import torch
import torch.nn.functional as F
from torch import nn

from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.layers import RMSNorm, compute_dtype

_PERIOD = 10_000.0


def sinusoids(x: torch.Tensor, width: int) -> torch.Tensor:
    """(..., width) float32 cosines and sines of ``x`` (...) at ``width / 2`` frequencies (arXiv 1706.03762, section 3.5)."""
    # float32: in bfloat16 neighbouring timesteps would have the same angle at the high frequencies.
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=x.device)
    angles = x.float().unsqueeze(-1) * _PERIOD ** (-steps / half)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def grid_positions(coords_BLA: torch.Tensor, width: int) -> torch.Tensor:
    """(B, L, width) float32: half the channels encode the row, half the column."""
    return sinusoids(coords_BLA, width // 2).flatten(-2)


class LatentEmbedding(nn.Module):
    """Noised latent patch + position in the grid + timestep -> embedding of width D."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.timestep_width = args.timestep_width
        self.patch_embedding = nn.Linear(args.geometry.vae_token_values, args.dim)
        self.timestep_w1 = nn.Linear(args.timestep_width, args.dim)
        self.timestep_w2 = nn.Linear(args.dim, args.dim)

    def forward(
        self, noised_BLZ: torch.Tensor, coords_BLA: torch.Tensor, timesteps_BL: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """((B, L, D) tokens, (B, L, D) timestep condition for the flow head). ``timesteps`` are float32 in [0, 1]."""
        dtype = compute_dtype(self.patch_embedding.weight)
        # Scaled to diffusion steps 0 to 1000, the range that the frequencies are designed for.
        time_BLN = sinusoids(1000.0 * timesteps_BL, self.timestep_width).to(dtype)
        condition_BLD = self.timestep_w2(F.silu(self.timestep_w1(time_BLN)))
        tokens_BLD = self.patch_embedding(noised_BLZ.to(dtype)) + condition_BLD
        position_BLD = grid_positions(coords_BLA, tokens_BLD.shape[-1]).to(dtype)
        return tokens_BLD + position_BLD, condition_BLD


class FlowHead(nn.Module):
    """Norm, scaled and shifted by the timestep (adaLN-Zero, arXiv 2212.09748, section 3.2), then one linear layer.

    Both linear layers start at zero: the initial velocity is zero, and no gradient of a random head reaches the decoder.
    """

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.modulation = nn.Linear(args.dim, 2 * args.dim)
        self.output = nn.Linear(args.dim, args.geometry.vae_token_values)

    def forward(self, h_BLD: torch.Tensor, condition_BLD: torch.Tensor) -> torch.Tensor:
        """(B, L, Z) float32 velocity."""
        scale_BLD, shift_BLD = self.modulation(F.silu(condition_BLD)).chunk(2, dim=-1)
        return self.output(self.norm(h_BLD) * (1 + scale_BLD) + shift_BLD).float()
