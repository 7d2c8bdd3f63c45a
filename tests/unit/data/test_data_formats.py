"""Parquet, compressed shards, key maps and damaged files: what a user's own files look like."""

import bz2
import gzip
import io
import json
import lzma
import pickle

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from symbiotic_titan.config.data import DataSource
from symbiotic_titan.data.fields import Fields
from symbiotic_titan.data.formats.shard import BadSample
from symbiotic_titan.data.readers import Reader, check_names, index_source
from symbiotic_titan.data.samples import fields_of
from tests.helpers.tar_files import tar_bytes

WHERE = "[[data.sources]] #1 (s)"


def png(value=200, size=(8, 8)):
    buffer = io.BytesIO()
    Image.fromarray(np.full((*size, 3), value, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def source(path, form, task="t2i", **keys):
    return DataSource("s", task, form, str(path), keys)


def read_fields(row, **settings):
    """Fields of all samples of a source, in the order of its shards."""
    shards = index_source(row, WHERE, **settings)
    check_names(row, shards, WHERE)
    shards = pickle.loads(pickle.dumps(shards))  # as for a worker process
    reader = Reader(shards)
    return [
        fields_of(row, reader.read(number, sample))
        for number, shard in enumerate(shards)
        for sample in range(shard.num_samples)
    ]


def test_keys_name_tar_members_and_json_keys(tmp_path):
    members = [("0.left.png", b"1"), ("0.right.png", b"2"), ("0.txt", b"text")]
    members += [("0.json", b'{"a": {"b.c": "deep"}}'), ("0.meta.json", b'{"title": "T"}')]
    (tmp_path / "s.tar").write_bytes(tar_bytes(members))
    for key, expected in (("txt", "text"), ("a.b.c", "deep"), ("meta.json.title", "T")):
        row = source(tmp_path / "s.tar", "webdataset", image="right.png", caption=key)
        [fields] = read_fields(row)
        assert (fields.text("caption"), fields.image()) == (expected, b"2")


def test_json_names_members_of_its_sample_as_images(tmp_path):
    members = [("0.1.png", b"1"), ("0.0.png", b"0"), ("0.json", b'{"images": ["0.png", "1.png"]}')]
    (tmp_path / "s.tar").write_bytes(tar_bytes([*members, ("0.txt", b"c")]))
    [fields] = read_fields(source(tmp_path / "s.tar", "webdataset"))
    assert fields.images() == [b"0", b"1"]
    with pytest.raises(BadSample, match="it has 2 images, one is expected"):
        fields.image()


@pytest.mark.parametrize("columns", [{}, {"image": "pic", "caption": "meta.words"}])
def test_parquet_rows_are_read_by_row_group_whatever_holds_the_image(tmp_path, columns):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "3.png").write_bytes(b"image 3")
    images = [{"bytes": b"image %d" % i, "path": None} for i in range(3)]
    images.append({"bytes": None, "path": "images/3.png"})
    texts = [f"text {i}" for i in range(4)]
    table = {"image": images, "caption": texts}
    if columns:
        table = {"pic": images, "meta": [{"words": text, "more": 1} for text in texts]}
    table["other"] = [1.0] * 4
    pq.write_table(pa.table(table), tmp_path / "t.parquet", row_group_size=3)
    row = source(tmp_path / "t.parquet", "parquet", **columns)
    shards = index_source(row, WHERE)
    assert [shard.num_samples for shard in shards] == [3, 1]
    assert [shard.key(0) for shard in shards] == ["row 0", "row 3"]
    assert "other" not in Reader(shards).read(0, 0).members
    found = [(f.image(), f.text("caption")) for f in read_fields(row)]
    assert found == [(b"image %d" % i, f"text {i}") for i in range(4)]


@pytest.mark.parametrize("column", [[b"image"], ["a.png"], [["a.png", "a.png"]]])
def test_parquet_images_may_be_bytes_paths_or_lists(tmp_path, column):
    (tmp_path / "a.png").write_bytes(b"image")
    pq.write_table(pa.table({"image": column, "caption": ["c"]}), tmp_path / "t.parquet")
    [fields] = read_fields(source(tmp_path / "t.parquet", "parquet"))
    assert set(fields.images()) == {b"image"}


def test_text_is_read_from_parquet_and_from_tar(tmp_path):
    pq.write_table(pa.table({"content": ["ä", "b"]}), tmp_path / "t.parquet")
    (tmp_path / "t.tar").write_bytes(tar_bytes([("0.txt", "ä".encode()), ("1.txt", b"b")]))
    for row in (
        source(tmp_path / "t.parquet", "parquet", "lm", text="content"),
        source(tmp_path / "t.tar", "webdataset", "lm"),
    ):
        assert [fields.text("text") for fields in read_fields(row)] == ["ä", "b"]


def test_jsonl_names_images_in_a_folder_beside_it(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.jpg").write_bytes(b"zero")
    paths = ["images/0.jpg", str(tmp_path / "images" / "0.jpg"), "images/1.jpg", 7]
    lines = [json.dumps({"file": path, "caption": "c"}) for path in paths]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    fields = read_fields(source(tmp_path / "t.jsonl", "jsonl", image="file"))
    assert [f.image() for f in fields[:2]] == [b"zero"] * 2
    with pytest.raises(BadSample, match=r"image .*images/1.jpg cannot be read .*No such file"):
        fields[2].image()
    with pytest.raises(BadSample, match="an image must be bytes or a path, got 7"):
        fields[3].image()


def test_images_beside_a_jsonl_behind_a_url_are_found():
    with fsspec.open("memory://test_formats/a.jsonl", "wb") as file:
        file.write(b'{"image": "i/0.png", "caption": "c"}\n')
    with fsspec.open("memory://test_formats/i/0.png", "wb") as file:
        file.write(b"image")
    [fields] = read_fields(source("memory://test_formats/*.jsonl", "jsonl"))
    assert fields.image() == b"image"


def test_parquet_behind_a_url_is_read():
    with fsspec.open("memory://test_formats/t.parquet", "wb") as file:
        pq.write_table(pa.table({"text": ["a"]}), file)
    [fields] = read_fields(source("memory://test_formats/t.parquet", "parquet", "lm"))
    assert fields.text("text") == "a"


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("ending", PACK)
def test_compressed_shards_are_unpacked_once_into_the_cache(tmp_path, ending):
    tar = tar_bytes([("0.png", b"image"), ("0.txt", b"caption")])
    (tmp_path / f"s.tar{ending}").write_bytes(PACK[ending](tar))
    row = source(tmp_path / f"s.tar{ending}", "webdataset")
    cache = tmp_path / "cache" / "unpacked"
    for _ in range(2):
        [fields] = read_fields(row, cache_folder=str(cache))
        assert (fields.image(), fields.text("caption")) == (b"image", "caption")
        [copy] = [path for path in cache.iterdir() if "index" not in path.name]
        assert copy.read_bytes() == tar
        copy.chmod(0o444)
    assert fields.sample.shard == row.path
    (tmp_path / f"s.tar{ending}").write_bytes(PACK[ending](tar_bytes([("1.png", b"other")])))
    [fields] = [
        fields_of(row, Reader(index_source(row, WHERE, cache_folder=str(cache))).read(0, 0))
    ]
    assert fields.image() == b"other"


def test_compressed_shards_without_a_cache_folder_or_a_library_are_refused(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    row = source(tmp_path / "a.jsonl.gz", "jsonl", "lm")
    with pytest.raises(ValueError, match=r"a.jsonl.gz is compressed, .*set data.cache_folder"):
        index_source(row, WHERE)
    if "zstd" not in fsspec.available_compressions():
        (tmp_path / "a.jsonl.zst").write_bytes(b"?")
        with pytest.raises(ValueError, match="compressed as zstd, .*install the package zstandard"):
            index_source(source(tmp_path / "a.jsonl.zst", "jsonl", "lm"), WHERE)


@pytest.mark.parametrize(
    ("form", "keys", "message"),
    [
        (
            "webdataset",
            {"image": "jpg"},
            "keys.image is looked for as 'jpg', which no sample has; ",
        ),
        ("webdataset", {"caption": "a.b"}, "keys.caption is looked for as 'a.b', which no sample "),
        ("webdataset", {"caption": "a.b"}, "there are: json, png, words. Name the right one: keys"),
        (
            "webdataset",
            {},
            "its caption is looked for as 'caption' or 'txt' or 'captions', which no",
        ),
        (
            "jsonl",
            {},
            '; there are: json, png, words. Name the right one: keys = {caption = "..."}',
        ),
        ("parquet", {"caption": "word"}, "keys.caption is looked for as 'word', which no sample"),
        ("parquet", {"caption": "words.a"}, "keys.caption is looked for as 'words.a', which no "),
        (
            "parquet",
            {"image": "png"},
            "its caption is looked for as 'caption' or 'txt' or 'captions', which no",
        ),
        ("parquet", {"image": "png"}, "there are: png, words, words.b. Name the right one"),
    ],
)
def test_key_that_no_sample_has_is_named_with_those_that_are_there(tmp_path, form, keys, message):
    (tmp_path / "s.webdataset").write_bytes(
        tar_bytes([("0.png", png()), ("0.json", b'{"words": "c"}')])
    )
    (tmp_path / "s.jsonl").write_text('{"png": "0.png", "words": "c"}\n')
    pq.write_table(pa.table({"png": [png()], "words": [{"b": "c"}]}), tmp_path / "s.parquet")
    row = source(tmp_path / f"s.{form}", form, **keys)
    with pytest.raises(ValueError) as error:
        check_names(row, index_source(row, WHERE), WHERE)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{WHERE}: ")


def test_a_key_that_only_later_samples_have_is_accepted(tmp_path):
    lines = [{"other": "x"}] * 3 + [{"text": "a"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert len(read_fields(source(tmp_path / "a.jsonl", "jsonl", "lm"))) == 4


@pytest.mark.parametrize(
    ("form", "content", "whole", "message"),
    [
        (
            "webdataset",
            tar_bytes([("0.txt", b"x" * 400), ("1.txt", b"y" * 400)])[: 1024 + 700],
            1,
            "cannot be read as a tar file (unexpected end of data)",
        ),
        (
            "webdataset",
            tar_bytes([("0.txt", b"x" * 400), ("1.txt", b"y" * 400)])[:1024],
            1,
            "breaks off after byte 1024; copy or write it again",
        ),
        ("webdataset", b"no tar" * 500, 0, "cannot be read as a tar file"),
        ("parquet", b"PAR1 no", 0, "cannot be read as a Parquet file"),
        (
            "jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 9, 0)[:-12],
            8,
            "cannot be unpacked to its",
        ),
    ],
)
def test_rest_of_a_damaged_file_is_one_bad_sample_where_they_are_skipped(
    tmp_path, form, content, whole, message
):
    path = tmp_path / f"s.{form}"
    path.write_bytes(content)
    row, cache = source(path, form.removesuffix(".gz"), "lm"), str(tmp_path / "cache")
    with pytest.raises(ValueError) as error:
        index_source(row, WHERE, cache_folder=cache)
    assert str(error.value).startswith(f"{WHERE}: {path} {message}")
    shards = index_source(row, WHERE, cache_folder=cache, tolerant=True)
    assert shards[-1].num_samples == 1
    with pytest.raises(BadSample) as bad:
        Reader(shards).read(len(shards) - 1, 0)
    assert bad.value.reason == "unreadable"
    assert str(bad.value).startswith(f"{path}: sample '(damaged part)': the file {message}")
    good = 0
    for sample in range(shards[0].num_samples if len(shards) > 1 else 0):
        good += bool(Fields(Reader(shards).read(0, sample), {}).text("text"))
        if good == whole:
            break
    assert good == whole


def test_file_that_shrinks_or_goes_away_while_it_is_read_gives_bad_samples(tmp_path):
    path = tmp_path / "s.tar"
    path.write_bytes(tar_bytes([("0.txt", b"x" * 400), ("1.txt", b"y" * 400)]))
    shards = index_source(source(path, "webdataset", "lm"), WHERE)
    path.write_bytes(path.read_bytes()[:1200])
    with pytest.raises(BadSample, match="sample '1': the file ends inside its .txt"):
        Reader(shards).read(0, 1)
    path.unlink()
    with pytest.raises(BadSample, match="sample '0': it cannot be read .*No such file"):
        Reader(shards).read(0, 0)


def test_damaged_row_group_gives_bad_samples_and_the_others_are_read(tmp_path):
    path = tmp_path / "t.parquet"
    texts = [f"text {i} " * 50 for i in range(40)]
    table = pa.table({"text": texts})
    pq.write_table(
        table, path, row_group_size=20, compression="none", use_dictionary=False,
        write_page_checksum=True,
    )  # fmt: skip
    content = bytearray(path.read_bytes())
    content[content.index(b"text 3 ")] ^= 0xFF
    path.write_bytes(content)
    shards = index_source(source(path, "parquet", "lm"), WHERE)
    reader = Reader(shards)
    with pytest.raises(BadSample, match="sample 'row 7': .*row group 0 cannot be decoded"):
        reader.read(0, 7)
    assert reader.read(1, 0).members == {"text": texts[20]}


def test_text_of_a_table_that_is_not_utf8_is_a_bad_sample(tmp_path):
    bad = pa.array([b"ok", b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": bad}), tmp_path / "t.parquet")
    reader = Reader(index_source(source(tmp_path / "t.parquet", "parquet", "lm"), WHERE))
    assert reader.read(0, 0).members == {"text": "ok"}
    with pytest.raises(BadSample) as error:
        reader.read(0, 1)
    assert error.value.reason == "encoding"
