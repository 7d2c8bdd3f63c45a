"""A caption of several texts: one is chosen for each sample and epoch, and the choice is the same whenever it is read again."""

import io
import json
import tarfile
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import torch

from symbiotic_titan.codecs.codec import build_codec
from symbiotic_titan.config.data import Data, DataSource
from symbiotic_titan.config.generation import Latents
from symbiotic_titan.data.fields import check_fields
from symbiotic_titan.data.formats.shard import BadSample
from symbiotic_titan.data.latent_cache import encoding_of, folder_of
from symbiotic_titan.data.latent_writer import CacheWriter
from symbiotic_titan.data.latents import TargetImages
from symbiotic_titan.data.pipeline import indexed
from symbiotic_titan.sequence.tasks import TASKS
from tests.helpers.read_documents import document_of
from tests.helpers.released_data import picture

TABLE = "[[data.sources]]"
RED = picture("red")
TWO = {"short": "a red square", "long": "a red square on nothing"}


def caption(values, index=0, **settings):
    """The trained caption of a t2i sample."""
    text = document_of("t2i", {"png": RED, **values}, index=index, **settings)
    head, tail = "<user>[", "]<assistant><make red>[<eos>]"
    assert text.startswith(head) and text.endswith(tail)
    return text[len(head) : -len(tail)]


def all_captions(values, **settings):
    return Counter(caption(values, index, **settings) for index in range(40))


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        ({"captions": json.dumps(TWO)}, {}),
        ({"captions": json.dumps(list(TWO.values()))}, {}),
        ({"captions": TWO}, {}),
        ({"captions": list(TWO.values())}, {}),
        ({"caption": list(TWO.values())}, {}),
        ({"caption": json.dumps(TWO)}, {}),
        ({"json": json.dumps({"captions": TWO}).encode()}, {}),
        ({"mine": json.dumps(TWO)}, {"caption": "mine"}),
        ({"re": TWO["short"], "org": TWO["long"]}, {"caption": ["re", "org"]}),
        ({"re": TWO["short"], "org": json.dumps([TWO["long"], ""])}, {"caption": ["re", "org"]}),
        ({"caption": ["", None, *TWO.values(), " "]}, {}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_every_form_of_several_captions_gives_each_of_them(values, keys):
    found = all_captions(values, keys=keys)
    assert set(found) == set(TWO.values()) and min(found.values()) > 8


def test_a_choice_follows_from_seed_and_index_alone():
    values = {"captions": [f"caption {n}" for n in range(50)]}
    first = [caption(values, index) for index in range(30)]
    assert first == [caption(values, index) for index in range(30)]
    assert first != [caption(values, index, seed=1) for index in range(30)]
    assert len(set(first)) > 15


def test_a_plain_caption_and_one_in_a_list_are_trained_alike():
    texts = ["a red square", "[photo] a red square", "{red}", "a, b [c]"]
    for text in texts:
        assert caption({"caption": text}) == caption({"caption": [text]}) == text
    assert caption({"caption": "first", "txt": b"second", "captions": ["third"]}) == "first"
    assert caption({"caption": None, "txt": b"second", "captions": ["third"]}) == "second"
    assert caption({"re": None, "org": "there"}, keys={"caption": ["re", "org"]}) == "there"


@pytest.mark.parametrize(
    ("value", "reason", "message"),
    [
        ([], "empty", "'caption' is empty"),
        ("[]", "empty", "'caption' is empty"),
        (["", " ", None], "empty", "'caption' is empty"),
        ([7], "wrong_type", "each text of 'caption' must be a string, got 7"),
        ("[1, 2]", "wrong_type", "each text of 'caption' must be a string, got 1"),
        ({"a": {"b": "c"}}, "wrong_type", "each text of 'caption' must be a string, got {'b'"),
        (["good", {"raw": "c"}], "wrong_type", "must be a string, got {'raw': 'c'}"),
    ],
)
def test_a_caption_without_a_text_is_a_bad_sample(value, reason, message):
    with pytest.raises(BadSample) as error:
        caption({"caption": value})
    assert error.value.reason == reason and message in str(error.value)


def test_several_names_are_all_missing_or_one_is_misspelled():
    keys = {"caption": ["re", "org"]}
    with pytest.raises(BadSample, match="its caption is missing: 're' is null"):
        caption({"re": None}, keys=keys)
    with pytest.raises(ValueError, match="keys.caption is looked for as 'org', which no sample"):
        check_fields(TASKS["t2i"], keys, ["png", "re"], "x")
    check_fields(TASKS["t2i"], keys, ["png", "re", "org"], "x")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"image": ["a", "b"]}, r"keys.image: only a caption may have several names, got \['a'"),
        ({"caption": []}, "keys.caption: must not be empty"),
        ({"caption": ["a", ""]}, r"keys.caption\[1\]: must be 1 to 1000 characters"),
        ({"caption": ["a", "a"]}, r"keys.caption: has a name twice, got \['a', 'a'\]; keep one"),
        ({"caption": 7}, "keys.caption: must be a string or a list, each item a string, got 7"),
    ],
)
def test_wrong_names_of_captions_are_refused(keys, message):
    row = {"name": "s", "task": "t2i", "format": "parquet", "path": "x", "keys": keys}
    with pytest.raises(ValueError, match=message):
        Data(sources=[row])


