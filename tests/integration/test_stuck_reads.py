"""Reads that never end, as from a disk of a network that is gone: the run can be stopped, has a deadline, and leaves no process."""

import os
import signal
import time
from pathlib import Path

import pytest

from symbiotic_titan.reliability.runs import children_of, wait_until
from symbiotic_titan.weights.damage import newest_complete_step
from tests.helpers.launch import arguments_of, start_ranks

# After some samples this process's next one comes from a pipe that nobody writes.
STUCK = """
import os
from symbiotic_titan.data.formats import shard
read, left = shard.Reader.read, int(os.environ.get("SAMPLES", 300))

def read_or_hang(reader, number, sample):
    global left
    left -= 1
    if left < 0:
        open(os.environ["NEVER"] + ".begun", "w").close()
        open(os.environ["NEVER"]).close()
    return read(reader, number, sample)

shard.Reader.read = read_or_hang
"""


@pytest.fixture
def started(tmp_path, demo, monkeypatch):
    """Starts a run that will hang: settings -> ``Ranks``, and the processes that it has started once it hangs."""
    (tmp_path / "stuck.py").write_text(STUCK)
    os.mkfifo(tmp_path / "never")
    monkeypatch.setenv("NEVER", str(tmp_path / "never"))

    def start(**settings):
        settings = {key.replace("__", "."): value for key, value in settings.items()}
        settings |= {"training.steps": 1000, "training.seq_len": 256}
        settings |= {"experimental.custom_import": "stuck"}
        arguments = arguments_of(tmp_path, demo, settings)
        ranks = start_ranks(tmp_path, arguments, path=str(tmp_path))
        ranks.wait_for("step:  2")
        wait_until((tmp_path / "never.begun").exists, 60)
        seen = ""  # steps whose data were read before go on
        while seen != (seen := ranks.texts()[0]):
            time.sleep(1)
        return ranks, children_of([ranks.processes[0].pid])

    return start


def are_gone(pids: list[int]) -> bool:
    end = time.monotonic() + 5
    while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return not alive


def test_a_stop_signal_does_not_wait_for_a_read(started, tmp_path):
    ranks, workers = started()
    assert not workers
    sent = time.monotonic()
    ranks.send(signal.SIGUSR1)
    assert ranks.wait(60) == [0], ranks.texts()[0][-3000:]
    (text,) = ranks.texts()
    step = newest_complete_step(tmp_path / "checkpoint")[0]
    assert step >= 2 and f"SIGUSR1: saving a checkpoint at step {step}" in text
    assert "Traceback" not in text and time.monotonic() - sent < 20


def test_a_read_has_a_deadline_and_its_workers_end_with_the_run(started, tmp_path, monkeypatch):
    monkeypatch.setenv("SAMPLES", "200")
    settings = {"training__dataloader__num_workers": 2, "data__read_timeout_seconds": 10}
    ranks, workers = started(**settings)
    assert ranks.wait(60) == [2], ranks.texts()[0][-3000:]
    last = ranks.texts()[0].splitlines()[-1]
    assert "source '" in last and ", sample number " in last and "demo" in last
    assert "reading it takes longer than 10 s; see whether the file" in last
    step = newest_complete_step(tmp_path / "checkpoint")[0]
    assert f"The checkpoint of step {step} is saved" in last and "Traceback" not in last
    assert len(workers) >= 2 and are_gone(workers)


def test_workers_that_hang_end_when_the_trainer_is_killed(started, monkeypatch):
    monkeypatch.setenv("SAMPLES", "200")
    ranks, workers = started(training__dataloader__num_workers=2)
    ranks.send(signal.SIGKILL)
    assert ranks.wait(60) == [-9] and len(workers) >= 2 and are_gone(workers)
