"""The suite ``clip_score``: torchmetrics' CLIPScore, by a CLIP model from a local folder.

    clip_score/score   100 x cosine between a picture and its caption, mean (arXiv 2104.08718); chance: with the next caption

In its folder: images/*.png, one for each caption.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from symbiotic_titan.evaluation.suite import Advance, Progress, Scores, Suite, measure
from symbiotic_titan.evaluation.suites.clip import (
    Processor,
    check_clip,
    load_model,
    load_processor,
)
from symbiotic_titan.evaluation.suites.generation import (
    CaptionOptions,
    generate_captioned,
    stacked,
)
from symbiotic_titan.inference.generator import Generator


@dataclass(frozen=True)
class ClipScoreOptions(CaptionOptions):
    """Options of the suite ``clip_score``."""

    model: str = ""
    """Folder of a CLIP model in the transformers layout: config.json, model.safetensors, tokenizer and preprocessor"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip("model", self.model)


def run_clip_score(
    generator: Generator, options: ClipScoreOptions, folder: Path, progress: Progress
) -> Scores:
    """Raises ValueError for a CLIP model that cannot be read."""
    clip = load_clip(options.model)
    captions = options.captions()
    images = generate_captioned(generator, captions, options, folder, progress)
    score, chance = (
        clip_score(
            clip, images, texts, options.batch_size, generator.device, progress(what, len(images))
        )
        for what, texts in (("captions", captions), ("next captions", captions[1:] + captions[:1]))
    )
    return {"clip_score/score": measure(score, chance=chance, number=len(images))}


class _Clip:
    """A CLIP whose features are tensors, as torchmetrics expects; those of transformers 5 are objects."""

    def __init__(self, clip: Any) -> None:
        self._clip = clip
        self.config = clip.config

    def to(self, device: torch.device) -> "_Clip":
        self._clip.to(device)
        return self

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self._clip.get_image_features(pixel_values=pixel_values).pooler_output

    def get_text_features(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self._clip.get_text_features(input_ids=ids, attention_mask=mask).pooler_output


# (CLIP model, its processor of texts and images)
Clip = tuple[_Clip, Processor]


def load_clip(folder: str) -> Clip:
    """The CLIP model of a local folder, for torchmetrics.

    Raises:
        ValueError: files are missing, or are not those of a CLIP model.
    """
    return _Clip(load_model(folder)), load_processor(folder)


@torch.no_grad()
def clip_score(
    clip: Clip,
    images: Sequence[Image.Image],
    captions: Sequence[str],
    batch_size: int,
    device: torch.device,
    advance: Advance,
) -> float:
    """Mean over the images, each with the caption at the same index."""
    from torchmetrics.multimodal.clip_score import CLIPScore

    metric = CLIPScore(model_name_or_path=lambda: clip).to(device)
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        pixels = [stacked([image])[0].to(device) for image in batch]
        metric.update(pixels, [*captions[start : start + batch_size]])
        advance(len(batch))
    return float(metric.compute())  # device sync


CLIP_SCORE = Suite(
    name="clip_score",
    description="how well pictures fit their captions, by a local CLIP model",
    options=ClipScoreOptions,
    run=run_clip_score,
    modules=("torchmetrics", "transformers"),
    install="pip install torchmetrics transformers",
)
