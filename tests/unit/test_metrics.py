"""What the metrics say about routing and gradients, against numbers worked out by hand."""

import signal

import pytest
import torch
from torch import nn

from symbiotic_titan.metrics import group_grad_norms, routing_metrics
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.sequence.modality import TEXT, VAE, VIT
from symbiotic_titan.stop import StopRequest

GROUPS = (ExpertGroup("und", (TEXT, VIT), 3), ExpertGroup("gen", (VAE,), 2))


def assignments(text, vit, vae):
    """(1 layer, 3 modalities, 5 experts) counts."""
    return torch.tensor([[text, vit, vae]])


def test_experts_are_compared_with_their_own_group():
    metrics = routing_metrics(
        assignments([4, 4, 4, 0, 0], [0] * 5, [0, 0, 0, 6, 6]), GROUPS, capacity_factor=1.0
    )
    for name in ("all", "text", "vae"):
        assert metrics[f"routing/capacity_rate/{name}"] == pytest.approx(1.0)
        assert metrics[f"routing/imbalance/{name}"] == pytest.approx(1.0)
        assert metrics[f"routing/idle_experts/{name}"] == 0
    assert "routing/capacity_rate/vit" not in metrics  # it has no token


def test_collapse_of_one_group_shows_in_its_modality_and_by_its_weight_in_all():
    metrics = routing_metrics(
        assignments([2, 2, 2, 0, 0], [0] * 5, [0, 0, 0, 6, 0]), GROUPS, capacity_factor=1.0
    )
    assert metrics["routing/capacity_rate/text"] == pytest.approx(1.0)
    assert metrics["routing/capacity_rate/vae"] == pytest.approx(0.5)
    assert metrics["routing/capacity_rate/all"] == pytest.approx(0.75)
    assert metrics["routing/imbalance/vae"] == pytest.approx(2.0)
    assert metrics["routing/idle_experts/all"] == 1


def test_capacity_factor_widens_what_fits():
    counts = assignments([4, 1, 1, 0, 0], [0] * 5, [0] * 5)
    tight = routing_metrics(counts, GROUPS, 1.0)["routing/capacity_rate/text"]
    loose = routing_metrics(counts, GROUPS, 2.0)["routing/capacity_rate/text"]
    assert tight == pytest.approx(4 / 6) and loose == pytest.approx(1.0)


def test_gradient_norm_of_a_group_is_that_of_its_parameters_together():
    a, b, idle = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    groups = [{"name": "both", "params": [a, b]}, {"name": "idle", "params": [idle]}]
    assert group_grad_norms(groups) == {"both": pytest.approx(5.0), "idle": 0.0}


def test_first_signal_is_remembered_and_a_second_interrupt_is_not_held_back():
    stop = StopRequest()
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        stop.install()
        assert stop.signal_name is None
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal_name == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
