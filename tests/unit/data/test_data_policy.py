"""What happens to samples that cannot be used: policies per source, counts per reason, ceilings."""

import json

import pytest
import torch

from symbiotic_titan.config.data import Data
from symbiotic_titan.data.documents import TextSegment, VaeSegment
from symbiotic_titan.data.formats.shard import REASONS
from symbiotic_titan.sequence.tasks import TASKS, Task


def write(folder, name, values):
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(v if isinstance(v, str) else json.dumps(v) for v in values) + "\n")
    return {"name": name, "task": "lm", "format": "jsonl", "path": str(path)}


def chat(words):
    turns = [{"role": "user", "content": words}, {"role": "assistant", "content": "yes"}]
    return {"messages": turns}


GOOD = [{"text": f"text {i}"} for i in range(12)]


def read(loader, num_rows):
    for _ in zip(range(num_rows), loader, strict=False):
        pass
    return {reason: n for reason, n in loader.skip_reasons.items() if n}


def test_each_source_has_its_own_policy(make_loader, tmp_path):
    lenient = write(tmp_path, "lenient", [*GOOD, {"text": 7}]) | {"bad_samples": "skip"}
    strict = write(tmp_path, "strict", GOOD)
    loader = make_loader({"sources": [lenient, strict]}, seq_len=64)
    assert read(loader, 20)["wrong_type"] == loader.num_skipped > 0
    strict = write(tmp_path, "strict", [*GOOD, {"text": 7}])
    with pytest.raises(
        ValueError, match=r"'text' must be a string, got 7 \(source 'strict'\); repair"
    ):
        read(make_loader({"sources": [lenient, strict]}, seq_len=64), 40)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skips_are_counted_by_reason(make_loader, tmp_path, num_workers):
    bad = [{"text": 7}, {"text": " "}, {"t": "x"}, "{", "[]"]
    row = write(tmp_path, "mixed", [*GOOD, *bad])
    loader = make_loader(
        {"sources": [row], "bad_samples": "skip", "max_bad_samples": 1000},
        seq_len=64,
        num_workers=num_workers,
    )
    assert set(loader.skip_reasons) == {*REASONS, "truncated"}
    found = read(loader, 40)
    assert sum(found.values()) == loader.num_skipped
    assert found.keys() == {"wrong_type", "empty", "missing", "json"}
    assert found["json"] > found["empty"]


def test_counts_go_on_after_a_resume_and_start_where_an_old_state_knows_none(make_loader, tmp_path):
    data = {"sources": [write(tmp_path, "mixed", [*GOOD, "{"])], "bad_samples": "skip"}
    before, after, whole = (make_loader(data, seq_len=64) for _ in range(3))
    read(before, 12)
    state = before.state_dict()
    after.load_state_dict(state)
    assert after.skip_reasons == before.skip_reasons
    read(after, 12)
    read(whole, 24)
    assert after.skip_reasons == whole.skip_reasons and after.state_dict() == whole.state_dict()

    old = json.loads(state["state"])
    for stream in old["lanes"].values():
        for key in ("skipped", "in_a_row", "truncated"):
            del stream[key]
    after.load_state_dict({"state": json.dumps(old)})
    assert after.num_skipped == before.num_skipped and not any(after.skip_reasons.values())


def test_a_row_of_bad_samples_stops_the_run_before_the_total_does(make_loader, tmp_path):
    row = write(tmp_path, "broken", [*GOOD[:1], *["{"] * 40])
    data = {"sources": [row], "bad_samples": "skip", "max_bad_in_a_row": 5}
    with pytest.raises(ValueError) as error:
        read(make_loader(data | {"max_bad_samples": 10**6}, seq_len=64), 20)
    assert "source 'broken': skipped 6 samples in a row" in str(error.value)
    assert "more than data.max_bad_in_a_row = 5; the last one is " in str(error.value)


