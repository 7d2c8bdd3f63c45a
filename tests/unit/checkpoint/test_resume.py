"""The newest complete checkpoint is chosen; damaged ones are named."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from symbiotic_titan.checkpoint.save_checks import check_loaded
from symbiotic_titan.checkpoint.start import (
    check_resumable,
    check_weights,
    entries_of,
)
from symbiotic_titan.weights.damage import (
    complete_metadata,
    damage_of,
    newest_complete_step,
    read_metadata,
    rename_as,
)
from symbiotic_titan.weights.dcp import check_holds


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
    assert newest_complete_step(folder)[:2] == (20, {})


def test_unfinished_save_is_skipped_and_named(folder):
    (folder / "step-20" / ".metadata").unlink()
    step, skipped, _ = newest_complete_step(folder)
    assert step == 10
    assert "it has no .metadata" in skipped[folder / "step-20"]


def test_truncated_and_missing_files_are_found_without_reading_tensors(folder):
    data = next((folder / "step-20").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-100])
    next((folder / "step-10").glob("*.distcp")).unlink()
    step, skipped, _ = newest_complete_step(folder)
    assert step == 9
    assert "bytes instead of" in skipped[folder / "step-20"]
    assert "is missing" in skipped[folder / "step-10"]


def test_garbage_metadata_is_damage(folder):
    (folder / "step-20" / ".metadata").write_bytes(b"not a pickle")
    assert "cannot be read" in (damage_of(folder / "step-20") or "")


def test_nothing_complete_means_start_anew(tmp_path):
    (tmp_path / "step-5").mkdir()
    step, skipped, _ = newest_complete_step(tmp_path)
    assert step == -1 and len(skipped) == 1


def test_set_aside_keeps_the_files_under_a_name_that_is_no_step(folder):
    first = rename_as(folder / "step-20", "damaged")
    shutil.copytree(folder / "step-10", folder / "step-20")
    second = rename_as(folder / "step-20", "damaged")
    assert (first.name, second.name) == ("damaged-20", "damaged-20-2")
    assert list(first.glob("*.distcp")) and newest_complete_step(folder)[:2] == (10, {})


def save_run(folder, **changes):
    state = {
        "w": torch.zeros(2, 3),
        "optimizer": {"state.w.exp_avg": torch.zeros(2, 3)},
        "train_state": {"step": 1},
    }
    dcp.save({**state, **changes}, checkpoint_id=str(folder), no_dist=True)
    return folder


def entries(folder):
    return entries_of(read_metadata(folder)[0])


def test_checkpoint_of_this_run_fits(tmp_path):
    folder = save_run(tmp_path / "step-1")
    assert check_resumable(folder, entries(folder), {"w": (2, 3)}, ["w"]) is None


@pytest.mark.parametrize(
    ("changes", "shapes", "message"),
    [
        ({"train_state": {}}, {"w": (2, 3)}, "holds the model alone"),
        ({}, {"w": (4, 3)}, r"w has shape \(2, 3\) in it and has shape \(4, 3\) here"),
        ({}, {"v": (2, 3)}, "v is missing in it"),
        (
            {"optimizer": {"state.u.exp_avg": torch.zeros(1)}},
            {"w": (2, 3)},
            "no optimizer state of w, which was frozen",
        ),
    ],
)
def test_checkpoint_that_does_not_fit_is_refused(tmp_path, changes, shapes, message):
    folder = save_run(tmp_path / "step-1", **changes)
    with pytest.raises(ValueError, match=message):
        check_resumable(folder, entries(folder), shapes, list(shapes))


def test_start_of_this_model_can_be_begun_with(tmp_path):
    start = save_run(tmp_path / "start", train_state={}, optimizer={})
    assert check_weights(start, entries(start), {"w": (2, 3)}, model_only=True) is None


@pytest.mark.parametrize(
    ("shapes", "model_only", "message"),
    [
        ({"w": (4, 3)}, True, r"of another model: w has shape \(2, 3\) .* symbiotic convert"),
        ({"v": (2, 3)}, True, "v is missing in it"),
        ({"w": (2, 3)}, False, "set checkpoint.initial_load_model_only = true"),
    ],
)
def test_start_that_does_not_fit_is_refused(tmp_path, shapes, model_only, message):
    start = save_run(tmp_path / "start", train_state={}, optimizer={})
    with pytest.raises(ValueError, match=message):
        check_weights(start, entries(start), shapes, model_only=model_only)


def test_another_number_of_embeddings_is_named_with_its_key(tmp_path):
    name = "tok_embeddings.weight"
    needs, held = {name: (384, 8)}, {name: (320, 8)}
    message = "has 320 embeddings, the config's model 384; set model.vocab_size = 320: "
    with pytest.raises(ValueError, match=f"^checkpoint.initial_load_path: .* {message}"):
        check_weights(tmp_path, held, needs, model_only=True)
    with pytest.raises(ValueError, match=f"^checkpoint {tmp_path} {message}"):
        check_resumable(tmp_path, held | {"train_state.step": None}, needs, [])
    with pytest.raises(ValueError, match=r"tok_embeddings.weight has shape \(320, 4\) in it"):
        check_weights(tmp_path, {name: (320, 4)}, needs, model_only=True)


def test_missing_or_damaged_folder_is_named_with_its_key(tmp_path):
    with pytest.raises(ValueError, match="a.key: no such folder: .*; do that"):
        complete_metadata(tmp_path / "none", "a.key", "do that")
    start = save_run(tmp_path / "start")
    next(start.glob("*.distcp")).unlink()
    with pytest.raises(ValueError, match="is not complete: its file .* is missing; do that"):
        complete_metadata(start, "a.key", "do that")


def test_checkpoint_of_an_optimizer_without_state_fits(tmp_path):
    folder = save_run(tmp_path / "step-1", optimizer={})
    assert check_resumable(folder, entries(folder), {"w": (2, 3)}, ["w"]) is None


def test_a_tensor_that_nothing_gave_a_value_is_named():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert check_loaded(model.state_dict(), Path("start")) is None
    with torch.no_grad():
        model[1].bias.fill_(float("nan"))
    message = (
        r"start is not finite, or has no values, in 1 of 4 tensors on rank 0: 1.bias \(NaN\); use"
    )
    with pytest.raises(ValueError, match=message):
        check_loaded(model.state_dict(), Path("start"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "optimizer.state.w.exp_avg_sq",
            "which the optimizer of this run keeps: another optimizer saved it",
        ),
        ("train_state.tokens", "which this run would go on with; resume with the settings"),
    ],
)
def test_state_that_a_checkpoint_lacks_is_named(tmp_path, name, message):
    saved = entries(save_run(tmp_path / "step-1"))
    assert check_holds(tmp_path, saved, saved) is None
    with pytest.raises(ValueError, match=f"has no {name}, {message}"):
        check_holds(tmp_path, saved, [*saved, name])


def test_the_state_of_another_optimizer_is_refused(tmp_path):
    folder, shapes = save_run(tmp_path / "step-1"), {"w": (2, 3)}
    assert check_resumable(folder, entries(folder), shapes, ["w"], ["exp_avg"]) is None
    message = f"optimizer.builder: checkpoint {folder} has no optimizer.state.w.exp_avg_sq, which"
    with pytest.raises(ValueError, match=message):
        check_resumable(folder, entries(folder), shapes, ["w"], ["exp_avg", "exp_avg_sq"])
