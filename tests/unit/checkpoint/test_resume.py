"""The newest complete checkpoint is chosen; damaged ones are named."""

import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp

from symbiotic_titan.checkpoint.resume import damage_of, newest_complete_step


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "step-10"
    dcp.save({"w": torch.arange(1000.0), "step": 10}, checkpoint_id=str(folder), no_dist=True)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    for step in (10, 20, 9):
        shutil.copytree(saved, tmp_path / f"step-{step}")
    (tmp_path / "step-latest").mkdir()
    return tmp_path


def test_newest_is_by_number_not_by_name(folder):
    assert newest_complete_step(folder) == (20, [])


def test_unfinished_save_is_skipped_and_named(folder):
    (folder / "step-20" / ".metadata").unlink()
    step, skipped = newest_complete_step(folder)
    assert step == 10
    assert "step-20 is skipped: it has no .metadata" in skipped[0]


def test_truncated_and_missing_files_are_found_without_reading_tensors(folder):
    data = next((folder / "step-20").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-100])
    next((folder / "step-10").glob("*.distcp")).unlink()
    step, skipped = newest_complete_step(folder)
    assert step == 9
    assert "bytes instead of" in skipped[0] and "is missing" in skipped[1]


def test_garbage_metadata_is_damage(folder):
    (folder / "step-20" / ".metadata").write_bytes(b"not a pickle")
    assert "cannot be read" in (damage_of(folder / "step-20") or "")


def test_nothing_complete_means_start_anew(tmp_path):
    (tmp_path / "step-5").mkdir()
    step, skipped = newest_complete_step(tmp_path)
    assert step == -1 and len(skipped) == 1
