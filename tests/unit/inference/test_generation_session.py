"""Reading rows chunk by chunk gives what one forward over whole rows of the data chain gives."""

import copy
from dataclasses import replace

import pytest
import torch

from symbiotic_titan.data.documents import (
    Document,
    TextSegment,
    VaeSegment,
)
from symbiotic_titan.data.packing import SequenceSize
from symbiotic_titan.data.sequence_builder import SequenceBuilder
from symbiotic_titan.inference.generator import Generator
from symbiotic_titan.inference.session import Session
from symbiotic_titan.model.kv_cache import LayerCache
from symbiotic_titan.parallel.compile import apply_compile
from symbiotic_titan.sequence.modality import NO_TASK
from tests.helpers.pictures import encoded, picture

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
CACHED = pytest.mark.parametrize("cached", [True, False])


def training_row(document, model, tokenizer):
    """The row of training that holds ``document`` alone, with some padding."""
    args, special = model.args, tokenizer.special
    size = SequenceSize(
        document.num_tokens + 9, document.num_vit_tokens + 2, document.num_vae_tokens + 3
    )
    return SequenceBuilder(size, args.geometry, args.rotary_layout, special).build([document])


@torch.no_grad()
def read_whole(model, row, latents=None, timestep=0.0):
    """The plain forward of training, without a chunk or a cache."""
    timesteps_BL = torch.full(row.vae_image.shape, timestep)
    return model(row, row.latents if latents is None else latents, timesteps_BL, torch.tensor(1.0))


def all_columns(batch):
    return torch.arange(batch.tokens.shape[1]).expand(batch.tokens.shape[0], -1)


@pytest.fixture
def documents(prompts):
    """Prompts of different lengths, with two images, none and one."""
    return [
        prompts.conversation("what?", [picture(1), picture(2, 32, 32)]),
        prompts.text("plain"),
        prompts.conversation("how many are there?", [picture(3, 40, 24)]),
    ]


@CACHED
def test_prompts_and_tokens_after_them_read_as_rows_of_training(
    cached, documents, model, tokenizer, chunks
):
    session, after = Session(model, cached=cached), [[65, 66, 67], [70], [80, 81]]
    rows = chunks.prompts(documents)
    first = session.prefill(rows.batch, all_columns(rows.batch)).logits
    steps = []
    for step in range(3):
        active = [step < len(ids) for ids in after]
        tokens = [ids[step] if step < len(ids) else 99 for ids in after]
        chunk = chunks.tokens(torch.tensor(tokens), rows.positions + step, torch.tensor(active))
        steps.append(session.decode(chunk).logits[:, 0])
    for b, (document, ids) in enumerate(zip(documents, after, strict=True)):
        whole = Document(NO_TASK, (*document.segments, TextSegment(ids)))
        expected = read_whole(model, training_row(whole, model, tokenizer)).logits[0]
        length = document.num_tokens
        torch.testing.assert_close(first[b, :length], expected[:length], **CLOSE)
        for step in range(len(ids)):
            torch.testing.assert_close(steps[step][b], expected[length + step], **CLOSE)


@CACHED
def test_an_image_after_a_caption_reads_as_the_training_sample(
    cached, prompts, chunks, model, tokenizer, training_document
):
    """Also after it was read at other timesteps: it is never kept."""
    document = training_document("t2i", caption=b"a cross", png=encoded(picture(5)))
    image = next(s for s in document.segments if isinstance(s, VaeSegment))
    row = training_row(document, model, tokenizer)
    noised_BLZ = torch.randn(row.latents.shape)
    expected = read_whole(model, row, noised_BLZ, timestep=0.3).velocity
    assert expected[0, 0].abs().max() > 0.1

    num_tokens = image.rows * image.columns
    session, prompt = Session(model, cached=cached), chunks.prompts([prompts.image("a cross")])
    session.prefill(prompt.batch)
    chunk = chunks.images(prompt, image.rows, image.columns)
    chunk = replace(chunk, latents=noised_BLZ[:, :num_tokens])
    for timestep in (1.0, 0.7, 0.3):
        out = session.denoise(chunk, timestep)
    torch.testing.assert_close(out.velocity, expected[:, :num_tokens], **CLOSE)
    assert out.logits.shape[1] == 0


@CACHED
def test_a_text_that_goes_on_does_not_see_the_image_read_meanwhile(cached, prompts, chunks, model):
    def logits(meanwhile):
        session, rows = Session(model, cached=cached), chunks.prompts([prompts.image("a cross")])
        session.prefill(rows.batch)
        if meanwhile:
            session.denoise(chunks.images(rows, 5, 7), 0.5)
        chunk = chunks.tokens(torch.tensor([7]), rows.positions, torch.tensor([True]))
        return session.decode(chunk).logits

    assert torch.equal(logits(meanwhile=True), logits(meanwhile=False))


@CACHED
def test_padding_is_routed_nowhere(cached, documents, chunks, model):
    session, rows = Session(model, cached=cached), chunks.prompts(documents)
    counts = session.prefill(rows.batch, all_columns(rows.batch)).records[0].counts
    assert counts.sum() == model.args.top_k * sum(d.num_tokens for d in documents)
    active = torch.tensor([False, True, False])
    chunk = chunks.tokens(torch.tensor([1, 2, 3]), rows.positions, active)
    records = session.decode(chunk).records
    new = records[0].counts.sum() - (0 if cached else counts.sum())
    assert new == model.args.top_k


def test_a_model_compiled_for_training_can_be_read(model, make_generator, config, tokenizer):
    compiled = copy.deepcopy(model)
    apply_compile(compiled, backend="eager")
    generator = Generator(compiled, config, tokenizer, torch.device("cpu"))
    expected = make_generator().text(["what?", "how many?"], max_tokens=12)
    assert generator.text(["what?", "how many?"], max_tokens=12) == expected


def test_the_cache_grows_without_changing_what_it_holds():
    cache, chunks = LayerCache(), [torch.randn(2, 3, n, 4) for n in (5, 1, 1, 9, 2)]
    for number, chunk in enumerate(chunks):
        cache.complete(torch.randn_like(chunk), torch.randn_like(chunk))  # overwritten: not kept
        keys, values = cache.complete(chunk, -chunk)
        cache.append(chunk.shape[2])
        held = torch.cat(chunks[: number + 1], dim=2)
        assert torch.equal(keys, held) and torch.equal(values, -held)
