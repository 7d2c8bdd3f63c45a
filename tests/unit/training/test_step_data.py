"""The data of a step: read ahead, put back, and what all ranks learn of an error."""

import logging

import pytest
import torch

from symbiotic_titan.config.data import Data
from symbiotic_titan.parallel.ranks import DataRanks
from symbiotic_titan.process import raised_by_us
from symbiotic_titan.training.step_data import StepData, Stop, error_of_ranks

ALONE = DataRanks(torch.device("cpu"), 0, 1, None)


class Loader:
    """Numbers as batches, with an error at some of them; what StepData asks of the loader."""

    can_end, ended_sources = False, []

    def __init__(self, error=None, at=None, skip_counts=(10, 0)):
        self.position, self.error, self.at = 0, error, at
        self.skip_counts = list(skip_counts)

    def __iter__(self):
        while True:
            if self.position == self.at:
                raise self.error
            self.position += 1
            yield self.position

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


def test_batches_that_were_read_ahead_are_the_next_ones_and_can_be_put_back():
    loader, times = Loader(), []
    data = StepData(loader, 2, ALONE, times)
    assert next(data) == [1, 2]
    data.read()
    assert data.reason_to_stop(None) is None and next(data) == [3, 4]
    data.read()
    assert loader.position == 6
    data.put_back()
    assert loader.position == 4 and len(times) == 3


def test_an_error_between_micro_batches_puts_back_those_that_were_read():
    loader = Loader(ValueError("bad"), at=3)
    data = StepData(loader, 2, ALONE, [])
    next(data)
    data.read()
    assert loader.position == 3
    assert data.reason_to_stop(None) == Stop("error in the data", "ValueError: bad")
    data.put_back()
    assert loader.position == 2
    with pytest.raises(ValueError, match="bad"):
        next(data)


def test_an_error_goes_before_a_signal_and_the_limit_of_bad_samples_is_one():
    data = StepData(Loader(skip_counts=(10, 4)), 1, ALONE, [])
    data.read()
    assert data.reason_to_stop("SIGTERM") == Stop("error in the data", "skipped 4")
    data = StepData(Loader(skip_counts=(10, 3)), 1, ALONE, [])
    data.read()
    assert data.reason_to_stop("SIGTERM") == Stop("SIGTERM")


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
    message = "data.max_bad_share: must be at least 0 and less than 1, got 1.0"
    assert raised_by_us(caught.value) and error_of_ranks(caught.value) == message
    assert error_of_ranks(None) is None and not caplog.records
