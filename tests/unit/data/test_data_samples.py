import io
import json

import numpy as np
import pytest
from PIL import Image

from symbiotic_titan.config.data import Data, DataSource
from symbiotic_titan.config.generation import Latents
from symbiotic_titan.data.documents import (
    TextSegment,
    VaeSegment,
    VitSegment,
)
from symbiotic_titan.data.formats.shard import Sample
from symbiotic_titan.data.latents import TargetImages
from symbiotic_titan.data.samples import (
    BadSample,
    DocumentMaker,
    image_document_overhead,
)
from symbiotic_titan.data.tokenizer import ByteTokenizer
from symbiotic_titan.sequence.geometry import ImageGeometry
from symbiotic_titan.sequence.tasks import task_number

GEOMETRY = ImageGeometry(
    vit_patch=4, vit_merge=2, vit_channels=3, latent_channels=3, latent_stride=1, latent_patch=4
)
S = ByteTokenizer().special
[USER], [ASSISTANT] = (ByteTokenizer().turn(role).prefix for role in ("user", "assistant"))


def png(height=32, width=32):
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), 200, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def maker(seq_len=128, **config):
    settings = Data(**({"condition_dropout": 0.0} | config))
    return DocumentMaker(
        settings,
        GEOMETRY,
        TargetImages(settings, Latents(), GEOMETRY, []),
        ByteTokenizer(),
        seq_len,
    )


def make(task, members, index=0, **settings):
    kind = "jsonl" if task == "lm" else "webdataset"
    source = DataSource(name=task, task=task, format=kind, path="x")
    members = {k: v if isinstance(v, bytes) else json.dumps(v).encode() for k, v in members.items()}
    return maker(**settings).make(source, Sample("s.tar", "000", members), index)


def layout(document):
    """[(id, or "vit"/"vae"), trained] of every token."""
    out = []
    for segment in document.segments:
        if isinstance(segment, TextSegment):
            out += [(i, segment.trained) for i in segment.ids]
        else:
            name = "vit" if isinstance(segment, VitSegment) else "vae"
            out += [(name, False)] * (segment.rows * segment.columns)
    assert len(out) == document.num_tokens
    return out


def test_text_is_framed_by_bos_and_eos_and_trained_behind_bos():
    [document] = make("lm", {"json": {"text": "ab"}})
    assert layout(document) == [(S.bos, False), (97, True), (98, True), (S.eos, True)]
    assert document.task == task_number("lm")


@pytest.mark.parametrize("length", [1, 6, 7, 8, 13, 14, 15, 40])
def test_long_text_is_cut_into_full_rows_and_nothing_is_lost(length):
    text = "".join(chr(97 + i % 26) for i in range(length))
    documents = make("lm", {"json": {"text": text}}, seq_len=8)
    ids = [layout(document) for document in documents]
    assert all(tokens[0] == (S.bos, False) for tokens in ids)
    assert all(len(tokens) == 8 for tokens in ids[:-1]) and 2 <= len(ids[-1]) <= 8
    assert [i for tokens in ids for i, _ in tokens[1:]] == [*text.encode(), S.eos]


def test_only_the_answer_is_trained_in_a_question_about_an_image():
    members = {"png": png(16, 8), "json": {"question": "q?", "answer": "a"}}
    [document] = make("mmu", members)
    assert layout(document) == [
        (S.bos, False),
        (USER, False),
        (S.vit_start, False),
        ("vit", False),
        ("vit", False),
        (S.vit_end, False),
        (ord("q"), False),
        (ord("?"), False),
        (ASSISTANT, False),
        (ord("a"), True),
        (S.eos, True),
    ]


@pytest.mark.parametrize("task", ["t2i", "t2i_long"])
def test_caption_and_image_start_are_trained_in_generation(task):
    [document] = make(task, {"jpg": png(), "json": {"caption": "c"}}, vae_pixels=64)
    assert layout(document) == [
        (S.bos, False),
        (USER, False),
        (ord("c"), True),
        (ASSISTANT, False),
        (S.vae_start, True),
        *[("vae", False)] * 4,
        (S.vae_end, False),
        (S.eos, True),
    ]
    assert document.num_tokens == 1 + 4 + image_document_overhead(ByteTokenizer())


