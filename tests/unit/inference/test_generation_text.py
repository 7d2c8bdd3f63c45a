"""Text: cached equals uncached, a batch equals single prompts, draws, endings, and how likely a text is."""

import pytest
import torch

from symbiotic_titan.data.documents import (
    Document,
    TextSegment,
)
from symbiotic_titan.data.packing import SequenceSize
from symbiotic_titan.data.sequence_builder import SequenceBuilder
from symbiotic_titan.inference.generator import Generator
from symbiotic_titan.inference.prompts import PromptMaker
from symbiotic_titan.inference.session import Session
from symbiotic_titan.inference.text import (
    Endings,
    TextSampling,
    TokenSampler,
    continue_prompts,
)
from symbiotic_titan.sequence.modality import NO_TASK
from tests.helpers.pictures import picture

PROMPTS = ["what?", "how many shapes are there in it?", "the digit"]
IMAGES = [[picture(1)], [], [picture(2, 32, 32), picture(3, 40, 24)]]
NOTHING = torch.empty(0, dtype=torch.int64)


def ids(completions):
    return [c.ids for c in completions]


@torch.no_grad()
def logits_of(model, tokenizer, segments):
    """(T, V): the plain forward over one row of training."""
    document = Document(NO_TASK, tuple(segments))
    patches = document.num_vit_patches
    size = SequenceSize(document.num_tokens, document.num_vit_tokens, 1, num_vit_patches=patches)
    args = model.args
    row = SequenceBuilder(size, args.geometry, args.rotary_layout, tokenizer.special).build(
        [document]
    )
    return model(row, row.latents, torch.zeros(row.vae_image.shape), torch.tensor(1.0)).logits[0]


@pytest.mark.parametrize("kind", ["squares", "queries"])
def test_greedy_tokens_are_those_of_a_plain_loop_over_training_rows(
    model, query_model, config, tokenizer, kind
):
    model = {"squares": model, "queries": query_model}[kind]
    generator = Generator(model, config, tokenizer, torch.device("cpu"))
    uncached = Generator(model, config, tokenizer, torch.device("cpu"), cached=False)
    prompts = PromptMaker(tokenizer, model.args.geometry, config.data, config.training.seq_len)
    drawn = ids(generator.text(PROMPTS, IMAGES, max_tokens=7))
    assert drawn == ids(uncached.text(PROMPTS, IMAGES, max_tokens=7))
    for prompt, images, found in zip(PROMPTS, IMAGES, drawn, strict=True):
        segments, expected = prompts.conversation(prompt, images).segments, []
        for _ in range(7):
            logits = logits_of(model, tokenizer, [*segments, TextSegment(expected)])[-1]
            logits[generator._no_text] = float("-inf")
            expected.append(int(logits.argmax()))
        assert found == expected
    assert len({tuple(found) for found in drawn}) > 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_text_is_the_same_alone_and_in_a_batch(generator, temperature):
    settings = {"max_tokens": 6, "temperature": temperature, "top_p": 0.9, "seed": 3}
    together = generator.text(PROMPTS, IMAGES, **settings)
    assert generator.text(PROMPTS, IMAGES, **settings, batch_size=2) == together
    for i, prompt in enumerate(PROMPTS):
        alone = generator.text([prompt], [IMAGES[i]], **settings, first_index=i)
        assert alone == [together[i]]


def test_a_seed_reproduces_and_another_does_not(generator):
    draws = [generator.text(PROMPTS, max_tokens=9, temperature=1.0, seed=s) for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def frequencies(sampling, logits, count=4000):
    draw = TokenSampler(sampling, 0, range(count), NOTHING)
    return draw(logits.expand(count, -1)).bincount(minlength=logits.numel()) / count


def test_draws_follow_the_softmax_at_a_temperature():
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0])
    for temperature in (0.5, 2.0):
        found = frequencies(TextSampling(1, temperature), logits)
        assert (found - (logits / temperature).softmax(-1)).abs().max() < 0.03


def test_top_p_draws_from_the_fewest_likeliest_tokens_that_have_that_probability():
    probability = torch.tensor([0.1, 0.5, 0.15, 0.25])
    found = frequencies(TextSampling(1, 1.0, top_p=0.7), probability.log())
    assert (found - torch.tensor([0.0, 2 / 3, 0.0, 1 / 3])).abs().max() < 0.03
    assert frequencies(TextSampling(1, 1.0, top_p=0.01), probability.log())[1] == 1.0


def test_banned_ids_are_never_drawn():
    logits = torch.tensor([[5.0, 4.0, 3.0]])
    banned = torch.tensor([0])
    assert TokenSampler(TextSampling(1), 0, [0], banned)(logits).tolist() == [1]
    drawn = TokenSampler(TextSampling(1, 3.0), 0, range(200), banned)(logits.expand(200, -1))
    assert set(drawn.tolist()) == {1, 2}


