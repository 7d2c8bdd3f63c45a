"""[sampling]: pictures of fixed prompts, drawn while training."""

from dataclasses import dataclass, field


@dataclass
class Sampling:
    enable: bool = False
    """Whether to draw ``prompts`` and show the pictures in TensorBoard: before the first step, every ``freq`` steps and at the
    last step"""

    freq: int = 500
    """Steps from one grid of pictures to the next"""

    prompts: list[str] = field(default_factory=list)
    """Captions; each gets a picture, with the same noise every time"""

    aspect: str = "1:1"
    """Width:height of the pictures; the nearest bucket of data.vae_pixels and data.max_aspect is taken"""

    steps: int = 20
    """Steps of the sampler"""

    sampler: str = "euler"
    """``euler``, or ``heun``, which takes two forwards a step"""

    guidance: float = 3.0
    """1 follows the caption as trained, more exaggerates what it changes and takes twice the rows"""

    shift: float | None = None
    """As flow.shift, which it is where left out"""

    seed: int = 0
    """Seed of the noise"""

    batch_size: int = 8
    """Pictures that one process draws at once. Several processes share the prompts"""

    def __post_init__(self) -> None:
        for name in ("freq", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"sampling.{name}: must be at least 1, got {getattr(self, name)}")
