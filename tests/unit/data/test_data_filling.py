"""Rows that stay empty get one line that names the setting which keeps the waiting samples out, whoever packs them."""

import json
from itertools import islice

import pytest

from symbiotic_titan.data.documents import Document, TextSegment
from symbiotic_titan.data.packing import NUM_ROWS, Filling, SequenceSize, limiting
from symbiotic_titan.sequence.tasks import task_number
from tests.unit.data.test_data_packing import vae, vit

LM, T2I = task_number("lm"), task_number("t2i")


@pytest.fixture
def advice_after(make_loader, demo_config):
    """What the loader says after a number of rows, with the sources of some tasks only."""

    def read(number, tasks, seq_len=256, num_workers=0, **data):
        sources = [vars(s) for s in demo_config.sources if s.name in tasks]
        data = {"sources": sources, "lookahead": 16} | data
        loader = make_loader(data, seq_len=seq_len, num_workers=num_workers)
        list(islice(loader, number))
        assert "filling" not in json.dumps(loader.state_dict())  # no part of a checkpoint
        return loader.advice_on_filling

    return read


def test_full_rows_get_no_line(advice_after):
    assert advice_after(24, ("lm", "mmu", "t2i")) is None
    assert advice_after(0, ("lm", "mmu", "t2i")) is None


@pytest.mark.parametrize(
    ("tasks", "settings", "line"),
    [
        (("t2i", "mmu"), {"seq_len": 512, "max_row_share": {"t2i": 0.25}}, "data.max_row_share.t2i = 0.25: raise it, or lower"),
        (("t2i",), {"max_vae_tokens": 64}, "because of data.max_vae_tokens = 64: raise it, or set 0 for as many as fit; "),
        (("mmu",), {"max_vit_tokens": 32, "num_workers": 1}, "because of data.max_vit_tokens = 32: raise it, or set 0"),
        (("t2i",), {"seq_len": 160}, "because of training.seq_len = 160: raise it, or data.lookahead = 16, or set data.packing"),
        (("mmu",), {"lookahead": 1}, "no other sample waited because of data.lookahead = 1: raise it"),
    ],
)  # fmt: skip
def test_the_setting_that_limits_is_named_with_its_remedy(advice_after, tasks, settings, line):
    assert line in advice_after(24, tasks, **settings)


def test_the_end_of_the_data_is_not_a_matter_of_settings(advice_after):
    assert advice_after(400, ("mmu",), at_end="stop") is None


def test_what_refuses_a_waiting_document_is_found_among_all_limits():
    text, seen = Document(LM, (TextSegment([1] * 10),)), Document(LM, (vit(2, 2),))
    target = Document(T2I, (vae(2, 2),))
    left = SequenceSize(8, 3, 3, {T2I: 3})
    assert limiting(left, [text]) == "training.seq_len"
    assert limiting(left, [text, seen]) == "data.max_vit_tokens"
    assert limiting(SequenceSize(8, 3, 4, {T2I: 3}), [target]) == "data.max_row_share.t2i"
    assert limiting(left, [seen, target, target]) == "data.max_vae_tokens"
    assert limiting(SequenceSize(8, 8, 8), [text, seen]) == "data.packing"  # a wrong one, of a user
    assert limiting(left, []) == "data.lookahead"


def test_a_long_run_is_looked_at_in_the_beginning_only():
    filling, size = Filling(), SequenceSize(10, 10, 10)
    for _ in range(NUM_ROWS + 5):
        filling = filling.after([Document(LM, (TextSegment([1] * 4),))], [], size)
    assert (filling.rows, filling.tokens) == (NUM_ROWS, 4 * NUM_ROWS)
    assert filling.limits == {"data.lookahead": NUM_ROWS}
