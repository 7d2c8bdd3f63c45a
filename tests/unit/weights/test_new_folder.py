"""A folder appears whole or not at all, and what was not written here is never replaced."""

import os
import socket
import subprocess

import pytest

from symbiotic_titan.weights import new_folder as module
from symbiotic_titan.weights.new_folder import new_folder


def write(folder, text="new", *, file="model-1.safetensors", overwrite=False):
    with new_folder(folder, overwrite=overwrite, num_bytes=1) as unfinished:
        (unfinished / file).write_text(text)


def files_in(folder) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.iterdir() if p.name != module.MANIFEST}


RELEASE = ("config.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (RELEASE, "out was not written by symbiotic convert and is not overwritten"),
        ((".metadata", "__0_0.distcp"), "out was not written by symbiotic convert"),
        ((), "out was not written by symbiotic convert"),
        (None, "out was not written by symbiotic convert"),
    ],
    ids=["release", "training checkpoint", "empty", "file"],
)
def test_what_was_not_written_here_is_not_replaced(tmp_path, names, message):
    out = tmp_path / "out"
    if names is None:
        out.write_text("mine")
    else:
        out.mkdir()
        for name in names:
            (out / name).write_text("mine")
    with pytest.raises(ValueError, match=message):
        write(out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert out.read_text() == "mine" if names is None else files_in(out).keys() == set(names)


def test_what_was_written_here_is_replaced_when_that_is_asked_for(tmp_path):
    out = tmp_path / "out"
    write(out, "old", file="old.safetensors")
    with pytest.raises(ValueError, match="out exists; choose another --out, or .* --overwrite"):
        write(out)
    write(out, overwrite=True)
    assert files_in(out) == {"model-1.safetensors": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_was_added_to_a_folder_keeps_it(tmp_path):
    out = tmp_path / "out"
    write(out, "old")
    (out / "run").mkdir()
    with pytest.raises(ValueError, match="out contains run, which was not written with it"):
        write(out, overwrite=True)
    assert (out / "run").is_dir() and (out / "model-1.safetensors").read_text() == "old"


def test_a_shape_alone_replaces_a_shape_and_no_tensors(tmp_path):
    write(tmp_path / "shape", "old", file="model.json")
    write(tmp_path / "shape", file="model.json", overwrite=True)
    assert files_in(tmp_path / "shape") == {"model.json": "new"}
    for tensors in (".metadata", "model-1.safetensors"):
        out = tmp_path / f"with {tensors}"
        write(out, "old", file=tensors)
        with pytest.raises(ValueError, match="holds tensors and is not replaced by a shape alone"):
            write(out, file="model.json", overwrite=True)
        assert files_in(out) == {tensors: "old"}


def test_a_link_goes_on_to_point_to_what_is_replaced(tmp_path):
    write(tmp_path / "disk" / "out", "old")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    write(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert files_in(tmp_path / "disk" / "out") == {"model-1.safetensors": "new"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_writers_of_one_folder_do_not_mix(tmp_path, monkeypatch, overwrite):
    """The second begins while the first writes, and ends before it."""
    out = tmp_path / "out"

    def first():
        with new_folder(out, overwrite=overwrite, num_bytes=1) as unfinished:
            (unfinished / "a.safetensors").write_text("first")
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", os.getppid)  # another process, which runs
                write(out, "second", file="b.safetensors")
            (unfinished / "c.safetensors").write_text("first")

    if overwrite:
        first()
        assert files_in(out) == dict.fromkeys(("a.safetensors", "c.safetensors"), "first")
    else:
        with pytest.raises(ValueError, match="out exists; choose another --out"):
            first()
        assert files_in(out) == {"b.safetensors": "second"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_process_left_is_removed_and_what_others_write_is_not(tmp_path):
    killed = subprocess.Popen(["true"])
    killed.wait()
    here, out = f"out.incomplete-{socket.gethostname()}", tmp_path / "out"
    others = {f"{here}-{os.getppid()}", "out.incomplete-elsewhere-5", f"out-2.{here}-{killed.pid}"}
    for name in (*others, f"{here}-{killed.pid}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half.safetensors").write_text("half")
    write(out)
    assert {path.name for path in tmp_path.iterdir()} == others | {"out"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_replacement_that_fails_at_the_last_moment_leaves_the_old(tmp_path, monkeypatch, error):
    out = tmp_path / "out"
    write(out, "old")
    rename = type(out).rename

    def failing(path, target):
        if ".incomplete-" in path.name:
            raise error
        return rename(path, target)

    monkeypatch.setattr(type(out), "rename", failing)
    with pytest.raises(error):
        write(out, overwrite=True)
    assert files_in(out) == {"model-1.safetensors": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
