"""Kept indexes give the samples that the files hold now, whatever the cache folder holds."""

import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import fsspec
import numpy as np
import pytest

from symbiotic_titan.config.data import FORMATS, DataSource
from symbiotic_titan.data import readers
from symbiotic_titan.data.formats import index_cache
from symbiotic_titan.data.formats.jsonl import TextRows
from symbiotic_titan.data.formats.shard import BadSample, DamagedRest
from symbiotic_titan.data.formats.webdataset import TarSamples
from symbiotic_titan.data.readers import Reader, index_source
from tests.helpers.tar_files import tar_bytes

WHERE = "[[data.sources]] #1 (s)"
LINES = b'{"text": "a"}\n\n \n{"text": "b"}\n{"text": "c"}'


def source(path, form="webdataset"):
    return DataSource("s", "lm", form, str(path))


def content(shards):
    """All that a reader gets from shards that went to another process: keys and bytes."""
    shards = pickle.loads(pickle.dumps(shards))
    reader = Reader(shards)
    samples = [reader.read(n, i) for n, s in enumerate(shards) for i in range(s.num_samples)]
    return [(sample.shard, sample.key, sample.members) for sample in samples]


@pytest.fixture
def files(tmp_path):
    """Five tar files, the last with a name that is not UTF-8, and one of lines with blank ones."""
    for i in range(5):
        key = f"a/{i}" if i < 4 else os.fsdecode(b"\xe4")
        members = [(f"{key}.txt", b"text %d" % i), (f"{key}.json", b"{}"), ("ü.txt", b"")]
        (tmp_path / f"{i}.tar").write_bytes(tar_bytes([*members, (f"{key}.txt", b"again")]))
    (tmp_path / "l.jsonl").write_bytes(LINES)
    return tmp_path


def refuse(*arguments):
    raise AssertionError("the file is indexed anew")


@pytest.mark.parametrize(("name", "form"), [("*.tar", "webdataset"), ("l.jsonl", "jsonl")])
def test_a_kept_index_gives_the_same_samples_and_is_not_made_again(files, monkeypatch, name, form):
    row, cache = source(files / name, form), str(files / "deep" / "cache")
    plain = content(index_source(row, WHERE))
    assert content(index_source(row, WHERE, cache_folder=cache)) == plain
    monkeypatch.setattr(FORMATS[form], "index", refuse)
    assert content(index_source(row, WHERE, cache_folder=cache)) == plain
    with pytest.raises(AssertionError, match="indexed anew"):
        index_source(row, WHERE)


def test_blank_lines_keep_their_meaning(files):
    lines = content(index_source(source(files / "l.jsonl", "jsonl"), WHERE))
    assert [(key, json.loads(m["json"])["text"]) for _, key, m in lines] == [
        ("line 1", "a"), ("line 4", "b"), ("line 5", "c"),
    ]  # fmt: skip


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "foreign"])
def test_a_damaged_index_is_made_again(files, damage):
    row, cache = source(files / "0.tar"), files / "cache"
    plain = content(index_source(row, WHERE, cache_folder=str(cache)))
    [kept] = cache.iterdir()
    whole = kept.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    kept.write_bytes(
        {"flip": bytes(flipped), "cut": whole[:-1], "empty": b"", "foreign": b"x" * 99}[damage]
    )
    assert content(index_source(row, WHERE, cache_folder=str(cache))) == plain
    assert [path.read_bytes() for path in cache.iterdir()] == [whole]


def test_a_changed_file_is_indexed_anew(files):
    row, cache = source(files / "0.tar"), str(files / "cache")
    before = files / "0.tar"
    index_source(row, WHERE, cache_folder=cache)
    size = before.stat().st_size
    before.write_bytes(tar_bytes([("b.txt", b"x"), ("c.txt", b"y"), ("d.txt", b"z"), ("e", b"")]))
    assert before.stat().st_size == size
    os.utime(before, (1, 1))
    keys = [key for _, key, _ in content(index_source(row, WHERE, cache_folder=cache))]
    assert keys == ["b", "c", "d", "e"]


def test_another_file_of_that_name_and_another_format_have_their_own_index(files):
    (files / "other").mkdir()
    (files / "other" / "l.jsonl").write_bytes(b'{"text": "other"}\n')
    cache = str(files / "cache")
    for path in (files / "l.jsonl", files / "other" / "l.jsonl"):
        row = source(path, "jsonl")
        assert content(index_source(row, WHERE, cache_folder=cache)) == content(
            index_source(row, WHERE)
        )
    as_tar = source(files / "l.jsonl")
    with pytest.raises(ValueError, match="l.jsonl cannot be read as a tar file"):
        index_source(as_tar, WHERE, cache_folder=cache)


