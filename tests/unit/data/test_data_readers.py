import json

import fsspec
import pytest

from symbiotic_titan.config.data import DataSource
from symbiotic_titan.data.readers import Reader, index_source
from tests.helpers.tar_files import tar_bytes

WHERE = "[[data.sources]] #1 (s)"


def source(path, form="webdataset"):
    return DataSource(name="s", task="t2i", format=form, path=str(path))


def test_members_are_grouped_by_the_path_up_to_the_first_dot(tmp_path):
    long_name = "x" * 150  # longer than a plain tar header holds
    members = [
        ("a/0.png", b"picture"),
        ("a/0.json", b"{}"),
        ("b/0.seg.PNG", b"other"),
        (f"{long_name}.txt", b"text"),
    ]
    (tmp_path / "s.tar").write_bytes(tar_bytes(members))
    [shard] = index_source(source(tmp_path / "s.tar"), WHERE)
    assert [shard.key(i) for i in range(shard.num_samples)] == ["a/0", "b/0", long_name]
    samples = [Reader([shard]).read(0, i) for i in range(3)]
    assert samples[0].members == {"png": b"picture", "json": b"{}"}
    assert samples[1].members == {"seg.png": b"other"}
    assert samples[2].members == {"txt": b"text"}
    assert samples[0].shard == str(tmp_path / "s.tar")


def test_lines_are_samples_and_blank_ones_are_passed_over(tmp_path):
    (tmp_path / "t.jsonl").write_bytes('{"text": "ä"}\n\n  \n{"text": "b"}'.encode())
    [shard] = index_source(source(tmp_path / "t.jsonl", "jsonl"), WHERE)
    assert [shard.key(i) for i in range(shard.num_samples)] == ["line 1", "line 4"]
    texts = [json.loads(Reader([shard]).read(0, i).members["json"])["text"] for i in range(2)]
    assert texts == ["ä", "b"]


def test_shards_behind_a_url_are_read_like_local_ones():
    for i in range(2):
        with fsspec.open(f"memory://test_readers/s{i}.tar", "wb") as file:
            file.write(tar_bytes([(f"{i}.txt", b"text %d" % i)]))
    shards = index_source(source("memory://test_readers/*.tar"), WHERE)
    assert [Reader(shards).read(i, 0).members["txt"] for i in range(2)] == [b"text 0", b"text 1"]


def test_reader_keeps_few_shards_open(tmp_path):
    for i in range(11):
        (tmp_path / f"{i:02d}.jsonl").write_text(f'{{"text": "{i}"}}\n')
    shards = index_source(source(tmp_path / "*.jsonl", "jsonl"), WHERE)
    reader = Reader(shards)
    for _ in range(2):
        for i in range(len(shards)):
            assert json.loads(reader.read(i, 0).members["json"]) == {"text": str(i)}
            assert len(reader._files) <= shards[0].max_open


def message_of(path, form):
    """What indexing it raises: one line that begins with the row of the config."""
    with pytest.raises(ValueError) as error:
        index_source(source(path, form), WHERE)
    message = str(error.value)
    assert message.startswith(WHERE) and "\n" not in message
    return message


def test_missing_shards_are_named_with_their_path(tmp_path):
    all_of_none = message_of(tmp_path / "*.tar", "webdataset")
    assert f"no file matches path '{tmp_path}/*.tar'; check path" in all_of_none
    assert "no file matches path" in message_of(tmp_path / "one.tar", "webdataset")
    assert "no file matches path" in message_of(tmp_path, "webdataset")


def test_url_of_an_unknown_kind_is_refused():
    message = message_of("nowhere://a/*.tar", "webdataset")
    assert "cannot be opened (Protocol not known: nowhere" in message


def test_missing_demo_shards_are_answered_with_the_command_that_makes_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = message_of("demo_data/train/t2i/*.tar", "webdataset")
    assert "make the demo data with: symbiotic make-demo-data --out demo_data" in message


def test_file_that_is_no_tar_is_refused(tmp_path):
    (tmp_path / "n.tar").write_bytes(b"no tar" * 500)
    assert "n.tar cannot be read as a tar file" in message_of(tmp_path / "n.tar", "webdataset")


@pytest.mark.parametrize(
    "length, message",
    [
        (700, "t.tar cannot be read as a tar file (unexpected end of data)"),
        (1024, "t.tar breaks off after byte 1024; copy or write it again"),
        (1024 + 100, "t.tar breaks off after byte 1024; copy or write it again"),
        (1024 + 512 + 100, "t.tar cannot be read as a tar file (unexpected end of data)"),
    ],
)
def test_tar_that_breaks_off_is_refused(tmp_path, length, message):
    whole = tar_bytes([("0.txt", b"x" * 400), ("1.txt", b"y" * 400)])
    (tmp_path / "t.tar").write_bytes(whole[:length])
    assert message in message_of(tmp_path / "t.tar", "webdataset")
