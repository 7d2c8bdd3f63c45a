"""[latents]: what target images are made of, and where that is computed.

[sampling]: images generated from fixed prompts while training.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from symbiotic_titan.config.losses import SHIFT
from symbiotic_titan.config.optimizer import Weights
from symbiotic_titan.config.rows import PATH_OR_NONE, SEED, STEPS, TEXT, Range, Text, check_row
from symbiotic_titan.registry import Registry, choice

# Name -> subclass of ``codecs.codec.Codec``.
CODECS: Registry[Any] = Registry(
    "latents.codec",
    {
        "pixel": "symbiotic_titan.codecs.codec:PixelCodec",
        "flux": "symbiotic_titan.codecs.flux:FluxCodec",
        "autoencoder_kl": "symbiotic_titan.codecs.autoencoder_kl:KLCodec",
    },
)

# (velocity model, state at t, t, next timestep) -> state at the next timestep; see ``flow.solver``.
SolverStep = Callable[[Callable[[Any, float], Any], Any, float, float], Any]
SOLVERS: Registry[SolverStep] = Registry(
    "sampler",
    {
        "euler": "symbiotic_titan.flow.solver:euler_step",
        "heun": "symbiotic_titan.flow.solver:heun_step",
    },
)


_ASPECT = Text("width:height, as 3:2", r"[1-9]\d{0,4}:[1-9]\d{0,4}")


@dataclass
class Latents:
    codec: str = choice(CODECS, "pixel")
    """``pixel``: patches of pixels, scaled to [-1, 1]; for small runs, needs no autoencoder. ``flux``: torchtitan's Flux autoencoder.
    ``autoencoder_kl``: one of diffusers, which must be installed. Their latents are means, without noise."""

    patch: Annotated[int, Range(1, 1024)] = 4
    """Latent positions along one side of one sequence token (pixels, for the ``pixel`` codec)."""

    path: Annotated[str, PATH_OR_NONE] = ""
    """Weights of the autoencoder: a safetensors file for ``flux``, a folder that diffusers wrote for ``autoencoder_kl``."""

    scale: Annotated[float | None, Range()] = None
    """Latents are scale * (mean - shift). Left out: what the autoencoder was released with."""

    shift: Annotated[float | None, Range()] = None
    """See ``scale``."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which the autoencoder computes and in which a cache keeps its latents; the flow's own is float32 always."""

    cache: Annotated[str, PATH_OR_NONE] = ""
    """Folder that symbiotic cache-latents wrote for this config. Latents of target images are then read from it, and nothing is
    encoded while training."""

    @property
    def carries_pixels(self) -> bool:
        """Whether the loader hands out pixels of target images, which the training device encodes."""
        return self.codec != "pixel" and not self.cache

    def __post_init__(self) -> None:
        check_row("latents", self)
        if self.scale == 0:
            raise ValueError("latents.scale: must not be zero, which would make all latents equal")


@dataclass
class Sampling:
    enable: bool = False
    """Whether to generate images for ``prompts`` and show them in TensorBoard: before the first step, every ``freq`` steps and at
    the last step"""

    freq: Annotated[int, STEPS] = 500
    """Steps from one grid of images to the next"""

    weights: Weights = "trained"
    """Which weights generate; ``ema``: the average that [ema] keeps"""

    prompts: Annotated[list[str], TEXT] = field(default_factory=list)
    """Captions; an image is generated for each, with the same noise every time"""

    aspect: Annotated[str, _ASPECT] = "1:1"
    """Width:height of the images; the nearest bucket of data.vae_pixels and data.max_aspect is taken"""

    steps: Annotated[int, Range(1, 10**4)] = 20
    """Steps of the sampler"""

    sampler: str = choice(SOLVERS, "euler")
    """Solver of the flow; ``heun`` takes two forwards a step"""

    guidance: Annotated[float, Range(0, 1000)] = 3.0
    """1 follows the caption as trained, more exaggerates what it changes and takes twice the rows"""

    shift: Annotated[float | None, SHIFT] = None
    """As flow.shift, which it is where left out"""

    seed: Annotated[int, SEED] = 0
    """Seed of the noise"""

    batch_size: Annotated[int, Range(1, 2**16)] = 8
    """Images that one process generates at once. Several processes share the prompts"""

    def __post_init__(self) -> None:
        check_row("sampling", self)
