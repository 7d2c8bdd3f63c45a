"""The chain from shards to rows, one stream or several in one process."""

import json
from collections import Counter
from itertools import islice

import pytest

from symbiotic_titan.config.data import Data
from symbiotic_titan.data.order import SourceOrder
from symbiotic_titan.data.tokenizer import ByteTokenizer
from symbiotic_titan.sequence.modality import PADDING


def write_texts(folder, count, prefix="text"):
    """JSONL shards of ``count`` short texts, each with its number."""
    for shard in range(2):
        lines = [json.dumps({"text": f"{prefix} {i}"}) for i in range(shard, count, 2)]
        (folder / f"{prefix}-{shard}.jsonl").write_text("\n".join(lines) + "\n")
    return {"task": "lm", "format": "jsonl", "path": f"{folder}/{prefix}-*.jsonl"}


def texts_of(batch):
    """The documents of a batch as text, row by row."""
    tokenizer = ByteTokenizer()
    return [
        tokenizer.decode(tokens[document == number].tolist())
        for tokens, document in zip(batch.tokens, batch.document, strict=True)
        for number in range(int(document.max()) + 1)
    ]


def states_of(loader):
    return json.loads(loader.state_dict()["state"])["lanes"]


def read_samples(loader, num_batches):
    batches = iter(loader)
    return [text for _ in range(num_batches) for text in texts_of(next(batches))]


@pytest.mark.parametrize("num_samples", [3, 40])
def test_rows_hold_exactly_the_samples_that_the_order_names(make_loader, tmp_path, num_samples):
    """Together with the order, which visits each sample once per epoch: none is lost, none repeated."""
    row = {"name": "texts", **write_texts(tmp_path, num_samples)}
    loader = make_loader({"sources": [row]}, seq_len=48)
    found = Counter(read_samples(loader, 60))
    order = SourceOrder(0, "texts", [(num_samples + 1) // 2, num_samples // 2])
    expected = Counter()
    for stream, state in states_of(loader).items():
        waiting = {index for _, index, _ in state["waiting"]}
        for index in range(int(stream), state["read"][0] * 4, 4):
            shard, sample = order.locate(index)
            expected[f"text {shard + 2 * sample}"] += index not in waiting
    assert found == expected and min(found.values()) >= 3


def test_each_stream_follows_the_mixture_to_the_sample(make_loader):
    loader = make_loader()
    batches = iter(loader)
    for _ in range(40):
        next(batches)
        for state in states_of(loader).values():
            total = sum(state["scheduled"])
            for count, share in zip(state["scheduled"], (0.3, 0.3, 0.2, 0.2), strict=True):
                assert abs(count - total * share) < 1


def test_each_stream_follows_the_mixture_in_tokens(make_loader):
    """Off by less than one longest sample: shares 3 : 3 : 2 : 2, samples of up to 1800 tokens."""
    loader = make_loader({"mixture_by": "tokens"})
    for _ in islice(loader, 60):
        for state in states_of(loader).values():
            total = sum(state["tokens"])
            for tokens, share in zip(state["tokens"], (0.3, 0.3, 0.2, 0.2), strict=True):
                assert abs(tokens - share * total) < 1800


def test_source_of_weight_zero_is_not_even_opened(make_loader, demo_config):
    closed = {"name": "off", "task": "lm", "format": "jsonl", "path": "nowhere", "weight": 0.0}
    loader = make_loader({"sources": [*demo_config.sources, closed]})
    assert next(iter(loader)).tokens.shape == (1, 256)


@pytest.mark.parametrize("seq_len, least", [(256, 0.90), (512, 0.95)])
def test_demo_mixture_fills_its_rows(make_loader, seq_len, least):
    loader = make_loader({"lookahead": Data().lookahead}, seq_len=seq_len, local_batch_size=20)
    batch = next(iter(loader))
    assert (batch.modality != PADDING).float().mean() >= least


def test_caps_on_image_tokens_hold_in_every_row(make_loader):
    data = {"max_vit_tokens": 16, "max_vae_tokens": 64}
    batch = next(iter(make_loader(data, seq_len=512, local_batch_size=40)))
    assert batch.vit_index.shape == (40, 16) and batch.vae_index.shape == (40, 64)
    per_row = (batch.vae_image >= 0).sum(1)
    assert per_row.max() == 64 and batch.num_latent_tokens() == per_row.sum()


def add_bad(folder, count, bad, prefix="bad"):
    source = write_texts(folder, count, prefix)
    for shard in range(2):
        path = folder / f"{prefix}-{shard}.jsonl"
        lines = path.read_text().splitlines()
        lines = ['{"text": 7}' if json.loads(x)["text"].split()[1] in bad else x for x in lines]
        path.write_text("\n".join(lines) + "\n")
    return source


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_sample_stops_the_run_with_shard_key_and_reason(make_loader, tmp_path, num_workers):
    row = {"name": "texts", **add_bad(tmp_path, 20, {"5"})}
    loader = make_loader({"sources": [row]}, seq_len=64, num_workers=num_workers)
    with pytest.raises(ValueError) as error:
        for _ in zip(range(50), loader, strict=False):
            pass
    assert str(error.value) == (
        f"{tmp_path}/bad-1.jsonl: sample 'line 3': 'text' must be a string, got 7 (source 'texts'); "
        'repair it, or set data.bad_samples = "skip"'
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipped_samples_are_counted_and_replaced_from_their_source(
    make_loader, tmp_path, num_workers
):
    rows = [
        {"name": "some", **add_bad(tmp_path, 20, {"3", "4", "11"})},
        {"name": "good", **write_texts(tmp_path, 20, "good")},
    ]
    data = {"sources": rows, "bad_samples": "skip"}
    loader = make_loader(data, seq_len=64, num_workers=num_workers)
    assert loader.num_skipped == 0
    found = read_samples(loader, 40)
    assert not {"bad 3", "bad 4", "bad 11"} & set(found) and "bad 5" in found
    states = states_of(loader).values()
    assert loader.num_skipped == sum(sum(s["read"]) - sum(s["scheduled"]) for s in states) > 3
    for state in states:
        assert abs(state["scheduled"][0] - state["scheduled"][1]) <= 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_bad_samples_stop_the_run_with_their_numbers(make_loader, tmp_path, num_workers):
    row = {"name": "texts", **add_bad(tmp_path, 6, {str(i) for i in range(6)})}
    data = {"sources": [row], "bad_samples": "skip", "max_bad_samples": 9}
    loader = make_loader(data, seq_len=64, num_workers=num_workers)
    with pytest.raises(ValueError) as error:
        next(iter(loader))
    assert str(error.value).startswith(
        "skipped 10 bad samples (texts: 10) of 10 read, 100.00%, more than data.max_bad_samples = 9; the last one is "
    )
    assert str(error.value).endswith(
        "; list them with symbiotic check-data and repair the shards, or raise the limit or allow a share with data.max_bad_share"
    )


def test_sample_that_went_bad_since_the_checkpoint_is_named(make_loader, tmp_path):
    row = {"name": "texts", **write_texts(tmp_path, 20)}
    loader = make_loader({"sources": [row]}, seq_len=64)
    next(iter(loader))
    for path in tmp_path.glob("*.jsonl"):
        path.write_text(path.read_text().replace("{", "["))
    after = make_loader({"sources": [row]}, seq_len=64)
    after.load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match="when the checkpoint was saved, it could be used"):
        next(iter(after))


def test_parts_of_a_long_text_are_found_again(make_loader, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "abcdefghij" * 60}) + "\n")
    row = {"name": "long", "task": "lm", "format": "jsonl", "path": f"{tmp_path}/a.jsonl"}
    loader = make_loader({"sources": [row]}, seq_len=64)
    batches = iter(loader)
    for _ in range(5):
        next(batches)
    after = make_loader({"sources": [row]}, seq_len=64)
    after.load_state_dict(loader.state_dict())
    for expected, batch in zip(range(9), after, strict=False):
        assert texts_of(batch) == texts_of(next(batches)), expected