def test_damage_of_the_shard_itself_is_kept_with_its_index(files):
    whole = (files / "0.tar").read_bytes()
    (files / "0.tar").write_bytes(whole[: 1024 + 512 + 100])
    row, cache = source(files / "0.tar"), str(files / "cache")
    for _ in range(2):
        with pytest.raises(ValueError, match="0.tar cannot be read as a tar file "):
            index_source(row, WHERE, cache_folder=cache)
        shards = index_source(row, WHERE, cache_folder=cache, tolerant=True)
        assert isinstance(shards[-1], DamagedRest)
        assert [s.num_samples for s in shards] == [
            s.num_samples for s in index_source(row, WHERE, tolerant=True)
        ]


def test_shards_behind_a_url_are_kept_too(files, monkeypatch):
    path = "memory://test_index_cache/a.tar"
    for text in (b"one", b"two"):
        with fsspec.open(path, "wb") as file:
            file.write(tar_bytes([("0.txt", text)]))
        for _ in range(2):
            [(_, _, members)] = content(
                index_source(source(path), WHERE, cache_folder=str(files / "cache"))
            )
            assert members == {"txt": text}
    assert len(list((files / "cache").iterdir())) == 2


def test_processes_that_start_together_write_whole_indexes_and_share_the_files(files):
    """Each goes through the files in another order; all find the same shards, in the order of their paths."""
    row, cache = source(files / "*.tar"), files / "cache"
    index = partial(index_source, row, WHERE, cache_folder=str(cache))
    with ThreadPoolExecutor(8) as pool:
        found = [future.result() for future in [pool.submit(index) for _ in range(16)]]
    plain = content(index_source(row, WHERE))
    assert all(content(shards) == plain for shards in found)
    assert len(list(cache.iterdir())) == 5


def test_a_cache_folder_that_cannot_be_written_is_pointed_out(files):
    (files / "taken").write_text("a file")
    with pytest.raises(
        ValueError, match="data.cache_folder: .*taken cannot be written .*name another"
    ):
        index_source(source(files / "0.tar"), WHERE, cache_folder=str(files / "taken"))


def test_a_long_index_reports_its_progress(files, monkeypatch, caplog):
    monkeypatch.setattr(readers, "LOG_SECONDS", -1)
    with caplog.at_level("INFO", logger=readers.__name__):
        index_source(source(files / "*.tar"), WHERE)
    reports = [r.message for r in caplog.records if r.levelname == "INFO"]
    assert reports[-1] == f"{WHERE}: indexed 4 of 5 files"


def test_an_index_is_arrays_of_a_few_bytes_per_sample(tmp_path):
    (tmp_path / "l.jsonl").write_bytes(b'{"text": "a"}\n' * 1000)
    [lines] = index_source(source(tmp_path / "l.jsonl", "jsonl"), WHERE)
    (tmp_path / "t.tar").write_bytes(tar_bytes([(f"{i:06d}.txt", b"") for i in range(1000)]))
    [tar] = index_source(source(tmp_path / "t.tar"), WHERE)
    for shard, kind, limit in ((lines, TextRows, 8), (tar, TarSamples, 9 + 6)):
        arrays = [value for value in vars(shard).values() if isinstance(value, np.ndarray)]
        assert isinstance(shard, kind) and sum(a.nbytes for a in arrays) // 1000 == limit


def test_a_shard_of_a_kept_index_is_a_few_bytes_whatever_its_samples(files):
    (files / "big.jsonl").write_bytes(b'{"text": "a"}\n' * 100_000)
    row = source(files / "big.jsonl", "jsonl")
    [shard] = index_source(row, WHERE, cache_folder=str(files / "cache"))
    assert shard.num_samples == 100_000 and len(pickle.dumps(shard)) < 1000
    assert Reader([shard]).read(0, 99_999).key == "line 100000"


@pytest.mark.parametrize("damage", ["flip", "gone", "cut"])
def test_an_index_that_is_damaged_after_the_start_is_made_again(files, caplog, damage):
    row, cache = source(files / "*.tar"), files / "cache"
    plain = content(index_source(row, WHERE))
    shards = index_source(row, WHERE, cache_folder=str(cache))
    whole = {path: path.read_bytes() for path in cache.iterdir()}
    for path, data in whole.items():
        flipped = data[:-1] + bytes([data[-1] ^ 1])
        path.write_bytes({"flip": flipped, "gone": b"", "cut": data[:-9]}[damage])
        if damage == "gone":
            path.unlink()
    assert content(shards) == plain
    assert {path: path.read_bytes() for path in cache.iterdir()} == whole
    assert sum("is indexed again" in r.message for r in caplog.records) == 5


