"""The flow-matching path between a latent and noise, and the distributions of its timesteps.

x_t = (1 - t) x_0 + t e, with target velocity e - x_0: the conditional optimal-transport path of arXiv 2210.02747, section 4, with
t running from data (0) to noise (1). Meta's ``flow_matching`` library lets t run the other way.
"""

import torch

from symbiotic_titan.config.losses import TIMESTEP_DISTRIBUTIONS, Flow


def interpolate(
    latents_BLZ: torch.Tensor, noise_BLZ: torch.Tensor, timesteps_BL: torch.Tensor
) -> torch.Tensor:
    """(B, L, Z) x_t. ``timesteps`` are in [0, 1]; 0 is data, 1 is noise."""
    t_BL1 = timesteps_BL.unsqueeze(-1)
    return (1 - t_BL1) * latents_BLZ + t_BL1 * noise_BLZ


def velocity_target(latents_BLZ: torch.Tensor, noise_BLZ: torch.Tensor) -> torch.Tensor:
    """(B, L, Z) dx_t/dt, constant in t because the path is straight."""
    return noise_BLZ - latents_BLZ


def shift_timesteps(timesteps: torch.Tensor, shift: float) -> torch.Tensor:
    """t <- s t / (1 + (s - 1) t) (arXiv 2403.03206, eq. 23); monotone, keeps 0 and 1."""
    return shift * timesteps / (1 + (shift - 1) * timesteps)


def uniform(shape: tuple[int, ...], config: Flow, generator: torch.Generator) -> torch.Tensor:
    """Uniform in [0, 1)."""
    return torch.rand(shape, generator=generator)


def logit_normal(shape: tuple[int, ...], config: Flow, generator: torch.Generator) -> torch.Tensor:
    """The sigmoid of a normal: favours the middle of the path, where velocities are hardest to predict (arXiv 2403.03206, eq. 19)."""
    normal = torch.randn(shape, generator=generator) * config.std + config.mean
    return normal.sigmoid()


def draw_timesteps(
    shape: tuple[int, ...], config: Flow, generator: torch.Generator
) -> torch.Tensor:
    """``shape`` float32 timesteps in [0, 1], drawn from the configured distribution and shifted.

    Raises:
        ValueError: a registered distribution returned something else.
    """
    timesteps = TIMESTEP_DISTRIBUTIONS[config.timesteps](shape, config, generator)
    _check_timesteps(timesteps, shape, config.timesteps)
    # Shifted here, so that the shift applies to registered distributions too.
    return shift_timesteps(timesteps, config.shift)


def _check_timesteps(timesteps: torch.Tensor, shape: tuple[int, ...], name: str) -> None:
    where = (
        f"flow.timesteps = {name!r}: it must return float32 timesteps of shape {shape} in [0, 1]"
    )
    if not isinstance(timesteps, torch.Tensor):
        raise ValueError(f"{where}, got {type(timesteps).__name__}")
    if timesteps.shape != shape or timesteps.dtype != torch.float32:
        raise ValueError(f"{where}, got {timesteps.dtype} of shape {tuple(timesteps.shape)}")
    # Cheap, because timesteps are drawn on the CPU. NaN fails both comparisons.
    if not ((timesteps >= 0) & (timesteps <= 1)).all():
        raise ValueError(f"{where}, got values from {timesteps.min():g} to {timesteps.max():g}")
