"""Packed rows written by hand, independent of the data chain, and the tiny model that reads them."""

from collections.abc import Callable

import pytest

from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.symbiotic import ModelOutput, SymbioticModel
from symbiotic_titan.sequence.batch import PackedBatch, stack_rows
from tests.helpers.query_models import with_queries
from tests.helpers.tiny_models import (
    MIXED,
    OTHER,
    deep_args,
    pack_row,
    run_model,
    tiny_args,
    tiny_model,
)


@pytest.fixture
def pack() -> Callable[..., PackedBatch]:
    return pack_row


@pytest.fixture
def args() -> ModelArgs:
    return tiny_args()


@pytest.fixture
def deep() -> ModelArgs:
    return deep_args()


@pytest.fixture
def query_args() -> ModelArgs:
    """Three queries read images of 2 patches a side, five those of 4."""
    return with_queries(tiny_args(), {2: 3, 4: 5})


@pytest.fixture
def make_args() -> Callable[..., ModelArgs]:
    return tiny_args


@pytest.fixture
def make_model() -> Callable[[ModelArgs], SymbioticModel]:
    return tiny_model


@pytest.fixture
def forward() -> Callable[..., ModelOutput]:
    return run_model


@pytest.fixture
def mixed_batch() -> PackedBatch:
    """Two rows: several documents, both kinds of image, padding."""
    return stack_rows([pack_row(MIXED, tiny_args()), pack_row(OTHER, tiny_args(), seed=10)])


@pytest.fixture
def text_batch() -> PackedBatch:
    return pack_row([[("text", 20)], [("text", 9)]], tiny_args())