def test_plain_text_file_serves_as_caption():
    [document] = make("t2i", {"webp": png(), "txt": "ä".encode()})
    assert [i for i, trained in layout(document) if trained][:2] == list("ä".encode())


def test_image_to_generate_takes_the_nearest_bucket():
    [document] = make("t2i", {"png": png(48, 80), "json": {"caption": "c"}})
    [image] = [s for s in document.segments if isinstance(s, VaeSegment)]
    assert (image.rows, image.columns) == (6, 10) and image.latents.shape == (60, 48)


def test_share_of_dropped_captions_is_as_configured_and_repeatable():
    members = {"png": png(4, 4), "json": {"caption": "caption"}}

    def dropped(index, share, seed=0):
        [document] = make("t2i", members, index, condition_dropout=share, seed=seed, vae_pixels=16)
        return document.num_tokens < 1 + image_document_overhead(ByteTokenizer()) + 7

    first = [dropped(i, 0.3) for i in range(1000)]
    assert 250 < sum(first) < 350
    assert first == [dropped(i, 0.3) for i in range(1000)]
    assert first != [dropped(i, 0.3, seed=1) for i in range(1000)]
    assert not any(dropped(i, 0.0) for i in range(100))
    assert all(dropped(i, 1.0) for i in range(100))


BAD = [
    ("lm", {"json": b'{"text": '}, "its JSON cannot be parsed"),
    ("lm", {"json": b"\xff\xfe{"}, "its JSON cannot be parsed"),
    ("lm", {"json": b"[" * 100_000}, "its JSON cannot be parsed"),
    ("lm", {"json": ["text"]}, "its JSON must be an object, got list"),
    (
        "lm",
        {"json": {"tet": "a"}},
        "its text is missing: there is no 'text' or 'txt' but json, tet",
    ),
    ("lm", {"json": {"text": " \n"}}, "'text' is empty"),
    (
        "mmu",
        {"json": {"question": "q", "answer": "a"}},
        "its image is missing: there is no 'png' or",
    ),
    (
        "mmu",
        {"png": png(), "json": {"question": "q"}},
        "its answer is missing: there is no 'answer' but",
    ),
    ("mmu", {"png": png(), "json": {"question": "q", "answer": ""}}, "'answer' is empty"),
    ("mmu", {"png": png(), "json": {"question": None, "answer": "a"}}, "its question is missing"),
    ("mmu", {"png": png(), "json": {"question": [], "answer": "a"}}, "a string, got []"),
    (
        "t2i",
        {"png": png()},
        "caption is missing: there is no 'caption' or 'txt' or 'captions' but png",
    ),
    ("t2i", {"png": png(), "txt": b"\xff"}, "'caption' is not UTF-8"),
    ("t2i", {"png": png(), "json": {"caption": 7}}, "'caption' must be a string, got 7"),
    ("t2i", {"png": b"", "json": {"caption": "c"}}, "its image cannot be decoded"),
    ("t2i", {"png": b"no picture", "json": {"caption": "c"}}, "its image cannot be decoded"),
    ("t2i", {"jpg": png()[:60], "json": {"caption": "c"}}, "its image cannot be decoded"),
    (
        "t2i_long",
        {"png": png(), "json": {"caption": "c" * 100}},
        "it needs 170 tokens, a row holds 128 (training.seq_len)",
    ),
]


@pytest.mark.parametrize("task, members, reason", BAD, ids=[reason for _, _, reason in BAD])
def test_unusable_sample_is_named_with_shard_key_and_reason(task, members, reason):
    with pytest.raises(BadSample) as error:
        make(task, members)
    assert str(error.value).startswith("s.tar: sample '000': ")
    assert reason in str(error.value)


def test_any_damage_to_an_image_is_a_bad_sample():
    whole = bytearray(png())
    random, num_bad = np.random.default_rng(0), 0
    for _ in range(300):
        broken = whole.copy()
        for at in random.integers(0, len(whole), 3):
            broken[at] = random.integers(0, 256)
        try:
            make("t2i", {"png": bytes(broken), "json": {"caption": "c"}})
        except BadSample as error:
            assert error.reason == "image"
            num_bad += 1
    assert num_bad > 100, "the damage was too slight to show anything"
