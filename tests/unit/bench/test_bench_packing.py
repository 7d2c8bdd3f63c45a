"""The packing benchmark packs every document once, as streams do, and its lengths are always the same."""

import json
from collections import Counter

import pytest

from symbiotic_titan.data.documents import (
    Document,
    TextSegment,
)
from symbiotic_titan.data.packing import SequenceSize
from tools.bench import packing


def texts(*lengths):
    return [Document(0, (TextSegment([0] * length),)) for length in lengths]


@pytest.fixture(scope="module")
def case():
    return packing.lognormal_case(400, lookahead=16, seed=0)


@pytest.mark.parametrize("name", packing.CONTENDERS)
def test_rows_hold_every_document_once_but_for_those_that_wait(case, name):
    rows = packing.pack(packing.CONTENDERS[name], case)
    packed = Counter(id(document) for row in rows for document in row)
    stream = [id(document) for documents in case.samples for document in documents]
    assert set(packed.values()) == {1} and set(packed) < set(stream)
    assert 0 < len(stream) - len(packed) < 16 + len(case.samples[-1])
    for row in rows:
        assert sum(document.num_tokens for document in row) <= case.size.num_tokens
    assert 0 < packing.fill(rows, case.size) <= 1


def test_packings_are_fuller_the_more_they_look_at(case):
    fills = {
        name: packing.fill(packing.pack(choose, case), case.size)
        for name, choose in packing.CONTENDERS.items()
    }
    order = ["none", "next_fit", "first_fit", "longest_first", "fullest"]
    assert sorted(fills, key=fills.__getitem__) == order
    assert fills["fullest"] > packing.BAR


def test_baselines_choose_by_age():
    waiting, size = texts(4, 5, 3, 1), SequenceSize(8, 0, 0)
    assert packing.CONTENDERS["first_fit"](waiting, size) == [0, 2, 3]
    assert packing.CONTENDERS["next_fit"](waiting, size) == [0]
    assert packing.CONTENDERS["none"](waiting, size) == [0]


def test_lengths_are_the_same_for_a_seed(case):
    def lengths(case):
        return [[document.num_tokens for document in sample] for sample in case.samples]

    again = packing.lognormal_case(400, lookahead=16, seed=0)
    other = packing.lognormal_case(400, lookahead=16, seed=1)
    assert lengths(case) == lengths(again) != lengths(other)
    assert max(map(max, lengths(case))) == packing.LONG_ROW
    assert any(len(sample) > 1 for sample in case.samples)


def test_a_measured_case_has_fill_and_speed_of_all(case):
    result = json.loads(json.dumps(packing.measure(case, repeats=2)))
    assert set(result) == {*packing.CONTENDERS, "build_ms"}
    for name in packing.CONTENDERS:
        assert result[name]["documents_per_second"] > 0


def test_a_users_mistake_ends_with_status_2_and_one_line(capsys, tmp_path):
    assert packing.main(["--config", str(tmp_path / "nowhere.toml")]) == 2
    assert capsys.readouterr().err.startswith("error: job.config_file: no such file: ")
