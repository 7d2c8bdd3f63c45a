"""What a folder of checkpoints goes through: branches, set-aside folders and deletion, each cut off at every moment."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from symbiotic_titan.checkpoint.history import (
    LINEAGE,
    History,
    go_back,
    had_a_complete_one,
    read_lineage,
    skip_damaged,
    step_to_resume,
    surplus,
    tidy,
)
from symbiotic_titan.weights.damage import damage_of, newest_complete_step


class Killed(BaseException):
    """What a process never gets to handle."""


@pytest.fixture
def dies(monkeypatch):
    """``dies(n)``: the process is killed before its n-th change of a folder."""
    real = {
        (Path, "rename"): Path.rename,
        (Path, "replace"): Path.replace,
        (Path, "unlink"): Path.unlink,
        (Path, "mkdir"): Path.mkdir,
        (os, "unlink"): os.unlink,
        (os, "rmdir"): os.rmdir,
    }
    left = [0]

    def patched(function):
        def change(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return function(*args, **kwargs)

        return change

    def after(changes):
        left[0] = changes
        for (owner, name), function in real.items():
            monkeypatch.setattr(owner, name, patched(function))

    yield after
    left[0] = 10**9


def run_until_killed(dies, changes, action):
    """Whether ``action`` was killed."""
    dies(changes)
    try:
        action()
    except (Killed, CheckpointException):  # torch wraps what ends a save
        return True
    finally:
        dies(10**9)
    return False


def save(history, step, *, complete=True):
    history.begin_save(step)
    folder = history.folder / f"step-{step}"
    state = {"w": torch.full((8,), float(step))}
    dcp.save(state, checkpoint_id=str(folder), no_dist=True)
    if not complete:
        (folder / ".metadata").unlink()
        return []
    doomed = history.end_save(step)
    for path in doomed:
        shutil.rmtree(path)
    return doomed


def a_run(folder, *steps, keep=0, after=0, went_back_to=0):
    """A process that saves ``steps``, having resumed from the step ``after``."""
    history = History(folder, keep)
    if after:
        history.begin(after, went_back_to=went_back_to)
    for step in steps:
        save(history, step)
    return history


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def newest(folder):
    return newest_complete_step(folder)[0]


# ---- lineage --------------------------------------------------------------------------------------------------------------


def test_each_checkpoint_names_the_one_before_it_and_the_process_that_saved_it(tmp_path):
    a_run(tmp_path, 3, 6)
    a_run(tmp_path, 9, after=6)
    lines = {step: read_lineage(tmp_path / f"step-{step}") for step in (3, 6, 9)}
    assert len({line.id for line in lines.values()}) == 3
    assert [(line.step, line.parent, line.parent_step) for line in lines.values()] == [
        (3, "", 0),
        (6, lines[3].id, 3),
        (9, lines[6].id, 6),
    ]
    assert all(line.host and line.started <= line.completed for line in lines.values())


def test_a_run_from_initial_weights_names_them_and_an_older_parent_has_no_id(tmp_path):
    history = History(tmp_path, 0)
    history.begin(0, "start/weights")
    save(history, 2)
    save(history, 4)
    assert read_lineage(tmp_path / "step-2").source == "start/weights"
    assert read_lineage(tmp_path / "step-4").source == ""
    (tmp_path / "step-4" / LINEAGE).unlink()  # as saved before there were lineages
    a_run(tmp_path, 6, after=4)
    line = read_lineage(tmp_path / "step-6")
    assert (line.parent, line.parent_step) == ("", 4)


@pytest.mark.parametrize(
    "change", [{"step": "3"}, {"id": 3}, {"kind": "plan"}, {"host": None}, {"step": True}]
)
def test_a_lineage_that_makes_no_sense_is_none(tmp_path, change):
    a_run(tmp_path, 3)
    path = tmp_path / "step-3" / LINEAGE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert read_lineage(tmp_path / "step-3") is None
    path.write_text("{")
    assert read_lineage(tmp_path / "step-3") is None


# ---- going back -----------------------------------------------------------------------------------------------------------


def test_going_back_sets_the_other_branch_aside_and_the_new_one_is_resumed(tmp_path, caplog):
    a_run(tmp_path, 3, 9, 12, 15)
    old = read_lineage(tmp_path / "step-12").id
    history = a_run(tmp_path, 12, after=9, went_back_to=9)
    assert names(tmp_path) == ["abandoned-12", "abandoned-15", "step-12", "step-3", "step-9"]
    assert f"the run went back to step 9: {tmp_path / 'step-15'} is now abandoned-15" in caplog.text
    assert newest(tmp_path) == 12
    line = read_lineage(tmp_path / "step-12")
    assert line.id != old == read_lineage(tmp_path / "abandoned-12").id
    assert line.parent == read_lineage(tmp_path / "step-9").id and line.went_back_to == 9
    save(history, 15)
    a_run(tmp_path, 12, after=9)
    assert {"abandoned-12", "abandoned-12-2", "abandoned-15-2"} <= set(names(tmp_path))


def test_a_process_killed_while_it_goes_back_has_done_nothing_or_is_finished_by_the_next(
    tmp_path, dies
):
    a_run(tmp_path / "whole", 3, 9, 12, 15)
    save(History(tmp_path / "whole", 0), 18, complete=False)
    outcomes = set()
    for changes in range(20):
        folder = tmp_path / str(changes)
        shutil.copytree(tmp_path / "whole", folder)
        was_killed = run_until_killed(dies, changes, lambda folder=folder: go_back(folder, 9))
        before = names(folder)
        tidy(folder)  # what the next start does
        outcomes.add(newest(folder))
        if newest(folder) == 15:
            assert before == names(folder) == names(tmp_path / "whole")
        else:
            assert names(folder) == "abandoned-12 abandoned-15 damaged-18 step-3 step-9".split()
            assert not list(folder.glob("*.json*"))
        if not was_killed:
            break
    assert not was_killed and changes > 4 and outcomes == {9, 15}


# ---- saves that were cut off ----------------------------------------------------------------------------------------------


def test_a_first_save_that_was_cut_off_is_told_from_checkpoints_that_were_lost(tmp_path):
    first = tmp_path / "first"
    save(History(first, 0), 5, complete=False)
    assert had_a_complete_one(first) is None
    shutil.copytree(first / "step-5", first / "damaged-7")
    assert had_a_complete_one(first) is None
    (first / "damaged-7" / ".metadata").write_bytes(b"")
    assert had_a_complete_one(first) == "damaged-7 was complete once"

    copied = tmp_path / "copied"  # without hidden files
    a_run(copied, 5)
    (copied / "step-5" / ".metadata").unlink()
    assert had_a_complete_one(copied) == "step-5 was complete once"

    lost = tmp_path / "lost"
    save(a_run(lost, 5), 10, complete=False)
    shutil.rmtree(lost / "step-5")
    assert had_a_complete_one(lost) == "step-10 followed step 5"


def test_a_process_killed_at_any_moment_of_its_first_saves_is_judged_rightly(tmp_path, dies):
    def first_saves(folder):
        history = History(folder, 0)
        save(history, 5)
        save(history, 10)

    for changes in range(40):
        folder = tmp_path / str(changes)
        was_killed = run_until_killed(dies, changes, lambda folder=folder: first_saves(folder))
        assert (had_a_complete_one(folder) is None) == (
            newest(folder) == -1 if folder.is_dir() else True
        )
        if not was_killed:
            break
    assert not was_killed and changes > 6 and newest(folder) == 10


def test_nothing_is_saved_over_what_is_there(tmp_path):
    history = a_run(tmp_path, 3)
    save(history, 3)
    assert names(tmp_path) == ["abandoned-3", "step-3"]
    (tmp_path / "step-6").mkdir()  # by a rank that was faster
    save(history, 6)
    assert names(tmp_path) == ["abandoned-3", "step-3", "step-6"]


# ---- deletion -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [2, 3])
def test_keep_latest_k_complete_ones_are_left_after_every_save(tmp_path, keep):
    history = History(tmp_path, keep)
    for step in range(1, 8):
        save(history, step)
        assert names(tmp_path) == [f"step-{s}" for s in range(max(1, step - keep + 1), step + 1)]
    assert damage_of(tmp_path / "step-7") is None


def test_the_one_to_roll_back_to_is_kept_among_them(tmp_path):
    history, left = History(tmp_path, 2, every=10), []
    for step in (10, 13, 16, 19, 20, 21):
        save(history, step)
        left.append(" ".join(names(tmp_path)).replace("step-", ""))
    assert left == ["10", "10 13", "10 16", "10 19", "19 20", "20 21"]


def test_no_complete_one_is_deleted_for_a_save_that_has_not_finished(tmp_path):
    history = a_run(tmp_path, 1, 2, keep=2)
    save(history, 3, complete=False)
    assert surplus(tmp_path, 2) == []
    assert names(tmp_path) == ["step-1", "step-2", "step-3"]


def test_what_is_set_aside_fills_the_places_that_are_left(tmp_path):
    a_run(tmp_path, 3, 6, 9, 12)
    go_back(tmp_path, 3)
    for name in ("damaged-13", "damaged-14"):
        (tmp_path / name).mkdir()
    history = History(tmp_path, 4)
    history.begin(3, went_back_to=3)
    left = []
    for step in (4, 5, 6, 7):
        save(history, step)
        left.append(" ".join(names(tmp_path)))
    assert left == [
        "abandoned-12 abandoned-9 step-3 step-4",
        "abandoned-12 step-3 step-4 step-5",
        "step-3 step-4 step-5 step-6",
        "step-4 step-5 step-6 step-7",
    ]


def test_where_all_are_kept_the_newest_two_damaged_ones_are(tmp_path):
    a_run(tmp_path, 3, 6)
    for age, step in enumerate((40, 20, 30)):
        (tmp_path / f"damaged-{step}").mkdir()
        os.utime(tmp_path / f"damaged-{step}", (2000 - age, 2000 - age))
    a_run(tmp_path, 9, after=3)
    assert len(names(tmp_path)) == 6
    tidy(tmp_path)  # by the next start
    assert names(tmp_path) == ["abandoned-6", "damaged-20", "damaged-40", "step-3", "step-9"]


def test_many_kills_without_a_complete_save_leave_two_damaged_folders(tmp_path):
    for step in (5, 5, 7, 5, 6):
        save(History(tmp_path, 3), step, complete=False)
        (tmp_path / f"step-{step}").rename(tmp_path / f"damaged-{step}-{len(names(tmp_path)) + 2}")
        tidy(tmp_path)
    assert len(names(tmp_path)) == 2


def test_a_checkpoint_that_is_half_deleted_is_none(tmp_path, dies):
    for changes in range(30):
        folder = tmp_path / str(changes)
        history = a_run(folder, 1, 2, keep=2)
        was_killed = run_until_killed(
            dies, changes, lambda folder=folder, history=history: save(history, 3)
        )
        for path in folder.glob("step-*"):
            files = {file.name for file in path.iterdir()}
            is_whole = damage_of(path) is None and LINEAGE in files
            assert is_whole or newest(folder) != int(path.name[5:])
        tidy(folder)
        assert not list(folder.glob("deleting-*"))
        assert newest(folder) == 3 or {"step-1", "step-2"} <= set(names(folder))
        if not was_killed:
            break
    assert not was_killed and changes > 8


# ---- where a run goes on --------------------------------------------------------------------------------------------------


def resumed(folder, load_step=-1, *, may_change=True):
    return step_to_resume(folder, load_step, may_change=may_change)[0]


@pytest.fixture
def restarted(monkeypatch):
    """Lets the launcher start the process again."""
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    return lambda name, value: monkeypatch.setenv(name, value)


def test_a_job_that_is_started_again_goes_back_once(tmp_path, restarted):
    a_run(tmp_path, 9, 12, 15)
    restarted("SLURM_RESTART_COUNT", "x")
    assert resumed(tmp_path, 9) == 9
    restarted("TORCHELASTIC_RESTART_COUNT", "1")
    assert resumed(tmp_path, 9) == 9  # the branch has no checkpoint yet
    a_run(tmp_path, 12, after=9, went_back_to=9)
    assert resumed(tmp_path, 9) == 12
    restarted("TORCHELASTIC_RESTART_COUNT", "0")
    assert resumed(tmp_path, 9) == 9  # the user asks for it again
    restarted("SLURM_RESTART_COUNT", "2")
    assert resumed(tmp_path, 9) == 12


def test_a_run_that_goes_back_to_the_start_begins_anew_also_when_it_is_killed(tmp_path):
    a_run(tmp_path, 9, 12)
    assert resumed(tmp_path, 0) == 0
    a_run_from_nothing = History(tmp_path, 0)
    a_run_from_nothing.begin(0)
    assert names(tmp_path) == ["abandoned-12", "abandoned-9"]
    assert resumed(tmp_path) == -1
    save(a_run_from_nothing, 3)
    assert resumed(tmp_path) == 3 and read_lineage(tmp_path / "step-3").parent_step == 0


def test_a_run_that_only_reads_renames_nothing(tmp_path):
    save(a_run(tmp_path, 3, 6), 9, complete=False)
    assert resumed(tmp_path, may_change=False) == 6 and resumed(tmp_path, 3, may_change=False) == 3
    for step in (3, 6):
        shutil.rmtree(tmp_path / f"step-{step}")
    (tmp_path / "step-9" / LINEAGE).unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* is complete \(step-9: it has no"):
        resumed(tmp_path, may_change=False)
    assert names(tmp_path) == ["step-9"]
    assert resumed(tmp_path) == -1 and names(tmp_path) == ["damaged-9"]


def test_a_run_that_has_lost_its_checkpoints_does_not_begin_anew_by_itself(tmp_path):
    a_run(tmp_path, 3, 6)
    for step in (3, 6):
        next((tmp_path / f"step-{step}").glob("*.distcp")).unlink()
    message = r"no checkpoint in .* is complete \(step-6: its file .* begin anew with --checkpoint.load_step 0"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            resumed(tmp_path)
    assert names(tmp_path) == ["step-3", "step-6"]
    for step in (3, 6):  # as one whose bytes turn out to be damaged when all ranks read them
        skip_damaged({tmp_path / f"step-{step}": "other bytes"}, rename=True)
    with pytest.raises(ValueError, match=r"is complete \(damaged-3 was complete once\)"):
        resumed(tmp_path)


def test_a_folder_that_cannot_be_changed_is_told_in_one_line(tmp_path, monkeypatch):
    save(a_run(tmp_path, 3), 6, complete=False)

    def rename(path, target):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(
        ValueError, match=r"checkpoint.folder: .* cannot be tidied \(Read-only file"
    ):
        resumed(tmp_path)
