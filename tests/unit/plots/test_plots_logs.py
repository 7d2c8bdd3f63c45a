"""What is read from a dump folder, number by number."""

from pathlib import Path

import pytest

from symbiotic_titan.plots.logs import default_labels, read_run, succeed
from tests.helpers.written_runs import Log, counts_of


def test_a_resumed_writer_replaces_what_came_after_its_first_step():
    earlier, later = {10: "a", 20: "a", 25: "a", 40: "a"}, {30: "b", 20: "b"}
    assert list(succeed(earlier, later).items()) == [(10, "a"), (20, "b"), (30, "b")]
    assert succeed({}, {5: "b"}) == {5: "b"}


def test_later_writer_wins_whatever_the_names_of_files_say(tmp_path):
    Log(tmp_path, "2").scalars("loss/text", {10: 1.0, 20: 2.0, 30: 3.0}).close()
    Log(tmp_path, "1").scalars("loss/text", {20: 5.0, 30: 6.0, 40: 7.0}).close()
    run = read_run(tmp_path, "r")
    steps, values = run.curve("loss/text")
    assert steps.tolist() == [10, 20, 30, 40] and values.tolist() == [1.0, 5.0, 6.0, 7.0]
    assert run.last_step == 40


def test_a_tag_that_the_later_writer_never_wrote_is_kept(tmp_path):
    Log(tmp_path, "1").scalars("a", {10: 1.0}).scalars("b", {10: 1.0, 20: 2.0}).close()
    Log(tmp_path, "2").scalars("a", {5: 3.0}).close()
    run = read_run(tmp_path, "r")
    assert run.scalars == {"a": {5: 3.0}, "b": {10: 1.0, 20: 2.0}}


def test_counts_come_back_as_they_were_written(tmp_path):
    Log(tmp_path, "1").scalars("a", {1: 1.0}).counts(1, 100, 200).close()
    Log(tmp_path, "2").scalars("a", {2: 1.0}).counts(150).close()
    run = read_run(tmp_path, "r")
    counts = run.tensors["routing/counts"]
    assert list(counts) == [1, 100, 150]
    assert (counts[150] == counts_of(150).numpy()).all()
    assert run.tensors["routing/layers"][150].tolist() == [1, 2, 3]
    assert run.tensors["routing/reachable"][1].sum(1).tolist() == [8, 8, 4]


def test_where_every_rank_logs_the_first_is_read(tmp_path):
    for rank in (0, 1):
        Log(tmp_path, f"1/rank_{rank}").scalars("a", {1: float(rank)}).close()
    assert read_run(tmp_path, "r").scalars == {"a": {1: 0.0}}


def test_a_log_cut_off_in_the_middle_of_a_record_is_read_up_to_there(tmp_path):
    Log(tmp_path).scalars("a", {1: 1.0, 2: 2.0}).close()
    (file,) = tmp_path.glob("tb/*/events*")
    file.write_bytes(file.read_bytes()[:-5])
    assert read_run(tmp_path, "r").scalars == {"a": {1: 1.0}}


def test_folders_that_hold_no_run_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder; give the job.dump_folder"):
        read_run(tmp_path / "nowhere", "r")
    with pytest.raises(
        ValueError, match="no TensorBoard logs below .*tb; give the job.dump_folder"
    ):
        read_run(tmp_path, "r")
    Log(tmp_path).close()
    with pytest.raises(ValueError, match="the logs are empty; wait for the first logged step"):
        read_run(tmp_path, "r")


def test_labels_are_folder_names_or_paths_where_names_clash():
    assert default_labels([Path("out/a"), Path("out/b")]) == ["a", "b"]
    assert default_labels([Path("x/a"), Path("y/a")]) == ["x/a", "y/a"]
    with pytest.raises(ValueError, match="the run is given twice"):
        default_labels([Path("x/a"), Path("x/../x/a")])
