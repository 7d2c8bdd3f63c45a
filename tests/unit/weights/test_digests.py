"""Digests are of what is on the disk, whatever sizes it was written in, and are there before a checkpoint counts as complete."""

import hashlib
import pickle
import random
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException

from symbiotic_titan.weights.damage import damage_of, newest_complete_step
from symbiotic_titan.weights.digests import (
    DigestingWriter,
    HashedFile,
    in_order,
    read_sums,
    sha256_of,
    wrong_files,
)

STATE = {
    "w": torch.arange(100_000.0).view(100, 1000),
    "few": torch.zeros(3, dtype=torch.bfloat16),
    "none": torch.zeros(0),
    "train_state": {"step": 3},
}


def save(writer):
    dcp.save(STATE, storage_writer=writer, no_dist=True)


@pytest.mark.parametrize("buffering", [0, -1])
def test_a_digest_is_that_of_the_file_whatever_sizes_are_written(tmp_path, buffering):
    draw, path = random.Random(3), tmp_path / "file"
    sizes = [0, 1, 65535, 65536, 3_000_001, *(draw.randrange(200_000) for _ in range(20))]
    with path.open("wb", buffering=buffering) as file, HashedFile(file) as hashed:
        for size in sizes:
            chunk = bytearray(draw.randbytes(size))
            assert hashed.write(memoryview(chunk)) == size
            chunk[:] = bytes(size)  # the writer's buffer, which it uses again
        assert hashed.tell() == sum(sizes)
    assert hashed.digest == hashlib.sha256(path.read_bytes()).hexdigest() == sha256_of(path)


def test_files_are_those_of_torchs_writer_and_all_have_digests(tmp_path):
    # A process that saves in the background gets the writer as a pickle.
    save(pickle.loads(pickle.dumps(DigestingWriter(tmp_path / "ours"))))
    save(FileSystemWriter(tmp_path / "plain"))
    names = {path.name for path in (tmp_path / "plain").iterdir()}
    sums = read_sums(tmp_path / "ours")
    assert sums is not None and sums.keys() == names == {".metadata", "__0_0.distcp"}
    assert list(wrong_files(tmp_path / "ours", sums, sums)) == []
    data = [(tmp_path / name / "__0_0.distcp").read_bytes() for name in ("ours", "plain")]
    assert data[0] == data[1]


def test_many_files_are_hashed_by_many_threads_and_all_wrong_ones_are_named(tmp_path):
    save(DigestingWriter(tmp_path, single_file_per_rank=False, thread_count=3))
    sums = read_sums(tmp_path)
    assert sums is not None and len(sums) == 5
    (tmp_path / "__0_1.distcp").unlink()
    (tmp_path / "__0_3.distcp").write_bytes(b"")
    wrong = list(wrong_files(tmp_path, sums, [*in_order(sums), "other"]))
    assert [text.partition("__0_")[2][:1] for text in wrong[:2]] == ["1", "3"]
    assert "no digest of other" in wrong[2] and len(wrong) == 3


def test_a_save_that_ends_between_digests_and_metadata_is_incomplete(tmp_path, monkeypatch):
    save(DigestingWriter(tmp_path / "step-1"))
    writer = DigestingWriter(tmp_path / "step-2")
    monkeypatch.setattr(type(writer.fs).__mro__[1], "rename", lambda *paths: 1 / 0)  # as if killed
    with pytest.raises((CheckpointException, ZeroDivisionError)):
        save(writer)
    assert (tmp_path / "step-2" / "SHA256SUMS").is_file()
    assert newest_complete_step(tmp_path)[0] == 1
    assert "it has no .metadata" in (damage_of(tmp_path / "step-2") or "")


def test_a_full_disk_is_the_writers_error():
    with open("/dev/full", "wb", buffering=0) as file, HashedFile(file) as hashed:
        for size in (10, 1_000_000):
            with pytest.raises(OSError, match="No space left"):
                hashed.write(bytes(size))


def test_an_older_checkpoint_saved_over_gets_new_digests(tmp_path):
    save(DigestingWriter(tmp_path))
    shutil.copy(tmp_path / "SHA256SUMS", tmp_path / "old")
    with torch.no_grad(), pytest.warns(UserWarning, match="existing checkpoint"):
        dcp.save({"w": torch.ones(5)}, storage_writer=DigestingWriter(tmp_path), no_dist=True)
    sums = read_sums(tmp_path)
    assert sums is not None and list(wrong_files(tmp_path, sums, sums)) == []
    assert (tmp_path / "SHA256SUMS").read_text() != (tmp_path / "old").read_text()


@pytest.mark.parametrize(
    "text", ["", "x", "0" * 64 + "  a/b\n", "0" * 63 + "  a\n", "0" * 64 + " a\n", "\n"]
)
def test_a_line_that_is_no_digest_and_name_is_damage(tmp_path, text):
    (tmp_path / "SHA256SUMS").write_text(text)
    with pytest.raises(ValueError, match="its SHA256SUMS is damaged: a line is no digest"):
        read_sums(tmp_path)


def test_files_are_in_the_order_of_their_ranks():
    names = ["__10_0.distcp", "__2_0.distcp", "__2_11.distcp", "__2_3.distcp"]
    assert in_order(names) == [names[1], names[3], names[2], names[0]]
