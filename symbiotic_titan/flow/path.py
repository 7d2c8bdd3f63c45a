"""The flow-matching path between a latent and noise.

x_t = (1 - t) x_0 + t e, with target velocity e - x_0 (arXiv 2210.02747 with t running from data to noise).
Letters: B rows, L latent tokens, Z numbers per latent patch.
"""

import torch


def interpolate(
    latents_BLZ: torch.Tensor, noise_BLZ: torch.Tensor, timesteps_BL: torch.Tensor
) -> torch.Tensor:
    """(B, L, Z) x_t. ``timesteps`` lie in [0, 1]; 0 is data, 1 is noise."""
    t_BL1 = timesteps_BL.unsqueeze(-1)
    return (1 - t_BL1) * latents_BLZ + t_BL1 * noise_BLZ


def velocity_target(latents_BLZ: torch.Tensor, noise_BLZ: torch.Tensor) -> torch.Tensor:
    """(B, L, Z) derivative of x_t by t."""
    return noise_BLZ - latents_BLZ
