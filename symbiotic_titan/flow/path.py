"""The flow-matching path between a latent and noise.

x_t = (1 - t) x_0 + t e, with target velocity e - x_0 (arXiv 2210.02747 with t running from data to noise).
Letters: B rows, L latent tokens, Z numbers per latent patch.

Draw noise and timesteps, the same for every split of a step over ranks and micro-batches.

Every row of the global batch has a generator of its own, seeded by (seed, step, row). One rank with two micro-batches draws
what two ranks with one draw, and a resumed run draws what the uninterrupted one would have.
Letters: B rows, L latent tokens, Z numbers per latent patch.
"""

import hashlib

import torch

from symbiotic_titan.config.losses import Flow


def interpolate(
    latents_BLZ: torch.Tensor, noise_BLZ: torch.Tensor, timesteps_BL: torch.Tensor
) -> torch.Tensor:
    """(B, L, Z) x_t. ``timesteps`` lie in [0, 1]; 0 is data, 1 is noise."""
    t_BL1 = timesteps_BL.unsqueeze(-1)
    return (1 - t_BL1) * latents_BLZ + t_BL1 * noise_BLZ


def velocity_target(latents_BLZ: torch.Tensor, noise_BLZ: torch.Tensor) -> torch.Tensor:
    """(B, L, Z) derivative of x_t by t."""
    return noise_BLZ - latents_BLZ


def shift_timesteps(timesteps: torch.Tensor, shift: float) -> torch.Tensor:
    """t <- s t / (1 + (s - 1) t) (arXiv 2403.03206, eq. 23); monotone, keeps 0 and 1."""
    return shift * timesteps / (1 + (shift - 1) * timesteps)


def draw_timesteps(
    shape: tuple[int, ...], config: Flow, generator: torch.Generator
) -> torch.Tensor:
    """``shape`` float32 timesteps in [0, 1] under the configured law and shift."""
    if config.timesteps == "uniform":
        timesteps = torch.rand(shape, generator=generator)
    else:
        normal = torch.randn(shape, generator=generator) * config.std + config.mean
        timesteps = normal.sigmoid()
    return shift_timesteps(timesteps, config.shift)


def keyed_generator(*key: int | str) -> torch.Generator:
    """CPU generator whose seed is a hash of ``key``."""
    text = "/".join(str(part) for part in key)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)


def row_generator(seed: int, step: int, row: int) -> torch.Generator:
    """CPU generator of one row of one step's global batch."""
    return keyed_generator(seed, step, row)


def first_token_of_image(image_BL: torch.Tensor) -> torch.Tensor:
    """(B, L) index of the first token of each token's image; an image's tokens are adjacent."""
    index_L = torch.arange(image_BL.shape[1], device=image_BL.device)
    starts_BL = image_BL != image_BL.roll(1, dims=1)
    starts_BL[:, 0] = True
    return torch.where(starts_BL, index_L, 0).cummax(dim=1).values


def draw_noise_and_timesteps(
    vae_image_BL: torch.Tensor, latent_values: int, *, config: Flow, step: int, first_row: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(noise (B, L, Z), timesteps (B, L)) on the device of ``vae_image_BL``; tokens of one image share a timestep.

    ``first_row`` is the index of this micro-batch's first row in the step's global batch. Unused latent tokens (image -1) get
    noise too and timestep 0.
    """
    num_rows, num_tokens = vae_image_BL.shape
    noises, timesteps = [], []
    for row in range(first_row, first_row + num_rows):
        generator = row_generator(config.seed, step, row)
        timesteps.append(draw_timesteps((num_tokens,), config, generator))
        noises.append(torch.randn(num_tokens, latent_values, generator=generator))
    device = vae_image_BL.device
    drawn_BL = torch.stack(timesteps).to(device)
    timesteps_BL = drawn_BL.gather(1, first_token_of_image(vae_image_BL))
    return torch.stack(noises).to(device), timesteps_BL.masked_fill(vae_image_BL < 0, 0.0)
