"""One of several processes writes, progress is shown on a terminal only, and a user's mistake is one line."""

import types

import pytest

from symbiotic_titan.process import Counter, exit_status, is_first_process, raised_by_us
from symbiotic_titan.registry import Registry


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