class Script:
    """Draws what it is told, row by row."""

    def __init__(self, *rows):
        self.rows, self.step = rows, -1

    def __call__(self, logits_BV):
        self.step += 1
        return torch.tensor([row[self.step] if self.step < len(row) else 0 for row in self.rows])


def run_script(model, chunks, prompts, rows, most, any_of=bool, is_stopped=lambda ids: False):
    documents = [prompts.text("a")] * len(rows)
    endings = Endings(sequences=([7, 8], [9]), is_stopped=is_stopped)
    session = Session(model)
    return continue_prompts(session, chunks, documents, most, Script(*rows), endings, any_of)


def test_each_row_ends_by_itself_and_without_what_ended_it(model, chunks, prompts):
    rows = [[1, 2, 9], [1, 7, 8], [7, 1, 8, 3], [1, 1], [5]]
    found = run_script(
        model, chunks, prompts, rows, [9, 9, 4, 2, 9], is_stopped=lambda ids: 5 in ids
    )
    assert [(row.ids, row.ending) for row in found] == [
        ([1, 2], "end"),
        ([1], "end"),
        ([7, 1, 8, 3], "length"),
        ([1, 1], "length"),
        ([5], "stop"),
    ]


def test_processes_do_as_many_forwards_as_the_one_that_writes_most(model, chunks, prompts):
    """The others are answered for by ``any_of``."""
    answers, asked = [True, True, True, False], []

    def any_of(value):
        asked.append(value)
        return answers[len(asked) - 1]

    [row] = run_script(model, chunks, prompts, [[1, 9]], [9], any_of)
    assert row.ids == [1] and asked == [True, False, False, False]


def test_a_text_ends_at_a_string_of_stop_which_is_cut_off(generator, tokenizer):
    [free] = generator.text(["what?"], max_tokens=12)
    text = tokenizer.decode(free.ids)
    [stopped] = generator.text(["what?"], max_tokens=12, stop=["never written", text[4:6]])
    assert stopped.ending == "stop"
    assert stopped.text == text[: text.index(text[4:6])]


def test_a_text_ends_where_the_row_is_full(generator):
    [completion] = generator.text(["a" * 378], max_tokens=99)  # and three tokens around it
    assert completion.ending in ("length", "end") and len(completion.ids) <= 3


def test_progress_counts_tokens_up_to_those_that_may_come(generator):
    told = []

    def progress(what, total):
        told.append((what, total))
        return told.append

    generator.text(["a" * 378, "b"], max_tokens=12, batch_size=2, progress=progress)
    assert told[0] == ("tokens", 3 + 12)
    assert all(told[1:]) and sum(told[1:]) == 3 + 12 and len(told) > 2


def test_log_likelihoods_are_sums_over_the_continuation(generator, model, tokenizer, prompts):
    pairs = [("the", " red circle"), ("how many are there", " one"), ("", "x")]
    found = generator.log_likelihoods(pairs, batch_size=2)
    for (context, continuation), result in zip(pairs, found, strict=True):
        wanted = torch.tensor(tokenizer.encode(continuation))
        segments = prompts.text(context + continuation).segments
        logits = logits_of(model, tokenizer, segments)[-len(wanted) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, wanted[:, None]).sum()
        assert result.sum == pytest.approx(float(expected), abs=1e-4)
        assert result.num_tokens == len(wanted) and not result.is_greedy


def test_nothing_is_certain_behind_anything(generator):
    [found] = generator.log_likelihoods([("how", "")])
    assert found == (0.0, True, 0)


def test_what_the_model_writes_is_greedy_and_likelier_than_anything_else(generator):
    [written] = generator.text(["how"], max_tokens=3, conversation=True)
    pairs = [("how", written.ids), ("how", [*written.ids[:2], 65])]
    best, other = generator.log_likelihoods(pairs, conversation=True)
    assert best.is_greedy and not other.is_greedy and best.sum > other.sum
    shown = generator.log_likelihoods(pairs[:1], [[picture(1)]], conversation=True)
    assert abs(shown[0].sum - best.sum) > 1e-3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: g.text(["a"], max_tokens=0), "max_tokens: must be at least 1, got 0"),
        (lambda g: g.text(["a"], temperature=-1), "temperature: must be zero or positive, got -1"),
        (lambda g: g.text(["a"], top_p=0), r"top_p: must be in \(0, 1\], got 0"),
        (lambda g: g.text(["a"], batch_size=0), "batch_size: must be at least 1, got 0"),
        (lambda g: g.text(["a", "b"], [[]]), "images: must be a list of images for each of the 2"),
        (lambda g: g.text(["a"], IMAGES[:1], conversation=False), "shown in a conversation"),
        (lambda g: g.text(["a", "b" * 400]), "prompt #1: its 403 tokens and 1 of its answer"),
        (lambda g: g.log_likelihoods([("a" * 380, "b" * 9)]), "prompt #0: .* and 9 after them"),
    ],
)
def test_a_users_mistake_is_named(generator, call, message):
    with pytest.raises(ValueError, match=message):
        call(generator)
