"""Noise and timesteps, for training and for generation.

In training every sequence of the global batch has its own generators, seeded by (seed, step, index of the sequence). Its noise is
therefore the same on any number of ranks and micro-batches, and after a resume without a saved random state. In generation the
noise of an image depends on (seed, index of the image) alone, not on its batch.

Timesteps, one number per token, are drawn on the CPU. Noise, which has many, is drawn where it is used, by one kernel per sequence:
drawn on the CPU, it would keep the host busy and have to be copied. torch's generators do it, because a counter-based hash in tensor
operations would take dozens of kernels. The price: a GPU's noise differs from a CPU's, and may differ between models of GPUs.
In generation all noise is drawn on the CPU, so that a seed gives the same image anywhere.
"""

import hashlib

import torch

from symbiotic_titan.config.losses import Flow
from symbiotic_titan.device import copy_from_host
from symbiotic_titan.flow.path import draw_timesteps, interpolate, velocity_target


def keyed_generator(*key: int | str) -> torch.Generator:
    """CPU generator whose seed is a hash of ``key``."""
    # A hash, because with a sum of the parts (1, 2) and (2, 1) would give the same numbers.
    text = "/".join(str(part) for part in key)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)


def row_generator(seed: int, step: int, row: int) -> torch.Generator:
    """CPU generator of one sequence of one step's global batch."""
    return keyed_generator(seed, step, row)


def generator_on(device: torch.device, generator: torch.Generator) -> torch.Generator:
    """``generator``, which is on the CPU, itself where that is the device; else one of the device with the seed that it had."""
    if device.type == "cpu":
        return generator
    return torch.Generator(device).manual_seed(generator.initial_seed())


def first_token_of_image(image_BL: torch.Tensor) -> torch.Tensor:
    """(B, L) index of the first token of each token's image; an image's tokens are adjacent."""
    index_L = torch.arange(image_BL.shape[1], device=image_BL.device)
    starts_BL = image_BL != image_BL.roll(1, dims=1)
    # roll compares the first token with the last, which may have the same image number.
    starts_BL[:, 0] = True
    return torch.where(starts_BL, index_L, 0).cummax(dim=1).values


def draw_noise_and_timesteps(
    vae_image_BL: torch.Tensor, latent_values: int, *, config: Flow, step: int, first_row: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(noise (B, L, Z), timesteps (B, L)) on the device of ``vae_image_BL``; tokens of one image share a timestep.

    ``first_row`` is the index of this micro-batch's first sequence in the step's global batch. Unused latent tokens (image -1) get
    noise too, and timestep 0.
    """
    (num_rows, num_tokens), device = vae_image_BL.shape, vae_image_BL.device
    noise_BLZ = torch.empty(num_rows, num_tokens, latent_values, device=device)
    timesteps = []
    for row, noise_LZ in enumerate(noise_BLZ, start=first_row):
        generator = row_generator(config.seed, step, row)
        # One draw per token, also for tokens that share a timestep, so that the noise drawn next is independent of the images.
        timesteps.append(draw_timesteps((num_tokens,), config, generator))
        noise_LZ.normal_(generator=generator_on(device, generator))
    drawn_BL = copy_from_host(torch.stack(timesteps), device)
    timesteps_BL = drawn_BL.gather(1, first_token_of_image(vae_image_BL))
    return noise_BLZ, timesteps_BL.masked_fill(vae_image_BL < 0, 0.0)


def noised_latents(
    latents_BLZ: torch.Tensor,
    vae_image_BL: torch.Tensor,
    *,
    config: Flow,
    step: int,
    first_row: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x_t (B, L, Z), timesteps (B, L), velocity target (B, L, Z)) of freshly drawn noise, see ``draw_noise_and_timesteps``."""
    noise_BLZ, timesteps_BL = draw_noise_and_timesteps(
        vae_image_BL, latents_BLZ.shape[-1], config=config, step=step, first_row=first_row
    )
    noised_BLZ = interpolate(latents_BLZ, noise_BLZ, timesteps_BL)
    return noised_BLZ, timesteps_BL, velocity_target(latents_BLZ, noise_BLZ)


def noise_of_image(seed: int, index: int, num_tokens: int, num_values: int) -> torch.Tensor:
    """(L, Z) float32 on the CPU; a function of the arguments alone, so an image is the same in any batch."""
    generator = keyed_generator("image", seed, index)
    return torch.randn(num_tokens, num_values, generator=generator)
