"""The data of a step: read ahead, agreed on, moved, and what all ranks learn of an error."""

import copy
import logging
import threading

import pytest
import torch

from symbiotic_titan.config.data import Data
from symbiotic_titan.parallel.ranks import DataRanks, on_host
from symbiotic_titan.process import raised_by_us
from symbiotic_titan.signals import StopRequest
from symbiotic_titan.training.step_data import (
    FIRST_STEPS,
    MovedAhead,
    StepData,
    Stop,
    error_of_ranks,
)

ALONE = DataRanks(torch.device("cpu"), 0, 1, None)


class Loader:
    """Numbers as batches, with an error at some of them; what StepData asks of the loader."""

    can_end, ended_sources = False, []

    def __init__(self, error=None, at=None, skip_counts=(10, 0)):
        # What it reads next, whatever its position is set to: as a loader with rows on their way.
        self.position, self.read, self.error, self.at = 0, 0, error, at
        self.skip_counts = list(skip_counts)

    def __iter__(self):
        while True:
            if self.read == self.at:
                raise self.error
            self.read += 1
            self.position = self.read
            yield self.read

    def ahead(self):
        return copy.copy(self)

    def check_reads(self, waited, limit):
        if waited > limit:
            raise ValueError(f"waited {limit}")

    @property
    def advice_on_filling(self):
        return f"rows stay empty, at {self.position}"

    def check_skip_counts(self, counts):
        if counts[1] > 3:
            raise ValueError(f"skipped {counts[1]}")


def foreign(kind, *arguments):
    """An error as a module from outside raises it."""
    try:
        exec(
            "raise kind(*arguments)", {"__name__": "layouts", "kind": kind, "arguments": arguments}
        )
    except kind as error:
        return error


def step_data(loader, num_micro_batches=1, times=None, ranks=ALONE):
    """The numbers are counted as they are, and moved by being negated."""
    return StepData(
        loader,
        num_micro_batches,
        ranks,
        [] if times is None else times,
        count=lambda batches: torch.tensor([sum(batches), len(batches)], dtype=torch.float64),
        move=lambda batch: -batch,
        signals=StopRequest(),
        read_seconds=0.3,
    )


def read_and_agree(data):
    data.agree(*on_host(data.read()))
    return data.reason_to_stop()


def test_the_loader_stands_before_a_step_until_it_is_taken():
    loader, times = Loader(), []
    data = step_data(loader, 2, times)
    assert list(next(data).micro_batches) == [-1, -2] and loader.position == 2
    assert read_and_agree(data) is None and loader.position == 2
    step = next(data)
    assert list(step.micro_batches) == [-3, -4] and loader.position == 4
    assert step.counts.tolist() == step.counts_on_host.tolist() == [7, 2]
    assert not data.is_agreed and len(times) == 2


def test_rows_that_stay_empty_are_told_once_and_by_one_rank(caplog, monkeypatch):
    data, other = step_data(Loader()), step_data(Loader())
    with caplog.at_level(logging.WARNING):
        for _ in range(2 * FIRST_STEPS):
            next(data)
        monkeypatch.setenv("RANK", "1")
        for _ in range(FIRST_STEPS):
            next(other)
    assert caplog.messages == [f"rows stay empty, at {FIRST_STEPS}"]


def test_an_error_between_micro_batches_leaves_the_loader_before_those_that_were_read():
    loader = Loader(ValueError("bad"), at=3)
    data = step_data(loader, 2)
    next(data)
    assert read_and_agree(data) == Stop("error in the data", "ValueError: bad")
    assert loader.position == 2
    with pytest.raises(ValueError, match="bad"):
        next(data)


def test_an_error_goes_before_a_signal_and_the_limit_of_bad_samples_is_one():
    for skipped, expected in (
        (4, Stop("error in the data", "skipped 4")),
        (3, Stop("SIGTERM", is_signal=True)),
    ):
        data = step_data(Loader(skip_counts=(10, skipped)))
        data.signals.signal_name = "SIGTERM"
        assert read_and_agree(data) == expected


def test_a_signal_that_comes_after_reading_stops_the_run_one_step_later():
    data = step_data(Loader())
    sums = data.read()
    data.signals.signal_name = "SIGTERM"
    data.agree(*on_host(sums))
    assert data.reason_to_stop() is None
    next(data)
    assert read_and_agree(data) == Stop("SIGTERM", is_signal=True)


@pytest.mark.parametrize("signal_name", ["SIGTERM", None])
def test_a_read_that_hangs_ends_with_a_signal_or_its_deadline_and_moves_nothing(
    monkeypatch, signal_name
):
    monkeypatch.setattr("symbiotic_titan.training.step_data.PATIENCE", 0.2)
    loader, hangs = Loader(), threading.Event()
    monkeypatch.setattr(Loader, "__iter__", lambda self: iter([1, 2]) if hangs.wait() else None)
    data = step_data(loader)
    data.signals.signal_name = signal_name
    error = None if signal_name else "ValueError: waited 0.3"
    stop = Stop(signal_name or "error in the data", error, is_signal=signal_name is not None)
    assert read_and_agree(data) == stop
    assert loader.position == 0 and data.signals.leave_at_once
    data.close()  # does not wait for the thread
    hangs.set()


def test_the_next_micro_batch_is_on_its_way_when_one_is_handed_over():
    started = []
    moved = MovedAhead(iter("abc"), lambda batch: started.append(batch) or batch, stream=None)
    assert started == ["a"]
    for i, batch in enumerate(moved):
        assert batch == "abc"[i] and started == list("abc"[: i + 2])


@pytest.mark.parametrize(
    "kind, text, line",
    [
        (KeyError, "caption", "KeyError: 'caption'"),
        (ValueError, "no box", "ValueError: no box"),
        (OSError, "gone", "OSError: gone"),
        # As DataLoader hands on what was raised in a worker.
        (RuntimeError, "Caught it in worker 0.\nTraceback ...\nIndexError: 7", "IndexError: 7"),
    ],
)
def test_a_foreign_error_is_told_in_one_line_and_logged_with_its_traceback(
    caplog, kind, text, line
):
    error = foreign(kind, text)
    with caplog.at_level(logging.ERROR):
        assert error_of_ranks(error) == line
    assert "Traceback (most recent call last)" in caplog.text and text in caplog.text


def test_an_error_for_the_user_is_told_without_traceback(caplog):
    with pytest.raises(ValueError) as caught:
        Data(max_bad_share=1.0)
    message = "data.max_bad_share: must lie in [0, 1), got 1.0"
    assert raised_by_us(caught.value) and error_of_ranks(caught.value) == message
    assert error_of_ranks(None) is None and not caplog.records
