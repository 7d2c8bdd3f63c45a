"""Every way to start a training run gives the same run."""

import os
import subprocess
import sys

import pytest

from tests.helpers.launch import ROOT, arguments_of, read_scalars

STEPS = 2
STARTS = {
    "a config": lambda config, rest: [sys.executable, "-m", "symbiotic_titan.cli", "train", config, *rest],
    "an option": lambda config, rest: [
        *(sys.executable, "-m", "symbiotic_titan.cli", "train"),
        *("--job.config_file", config, *rest),
    ],
    "run_train.sh": lambda config, rest: ["./run_train.sh", *rest],
}  # fmt: skip


@pytest.fixture(scope="module")
def losses(tmp_path_factory, demo):
    """Start -> step -> loss."""
    found = {}
    launched = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"}
    clean = {key: value for key, value in os.environ.items() if key not in launched}
    for name, command in STARTS.items():
        folder = tmp_path_factory.mktemp("start")
        _, config, *rest = arguments_of(folder, demo, {"training.steps": STEPS})
        environment = clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment |= {"CONFIG_FILE": config, "SYMBIOTIC_PYTHON": sys.executable}
        done = subprocess.run(
            command(config, rest), cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        found[name] = read_scalars(folder, "loss/total")
    return found


@pytest.mark.parametrize("start", STARTS)
def test_every_start_gives_the_same_losses(losses, start):
    assert list(losses[start]) == [1, 2] and losses[start] == losses["a config"]
