"""One of several processes writes, progress is shown on a terminal only, and a user's mistake is one line."""

import importlib.util
import json
import types

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from symbiotic_titan.process import Counter, exit_status, is_first_process, raised_by_us
from symbiotic_titan.registry import Registry
from tests.helpers.launch import ROOT


@pytest.mark.parametrize(("rank", "is_first"), [(None, True), ("0", True), ("3", False)])
def test_the_first_process_is_the_one_that_torchrun_numbers_zero(monkeypatch, rank, is_first):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert is_first_process() == is_first


def test_progress_is_shown_on_a_terminal_only(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    assert list(Counter("items", 2).over("ab")) == ["a", "b"]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    counter = Counter("items", 3)
    counter(2)
    counter()
    first, last = capsys.readouterr().err.split("\r")[1:]
    assert first.startswith("items: 2/3, ") and not first.endswith("\n")
    assert last.startswith("items: 3/3, 0 s left") and last.endswith("\n")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (None, 0, ""),
        (ValueError("--out: is a file"), 2, "error: --out: is a file\n"),
        (KeyboardInterrupt(), 130, "interrupted; run it again\n"),
    ],
)
def test_a_command_ends_with_one_line_and_a_status(capsys, error, status, line):
    def command():
        if error is not None:
            raise error

    assert exit_status(command, interrupted="interrupted; run it again") == status
    assert capsys.readouterr().err == line


def test_an_error_of_ours_keeps_its_traceback():
    with pytest.raises(TypeError):
        exit_status(lambda: len(3))


def raised_in(module):
    """A ValueError that a function of ``module`` raises."""
    namespace = types.ModuleType(module).__dict__
    exec("def part():\n    raise ValueError('boom')", namespace)
    with pytest.raises(ValueError) as caught:
        namespace["part"]()
    return caught.value


def test_an_error_of_this_package_is_ours():
    with pytest.raises(ValueError) as caught:
        Registry("section.key")["absent"]
    assert raised_by_us(caught.value)


@pytest.mark.parametrize("module", ["my_parts", "symbiotic_titan_extras", "torch.utils"])
def test_an_error_of_a_foreign_module_keeps_its_traceback(module):
    assert not raised_by_us(raised_in(module))


def launch_ending_with(monkeypatch, tmp_path, statuses):
    """What tools/launch.py makes of the exit status of each rank; a rank's message is its number."""
    spec = importlib.util.spec_from_file_location("launch", ROOT / "tools" / "launch.py")
    launch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launch)
    failures = {}
    for rank, status in enumerate(statuses):
        file = tmp_path / f"{rank}.json"
        told = {"message": f"ValueError: mistake {rank}", "extraInfo": {"timestamp": "1"}}
        file.write_text(json.dumps({"message": told}))
        if status:
            failures[rank] = ProcessFailure(rank, 1, status, str(file))

    def main(arguments):
        if failures:
            raise ChildFailedError("train", failures)

    monkeypatch.setattr("torch.distributed.run.main", main)
    return launch.main()


def test_the_launcher_passes_on_a_mistake_and_tells_one_of_a_hidden_rank(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.delenv("LOG_RANK", raising=False)
    assert launch_ending_with(monkeypatch, tmp_path, [0, 0]) == 0
    assert launch_ending_with(monkeypatch, tmp_path, [2, 2]) == 2
    assert capsys.readouterr().err == ""
    assert launch_ending_with(monkeypatch, tmp_path, [-15, 2]) == 2
    assert capsys.readouterr().err == "error: rank 1: mistake 1\n"
    monkeypatch.setenv("LOG_RANK", "0,1")
    assert launch_ending_with(monkeypatch, tmp_path, [-15, 2]) == 2
    assert capsys.readouterr().err == ""
    for statuses in ([1, 2], [-9, -15]):
        with pytest.raises(ChildFailedError):
            launch_ending_with(monkeypatch, tmp_path, statuses)
