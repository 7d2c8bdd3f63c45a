"""A resumed run says what it changed about its groups, one line for each."""

import logging

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torchtitan.config import LRScheduler

from symbiotic_titan.config.optimizer import Optimizer
from symbiotic_titan.optim.build import (
    build_optimizers,
    freeze_parameters,
)
from symbiotic_titan.optim.group_record import GroupRecord, describe_changes
from symbiotic_titan.optim.lr_schedule import build_schedulers

RULES = [{"name": "new", "match": ["^1"], "lr": 1e-3}, {"name": "old", "match": [".*"]}]


def make(rules, schedule=None, num_steps=100, **config):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = Optimizer(lr=1e-4, param_groups=rules, **config)
    freeze_parameters(model, optimizer.param_groups)
    optimizers = build_optimizers([model], optimizer, None)
    schedule = schedule or LRScheduler(warmup_steps=2, decay_ratio=0.0)
    build_schedulers(optimizers, schedule, num_steps)
    return GroupRecord(model, optimizers)


def changes(before, after, caplog):
    caplog.clear()
    with caplog.at_level(logging.INFO):
        after.load_state_dict(before.state_dict())
    assert all(record.levelno == logging.INFO for record in caplog.records)
    return [record.getMessage() for record in caplog.records]


def test_nothing_changed_is_nothing_logged(caplog):
    saved = make(RULES)
    for group in saved.optimizers.groups:
        group["lr"] *= 0.5  # where the schedule stands is no change
    assert changes(saved, make(RULES), caplog) == []


def test_each_changed_group_has_its_line(caplog):
    other = [{**RULES[0], "lr": 5e-4, "betas": [0.8, 0.9]}, {**RULES[1], "weight_decay": 0.1}]
    assert changes(make(RULES), make(other), caplog) == [
        "group new: lr 0.001 -> 0.0005, betas [0.9, 0.95] -> [0.8, 0.9]",
        "group old: weight_decay 0.0 -> 0.1",
    ]


def test_a_changed_schedule_is_told_for_the_groups_that_follow_it(caplog):
    own = [{**RULES[0], "warmup_steps": 5}, RULES[1]]
    shorter = LRScheduler(warmup_steps=2, decay_ratio=0.5, decay_type="cosine")
    assert changes(make(RULES), make(own), caplog) == ["group new: warmup_steps 2 -> 5"]
    changed = "decay_ratio 0.0 -> 0.5, decay_type linear -> cosine"
    assert changes(make(RULES), make(RULES, shorter), caplog) == [
        f"group new: {changed}",
        f"group old: {changed}",
    ]


def test_a_longer_run_is_told_only_where_rates_depend_on_its_length(caplog):
    decays = LRScheduler(warmup_steps=2, decay_ratio=0.5)
    longer = make(RULES, decays, num_steps=200)
    assert changes(make(RULES), make(RULES, num_steps=200), caplog) == []
    assert changes(make(RULES, decays), longer, caplog) == [
        "group new: total_steps 100 -> 200",
        "group old: total_steps 100 -> 200",
    ]


def test_groups_that_come_go_and_exchange_parameters_are_told(caplog):
    split = [
        {"name": "bias", "match": ["bias"]},
        {"name": "old", "match": ["^0"]},
        {"name": "last", "match": [".*"]},
    ]
    assert changes(make(RULES), make(split), caplog) == [
        "group bias: parameters joined: 2 (from new, old)",
        "group old: parameters left: 1",
        "group last: parameters joined: 1 (from new)",
        "group new: gone",
    ]
    frozen = [{"name": "still", "match": ["^0"], "frozen": True}, *RULES]
    frozen[2] = {"name": "old", "match": [".*"]}
    frozen[1] = {**RULES[0], "match": ["weight"]}
    assert changes(make(frozen), make(RULES), caplog) == [
        "group new: parameters joined: 1 (from old)",
        "group old: parameters joined: 2 (from none), parameters left: 1",
    ]


def test_settings_that_one_side_does_not_know_are_no_change():
    saved = {"a": {"lr": 1.0, "parameters": ["x"]}}
    now = {"a": {"lr": 1.0, "momentum": 0.9, "parameters": ["x"]}}
    assert describe_changes(saved, now) == describe_changes(now, saved) == []


def test_record_goes_through_a_checkpoint_and_settings_of_any_type_are_saved(tmp_path, caplog):
    saved = make(RULES)
    saved.optimizers.groups[0]["matrix"] = torch.ones(1)  # of some other optimizer
    dcp.save({"param_groups": saved}, checkpoint_id=tmp_path)
    with caplog.at_level(logging.INFO):
        dcp.load({"param_groups": make(RULES[1:])}, checkpoint_id=tmp_path)
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("group ")]
    assert lines == ["group old: parameters joined: 2 (from new)", "group new: gone"]
