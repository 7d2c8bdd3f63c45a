"""A validation leaves a sharded model as it found it: whole weights that no backward will free are given back."""

import contextlib
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from symbiotic_titan.losses.step import LossFunction
from symbiotic_titan.training.validation import (
    HeldOutRows,
    SymbioticValidator,
)
from tests.helpers.debug_model import build, config_of
from tests.helpers.gloo import run_on_ranks
from tests.helpers.tiny_models import MIXED, pack_row


def summed(values):
    dist.all_reduce(values)
    return values


def validate(rank, overrides, stop):
    """(whether every parameter is a shard afterwards, what was logged)."""
    config = config_of(overrides)
    model, args = build(config)
    logged = {}
    metrics = SimpleNamespace(
        time_last_log=0.0,
        logger=SimpleNamespace(log=lambda values, step: logged.update(values)),
        color=SimpleNamespace(yellow="", green="", orange="", blue="", reset=""),
    )
    rows = [pack_row(MIXED, args, seed=rank + 2 * i) for i in range(2)]
    for row in rows:
        row.task[:] = row.document
    validator = SymbioticValidator(
        config, HeldOutRows(rows, [rank, 2 + rank]), LossFunction(), metrics
    )
    validator.connect(lambda batch: batch, contextlib.nullcontext(), summed, lambda: stop)
    validator.validate([model], step=0)
    return all(isinstance(p, DTensor) for p in model.parameters()), logged


def cases(rank):
    never = "--parallelism.fsdp_reshard_after_forward never"
    return {
        "default": validate(rank, "", stop=False),
        "never": validate(rank, never, stop=False),
        "expert_parallel": validate(rank, "--parallelism.expert_parallel_degree 2", stop=False),
        "stopped": validate(rank, never, stop=True),
    }


@pytest.fixture(scope="module")
def results():
    return run_on_ranks(2, cases)


def test_all_weights_are_sharded_after_a_validation(results):
    assert all(sharded for result in results for sharded, _ in result.values())


def test_every_rank_logs_the_same_on_every_layout(results):
    expected = results[0]["default"][1]
    assert expected["validation/flow"] > 0
    for result in results:
        for case in ("default", "never", "expert_parallel"):
            assert result[case][1] == pytest.approx(expected, rel=1e-5)
        assert result["stopped"][1] == {}