def test_answers_of_a_list_are_chosen_from_and_json_text_stays_the_answer():
    def answer(value):
        values = {"png": RED, "question": "q", "answers": value}
        keys = {"question": "question", "answer": "answers"}
        return {
            document_of("mmu", values, keys=keys, index=index).partition("<assistant>")[2]
            for index in range(20)
        }

    assert answer(["red", "a red one"]) == {"[red<eos>]", "[a red one<eos>]"}
    assert answer('["box"]') == {'[["box"]<eos>]'}


# ---- epochs, resumes and caches -------------------------------------------------------------------------------------------


def write_source(folder, num_samples=6):
    """Tar with captions as JSON text, lists, and in two keys; a sample with a bad caption."""
    with tarfile.open(folder / "some.tar", "w") as tar:
        for number in range(num_samples):
            texts = [f"caption {number}.{n}" for n in range(4)]
            both = {"a": texts, "b": json.dumps({"x": f"b {number}"})}
            record = both if number else {"a": [], "b": None}
            for name, data in (
                (f"{number}.png", RED),
                (f"{number}.json", json.dumps(record).encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return DataSource(
        "own", "t2i", "webdataset", f"{folder}/some.tar", {"caption": ["a", "b"]},
        bad_samples="skip",
    )  # fmt: skip


def rows_of(loader, count):
    return list(islice(loader, count))


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        for name, tensor in a.tensors().items():
            assert torch.equal(tensor, getattr(b, name)), name


def test_captions_change_with_the_epoch_survive_a_resume_and_come_from_a_cache_alike(
    make_loader, geometry, tmp_path
):
    source = write_source(tmp_path)
    data = {"sources": [source], "lookahead": 2, "vae_pixels": 64, "max_bad_samples": 1000}
    data |= {"max_bad_in_a_row": 1000, "condition_dropout": 0.2}
    config = Data(**data)
    shards, listed = indexed(config, source, TABLE)
    writer = CacheWriter(
        config=config,
        source=source,
        targets=TargetImages(config, Latents(), geometry, [source]),
        codec=build_codec(Latents()),
        dtype=torch.float32,
        listed=listed,
        advance=lambda done, bad: None,
    )
    cache = tmp_path / "cache"
    encoding = encoding_of(config, Latents(), geometry)
    writer.write(folder_of(cache, TABLE, source), encoding, shards, 0, 1)

    settings = {"global_batch_size": 1, "seq_len": 64}
    loader = make_loader(data, **settings)
    fresh = rows_of(loader, 12)
    assert_same(
        rows_of(make_loader(data, latents=Latents(cache=str(cache)), **settings), 12), fresh
    )
    texts = Counter()
    for row in fresh:
        text = bytes(t for t in row.tokens.flatten().tolist() if t < 256).decode()
        texts.update(f"{part[0]}" for part in text.split("caption 3.")[1:])
    assert len(texts) > 1, "the same caption in every epoch"

    state = loader.state_dict()
    after = rows_of(loader, 6)
    resumed = make_loader(data, **settings)
    resumed.load_state_dict(state)
    assert_same(rows_of(resumed, 6), after)
    with pytest.raises(ValueError, match="the keys of source 'own' was {'caption': "):
        other = replace(source, keys={"caption": "a"})
        make_loader(data | {"sources": [other]}, **settings).load_state_dict(state)