@pytest.mark.parametrize("laid_out", [[], [[]], [[TextSegment([])]]])
def test_a_layout_that_makes_nothing_of_any_sample_stops_the_run(make_loader, tmp_path, laid_out):
    task = Task("nothing", (("text",),), layout=lambda sample: laid_out)
    data = {"sources": [write(tmp_path, "texts", GOOD) | {"task": "nothing"}]}
    with TASKS.temporarily(nothing=task):
        with pytest.raises(
            ValueError, match=r"task 'nothing' makes no document of it, .* \(source"
        ):
            read(make_loader(data, seq_len=64), 1)
        with pytest.raises(ValueError, match="skipped 6 samples in a row"):
            limits = {"bad_samples": "skip", "max_bad_in_a_row": 5}
            read(make_loader(data | limits, seq_len=64), 1)


TRAINED, UNTRAINED = TextSegment([65], trained=True), TextSegment([65])
TARGET = VaeSegment(torch.zeros(1, 48), 1, 1)


@pytest.mark.parametrize(
    ("laid_out", "message"),
    [
        (None, "must return a list with a list of segments for each document, got None"),
        ([TRAINED], "must return a list with a list of segments for each document, got [TextS"),
        (
            [["text"]],
            "must return a list with a list of segments for each document, got [['text']]",
        ),
        ([[TRAINED, TARGET]], 'gives a target image; set target_images to "one" or "any"'),
        ([[TRAINED], [UNTRAINED]], "the layout of task 'odd' trains nothing of it"),
    ],
)
def test_a_layout_of_the_wrong_kind_is_told_by_its_task(make_loader, tmp_path, laid_out, message):
    task = Task("odd", (("text",),), layout=lambda sample: laid_out)
    data = {"sources": [write(tmp_path, "texts", GOOD) | {"task": "odd"}]}
    with TASKS.temporarily(odd=task), pytest.raises(ValueError) as error:
        read(make_loader(data, seq_len=64), 1)
    assert "task 'odd'" in str(error.value) and message in str(error.value)


LONG = [*map(chat, "abcdefgh"), chat("x" * 100), chat("y" * 100)]


def test_sample_longer_than_a_row_is_bad_unless_told_otherwise(make_loader, tmp_path):
    row = write(tmp_path, "chat", LONG)
    with pytest.raises(ValueError) as error:
        read(make_loader({"sources": [row]}, seq_len=64), 20)
    assert "it needs 107 tokens, a row holds 64 (training.seq_len) (source 'chat'); raise " in str(
        error.value
    )
    assert 'or set data.too_long = "skip" or "truncate"' in str(error.value)
    data = {"sources": [row], "bad_samples": "skip", "max_bad_samples": 3}
    with pytest.raises(ValueError, match="more than data.max_bad_samples = 3"):
        read(make_loader(data, seq_len=64), 40)


def test_long_samples_that_are_skipped_are_counted_apart_from_bad_ones(make_loader, tmp_path):
    row = write(tmp_path, "chat", LONG) | {"too_long": "skip"}
    loader = make_loader({"sources": [row], "max_bad_samples": 0}, seq_len=64)
    assert read(loader, 40)["too_long"] > 3 and loader.num_skipped == 0


def test_a_source_of_nothing_but_long_samples_stops_the_run(make_loader, tmp_path):
    row = write(tmp_path, "chat", LONG[-2:]) | {"too_long": "skip"}
    with pytest.raises(ValueError, match="skipped 101 samples in a row, .* 107 tokens"):
        read(make_loader({"sources": [row]}, seq_len=64), 2)


def test_truncated_samples_are_counted(make_loader, tmp_path):
    values = [*LONG, chat("z" * 20)]
    values[-2]["messages"].insert(0, {"role": "assistant", "content": "long" * 40})
    row = write(tmp_path, "chat", [v for v in values if v is not LONG[-2]]) | {
        "too_long": "truncate"
    }
    loader = make_loader({"sources": [row]}, seq_len=64)
    assert read(loader, 40).keys() == {"truncated"} and loader.num_skipped == 0