def test_bad_samples_of_all_streams_of_a_rank_are_added_up(make_loader, tmp_path):
    row = {"name": "texts", **add_bad(tmp_path, 20, {"3", "4", "11"})}
    data = {"sources": [row], "bad_samples": "skip", "max_bad_samples": 3}
    loader = make_loader(data, seq_len=64)
    with pytest.raises(
        ValueError, match=r"skipped 4 bad samples \(texts: 4\) of \d+ read, .*%, more than"
    ):
        read_samples(loader, 100)


@pytest.mark.parametrize(
    "settings, data, message",
    [
        (
            {"seq_len": 64},
            {},
            "training.seq_len: 64 is too short for one image of 64 tokens + 7 of text; "
            "raise it to at least 71 or lower data.vae_pixels",
        ),
        (
            {},
            {"vit_pixels": 64 * 256},
            "training.seq_len: 256 is too short for one image of 256 tokens + 8 of text; "
            "raise it to at least 264 or lower data.vit_pixels",
        ),
        ({}, {"vit_pixels": 63}, "data.vit_pixels: 63 pixels hold no token of 8 x 8"),
        ({}, {"vae_pixels": 15}, "data.vae_pixels: 15 pixels hold no token of 4 x 4"),
        (
            {},
            {"max_vit_tokens": 15},
            "data.max_vit_tokens: 15 is too few for one image of 16 tokens",
        ),
        (
            {},
            {"max_vae_tokens": 63},
            "data.max_vae_tokens: 63 is too few for one image of 64 tokens",
        ),
        ({}, {"max_vit_tokens": 257}, "data.max_vit_tokens: 257 is more than a row holds"),
        ({}, {"sources": []}, "[[data.sources]]: there is none"),
        (
            {"dp_world_size": 3, "gather": list},
            {},
            "data.num_lanes: 4 streams cannot be shared evenly by 3 data ranks; set it to 3",
        ),
        (
            {"dp_world_size": 8, "gather": list},
            {},
            "data.num_lanes: 4 streams cannot be shared evenly by 8 data ranks; set it to 8",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_before_training(
    make_loader, settings, data, message
):
    with pytest.raises(ValueError) as error:
        make_loader(data, **settings)
    assert message in str(error.value)
