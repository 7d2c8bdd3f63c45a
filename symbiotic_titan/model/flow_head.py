"""The way out for an image to be generated: decoder state -> velocity of its latent patch.

Letters: B rows, L latent tokens of a row, Z numbers in a latent patch, D width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.norm import RMSNorm


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
