"""Files that are not what a source expects, and samples that could be taken for something else than they are."""

import gzip
import io
import json
import logging
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from symbiotic_titan.data.formats.shard import BadSample
from tests.helpers.read_documents import read_source
from tests.helpers.released_data import IMAGE, TURN, picture
from tests.helpers.tar_files import tar_bytes

RED, BLUE = picture("red"), picture("blue")
TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
SEEN = "<user><see red>q<assistant>[a<eos>]"


@pytest.fixture
def read(tmp_path):
    """Documents of the file that has the ``content``; texts are JSON lines, tables Parquet, lists the members of a tar file."""

    def reading(task, content, more="", form=None):
        if isinstance(content, pa.Table):
            form, path = form or "parquet", tmp_path / "a.parquet"
            pq.write_table(content, path)
        elif isinstance(content, list) and isinstance(content[0], tuple):
            form, path = "webdataset", tmp_path / "a.tar"
            path.write_bytes(tar_bytes(content))
        else:
            form, path = form or "jsonl", tmp_path / "a.jsonl"
            rows = [json.dumps(row) for row in content] if isinstance(content, list) else []
            path.write_bytes("\n".join(rows).encode() if rows else content)
        lines = f'task = "{task}"\nformat = "{form}"\npath = "{path}"\n{more}'
        return list(read_source(tmp_path, f'[[data.sources]]\nname = "s"\n{lines}'))

    return reading


def said(content, **more):
    return {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": "a", **more},
        ]
    }


def packed(kind):
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("a.jsonl", '{"text": "a"}')
    elif kind == "arrow":
        table = pa.table({"text": ["a"]})
        with pa.ipc.new_stream(buffer, table.schema) as writer:
            writer.write_table(table)
    elif kind == "parquet":
        pq.write_table(pa.table({"text": ["a"]}), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (packed("zip"), "is a ZIP archive; unpack it"),
        (packed("arrow"), "is a stream of Arrow batches; write it as Parquet"),
        (packed("parquet"), 'is a Parquet file; set format = "parquet"'),
        (
            gzip.compress(b'{"text": "a"}', mtime=0),
            "is compressed with gzip; let its name end in .gz",
        ),
        ('{"text": "a"}\n'.encode("utf-16"), "is text in UTF-16; convert it to UTF-8"),
        (b"<!DOCTYPE html>\n<p>404</p>\n", "is an HTML page, so its download failed"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
@pytest.mark.parametrize("form", ["jsonl", "json", "webdataset"])
def test_a_file_of_another_kind_is_named_before_anything_is_read(form, content, message, read):
    with pytest.raises(ValueError, match=message) as error:
        read("lm", content, form=form)
    assert "\n" not in str(error.value)


def test_a_damaged_parquet_file_is_not_called_another_kind(read):
    with pytest.raises(ValueError, match="cannot be read as a Parquet file"):
        read("lm", packed("parquet")[:-20], form="parquet")


def test_columns_of_one_name_are_refused(read):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    with pytest.raises(ValueError, match="has several columns 'text'; rename all but one"):
        read("lm", table)
    other = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["text", "n", "n"])
    assert read("lm", other) == ["[a<eos>]"]


def test_linked_folders_are_folders_and_none_is_entered_twice(tmp_path):
    for name, text in (("data/a.jsonl", "own"), ("elsewhere/b.jsonl", "linked")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps({"text": text}))
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "itself").symlink_to(tmp_path / "data")
    row = '[[data.sources]]\nname = "s"\ntask = "lm"\nformat = "jsonl"\npath = "FOLDER/{}"'
    assert list(read_source(tmp_path, row.format("data"))) == ["[own<eos>]", "[linked<eos>]"]
    assert list(read_source(tmp_path, row.format("data/l*/*.jsonl"))) == ["[linked<eos>]"]


