"""One of several processes writes and shows progress, on a terminal or in a log, and a user's mistake is one line."""

import types

import pytest

from symbiotic_titan.process import (
    Counter,
    duration,
    exit_status,
    is_first_process,
    raised_by_us,
    shows_colors,
)
from symbiotic_titan.registry import Registry


@pytest.mark.parametrize(("rank", "is_first"), [(None, True), ("0", True), ("3", False)])
def test_the_first_process_is_the_one_that_torchrun_numbers_zero(monkeypatch, rank, is_first):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert is_first_process() == is_first


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, which the test sets."""
    now = [100.0]
    monkeypatch.setattr("symbiotic_titan.process.time.monotonic", lambda: now[0])
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    return now


def test_progress_of_a_long_command_is_a_line_now_and_then_in_a_log(clock, capsys, monkeypatch):
    counter = Counter("items", 10)
    for seconds in (2, 3, 1, 28, 2, 1):  # at 2, 5, 6, 34, 36 and 37
        clock[0] += seconds
        counter()
    counter(4)
    assert capsys.readouterr().err.splitlines() == [
        "items: 2/10, 20 s left", "items: 5/10, 36 s left", "items: 10/10, 0 s left"
    ]  # fmt: skip
    monkeypatch.setenv("RANK", "1")
    other = Counter("items", 10)
    clock[0] += 60
    other()
    assert capsys.readouterr().err == ""


def test_progress_of_a_short_command_is_not_in_a_log(clock, capsys):
    assert list(Counter("items", 2).over("ab")) == ["a", "b"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"), (99.4, "99 s"), (99.6, "2 min"), (5940, "99 min"), (5990, "1 h 40 min"),
        (12000, "3 h 20 min"), (172800, "2 d 0 h"), (360000, "4 d 4 h"),
    ],
)  # fmt: skip
def test_a_duration_has_its_largest_units(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("is_terminal", "no_color", "colors"),
    [(True, None, True), (True, "", True), (True, "1", False), (False, None, False)],
)
def test_colours_are_for_terminals_of_users_who_want_them(
    monkeypatch, is_terminal, no_color, colors
):
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    assert shows_colors() == colors


def test_progress_overwrites_one_line_of_a_terminal(monkeypatch, capsys):
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
