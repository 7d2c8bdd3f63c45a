"""Geometries of the released backbones, and the image processors of transformers that go with them."""

from dataclasses import replace

import numpy as np
from PIL import Image
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import (
    Ernie4_5_VLMoeImageProcessorPil,
)
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from symbiotic_titan.sequence.geometry import ImageGeometry

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
GENERATED = {"latent_channels": 3, "latent_stride": 1, "latent_patch": 4}
QWEN3_VL = ImageGeometry(16, 2, 3, **GENERATED, vit_resize="qwen")
QWEN2_VL = ImageGeometry(
    14, 2, 3, **GENERATED, vit_mean=CLIP_MEAN, vit_std=CLIP_STD, vit_resize="qwen"
)
GLM_4V = ImageGeometry(
    14, 2, 3, **GENERATED, vit_mean=CLIP_MEAN, vit_std=CLIP_STD, vit_resize="glm"
)
ERNIE_VL = replace(QWEN2_VL, vit_own_delimiters=True)
ARIA = ImageGeometry(
    14, 1, 3, **GENERATED, vit_resize="aria", vit_queries=(128, 256), vit_query_sides=(35, 70)
)

# Budgets small enough for a test, which each of the sizes below meets on another side.
LOW, HIGH = 12544, 65536


def noise_image(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def processor_of(geometry):
    """The image processor of transformers with our budgets; GLM's count two frames."""
    kind, frames = (Qwen2VLImageProcessorPil, 1)
    if geometry.vit_resize == "glm":
        kind, frames = (Glm4vImageProcessorPil, 2)
    elif geometry == ERNIE_VL:
        kind = Ernie4_5_VLMoeImageProcessorPil
    return kind(
        patch_size=geometry.vit_patch,
        merge_size=geometry.vit_merge,
        temporal_patch_size=2,
        size={"shortest_edge": frames * LOW, "longest_edge": frames * HIGH},
        image_mean=list(geometry.vit_mean),
        image_std=list(geometry.vit_std),
    )
