"""What ``path`` of a source may be: patterns, braces, folders and URLs; which files are left out, and what is refused."""

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from symbiotic_titan.config.data import FORMATS, DataSource
from symbiotic_titan.data import files, readers
from symbiotic_titan.data.files import expanded, source_files
from symbiotic_titan.data.formats.shard import FileFormat
from symbiotic_titan.data.readers import index_source
from tests.helpers.tar_files import tar_bytes

WHERE = "[[data.sources]] #1 (s)"


def source(path, form="webdataset"):
    return DataSource("s", "lm", form, str(path))


@pytest.fixture
def tree(tmp_path):
    def make(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
        return tmp_path

    return make


def found(root, pattern, form="webdataset"):
    """Matches of ``pattern``, relative to ``root``."""
    files = source_files(source(root / pattern, form), WHERE)
    return [file.removeprefix(f"{root}/") for file in files]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("{a,b}/{1..2}", ["a/1", "a/2", "b/1", "b/2"]),
        ("r/{0008..0011}.tar", [f"r/{n:04d}.tar" for n in range(8, 12)]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{08..1}", ["08", "07", "06", "05", "04", "03", "02", "01"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{0..9..4}", ["0", "4", "8"]),
        ("{9..0..-4}", ["9", "5", "1"]),
        ("{-1..1}", ["-1", "0", "1"]),
        ("{a,b{0..1},}x", ["ax", "b0x", "b1x", "x"]),
        ("{a}{b..c}", ["{a}b", "{a}c"]),
        ("{{a,b}}", ["{a}", "{b}"]),
        ("a{b", ["a{b"]),
        ("{a{1,2}", ["{a1", "{a2"]),
        ("a}{1,2}", ["a}1", "a}2"]),
    ],
)
def test_braces_mean_what_they_mean_in_bash(text, names):
    assert expanded(text, WHERE) == names


@pytest.mark.parametrize("text", ["{0..9999999}", "{1..2000}{1..2000}"])
def test_braces_that_stand_for_too_much_are_refused(tree, text):
    with pytest.raises(ValueError, match=r"#1 \(s\): path .*stands for more than 1,000,000 files"):
        source_files(source(tree("a") / text), WHERE)


def test_every_file_of_braces_must_exist(tree):
    root = tree(*[f"rec/{i:04d}.tar" for i in range(12)], "rec/0012.txt")
    assert found(root, "rec/{0000..0011}.tar") == [f"rec/{i:04d}.tar" for i in range(12)]
    assert found(root, "rec/{0011..0010}.tar") == ["rec/0010.tar", "rec/0011.tar"]
    with pytest.raises(ValueError) as error:
        source_files(source(root / "rec/{0009..0099}.tar"), WHERE)
    assert str(error.value) == (
        f"{WHERE}: 88 of the 91 files of path '{root}/rec/{{0009..0099}}.tar' are missing, the first is {root}/rec/0012.tar; "
        "complete them, or correct the braces"
    )


def test_braces_may_hold_patterns_and_folders(tree):
    root = tree("a/0.tar", "a/1.tar", "b/0.tar", "b/deep/2.tar", "b/0.txt")
    assert found(root, "{a,b}/*.tar") == ["a/0.tar", "a/1.tar", "b/0.tar"]
    assert found(root, "{a,b}") == ["a/0.tar", "a/1.tar", "b/0.tar", "b/deep/2.tar"]
    with pytest.raises(ValueError, match="1 of the 2 files of path .* missing, .*/c/"):
        source_files(source(root / "{a,c}/*.tar"), WHERE)


@pytest.mark.parametrize("name", ["{0..1}.tar", "{a,b}.tar", "a*.tar", "a[0].tar"])
def test_an_existing_file_is_itself_whatever_its_name(tree, name):
    root = tree(name, "0.tar", "1.tar", "a.tar", "b.tar", "a0.tar")
    assert found(root, name) == [name]


def test_a_folder_whose_name_holds_braces_may_come_before_a_pattern(tree):
    root = tree("{a,b}/0.tar", "a/1.tar")
    assert found(root, "{a,b}/*.tar") == ["{a,b}/0.tar"]


def test_a_pattern_leaves_out_hidden_files_and_those_of_spark(tree):
    side = ["_SUCCESS", "_metadata", "_common_metadata", "_committed_12", "_started_12"]
    root = tree("a.tar", "._a.tar", ".cache/b.tar", "c/.d/e.tar", "c/e.tar", "_a.tar", *side)
    assert found(root, "*") == ["_a.tar", "a.tar"]
    assert found(root, "**/*.tar") == ["_a.tar", "a.tar", "c/e.tar"]
    assert found(root, ".*.tar") == ["._a.tar"]
    assert found(root, ".cache/*") == [".cache/b.tar"]
    assert found(root, "*/.d/*.tar") == ["c/.d/e.tar"]


def test_hidden_folders_above_the_pattern_do_not_matter(tree):
    root = tree(".cache/data/0.tar")
    assert found(root, ".cache/data/*.tar") == found(root, ".cache/data") == [".cache/data/0.tar"]


