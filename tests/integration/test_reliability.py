"""symbiotic reliability with real runs: what it starts and hurts is a run as a user starts it. A longer campaign is run by hand."""

import json
import sys

import pytest

from symbiotic_titan.commands import reliability


def campaign(capsys, folder, *options):
    """(status, what its last line says)."""
    status = reliability.main(["--out", str(folder), "--minutes", "20", *options])
    return status, json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(autouse=True)
def this_python(monkeypatch):
    monkeypatch.setenv("SYMBIOTIC_PYTHON", sys.executable)


def test_a_campaign_hurts_runs_and_finds_them_well(capsys, tmp_path):
    small = ("--layouts", "one process", "--steps", "6", "--trials", "1", "--at-once", "1")
    status, found = campaign(capsys, tmp_path, *small, "--kinds", "kill")
    assert status == 0 and found["starts"] >= 1
    assert sum(row["well"] for row in found["kinds"].values()) >= 1


@pytest.mark.slow
def test_every_kind_of_fault_on_one_process_and_two(capsys, tmp_path):
    layouts = ("one worker", "FSDP2", "2 and 1 processes in turn")
    status, found = campaign(capsys, tmp_path, "--layouts", *layouts, "--trials", "24")
    assert status == 0, json.dumps(found, indent=1)
    assert {"kill", "signal", "damage"} <= found["kinds"].keys()