@pytest.mark.parametrize(
    "place", ["<IMAGE>", "<image />", "<image2>", "< image >", "<|image_pad|>"]
)
def test_what_looks_like_the_place_of_an_image_is_not_trained_as_text(place, read):
    table = pa.table({"image": [RED], "question": [f"{place}q"], "answer": ["a"]})
    [error] = read("mmu", table)
    assert isinstance(error, BadSample) and f"{place}, which looks like the place" in str(error)


def test_the_places_of_qwen_are_known(read):
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    table = pa.table({"image": [RED], "question": [f"{place}q"], "answer": ["a"]})
    assert read("mmu", table) == [SEEN]


def test_an_image_that_an_item_names_and_the_sample_lists_is_shown_once(read, tmp_path):
    for name, data in (("r.png", RED), ("b.png", BLUE)):
        (tmp_path / name).write_bytes(data)
    row = said([{"type": "image", "image": "r.png"}, "q"])
    one, two = read("mmu", [{**row, "images": ["r.png"]}, {**row, "images": ["r.png", "b.png"]}])
    assert one == SEEN
    assert isinstance(two, BadSample) and "places for 1 images too few" in str(two)


def test_of_two_images_in_a_tar_file_none_is_passed_over(read):
    pair = [("0.png", RED), ("0.webp", BLUE)]
    [error] = read("t2i", [*pair, ("0.txt", b"c")])
    assert isinstance(error, BadSample) and "it has 'png' and 'webp'; name one" in str(error)
    [document] = read("t2i", [*pair, ("0.txt", b"c")], 'keys = {image = "webp"}')
    assert document == "<user>[c]<assistant><make blue>[<eos>]"
    items = [{"type": "image", "image": "webp"}, {"type": "image", "image": "png"}, "q"]
    [document] = read("mmu", [*pair, ("0.json", json.dumps(said(items)).encode())])
    assert document == "<user><see blue><see red>q<assistant>[a<eos>]"


def test_a_table_of_nulls_is_no_image_and_empty_bytes_are_a_bad_one(read):
    images = [{"bytes": None, "path": None}, {"bytes": b"", "path": None}]
    columns = {
        "image": pa.array(images, IMAGE),
        "conversations": pa.array([TURNS] * 2, pa.list_(TURN)),
    }
    text, error = read("mmu", pa.table(columns))
    assert text == "<user>q<assistant>[a<eos>]"
    assert isinstance(error, BadSample)


def test_why_a_field_is_missing(read):
    null = pa.table({"image": [RED], "caption": pa.array([None], pa.string())})
    numbers = pa.table({"image": [list(RED)], "caption": ["c"]})
    messages = [str(read("t2i", table)[0]) for table in (null, numbers)]
    assert "its caption is missing: 'caption' is null" in messages[0]
    assert "its image is a list of numbers; it must be encoded" in messages[1]


def test_thoughts_of_the_assistant_are_not_left_out_without_a_word(read):
    thinking, without = read(
        "lm", [said("q", reasoning_content="hm"), said("q", reasoning_content=None)]
    )
    assert isinstance(thinking, BadSample) and "'reasoning_content', which is not" in str(thinking)
    assert without == "<user>q<assistant>[a<eos>]"


def test_a_byte_order_mark_is_no_part_of_a_caption(read):
    [document] = read("t2i", [("0.png", RED), ("0.txt", b"\xef\xbb\xbfc")])
    assert document == "<user>[c]<assistant><make red>[<eos>]"


def test_a_choice_between_schemas_is_said(read, caplog):
    # The Hub's copy of Alpaca has a column with the filled-in template.
    row = {
        "instruction": "i",
        "input": "",
        "output": "o",
        "text": "### Instruction: i ### Response: o",
    }
    with caplog.at_level(logging.WARNING):
        assert read("lm", [row]) == ["[### Instruction: i ### Response: o<eos>]"]
    assert "samples have text and output, and text is what is read" in caplog.text
    caplog.clear()
    assert read("lm", [row], 'keys = {output = "output"}') == ["<user>i<assistant>[o<eos>]"]
    assert not caplog.text
