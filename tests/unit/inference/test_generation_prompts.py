"""A prompt is, token by token, the beginning of the training document that it stands for."""

import io

import pytest
from PIL import Image

from symbiotic_titan.config.tokenizer import Tokenizer
from symbiotic_titan.data.decoding import ORIENTATION, UPRIGHT
from symbiotic_titan.data.documents import (
    TextSegment,
    VaeSegment,
    VitSegment,
)
from symbiotic_titan.data.tokenizer import ByteTokenizer, open_tokenizer
from symbiotic_titan.inference.prompts import PromptMaker
from tests.helpers.pictures import encoded, picture
from tests.helpers.tokenizer_files import QWEN_TOKENS, byte_level_bpe, write


def tokens_of(document):
    """Ids, and a word for each token of an image."""
    words = {VitSegment: "vit", VaeSegment: "vae"}
    tokens = []
    for s in document.segments:
        tokens += s.ids if isinstance(s, TextSegment) else [words[type(s)]] * (s.rows * s.columns)
    return tokens


# Turns whose marks are shared: what ends a user's turn begins the assistant's, and the opening begins the user's.
SHARED_MARKS = {
    "user": ["<|im_start|>", "<|im_end|>"],
    "assistant": ["<|im_end|>", "<|im_start|>"],
}


@pytest.fixture(params=["bytes", "qwen", "shared marks"])
def any_tokenizer(request, tmp_path):
    if request.param == "bytes":
        return ByteTokenizer()
    folder = write(tmp_path / "qwen", byte_level_bpe(QWEN_TOKENS))
    section = Tokenizer("huggingface", str(folder))
    if request.param == "shared marks":
        section = Tokenizer(
            "huggingface",
            str(folder),
            special={"bos": "<|im_start|>"},
            turns=SHARED_MARKS,
            turn_separator="",
        )
    return open_tokenizer(section)


@pytest.fixture
def maker(any_tokenizer, model, config):
    return PromptMaker(any_tokenizer, model.args.geometry, config.data, 384)


@pytest.mark.parametrize("caption", ["a red circle", ""])
def test_an_image_prompt_ends_where_the_training_sample_has_its_image(
    caption, maker, any_tokenizer, training_document
):
    trained = tokens_of(
        training_document(
            "t2i",
            tokenizer=any_tokenizer,
            dropout=not caption,
            caption=(caption or "dropped").encode(),
            png=encoded(picture(1)),
        )
    )
    prompt = tokens_of(maker.image(caption))
    assert trained[: len(prompt)] == prompt
    assert trained[len(prompt)] == "vae"


def test_a_question_ends_where_the_training_sample_has_its_answer(
    maker, any_tokenizer, training_document
):
    image = picture(2, 40, 24)
    trained = tokens_of(
        training_document(
            "mmu", tokenizer=any_tokenizer, question=b"what?", answer=b"ab", png=encoded(image)
        )
    )
    prompt = maker.conversation("what?", [image])
    answer = [*any_tokenizer.encode("ab"), *any_tokenizer.turn("assistant").suffix]
    assert tokens_of(prompt) == trained[: -len(answer)]
    assert trained[-len(answer) :] == answer


def test_plain_text_begins_as_a_training_text(maker, any_tokenizer, training_document):
    trained = tokens_of(training_document("lm", tokenizer=any_tokenizer, text=b"plain words"))
    assert tokens_of(maker.text("plain words")) == trained[:-1]
    assert tokens_of(maker.text(any_tokenizer.encode("plain words"))) == trained[:-1]


def test_a_prompt_that_is_too_long_is_named_with_what_to_cut(config, model):
    maker = PromptMaker(ByteTokenizer(), model.args.geometry, config.data, seq_len=20)
    documents = [maker.image("abc"), maker.image("a" * 12)]
    maker.check_room(documents, [4, 4], "of its image")
    with pytest.raises(
        ValueError, match=r"prompt #1: its 16 tokens and 5 of its image .*seq_len = 20; .* by 1$"
    ):
        maker.check_room(documents, [5, 5], "of its image")


def test_images_of_a_prompt_are_turned_upright_and_laid_on_white(maker):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    stored = picture(0, height=16, width=48)
    shown = stored.transpose(UPRIGHT[6])
    turned = Image.open(io.BytesIO(encoded(stored, exif=exif)))
    assert tokens_of(maker.conversation("q", [turned])) == tokens_of(
        maker.conversation("q", [shown])
    )
    clear, white = Image.new("RGBA", (16, 16), (255, 0, 0, 0)), Image.new("RGB", (16, 16), "white")
    for given, right in ((turned, shown), (clear, white)):
        [found, wanted] = [
            next(s for s in maker.conversation("q", [i]).segments if isinstance(s, VitSegment))
            for i in (given, right)
        ]
        assert found.grid == wanted.grid and (found.patches == wanted.patches).all()
