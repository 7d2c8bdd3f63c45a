"""A campaign of faults finds what a run does wrong, and nothing where it does everything right."""

import json
import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed.checkpoint as dcp

from symbiotic_titan.commands import reliability
from symbiotic_titan.reliability import campaign
from symbiotic_titan.reliability.runs import LAYOUTS, largest_difference
from tests.helpers.structure import ROOT

ONE = LAYOUTS["one process"]


@pytest.fixture(scope="module")
def prototype(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prototype") / "step"
    dcp.save({"w": torch.arange(3000.0)}, checkpoint_id=str(folder), no_dist=True)
    return folder


@pytest.fixture
def findings(prototype, tmp_path, monkeypatch):
    """(flaw, kinds, trials) -> what a campaign found."""
    monkeypatch.setattr(campaign, "DAMAGE_SHARE", 0.7)
    monkeypatch.setattr(campaign, "small_disk", lambda folder, megabytes: None)

    def find(flaw, *kinds, trials=6):
        script = ROOT / "tests" / "helpers" / "hurt_run.py"
        settings = campaign.Settings(
            folder=tmp_path,
            command=(sys.executable, "-S", str(script), str(prototype), flaw),
            arguments=(),
            steps=9 if flaw != "deaf" else 10**6,
            patience=1.0 if flaw == "deaf" else 20.0,
            kinds=kinds,
            seed=1,
        )
        known = campaign.Reference({"w": torch.arange(3000.0)}, startup=0.1, step=0.03)
        tried = reliability.Campaign(settings, [ONE], at_once=1, trials=trials)
        monkeypatch.setattr(reliability, "reference", lambda *_: known)
        return tried.run(minutes=1)

    return find


def problems(found):
    return " ".join([*(t.problem for t in found.trials if t.problem), *found.problems])


def test_a_campaign_that_is_ended_early_says_what_it_found(monkeypatch, capsys, tmp_path):
    class Endless:
        def __init__(self, settings, layout, known, findings, name, chance):
            self.findings = findings

        def run(self, go_on):
            self.findings.starts += 1
            os.kill(os.getpid(), signal.SIGTERM)
            while go_on():
                time.sleep(0.01)

    monkeypatch.setattr(reliability, "Chain", Endless)
    monkeypatch.setattr(reliability, "reference", lambda *_: None)
    before = signal.getsignal(signal.SIGTERM)
    assert reliability.main(["--out", str(tmp_path), "--at-once", "1"]) == 130
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["starts"] == 1
    assert signal.getsignal(signal.SIGTERM) == before


def test_nothing_is_found_where_nothing_is_wrong(findings):
    found = findings("none", "kill", "signal", "damage", trials=9)
    assert problems(found) == ""
    assert found.table().keys() == {"kill", "signal", "damage"}
    assert found.comparisons and not any(difference for _, difference in found.comparisons)
    assert json.loads(json.dumps(found.as_dict()))["starts"] == found.starts


@pytest.mark.parametrize(
    ("flaw", "kinds", "found"),
    [
        ("deaf", ("signal",), "hangs"),
        ("forgetful", ("signal",), "was taken, the newest saved is"),
        ("trusting", ("kill", "damage"), "it was loaded: went on from step"),
        ("helpless", ("kill", "damage"), "needs a person: status 1"),
        ("noisy", ("signal",), "ended with a traceback"),
    ],
)
def test_each_thing_that_goes_wrong_is_found(findings, flaw, kinds, found):
    assert found in problems(findings(flaw, *kinds, trials=4 if flaw == "deaf" else 8))


def test_tensors_differ_by_value_shape_name_or_where_one_is_not_a_number():
    one = {"a": torch.tensor([1.0, 2.0])}
    assert largest_difference(one, {"a": torch.tensor([1.0, 2.0])}) == 0
    assert largest_difference(one, {"a": torch.tensor([1.0, 2.5])}) == 0.5
    for other in (torch.tensor([1.0]), torch.tensor([1.0, float("nan")])):
        assert largest_difference(one, {"a": other}) == float("inf")
    assert largest_difference(one, {"b": one["a"]}) == float("inf")


def test_options_that_cannot_be_are_refused(capsys):
    with pytest.raises(SystemExit) as end:
        reliability.main(["--minutes", "0"])
    assert end.value.code == 2 and "must be above 0" in capsys.readouterr().err