def test_a_folder_means_its_files_of_the_format(tree):
    names = ["a.tar", "deep/b.tar.gz", "c.TAR", "d.tgz", ".e.tar", ".git/f.tar", "g.jsonl", "h.txt"]
    root = tree(*(f"rec/{name}" for name in names), "rec/i.jsonl.zst", "rec/j.ndjson")
    assert found(root, "rec") == [f"rec/{n}" for n in ("a.tar", "c.TAR", "d.tgz", "deep/b.tar.gz")]
    assert found(root, "rec/", "jsonl") == [
        f"rec/{n}" for n in ("g.jsonl", "i.jsonl.zst", "j.ndjson")
    ]
    with pytest.raises(ValueError, match="no file matches path .*rec'; the folder holds no file "):
        source_files(source(root / "rec", "parquet"), WHERE)


def test_a_folder_is_refused_where_the_format_does_not_know_its_files(tree, monkeypatch):
    monkeypatch.setattr(FORMATS["webdataset"], "suffixes", FileFormat.suffixes)
    with pytest.raises(ValueError) as error:
        source_files(source(tree("rec/a.csv") / "rec"), WHERE)
    assert "is a folder, and the format 'webdataset' does not say how its files end" in str(
        error.value
    )
    assert 'rec/*.ENDING"' in str(error.value)


class Hub(MemoryFileSystem):
    """A file system of another package, under a protocol of its own."""

    protocol = "fakehub"
    store = {}
    pseudo_dirs = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("fakehub:/"))


@pytest.fixture
def hub():
    fsspec.register_implementation("fakehub", Hub, clobber=True)
    for i in range(3):
        with fsspec.open(f"fakehub://datasets/x/{i}.jsonl", "wb") as file:
            file.write(b'{"text": "%d"}\n' % i)
    return "fakehub://datasets/x"


def test_files_of_a_hub_are_found_by_pattern_braces_and_folder(hub):
    files = [f"fakehub:///datasets/x/{i}.jsonl" for i in range(3)]
    for path in ("*.jsonl", "{0..2}.jsonl", "", "{0,1,2}.jsonl"):
        assert source_files(source(f"{hub}/{path}", "jsonl"), WHERE) == files
    with pytest.raises(ValueError, match="1 of the 2 files of path 'fakehub://.*missing"):
        source_files(source(f"{hub}/{{2..3}}.jsonl", "jsonl"), WHERE)
    [shard, *_] = index_source(source(hub, "jsonl"), WHERE)
    assert shard.open().read(0) == {"json": b'{"text": "0"}\n'}


def test_a_package_that_is_missing_is_named(monkeypatch):
    fsspec.register_implementation("lakefs", "no_such_lake.files.LakeFS", clobber=True)
    with pytest.raises(ValueError) as error:
        source_files(source("lakefs://a/*.tar"), WHERE)
    message = str(error.value)
    assert message.startswith(f"{WHERE}: path 'lakefs://a/*.tar' needs a package that is not")
    assert message.endswith("install it with: pip install no_such_lake") and "\n" not in message

    def missing(path):
        raise ImportError("Install huggingface_hub to access HfFileSystem")

    monkeypatch.setattr(files, "url_to_fs", missing)
    with pytest.raises(ValueError, match=r"pip install 'symbiotic_titan\[hub\]'$"):
        source_files(source("hf://datasets/a/b/*.tar"), WHERE)


def test_valid_files_without_samples_are_left_out_with_one_line(tmp_path, caplog):
    contents = {
        "webdataset": (tar_bytes([("0.txt", b"a")]), tar_bytes([]), tar_bytes([(".x", b"")])),
        "jsonl": (b'{"text": "a"}\n', b"", b"\n \n"),
    }
    for form, kinds in contents.items():
        for i, content in enumerate(kinds):
            (tmp_path / f"{i}.{form}").write_bytes(content)
        caplog.clear()
        with caplog.at_level("INFO", logger=readers.__name__):
            [shard] = index_source(source(tmp_path / f"*.{form}", form), WHERE)
        assert shard.path.endswith(f"0.{form}") and shard.num_samples == 1
        [record] = caplog.records
        assert record.message == (
            f"{WHERE}: 2 of 3 files hold no samples, the first is {tmp_path}/1.{form}"
        )
        with pytest.raises(ValueError, match=r"1\..* holds no samples, nor do 1 more files; "):
            index_source(source(tmp_path / f"[12].{form}", form), WHERE)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "1.parquet")
    [shard] = index_source(source(tmp_path / "*.parquet", "parquet"), WHERE)
    assert shard.path.endswith("1.parquet")


@pytest.mark.parametrize("form", ["webdataset", "parquet"])
def test_a_file_of_0_bytes_that_cannot_be_valid_is_damaged(tmp_path, form):
    (tmp_path / "e").write_bytes(b"")
    with pytest.raises(ValueError, match="e has 0 bytes; copy or write it again"):
        index_source(source(tmp_path / "e", form), WHERE)
    [rest] = index_source(source(tmp_path / "e", form), WHERE, tolerant=True)
    assert rest.num_samples == 1 and rest.key(0) == "(damaged part)"
