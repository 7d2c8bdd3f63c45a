"""Samples that a source's ``skip_list`` names are passed over, and nothing else changes."""

import json
import shutil
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from symbiotic_titan.config.data import Data, DataSource
from symbiotic_titan.data.pipeline import indexed
from symbiotic_titan.data.skip_list import BadEntry, is_listed

TEXTS = [{"text": f"text number {i}"} for i in range(20)]
BAD = {3: {"text": 7}, 8: {"text": " "}, 15: {"nothing": 1}}
WHERE = "[[data.sources]] #1 (texts)"


def texts(folder, values, name="texts"):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return {"name": "texts", "task": "lm", "format": "jsonl", "path": str(path)}


def entry(path, sample, *, source="texts", size=None):
    size = path.stat().st_size if size is None else size
    return BadEntry(source, str(path), size, sample, f"line {sample + 1}", "empty", "it is empty")


def write_list(folder, entries):
    path = folder / "bad_samples.jsonl"
    path.write_text("".join(e.line() for e in entries))
    return str(path)


@pytest.fixture
def bad_source(tmp_path):
    """A source with three bad samples, and its list."""
    row = texts(tmp_path, [BAD.get(i, value) for i, value in enumerate(TEXTS)])
    path = tmp_path / "texts.jsonl"
    return row, write_list(tmp_path, [entry(path, sample) for sample in BAD])


def same(left, right):
    return all(torch.equal(tensor, getattr(right, name)) for name, tensor in left.tensors().items())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_rows_are_those_of_skipping_bit_for_bit_and_nothing_counts_as_bad(
    make_loader, bad_source, num_workers
):
    row, path = bad_source
    options = {"seq_len": 64, "num_workers": num_workers}
    skipping = make_loader({"sources": [row | {"bad_samples": "skip"}]}, **options)
    strict = {"sources": [row | {"skip_list": path}], "max_bad_samples": 0, "max_bad_in_a_row": 1}
    listing = make_loader(strict, **options)
    for left, right in zip(islice(skipping, 30), listing, strict=False):
        assert same(left, right)
    assert skipping.num_skipped > 9 and listing.num_skipped == 0
    counts = {reason: count for reason, count in listing.skip_reasons.items() if count}
    assert counts == {"listed": skipping.num_skipped}


def test_without_the_list_the_run_stops(make_loader, bad_source):
    row, _ = bad_source
    with pytest.raises(ValueError, match="repair it, or set data.bad_samples"):
        list(islice(make_loader({"sources": [row]}, seq_len=64), 30))


def test_a_list_may_be_added_on_a_resumed_run(make_loader, bad_source):
    row, path = bad_source
    before = make_loader({"sources": [row | {"bad_samples": "skip"}]}, seq_len=64)
    list(islice(before, 8))
    after = make_loader({"sources": [row | {"skip_list": path}]}, seq_len=64)
    after.load_state_dict(before.state_dict())
    skipped = before.num_skipped
    for left, right in zip(islice(before, 12), after, strict=False):
        assert same(left, right)
    assert after.num_skipped == skipped and after.skip_reasons["listed"] > 0
    again = make_loader({"sources": [row | {"skip_list": path}]}, seq_len=64)
    again.load_state_dict(after.state_dict())
    assert again.skip_reasons == after.skip_reasons


def test_a_waiting_sample_that_is_listed_after_all_is_trained_once_more(make_loader, tmp_path):
    """The oldest waiting sample, which comes first in the next row: it was good when the checkpoint was saved."""
    row = texts(tmp_path, TEXTS)
    before = make_loader({"sources": [row]}, seq_len=64)
    list(islice(before, 4))
    entries = [entry(tmp_path / "texts.jsonl", sample) for sample in range(19)]
    after = make_loader(
        {"sources": [row | {"skip_list": write_list(tmp_path, entries)}]}, seq_len=64
    )
    after.load_state_dict(before.state_dict())
    first, second = (next(iter(loader)).tokens[0, :20] for loader in (before, after))
    assert torch.equal(first, second)


def read(row, path):
    source = DataSource(**row | {"skip_list": path})
    _, listed = indexed(Data(sources=[]), source, WHERE)
    return listed.tolist()


