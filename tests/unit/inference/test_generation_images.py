"""Images: the batch, the seed, guidance, sizes, the note in the file; and a model that has learnt two pictures draws them."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from symbiotic_titan.data.documents import (
    Document,
    VaeSegment,
)
from symbiotic_titan.data.latents import to_pixels
from symbiotic_titan.data.packing import SequenceSize
from symbiotic_titan.data.sequence_builder import SequenceBuilder
from symbiotic_titan.flow.noise import noise_of_image
from symbiotic_titan.flow.path import interpolate, velocity_target
from symbiotic_titan.flow.solver import time_grid
from symbiotic_titan.inference.generator import Generator
from symbiotic_titan.inference.images import (
    LatentGrid,
    choose_size,
    unpatchified,
)
from symbiotic_titan.inference.prompts import PromptMaker
from symbiotic_titan.model.flavors import model_args
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.sequence.batch import stack_rows
from symbiotic_titan.sequence.geometry import patchify
from tests.helpers.pictures import picture

PROMPTS = ["a red circle at the top", "two", "the digit seven"]
FEW = {"steps": 3, "guidance": 2.5}


def pixels(pictures):
    return [np.asarray(p.image, dtype=np.float64) for p in pictures]


def assert_same(some, others):
    """Equal but for rounding to whole grey levels."""
    for a, b in zip(pixels(some), pixels(others), strict=True):
        assert np.abs(a - b).max() <= 1


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_an_image_is_the_same_alone_and_in_a_batch(generator, guidance):
    settings = {"steps": 3, "guidance": guidance, "seed": 5}
    together = generator.images(PROMPTS, **settings)
    assert_same(generator.images(PROMPTS, **settings, batch_size=2), together)
    for i, prompt in enumerate(PROMPTS):
        assert_same(generator.images([prompt], **settings, first_index=i), [together[i]])
    levels = pixels(together)
    assert np.abs(levels[0] - levels[1]).mean() > 10


def test_the_cache_does_not_change_an_image(generator, make_generator):
    uncached = make_generator(cached=False)
    assert_same(generator.images(PROMPTS, **FEW), uncached.images(PROMPTS, **FEW))


def test_a_seed_reproduces_and_another_does_not(generator):
    first, again, other = (generator.images(PROMPTS[:1], **FEW, seed=s) for s in (1, 1, 2))
    assert np.array_equal(*pixels([*first, *again]))
    assert np.abs(np.subtract(*pixels([*first, *other]))).mean() > 10


@torch.no_grad()
def euler_by_hand(model, training_row, guidance, steps):
    """The plain loop: whole rows of training, each branch in a forward of its own, no cache."""
    x_LZ = noise_of_image(3, 0, 64, 48)
    for t, following in zip(time_grid(steps, 1.0), time_grid(steps, 1.0)[1:], strict=False):
        velocities = []
        for row in training_row:
            times = torch.full(row.vae_image.shape, t)
            velocities.append(model(row, x_LZ[None], times, torch.tensor(1.0)).velocity[0])
        conditional, unconditional = velocities
        velocity = unconditional + guidance * (conditional - unconditional)
        x_LZ = x_LZ + (following - t) * velocity
    return x_LZ


@pytest.mark.parametrize("layout", ["grid", "sequence"])
def test_guided_images_are_those_of_a_plain_loop_over_training_rows(
    model, query_model, config, tokenizer, prompts, layout
):
    """Where tokens of images have rows and columns, and where they count up."""
    model = {"grid": model, "sequence": query_model}[layout]
    generator, args = Generator(model, config, tokenizer, torch.device("cpu")), model.args
    assert args.rotary_layout == layout
    rows = []
    for caption in ("a cross", ""):
        image = VaeSegment(torch.zeros(64, 48), 8, 8)
        document = Document(2, (*prompts.image(caption).segments, image))
        size = SequenceSize(document.num_tokens, 0, 64, num_vit_patches=0)
        builder = SequenceBuilder(size, args.geometry, args.rotary_layout, tokenizer.special)
        rows.append(builder.build([document]))
    latents_LZ = euler_by_hand(model, rows, guidance=2.0, steps=4)
    [cells] = unpatchified(latents_LZ[None], LatentGrid(8, 8), args.geometry)
    expected = ((cells.clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
    [drawn] = generator.images(["a cross"], steps=4, guidance=2.0, seed=3, shift=1.0)
    assert np.abs(np.asarray(drawn.image) - expected).max() <= 1


def test_guidance_one_reads_no_second_branch(generator, model, monkeypatch):
    rows = []
    forward = model.forward
    monkeypatch.setattr(
        model,
        "forward",
        lambda batch, *a, **k: rows.append(len(batch.tokens)) or forward(batch, *a, **k),
    )
    for guidance in (1.0, 2.0):
        generator.images(PROMPTS, steps=2, guidance=guidance)
    assert rows == [3, 3, 3, 6, 6, 6]


def test_cells_are_put_together_as_training_takes_them_apart(model):
    cells_CHW = to_pixels(picture(4, 24, 40))
    tokens_LZ = patchify(cells_CHW, 4)
    [together] = unpatchified(tokens_LZ[None], LatentGrid(6, 10), model.args.geometry)
    assert torch.equal(together, cells_CHW)


BUCKETS = [(24, 40), (32, 32), (40, 24)]


@pytest.mark.parametrize(
    ("size", "aspect", "chosen"),
    [
        (None, None, (32, 32)),
        ((24, 40), None, (24, 40)),
        (None, "3:2", (24, 40)),
        (None, "3:5", (40, 24)),
        (None, "10:9", (32, 32)),
    ],
)
def test_a_size_or_an_aspect_chooses_a_bucket(size, aspect, chosen):
    assert choose_size(size, aspect, BUCKETS) == chosen


@pytest.mark.parametrize(
    ("size", "aspect", "message"),
    [
        ((24, 32), None, "size 24 x 32: no bucket .* 24 x 40, 32 x 32, 40 x 24"),
        (None, "3:1", "aspect '3:1': must be width:height.* 24 x 40, 32 x 32, 40 x 24"),
        (None, "wide", "aspect 'wide': must be width:height"),
        (None, "0:1", "aspect '0:1': must be width:height"),
        ((32, 32), "1:1", "give one of them"),
    ],
)
def test_an_unknown_size_names_the_buckets(size, aspect, message):
    with pytest.raises(ValueError, match=message):
        choose_size(size, aspect, BUCKETS)


def test_a_file_carries_how_it_was_made(generator, tmp_path):
    prompt = "ein r\u00f6ter Kreis \u4e2d"
    [drawn] = generator.images([prompt], **FEW, seed=9, size=(24, 40), first_index=4)
    drawn.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (40, 24)
        text = dict(image.text)
    assert text == {
        "prompt": prompt,
        "seed": "9",
        "index": "4",
        "steps": "3",
        "sampler": "euler",
        "shift": "1.0",
        "guidance": "2.5",
        "checkpoint": "",
    }


def test_guidance_without_dropped_captions_is_warned_of(
    generator, make_generator, config, monkeypatch, caplog
):
    data = replace(config.data, condition_dropout=0.0)
    monkeypatch.setattr(config, "data", data)
    with caplog.at_level(logging.WARNING):
        generator.images(PROMPTS[:1], steps=1, guidance=1.0)
        assert "guidance" not in caplog.text
        generator.images(PROMPTS[:1], steps=1, guidance=3.0)
    assert "guidance = 3 reads images without a caption" in caplog.text


def test_a_caption_longer_than_a_row_is_an_error(generator):
    with pytest.raises(ValueError, match=r"prompt #0: .* 64 of its image .*seq_len = 384"):
        generator.images(["a" * 400], **FEW)


def test_progress_counts_images_and_steps(generator):
    told = []
    generator.images(PROMPTS, steps=4, guidance=1.0, batch_size=2, advance=told.append)
    assert told == [2] * 4 + [1] * 4


def two_pictures():
    """A red square at the top left and a blue one at the bottom right, 16 x 16."""
    first, second = (Image.new("RGB", (16, 16), "black") for _ in range(2))
    first.paste("red", (1, 1, 9, 9))
    second.paste("blue", (7, 7, 15, 15))
    return [first, second]


@pytest.mark.slow  # half a minute of training
def test_a_model_that_has_learnt_two_pictures_draws_the_one_that_its_caption_names(
    config, tokenizer
):
    captions, pictures = ["a red square", "a blue square"], two_pictures()
    small = {"dim": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "num_experts": 16}
    with torch.device("meta"):
        model = SymbioticModel(replace(model_args(config), **small))
    model.to_empty(device="cpu")
    model.init_weights()
    maker = PromptMaker(tokenizer, model.args.geometry, config.data, 384)
    documents = [
        Document(2, (*maker.image(c).segments, VaeSegment(patchify(to_pixels(p), 4), 4, 4)))
        for c, p in zip(captions, pictures, strict=True)
    ]
    size = SequenceSize(max(document.num_tokens for document in documents), 0, 16)
    builder = SequenceBuilder(
        size, model.args.geometry, model.args.rotary_layout, tokenizer.special
    )
    learn(model, stack_rows([builder.build([document]) for document in documents * 4]))

    settings = replace(config.data, vae_pixels=256)
    generator = Generator(
        model.eval(), replace(config, data=settings), tokenizer, torch.device("cpu")
    )
    drawn = generator.images(captions, steps=20, guidance=1.0)
    errors = [
        [np.abs(image - np.asarray(picture)).mean() for picture in pictures]
        for image in pixels(drawn)
    ]
    for i, other in ((0, 1), (1, 0)):
        assert errors[i][i] < 15 < 30 < errors[i][other]


def learn(model, batch, steps=400):
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, (step + 1) / 10) * (1 - step / steps)
        noise = torch.randn(batch.latents.shape)
        times = torch.rand(len(noise), 1).expand(batch.vae_image.shape)
        noised = interpolate(batch.latents, noise, times)
        velocity = model(batch, noised, times, torch.tensor(1.0)).velocity
        (velocity - velocity_target(batch.latents, noise)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
