"""The demo world for the runs of this folder, and one reference run that several tests compare with."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.launch import NUM_STEPS, ROOT, Run, launch


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "demo_data"
    command = [sys.executable, "tools/make_demo_data.py", "--out", str(folder), "--size", "debug"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def reference(tmp_path_factory, demo) -> Run:
    """An uninterrupted run of one process."""
    folder = tmp_path_factory.mktemp("reference")
    run = launch(folder, demo, training__steps=NUM_STEPS, checkpoint__interval=7)
    assert run.status == 0, run.text[-3000:]
    return run
