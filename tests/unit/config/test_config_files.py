"""A file is written whole or not at all, and what cannot be written is reported beforehand."""

import json

import pytest

from symbiotic_titan.config.files import check_file, replacing, write_json


@pytest.mark.parametrize("make", ["folder", "below a file", "below nothing"])
def test_files_that_cannot_be_written_are_told_before_and_after(tmp_path, make):
    path = tmp_path / "x.json"
    if make == "folder":
        path.mkdir()
    elif make == "below a file":
        (tmp_path / "file").write_text("mine")
        path = tmp_path / "file" / "x.json"
    else:
        path = type(path)("/proc/nothing/x.json")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        ValueError, match=r"--json: .*x.json cannot be written \(.*\); name another"
    ):
        check_file(path, "--json")
    with pytest.raises(OSError, match="writing .*x.json failed: .*"):
        write_json(path, "test", {"a": 1})
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_in_folders_to_come_can_be_written(tmp_path):
    path = tmp_path / "new" / "x.json"
    check_file(path, "--json")
    assert not list(tmp_path.iterdir())
    write_json(path, "test", {"a": 1})
    assert json.loads(path.read_text()) == {"kind": "test", "a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


@pytest.mark.parametrize("suffix", [None, ".incomplete"])
def test_a_file_is_replaced_only_when_the_new_one_is_complete(tmp_path, suffix):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path, suffix) as unfinished:
        unfinished.write_text("ne")
        raise RuntimeError
    assert path.read_text() == "old"
    with replacing(path, suffix) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
