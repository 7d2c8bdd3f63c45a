"""The suite ``fid``: torchmetrics' Fréchet distance, in the features of a network from a local file.

    fid/distance   of the pictures of given captions to real images (arXiv 1706.08500); lower is better

In its folder: images/*.png, one for each caption.
"""

import logging
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image, ImageOps

from symbiotic_titan.evaluation.files import check_file, check_folder, image_files, opened
from symbiotic_titan.evaluation.suite import Advance, Progress, Scores, Suite, measure
from symbiotic_titan.evaluation.suites.generation import (
    CaptionOptions,
    generate_captioned,
    stacked,
)
from symbiotic_titan.inference.generator import Generator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FidOptions(CaptionOptions):
    """Options of the suite ``fid``."""

    references: str = ""
    """Folder of real images"""

    model: str = ""
    """TorchScript file of a network: uint8 (N, 3, side, side) -> (N, features), as the Inception of FID is kept"""

    side: int = 299
    """Height and width in pixels at which the network sees the middle square of an image"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_folder("references", self.references, "a folder of real images")
        image_files(self.references)
        check_file("model", self.model, "a TorchScript file of a feature network")
        if self.side < 1:
            raise ValueError(f"side: must be at least 1, got {self.side}")


def run_fid(generator: Generator, options: FidOptions, folder: Path, progress: Progress) -> Scores:
    """Raises ValueError for a network or an image that cannot be read."""
    network = FeatureNetwork(Path(options.model), options.side)
    references = image_files(options.references)
    images = generate_captioned(generator, options.captions(), options, folder, progress)
    if min(len(references), len(images)) <= network.num_features:
        logger.warning(
            f"fid: {len(references)} real and {len(images)} generated images for {network.num_features} features: "
            "the distance comes out too large; compare it only with one of as many images"
        )
    advance = progress("images", len(references) + len(images))
    real = (opened(str(path)) for path in references)
    distance = frechet_distance(
        network,
        generator.device,
        _batches(real, options, generator.device, advance),
        _batches(iter(images), options, generator.device, advance),
    )
    return {"fid/distance": measure(distance, number=len(images))}


class FeatureNetwork(torch.nn.Module):
    """The network of a TorchScript file.

    Raises:
        ValueError: it is not a TorchScript file, or does not give one feature vector per image.
    """

    def __init__(self, path: Path, side: int) -> None:
        super().__init__()
        try:
            with warnings.catch_warnings():
                # TorchScript is deprecated, but the Inception network of FID is distributed in it.
                warnings.simplefilter("ignore", DeprecationWarning)
                self.network = torch.jit.load(path, map_location="cpu").eval()
            features = self(torch.zeros(2, 3, side, side, dtype=torch.uint8))
        except RuntimeError as error:
            raise ValueError(
                f"{path}: is no TorchScript file of a network that takes uint8 (N, 3, {side}, {side}) ({error})"
            ) from error
        if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != 2:
            raise ValueError(f"{path}: must give a row of features for each image")
        self.num_features = features.shape[1]

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)


def _batches(
    images: Iterator[Image.Image], options: FidOptions, device: torch.device, advance: Advance
) -> Iterator[torch.Tensor]:
    """uint8 (N, 3, side, side): the centre square of each image. Pillow's resizing is antialiased; without that, distances differ
    (arXiv 2104.11222)."""
    size = (options.side, options.side)
    while batch := list(islice(images, options.batch_size)):
        squares = [ImageOps.fit(image, size, Image.Resampling.BICUBIC) for image in batch]
        yield stacked(squares).to(device)
        advance(len(batch))


def frechet_distance(
    network: FeatureNetwork,
    device: torch.device,
    real: Iterable[torch.Tensor],
    generated: Iterable[torch.Tensor],
) -> float:
    """Distance between two sets of images, given in batches; each needs at least two images."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=network).to(device)
    for batches, is_real in ((real, True), (generated, False)):
        for images_N3HW in batches:
            metric.update(images_N3HW, real=is_real)
    return float(metric.compute())  # device sync


FID = Suite(
    name="fid",
    description="Fréchet distance to real images, in the features of a local network",
    options=FidOptions,
    run=run_fid,
    modules=("torchmetrics",),
    install="pip install torchmetrics",
)
