"""The three runs of docs/data.md, on data of these layouts at toy size, in one process one after the other."""

import math
import subprocess
import sys

import pytest

from tests.helpers import released_data as data
from tests.helpers.launch import ROOT, environments, read_scalars

STEPS = 20
# Config -> the losses that its data train.
RUNS = {
    "bagel_t2i": ("loss/text", "loss/flow"),
    "llava_json": ("loss/text",),
    "bagel_editing": ("loss/text", "loss/flow"),
}
PROGRAM = """
import sys
from symbiotic_titan.train import main
for config in sys.argv[1].split():
    status = main(["--job.config_file", f"{sys.argv[2]}/docs/examples/{config}.toml", *sys.argv[3:]])
    assert status == 0, config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder where the runs were started, which holds the data sets."""
    folder = tmp_path_factory.mktemp("documented")
    data.bagel_t2i(folder / "bagel_example")
    data.bagel_editing(folder / "bagel_example")
    data.llava_665k(folder / "llava")
    settings = [f"--training.steps={STEPS}", "--metrics.log_freq=1", "--checkpoint.no_enable"]
    settings += ["--training.local_batch_size=1", "--training.global_batch_size=2"]
    settings += ["--comm.train_timeout_seconds=300"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, " ".join(RUNS), str(ROOT), *settings],
        cwd=folder,
        env=environments(1)[0],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize(("config", "tag"), [(c, tag) for c, tags in RUNS.items() for tag in tags])
def test_the_losses_of_a_documented_run_fall(config, tag, folder):
    names = {"bagel_t2i": "bagel_t2i", "llava_json": "llava", "bagel_editing": "bagel_editing"}
    losses = list(read_scalars(folder / "outputs" / names[config], tag).values())
    assert len(losses) == STEPS and all(map(math.isfinite, losses))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
