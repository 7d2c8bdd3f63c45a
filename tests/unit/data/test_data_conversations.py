"""Conversations, several images and interleaved samples, as tokens of a document."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from symbiotic_titan.config.data import Data, DataSource
from symbiotic_titan.config.generation import Latents
from symbiotic_titan.data.documents import TextSegment, VitSegment
from symbiotic_titan.data.formats.shard import (
    BadSample,
    Sample,
)
from symbiotic_titan.data.latents import TargetImages
from symbiotic_titan.data.samples import DocumentMaker
from symbiotic_titan.data.tokenizer import ByteTokenizer
from symbiotic_titan.sequence.geometry import ImageGeometry

GEOMETRY = ImageGeometry(
    vit_patch=4, vit_merge=2, vit_channels=3, latent_channels=3, latent_stride=1, latent_patch=4
)
TOKENIZER = ByteTokenizer()
NAMES = {getattr(TOKENIZER.special, n): f"<{n}>" for n in vars(TOKENIZER.special)}
NAMES |= {TOKENIZER.turn(role).prefix[0]: f"<{role}>" for role in ("user", "assistant")}


def png(value):
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


RED, BLUE = png((255, 0, 0)), png((0, 0, 255))


def make(task, sample, keys=None, seq_len=256, **config):
    """The only document; members of ``sample`` that are bytes are images, all others its JSON."""
    source = DataSource("s", task, "webdataset", "x", keys or {})
    data = Data(condition_dropout=0.0, vae_pixels=64, **config)
    images = TargetImages(data, Latents(), GEOMETRY, [source])
    members = {k: v for k, v in sample.items() if isinstance(v, bytes)}
    values = {k: v for k, v in sample.items() if not isinstance(v, bytes)}
    members |= {"json": json.dumps(values).encode()} if values else {}
    maker = DocumentMaker(data, GEOMETRY, images, TOKENIZER, seq_len)
    [document] = maker.make(source, Sample("s.tar", "000", members), 0)
    return document


def layout(document):
    """The document as text, trained parts in brackets; an image is its kind and colour: vit:red."""
    out = ""
    for segment in document.segments:
        if isinstance(segment, TextSegment):
            text = "".join(NAMES.get(i) or chr(i) for i in segment.ids)
            out += f"[{text}]" if segment.trained and text else text
        else:
            is_vit = isinstance(segment, VitSegment)
            values = segment.patches if is_vit else segment.latents
            name = "red" if values[0, 0] > 0.9 else "blue"
            out += f"{{{'vit' if is_vit else 'vae'}:{name}}}"
    return out.replace("][", "")


A, USER = "<assistant>", "<user>"
VIT_RED = "<vit_start>{vit:red}<vit_end>"
VIT_BLUE = "<vit_start>{vit:blue}<vit_end>"
PAIR = {"0.png": RED, "1.png": BLUE, "images": ["0.png", "1.png"]}

TURNS = [("user", "a<image>\nb"), ("assistant", "c"), ("user", "d"), ("assistant", "e")]
MESSAGES = [{"role": role, "content": text} for role, text in TURNS]
LLAVA = [{"from": {"user": "human", "assistant": "gpt"}[r], "value": text} for r, text in TURNS]


def said(*items, role="user", last="ok"):
    return [{"role": role, "content": list(items)}, {"role": "assistant", "content": last}]


def text(words):
    return {"type": "text", "text": words}


@pytest.mark.parametrize(
    "sample",
    [
        {"messages": MESSAGES},
        {"conversations": LLAVA},
        {"messages": json.dumps(MESSAGES)},
        {
            "messages": [
                {"role": "user", "content": [text("a"), {"type": "image"}, text("b")]},
                *MESSAGES[1:],
            ]
        },
    ],
)
def test_turns_are_laid_out_and_only_the_assistant_is_trained(sample):
    document = make("mmu", {"png": RED, **sample})
    assert layout(document) == f"<bos>{USER}a{VIT_RED}b{A}[c<eos>]{USER}d{A}[e<eos>]"


def test_question_and_answer_are_a_conversation_of_two_turns():
    pair = layout(make("mmu", {"png": RED, "question": "q", "answer": "r"}))
    said = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "r"}]
    assert pair == layout(make("mmu", {"png": RED, "conversations": said}))
    assert pair == f"<bos>{USER}{VIT_RED}q{A}[r<eos>]"


def test_several_images_stand_in_their_order_and_places():
    document = make("mmu", {**PAIR, "question": "q", "answer": "r"})
    assert layout(document) == f"<bos>{USER}{VIT_RED}{VIT_BLUE}q{A}[r<eos>]"
    document = make("mmu", {**PAIR, "messages": said(text("<image>x<image>y"))})
    assert layout(document) == f"<bos>{USER}{VIT_RED}x{VIT_BLUE}y{A}[ok<eos>]"


def test_images_without_places_come_before_what_is_said_first():
    turns = [{"role": "system", "content": "s"}, *said(text("q"))]
    document = make("mmu", {**PAIR, "messages": turns})
    assert layout(document) == f"<bos>s{USER}{VIT_RED}{VIT_BLUE}q{A}[ok<eos>]"


def test_item_may_name_its_own_image():
    items = [{"type": "image", "image": "1.png"}, text("and"), {"type": "image", "path": "0.png"}]
    document = make("mmu", {"0.png": RED, "1.png": BLUE, "messages": said(*items)})
    assert layout(document) == f"<bos>{USER}{VIT_BLUE}and{VIT_RED}{A}[ok<eos>]"


def test_keys_choose_the_shape():
    sample = {"png": RED, "question": "q", "answer": "r", "chat": MESSAGES}
    assert layout(make("mmu", sample, {"messages": "chat"})).startswith(f"<bos>{USER}a{VIT_RED}b")
    assert layout(make("mmu", sample)).startswith(f"<bos>{USER}{VIT_RED}q")


def test_text_conversation_trains_answers_and_knows_no_placeholder():
    document = make("lm", {"messages": MESSAGES})
    assert layout(document) == f"<bos>{USER}a<image>\nb{A}[c<eos>]{USER}d{A}[e<eos>]"


def test_image_of_the_assistant_is_generated_and_that_of_the_user_understood():
    turns = [
        {"role": "user", "content": "<image>blue?"},
        {"role": "assistant", "content": "so:<image>"},
    ]
    document = make("interleaved", {**PAIR, "messages": turns})
    vae = "[<vae_start>]{vae:blue}<vae_end>"
    assert (
        layout(document) == f"<bos>{USER}{VIT_RED}blue?{A}[so:<vae_start>]" + vae[13:] + "[<eos>]"
    )


def test_segments_train_all_text_and_images_are_of_both_kinds():
    items = ["one", None, text("two"), {"type": "image", "use": "generate"}, "three"]
    document = make("interleaved", {**PAIR, "segments": items})
    assert layout(document) == (
        f"<bos>[one]{VIT_RED}[two<vae_start>]{{vae:blue}}<vae_end>[three<eos>]"
    )


BAD = [
    ({"messages": []}, "empty", "its messages are empty"),
    ({"messages": "[{"}, "json", "its messages cannot be parsed"),
    ({"messages": {"role": "user"}}, "wrong_type", "its messages must be a list, got {'role'"),
    ({"messages": ["hello"]}, "conversation", "turn 1 of its messages must be a table with 'role'"),
    ({"messages": [{"role": "user", "content": "q"}]}, "conversation", "is the assistant's"),
    ({"messages": said(text(" "))}, "empty", "turn 1 of its messages is empty"),
    ({"messages": said(text("q"), last="")}, "empty", "turn 2 of its messages is empty"),
    ({"messages": said(text(7))}, "wrong_type", "the text of turn 1 of its messages must be a str"),
    ({"messages": said(text("<image>"))}, "conversation", "a place for an image that is not there"),
    (
        {**PAIR, "messages": said(text("<image>"))},
        "conversation",
        "its messages have places for 1 images too few",
    ),
    ({"messages": said({"type": "video"})}, "conversation", "turn 1 of its messages: video is not"),
    ({"messages": said(text("q"), role="tool")}, "conversation", "role 'tool' has no turn"),
    (
        {"messages": said({"type": "image", "image": "no.png"})},
        "unreadable",
        "image no.png cannot be read",
    ),
    (
        {**PAIR, "messages": said({"type": "image", "use": "draw"})},
        "conversation",
        "use must be generate or understand, got 'draw'",
    ),
    (
        {**PAIR, "messages": said(text("q<image>"), last="<image>")},
        "conversation",
        "the assistant gives an image; that needs the task interleaved",
    ),
    (
        {"conversations": [{"from": "gpt", "value": None}]},
        "conversation",
        "None is neither text nor",
    ),
]


@pytest.mark.parametrize("sample, reason, message", BAD, ids=[m for _, _, m in BAD])
def test_conversation_of_no_use_is_named_with_its_reason(sample, reason, message):
    with pytest.raises(BadSample) as error:
        make("mmu", sample)
    assert error.value.reason == reason
    assert str(error.value).startswith("s.tar: sample '000': ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "segments, reason, message",
    [
        ([None], "conversation", "its segments: a place for an image that is not there"),
        ([7], "conversation", "its segments: 7 is neither text nor image"),
        ([{"type": "image", "image": "0.png"}], "empty", "its segments hold nothing to train"),
        (["a"], "conversation", "its segments have places for 1 images too few"),
    ],
)
def test_segments_of_no_use_are_named_with_their_reason(segments, reason, message):
    extra = {"png": RED} if segments == ["a"] else {"0.png": RED}
    with pytest.raises(BadSample) as error:
        make("interleaved", {**extra, "segments": segments})
    assert error.value.reason == reason and message in str(error.value)


def test_conversation_too_long_for_a_row_is_cut_where_the_row_ends():
    sample = {"png": RED, "messages": MESSAGES}
    whole = layout(make("mmu", sample))
    tokens = make("mmu", sample).num_tokens
    with pytest.raises(BadSample) as error:
        make("mmu", sample, seq_len=tokens - 1)
    assert error.value.reason == "too_long"
    for length in range(9, tokens):
        cut = make("mmu", sample, seq_len=length, too_long="truncate")
        assert cut.truncated and cut.num_tokens == length
        assert whole.replace("]", "").startswith(layout(cut).replace("]", ""))
    with pytest.raises(BadSample, match="it needs 15 tokens, a row holds 7"):  # nothing to train
        make("mmu", sample, seq_len=7, too_long="truncate")


def test_truncation_never_cuts_an_image():
    items = ["one", None, "two", {"type": "image", "use": "generate"}, "three"]
    for length in range(4, 22):
        cut = make("interleaved", {**PAIR, "segments": items}, seq_len=length, too_long="truncate")
        assert cut.num_tokens <= length
        assert layout(cut).count("vae_start") == layout(cut).count("{vae")
        assert layout(cut).count("vit_start") == layout(cut).count("{vit")


def test_caption_is_truncated_and_its_picture_stays():
    cut = make("t2i", {"png": RED, "caption": "long" * 50}, seq_len=20, too_long="truncate")
    assert cut.num_tokens == 20 and cut.truncated
    assert layout(cut).endswith("<vae_start>]{vae:red}<vae_end>[<eos>]")


def test_more_images_than_a_row_may_hold_are_too_long():
    with pytest.raises(BadSample, match=r"its images need 2 ViT and 0 latent tokens, .* 1 and 256"):
        make("mmu", {**PAIR, "question": "q", "answer": "r"}, max_vit_tokens=1)
