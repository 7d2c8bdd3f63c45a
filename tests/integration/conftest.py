"""The demo world for the runs of this folder, and one reference run that several tests compare with."""

from pathlib import Path

import pytest

from symbiotic_titan.commands import make_demo_data
from tests.helpers.launch import NUM_STEPS, Run, launch_program


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "demo_data"
    assert make_demo_data.main(["--out", str(folder), "--size", "debug"]) == 0
    return folder


@pytest.fixture(scope="session")
def reference(tmp_path_factory, demo) -> Run:
    """An uninterrupted run of one process, started as a program; those compared with it are forked."""
    folder = tmp_path_factory.mktemp("reference")
    settings = {"training__steps": NUM_STEPS, "checkpoint__interval": 7}
    run = launch_program(folder, demo, **settings, metrics__routing_freq=100)
    assert run.status == 0, run.text[-3000:]
    return run
