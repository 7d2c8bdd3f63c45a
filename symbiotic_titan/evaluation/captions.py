"""Pictures of the captions in a file, each drawn once: what fid and clip_score measure.

Letters: N images, H and W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from symbiotic_titan.evaluation.drawing import DrawingSettings, Wanted, draw
from symbiotic_titan.evaluation.files import check_file, check_limit, read_prompts
from symbiotic_titan.evaluation.suite import Progress
from symbiotic_titan.generation.generator import Generator


@dataclass(frozen=True)
class CaptionOptions(DrawingSettings):
    """What is drawn."""

    prompts: str = ""
    """Text file with a caption per line, each of which is drawn once"""

    limit: int | None = None
    """Captions to draw, counted from the first; without it all"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_file("prompts", self.prompts, "a text file with a caption per line")
        check_limit(self.limit)
        if len(read_prompts(self.prompts, self.limit)) < 2:
            raise ValueError("prompts: at least 2 are needed")


def draw_captions(
    generator: Generator, options: CaptionOptions, folder: Path, progress: Progress
) -> tuple[list[str], list[Image.Image]]:
    """The captions, and a picture of each in ``folder``/images/*.png."""
    prompts = read_prompts(options.prompts, options.limit)
    wanted = [
        Wanted(prompt, folder / "images" / f"{i:05d}.png") for i, prompt in enumerate(prompts)
    ]
    return prompts, draw(generator, wanted, options, progress)


def stacked(images: Sequence[Image.Image]) -> torch.Tensor:
    """uint8 (N, 3, H, W) of RGB images of one size."""
    return torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2)
