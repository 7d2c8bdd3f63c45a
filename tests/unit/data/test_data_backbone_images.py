"""What the data chain makes of images beside what the image processors of transformers make of them, for the released backbones."""

import numpy as np
import pytest
import torch
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import smart_resize as glm_resize
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as qwen_resize

from symbiotic_titan.config.data import Data
from symbiotic_titan.config.generation import Latents
from symbiotic_titan.data.images import (
    ImageSizeError,
    backbone_size,
    fit_size,
    longest_side_size,
    vit_patches,
)
from symbiotic_titan.data.pipeline import (
    build_spec,
    sequence_size,
)
from symbiotic_titan.data.tokenizer import ByteTokenizer
from symbiotic_titan.sequence.geometry import unpatchify
from tests.helpers.released_processors import (
    ARIA,
    ERNIE_VL,
    GLM_4V,
    HIGH,
    LOW,
    QWEN2_VL,
    QWEN3_VL,
    noise_image,
    processor_of,
)

# (height, width): as they are, odd, small, tiny, large, wide, tall, both thin and short, and near the rounding of a half.
SIZES = [
    *[(128, 160), (131, 197), (40, 50), (5, 7), (700, 900), (60, 1500), (1490, 61)],
    *[(9, 300), (33, 30), (112, 112), (48, 80), (256, 256), (239, 273), (272, 240), (1, 1)],
]  # fmt: skip


@pytest.mark.parametrize(
    "geometry", [QWEN3_VL, QWEN2_VL, GLM_4V, ERNIE_VL], ids=["qwen3", "qwen2", "glm", "ernie"]
)
def test_patches_are_those_of_the_backbones_image_processor(geometry):
    images = [noise_image(*size) for size in SIZES]
    theirs = processor_of(geometry)(images, return_tensors="pt")
    merge = geometry.vit_merge
    counts = theirs["image_grid_thw"].prod(-1).tolist()
    each = zip(images, theirs["image_grid_thw"], theirs["pixel_values"].split(counts), strict=True)
    for image, grid, values in each:
        cut = vit_patches(image, HIGH, geometry, LOW)
        patches_PQ = cut.patches
        assert grid.tolist() == [1, *cut.grid] == [1, cut.rows * merge, cut.columns * merge]
        frames_PCTX = values.reshape(len(patches_PQ), 3, 2, -1)
        for frame in range(2):
            torch.testing.assert_close(
                patches_PQ, frames_PCTX[:, :, frame].flatten(1), rtol=0, atol=1e-6
            )


@pytest.mark.parametrize("longest", [490, 980])
def test_patches_of_aria_are_those_that_its_image_processor_does_not_mask(longest):
    """It lays every image in the upper left of a square; a patch is masked where it holds nothing of the image."""
    processor = AriaImageProcessorPil(max_image_size=longest)
    for size in [*SIZES, (15, 980), (336, 979), (979, 980)]:
        image = noise_image(*size)
        theirs = processor([image], return_tensors="pt")
        square_1CSS, mask_1SS = theirs["pixel_values"], theirs["pixel_mask"]
        used_GG = mask_1SS[0].unflatten(0, (-1, 14)).unflatten(2, (-1, 14)).any(3).any(1)
        cut = vit_patches(image, longest**2, ARIA, 336**2)
        rows, columns = cut.grid
        assert used_GG.nonzero().amax(0).tolist() == [rows - 1, columns - 1], size
        assert used_GG.sum() == rows * columns == len(cut.patches)
        assert (cut.rows, cut.columns) == (1, {490: 128, 980: 256}[longest])
        expected_CSS = square_1CSS[0][:, : 14 * rows, : 14 * columns]
        found_CSS = unpatchify(cut.patches, rows, columns, 14)
        torch.testing.assert_close(found_CSS, expected_CSS, rtol=0, atol=1e-6)


def test_without_a_minimum_the_shorter_side_of_aria_s_images_keeps_the_shape():
    assert longest_side_size(100, 200, 490, 336) == (336, 490)
    assert longest_side_size(100, 200, 490, 0) == (245, 490)
    assert longest_side_size(3000, 1, 490, 0) == (490, 1)


