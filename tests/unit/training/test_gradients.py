"""What a step's gradients leave for the log: the expert counts of the last steps, whether or not they are logged."""

from types import SimpleNamespace

import torch

from symbiotic_titan.losses.step import MicroBatchResult
from symbiotic_titan.moe.record import RoutingTotals
from symbiotic_titan.parallel.ranks import DataRanks
from symbiotic_titan.training.gradients import StepGradients

ALONE = DataRanks(torch.device("cpu"), 0, 1, None)


class NoModel(StepGradients):
    """Each micro-batch is the (layers, modalities, experts) counts that it routes to."""

    def forward_backward(self, step, index, micro_batch, totals, step_routing):
        counts_YME = torch.full((2, 3, 4), micro_batch) if micro_batch else None
        routing = counts_YME is not None and RoutingTotals(counts_YME, torch.ones(2, 1))
        return MicroBatchResult({}, routing or None)


def gradients(window):
    metrics, losses = SimpleNamespace(routing_window=window), SimpleNamespace(balance_scope="local")
    config = SimpleNamespace(metrics=metrics, losses=losses)
    return NoModel(None, config, None, ALONE, (), 2, lambda batch: batch, None, torch.ones(()))


def test_counts_are_summed_over_the_micro_batches_of_the_last_steps():
    for window, expected in ((1, 11), (3, 33), (50, 36)):
        found = gradients(window)
        for step, batches in enumerate([(1, 2), (5, 6), (10, 1), (4, 7)], 1):
            results = found.of_step(step, batches, None)
        logged = found.logged_routing(results)
        assert logged.step.counts.unique().tolist() == [11]
        assert logged.recent.shape == (2, 3, 4) and logged.recent.unique().tolist() == [expected]
        assert logged.recent.dtype == torch.int64


def test_without_moe_layers_there_is_nothing_to_log():
    found = gradients(2)
    assert found.logged_routing(found.of_step(1, (0, 0), None)) is None