def test_skips_are_logged_ever_more_rarely(make_loader, tmp_path, caplog):
    row = write(tmp_path, "mixed", [*GOOD, *["{"] * 9])
    loader = make_loader({"sources": [row], "bad_samples": "skip", "num_lanes": 1}, seq_len=64)
    with caplog.at_level("WARNING"):
        count = read(loader, 9)["json"]
    told = [r.message for r in caplog.records if "so far as 'json'; the last one is" in r.message]
    assert len(told) == count.bit_length()
    assert told[0].startswith("source 'mixed', stream 0: skipped 1 samples so far")


def test_text_that_gives_fewer_rows_than_when_it_was_saved_is_refused(make_loader, tmp_path):
    """The shard is as long as before and has as many samples."""
    row = write(tmp_path, "texts", [{"text": "abcdefghij" * 60}] * 3)
    loader = make_loader({"sources": [row]}, seq_len=64)
    read(loader, 3)
    write(tmp_path, "texts", [{"text": "a", "rest": "b" * 587}] * 3)
    after = make_loader({"sources": [row]}, seq_len=64)
    after.load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match="a text has fewer parts than when the checkpoint was"):
        next(iter(after))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"keys": {"caption": "x"}},
            "#1 (a).keys: samples of the task lm have no 'caption'; choose from",
        ),
        (
            {"keys": {"image": "x"}},
            "#1 (a).keys: samples of the task lm have no 'image'; choose from conversations",
        ),
        ({"keys": {"text": ""}}, "#1.keys.text: must be 1 to 1000 characters"),
        (
            {"keys": {"text": 3}},
            "#1.keys.text: must be a string or a list, each item a string, got 3",
        ),
        (
            {"keys": {"text": "a", "messages": "b"}},
            "#1 (a).keys: text and messages are different schemas of a sample; keep one of them",
        ),
        ({"bad_samples": "stop"}, "#1.bad_samples: must be one of 'raise', 'skip', got"),
        ({"too_long": "split"}, "#1.too_long: must be"),
        (
            {"format": "csv"},
            "#1.format = 'csv': nothing is registered under this name; choose from webdataset, jsonl, json, parquet",
        ),
    ],
)
def test_settings_of_a_source_are_checked(settings, message):
    row = {"name": "a", "task": "lm", "format": "jsonl", "path": "x"}
    with pytest.raises(ValueError) as error:
        Data(sources=[row | settings])
    assert message in str(error.value)


@pytest.mark.parametrize("key", ["max_bad_in_a_row", "max_image_pixels"])
def test_limits_must_be_positive(key):
    with pytest.raises(ValueError, match=f"data.{key}: must be at least 1, got 0"):
        Data(**{key: 0})


def test_a_share_is_judged_over_all_streams_of_the_run_and_a_number_by_any(make_loader, tmp_path):
    row = write(tmp_path, "mixed", [*GOOD, {"text": 7}, {"text": 8}])
    data = {"sources": [row], "bad_samples": "skip", "max_bad_samples": 1, "num_lanes": 4}
    first_of_two = {"dp_rank": 0, "dp_world_size": 2, "gather": lambda part: [part], "seq_len": 64}
    with pytest.raises(
        ValueError, match=r"skipped 2 .* more than data.max_bad_samples = 1; .*list"
    ):
        read(make_loader(data, **first_of_two), 60)
    # A seventh of the samples is bad; a tenth is exceeded by the whole run, which one of its ranks cannot know.
    tenth = data | {"max_bad_share": 0.1}
    part = make_loader(tenth, **first_of_two)
    read(part, 60)
    assert part.num_skipped > 1
    doubled = [2 * count for count in part.skip_counts]
    message = (
        f"skipped {doubled[1]} bad samples \\(mixed: {doubled[1]}\\) of {doubled[0]} read, 1.*%, more than "
        "data.max_bad_samples = 1 and than data.max_bad_share = 0.1; list them with symbiotic check-data"
    )
    with pytest.raises(ValueError, match=message):
        part.check_skip_counts(doubled)
    with pytest.raises(ValueError, match="and than data.max_bad_share = 0.1"):
        read(make_loader(tenth, seq_len=64), 100)
    half = make_loader(data | {"max_bad_share": 0.5}, seq_len=64)
    assert read(half, 100)["wrong_type"] > 1
