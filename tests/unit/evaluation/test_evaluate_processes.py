"""One of several processes writes."""

import pytest

from symbiotic_titan.evaluation.results import is_first_process


@pytest.mark.parametrize(("rank", "is_first"), [(None, True), ("0", True), ("3", False)])
def test_the_first_process_is_the_one_that_torchrun_numbers_zero(monkeypatch, rank, is_first):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert is_first_process() == is_first