def test_a_budget_that_no_queries_are_for_is_refused():
    message = (
        r"data.vit_pixels: .* queries for squares of 240100 \(490\*\*2\) or 960400 \(980\*\*2\) pixels, "
        "got 65536; set one of these"
    )
    with pytest.raises(ValueError, match=message):
        vit_patches(noise_image(40, 40), HIGH, ARIA, 0)
    row = {"name": "mmu", "task": "mmu", "format": "parquet", "path": "-"}
    with pytest.raises(ValueError, match=message):
        sequence_size(Data(sources=[row], vit_pixels=HIGH), 2048, ARIA)


def test_rows_have_room_for_the_patches_that_their_queries_read():
    def room(geometry, tokens, task="mmu", **settings):
        row = {"name": "a", "task": task, "format": "parquet", "path": "-"}
        config = Data(sources=[row], max_vit_tokens=tokens, **settings)
        size = sequence_size(config, 2048, geometry)
        return size.num_vit_tokens, size.num_vit_patches

    assert room(ARIA, 300, vit_pixels=490**2) == (256, 2 * 35**2)
    assert room(ARIA, 300, vit_pixels=980**2) == (256, 70**2)
    assert room(ARIA, 0, vit_pixels=980**2) == (2048, 8 * 70**2)
    assert room(ARIA, 200, vit_pixels=980**2) == (0, 0)
    assert room(ARIA, 300, task="lm") == (0, 0)  # whatever vit_pixels is
    assert room(QWEN3_VL, 300) == room(QWEN3_VL, 300, task="lm") == (300, 4 * 300)


def test_a_row_that_holds_no_image_is_refused_with_the_number_that_was_set(tmp_path):
    row = {"name": "mmu", "task": "mmu", "format": "parquet", "path": str(tmp_path)}
    config = Data(sources=[row], vit_pixels=490**2, max_vit_tokens=100)
    with pytest.raises(ValueError, match="data.max_vit_tokens: 100 is too few .* 128 tokens"):
        build_spec(config, Latents(), ARIA, "sequence", ByteTokenizer(), 2048, 1)


def size_or_none(size, *arguments, **keywords):
    try:
        return size(*arguments, **keywords)
    except (ImageSizeError, ValueError):
        return None


@pytest.mark.parametrize("geometry", [QWEN2_VL, GLM_4V], ids=["qwen2", "glm"])
def test_any_shape_gets_the_size_of_the_image_processor_or_is_refused_by_both(geometry):
    processor, frames = (qwen_resize, 1) if geometry is QWEN2_VL else (glm_resize, 2)
    sides = np.exp(np.random.default_rng(0).uniform(0, np.log(5000), (5000, 2))).astype(int)
    refused = 0
    for height, width in sides.tolist():
        budget = {"factor": 28, "min_pixels": frames * LOW, "max_pixels": frames * HIGH}
        frame = {} if frames == 1 else {"num_frames": frames}
        theirs = size_or_none(processor, **frame, height=height, width=width, **budget)
        ours = size_or_none(backbone_size, height, width, HIGH, 28, LOW, widen=geometry is GLM_4V)
        assert ours == theirs, (height, width)
        refused += ours is None
    assert 100 < refused < 2000


def test_a_shape_that_the_backbone_does_not_take_is_refused():
    with pytest.raises(
        ImageSizeError, match="6030 x 30 pixels, the backbone takes sides up to 1 : 200"
    ):
        backbone_size(30, 6030, HIGH, 28, LOW, widen=False)
    with pytest.raises(ValueError, match="aspect ratio"):
        processor_of(QWEN2_VL)(noise_image(30, 6030))


def test_without_a_minimum_no_image_is_enlarged_or_lost():
    assert backbone_size(40, 50, HIGH, 28, 0, widen=False) == (28, 56)
    assert backbone_size(5, 7, HIGH, 28, 0, widen=False) == (28, 28)
    assert fit_size(40, 48, 10_000, 8) == (40, 48)


def test_our_own_rule_enlarges_small_images_to_the_minimum_only():
    assert fit_size(16, 24, 10_000, 8, min_pixels=4 * 16 * 24) == (32, 48)
    assert fit_size(64, 64, 10_000, 8, min_pixels=2000) == (64, 64)
    assert fit_size(8, 8, 1024, 8, min_pixels=1024) == (32, 32)


def test_a_minimum_above_the_budget_is_refused():
    with pytest.raises(
        ValueError, match="data.vit_min_pixels: must be at most data.vit_pixels = 64, got 65"
    ):
        Data(vit_pixels=64, vit_min_pixels=65)
