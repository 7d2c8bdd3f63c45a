"""MAX_RESTARTS of run_train.sh: a run whose rank was killed ends as one that nothing happened to."""

import os
import re
import signal
import subprocess
import sys

import pytest

from tests.helpers.launch import ROOT, arguments_of, read_scalars, train

STEPS = 8


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_the_losses_are_those_of_an_undisturbed_run(
    tmp_path, demo
):
    settings = {"training.steps": STEPS, "training.seq_len": 256, "compile.enable": False}
    settings["checkpoint.interval"] = 2
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert train(undisturbed, arguments_of(undisturbed, demo, settings), world_size=2).status == 0

    _, config, *rest = arguments_of(killed, demo, settings)
    environment = os.environ | {"NGPU": "2", "MAX_RESTARTS": "1", "LOG_RANK": "0,1"}
    environment |= {"CONFIG_FILE": config, "SYMBIOTIC_PYTHON": sys.executable}
    environment |= {"OMP_NUM_THREADS": "1"}
    lines, pipes = [], {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(["./run_train.sh", *rest], cwd=ROOT, env=environment, **pipes) as run:
        for line in run.stdout:
            lines.append(line)
            if "step:  5" in line and not any("start again" in line for line in lines):
                os.kill(ranks_of(run.pid)[1], signal.SIGKILL)
    text = "".join(lines)
    assert run.returncode == 0, text[-3000:]
    assert "rank 1 was killed by SIGKILL: all ranks start again from the newest" in text
    assert re.search(r"Training starts at step [35]\n", text)
    losses = read_scalars(killed, "loss/total")
    assert list(losses) == list(range(1, STEPS + 1))
    assert losses == pytest.approx(read_scalars(undisturbed, "loss/total"), abs=1e-5)


def ranks_of(script):
    """Process ids of the ranks that the launcher of the ``script`` has started, in their order."""
    found = {}
    for folder in os.listdir("/proc"):
        if folder.isdecimal():
            try:
                with open(f"/proc/{folder}/stat") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
            except OSError:  # it has ended
                continue
            found.setdefault(parent, []).append(int(folder))
    [launcher] = found[script]
    return sorted(found[launcher])
