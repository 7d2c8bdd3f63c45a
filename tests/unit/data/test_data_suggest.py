"""A row that is proposed for a file can be pasted into a config, and reads it rightly."""

import gzip
import io
import json
import tomllib
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from symbiotic_titan.commands import check_data
from symbiotic_titan.config.data import Data
from symbiotic_titan.data.suggest import suggest
from tests.helpers.tar_files import tar_bytes


def png(colour="red"):
    out = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(out, "PNG")
    return out.getvalue()


TURNS = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "red"}]
SEEING = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "red"}]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(**columns):
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


def tar(*members):
    return tar_bytes([(f"{i}.{end}", data) for i in range(3) for end, data in members])


# File -> (its bytes, task, format, keys).
SHAPES = {
    "a.jsonl": (jsonl([{"text": "a"}] * 3), "lm", "jsonl", {}),
    "a.ndjson": (jsonl([{"content": "a", "id": "7"}] * 3), "lm", "jsonl", {"text": "content"}),
    "b.jsonl": (jsonl([{"conversations": TURNS}] * 3), "lm", "jsonl", {}),
    "c.jsonl": (jsonl([{"chat": CHAT}] * 3), "lm", "jsonl", {"messages": "chat"}),
    "alpaca.json": (
        json.dumps([{"instruction": "Add", "input": "1 1", "output": "2"}] * 3, indent=1).encode(),
        *("lm", "json", {}),
    ),
    "llava.json": (
        json.dumps([{"image": "red.png", "conversations": SEEING}] * 3).encode(),
        *("mmu", "json", {}),
    ),
    "llava.jsonl.gz": (
        gzip.compress(jsonl([{"image": "red.png", "conversations": SEEING}] * 3)),
        *("mmu", "jsonl", {}),
    ),
    "pairs.tar": (tar(("png", png()), ("txt", b"a red square")), "t2i", "webdataset", {}),
    "prompts.tar": (
        tar(("png", png()), ("json", b'{"meta": {"prompt": "a red square"}, "width": 32}')),
        *("t2i", "webdataset", {"caption": "meta.prompt"}),
    ),
    "captions.parquet": (
        parquet(image=[{"bytes": png(), "path": None}] * 3, text=["a red square"] * 3),
        *("t2i", "parquet", {"caption": "text"}),
    ),
    "picture.parquet": (
        parquet(picture=[png()] * 3, caption=["a red square"] * 3),
        *("t2i", "parquet", {"image": "picture"}),
    ),
    "answers.parquet": (
        parquet(image=[png()] * 3, query=["What is it?"] * 3, response=["red"] * 3),
        *("mmu", "parquet", {"question": "query", "answer": "response"}),
    ),
    "cauldron.parquet": (
        parquet(
            images=[[{"bytes": png(), "path": None}]] * 3,
            texts=[[{"user": "What is it?", "assistant": "red", "source": "x"}]] * 3,
        ),
        *("mmu", "parquet", {}),
    ),
    "obelics.parquet": (
        parquet(images=[[None, png()]] * 3, texts=[["red:", None]] * 3),
        *("interleaved", "parquet", {}),
    ),
    "edits.parquet": (
        parquet(input_image=[png()] * 3, instruction=["Blue"] * 3, output_image=[png("blue")] * 3),
        *("interleaved", "parquet", {}),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_row_for_each_shape_is_toml_that_reads_it(make_loader, tmp_path, name):
    content, task, form, keys = SHAPES[name]
    path = tmp_path / name
    path.write_bytes(content)
    (tmp_path / "red.png").write_bytes(png())
    text = suggest(str(path)).toml()
    [row] = tomllib.loads(text)["data"]["sources"]
    assert (row["task"], row["format"], row.get("keys", {})) == (task, form, keys)
    assert row["path"] == str(path) and row["name"] == name.partition(".")[0]
    assert "# 3 of 3 samples make documents" in text and "trained" in text
    assert ("image of" in text) == (task != "lm")
    settings = {"sources": Data(sources=[row]).sources, "cache_folder": str(tmp_path / "cache")}
    loader = make_loader(settings, global_batch_size=1)
    [batch] = islice(loader, 1)
    assert loader.num_skipped == 0 and int(batch.num_labels()) > 0


def test_a_folder_and_a_pattern_are_proposed_as_they_were_named(tmp_path):
    folder = tmp_path / "squares"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.tar").write_bytes(SHAPES["pairs.tar"][0])
    (folder / "README.md").write_text("# Squares")
    for path in (str(folder), f"{folder}/*.tar"):
        found = suggest(path)
        assert (found.source.path, found.source.name, found.files) == (path, "squares", 2)
        assert "recognised" not in found.toml() and found.toml().startswith("# 2 files; the first")


def test_bad_samples_among_the_good_are_told(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl([{"text": "a"}, {"text": 7}, {"text": "b"}]))
    text = suggest(str(path)).toml()
    assert "# 2 of 3 samples make documents" in text
    assert "# bad, for example: 'text' must be a string, got 7" in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"a,b\n1,2\n", "begins with b'a,b\\n1,2\\n'; read are tar files, JSON lines"),
        ("a.jsonl", b'{"x": 1}\n', "jsonl whose samples have x fits no task"),
        ("a.parquet", b"PAR1 and no more", "cannot be read as a Parquet file"),
        ("a.tar", b"", "begins with b''"),
        ("a.json", b"[]", "holds no samples"),
        (None, b"", "no file matches path"),
    ],
)
def test_a_file_of_no_known_shape_is_one_line_and_status_2(
    tmp_path, capsys, name, content, message
):
    path = tmp_path / (name or "nothing")
    if name:
        path.write_bytes(content)
    assert check_data.main(["--suggest", str(path)]) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1
    assert said.err.startswith(f"error: --suggest {path}: ") and message in said.err


def test_config_and_suggest_exclude_each_other(capsys):
    for arguments in ([], ["config.toml", "--suggest", "a.tar"]):
        assert check_data.main(arguments) == 2
        assert "error: name either a CONFIG to check or --suggest FILE" in capsys.readouterr().err


def test_the_command_prints_the_row(tmp_path, capsys):
    path = tmp_path / "pairs.tar"
    path.write_bytes(SHAPES["pairs.tar"][0])
    assert check_data.main(["--suggest", str(path)]) == 0
    assert capsys.readouterr().out == suggest(str(path)).toml()