def test_samples_of_a_file_that_changed_are_bad_where_its_index_is_gone(files):
    row, cache = source(files / "0.tar"), files / "cache"
    shards = index_source(row, WHERE, cache_folder=str(cache))
    (files / "0.tar").write_bytes(tar_bytes([("x.txt", b"one")]))
    next(cache.iterdir()).unlink()
    with pytest.raises(BadSample, match="sample 'number 0': .* changed after it was indexed"):
        Reader(shards).read(0, 0)


def test_a_large_index_is_read_by_place_and_gives_the_same_samples(files, monkeypatch):
    monkeypatch.setattr(index_cache, "MAX_MAPPED", 0)
    for name, form in (("*.tar", "webdataset"), ("l.jsonl", "jsonl")):
        row = source(files / name, form)
        kept = index_source(row, WHERE, cache_folder=str(files / "cache"))
        assert content(kept) == content(index_source(row, WHERE))


def test_a_large_index_that_is_cut_off_while_it_is_in_use_gives_bad_samples(files, monkeypatch):
    monkeypatch.setattr(index_cache, "MAX_MAPPED", 0)
    row, cache = source(files / "l.jsonl", "jsonl"), files / "cache"
    reader = Reader(index_source(row, WHERE, cache_folder=str(cache)))
    assert reader.read(0, 2).key == "line 5"
    [kept] = cache.iterdir()
    os.truncate(kept, 100)
    with pytest.raises(BadSample, match="was cut off while it was in use"):
        reader.read(0, 1)


def test_an_array_in_a_file_is_as_one_in_memory(tmp_path):
    for shape in ((12,), (4, 3), (0,)):
        array = np.arange(np.prod(shape), dtype="<u4").reshape(shape)
        (tmp_path / "a").write_bytes(b"before" + array.tobytes())
        opened = index_cache.OpenIndex(tmp_path / "a")
        stored = index_cache.StoredArray(opened, 6, "<u4", shape)
        assert len(stored) == len(array) and stored.tolist() == array.tolist()
        for index in (slice(1, 3), slice(2, 1), slice(None), slice(0, 9, 2), array > 2):
            assert stored[index].tolist() == array[index].tolist()
        assert np.array_equal(stored, array) and stored.shape == shape
        for index in range(-len(array), len(array)):
            assert np.array_equal(stored[index], array[index])
        with pytest.raises(IndexError):
            stored[len(array)]


def test_helper_processes_fill_the_cache_and_change_nothing(files, monkeypatch):
    row, cache = source(files / "*.tar"), str(files / "cache")
    plain = content(index_source(row, WHERE))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4, 5})
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    (files / "5.tar").write_bytes(b"no tar" * 500)
    paths = sorted(str(path) for path in files.glob("*.tar"))
    # The folder that the command is called in may be a stranger's.
    (files / "random.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(files)
    [helper] = readers.start_helpers(row, [*paths, "gone"], cache, WHERE)
    assert helper.wait(60) == 0
    monkeypatch.setattr(FORMATS["webdataset"], "index", refuse)
    (files / "5.tar").unlink()
    assert content(index_source(row, WHERE, cache_folder=cache)) == plain


def test_a_long_index_gets_help_that_ends_with_it(files, monkeypatch):
    started = []

    class Helper:
        def __init__(self, command, **_):
            self.calls, self.stdin = [], open(os.devnull, "wb")
            started.append(self)

        def terminate(self):
            self.calls.append("terminate")

        def wait(self):
            self.calls.append("wait")

    monkeypatch.setattr(readers, "HELP_SECONDS", -1)
    monkeypatch.setattr(readers.subprocess, "Popen", Helper)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    index_source(source(files / "*.tar"), WHERE)
    assert not started  # without a cache folder there is nothing to share
    index_source(source(files / "*.tar"), WHERE, cache_folder=str(files / "cache"))
    assert [helper.calls for helper in started] == [["terminate", "wait"]] * 2


def test_an_index_that_takes_much_memory_advises_a_cache_folder(files, monkeypatch, caplog):
    monkeypatch.setattr(readers, "ADVISED_BYTES", 10)
    row = source(files / "l.jsonl", "jsonl")
    with caplog.at_level("INFO", logger=readers.__name__):
        index_source(row, WHERE, cache_folder=str(files / "cache"))
        assert not caplog.records
        index_source(row, WHERE)
    assert [r.message for r in caplog.records] == [
        f"{WHERE}: the index takes 0 MiB in every process; with data.cache_folder they share one"
    ]