def test_entries_follow_files_that_moved(tmp_path):
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        texts(tmp_path / part, TEXTS)
    path = write_list(
        tmp_path,
        [entry(tmp_path / "b" / "texts.jsonl", 5), entry(tmp_path / "a" / "texts.jsonl", 2)],
    )
    shutil.move(tmp_path / "a", tmp_path / "moved" / "a")
    shutil.move(tmp_path / "b", tmp_path / "moved" / "b")
    row = texts(tmp_path, TEXTS, "other") | {"path": f"{tmp_path}/moved/*/texts.jsonl"}
    assert read(row, path) == [2, 25]


def test_two_files_that_fit_alike_are_refused(tmp_path):
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        texts(tmp_path / part, TEXTS)
    size = (tmp_path / "a" / "texts.jsonl").stat().st_size
    path = write_list(tmp_path, [entry(tmp_path / "texts.jsonl", 5, size=size)])
    row = texts(tmp_path, TEXTS) | {"path": f"{tmp_path}/?/texts.jsonl"}
    with pytest.raises(ValueError, match=r"which may be .*a/texts.jsonl or .*b/texts.jsonl; write"):
        read(row, path)


def test_samples_are_numbered_through_the_row_groups_of_a_file(tmp_path):
    for name in "ab":
        table = pa.table({"text": [f"{name}{i}" for i in range(10)]})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=4)
    row = {"name": "texts", "task": "lm", "format": "parquet", "path": f"{tmp_path}/*.parquet"}
    listed = [entry(tmp_path / f"{name}.parquet", i) for name, i in (("a", 9), ("b", 5), ("b", 5))]
    path = write_list(tmp_path, listed)
    assert read(row, path) == [9, 15]


def test_stale_entries_and_those_of_other_sources_are_warned_about(tmp_path, caplog):
    row, path = texts(tmp_path, TEXTS), tmp_path / "texts.jsonl"
    stale = [entry(path, 3, size=1), entry(path, 400), entry(path, 4)]
    assert read(row, write_list(tmp_path, stale)) == [4]
    assert "2 of its entries name files that are not there or have changed, first" in caplog.text
    caplog.clear()
    assert read(row, write_list(tmp_path, [entry(path, 3, source="mine")])) == []
    assert "names no sample of the source 'texts' but of mine" in caplog.text
    assert read(row, write_list(tmp_path, [])) == []


def test_a_damaged_rest_can_be_listed_and_is_refused_otherwise(make_loader, tmp_path, demo_world):
    whole = next((demo_world / "train" / "t2i").glob("*.tar"))
    path = tmp_path / "cut.tar"
    path.write_bytes(whole.read_bytes()[:-12_000])
    row = {"name": "texts", "task": "t2i", "format": "webdataset", "path": str(path)}
    [tar, rest], _ = indexed(Data(sources=[], bad_samples="skip"), DataSource(**row), WHERE)
    damaged = write_list(tmp_path, [entry(path, tar.num_samples)])
    loader = make_loader({"sources": [row | {"skip_list": damaged}]})
    list(islice(loader, 8))
    assert loader.skip_reasons["listed"] >= rest.num_samples and loader.num_skipped == 0
    other = write_list(tmp_path, [entry(path, 0)])
    with pytest.raises(ValueError, match="cut.tar: the file .* or list it: symbiotic check-data"):
        make_loader({"sources": [row | {"skip_list": other}]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1: must be an object with source, file, num_bytes and sample (JSON"),
        ("\n[]", "line 2: must be an object with"),
        ('{"source": "a"}', "line 1: must be an object with source, file, num_bytes and sample ("),
        (
            '{"source": "a", "file": "f", "num_bytes": -1, "sample": true}',
            "line 1: source and file must be texts, num_bytes and sample numbers from 0; write",
        ),
        (None, "cannot be read ("),
    ],
)
def test_a_malformed_list_is_one_line(tmp_path, text, message):
    row, path = texts(tmp_path, TEXTS), tmp_path / "list.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError) as error:
        read(row, str(path))
    assert f"{WHERE}.skip_list: {path} {message}" in str(error.value)
    assert "\n" not in str(error.value) and "symbiotic check-data" in str(error.value)


def test_a_list_of_everything_is_refused(tmp_path):
    row, path = texts(tmp_path, TEXTS), tmp_path / "texts.jsonl"
    everything = write_list(tmp_path, [entry(path, i) for i in range(20)])
    with pytest.raises(ValueError, match="names all 20 samples of the source; repair its files"):
        read(row, everything)


def test_listed_numbers_are_found_as_in_a_set():
    listed = np.asarray([0, 3, 4, 90])
    assert [i for i in range(100) if is_listed(listed, i)] == listed.tolist()
    assert not is_listed(np.empty(0, dtype=np.int64), 0)
