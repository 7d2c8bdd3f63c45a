"""What a start waits for: the modules that the entry points and a training run load, of ours and of other libraries.

Imports are most of the seconds from the command to the first step; ``tools/bench/startup.py`` measures them.
"""

import gc
import os
import subprocess
import sys

import pytest

from symbiotic_titan.device import has_accelerator
from symbiotic_titan.process import loading
from tests.helpers.structure import PACKAGE, ROOT, import_train, is_part_of, ours

MOST_MODULES = 110  # of ours

# What only some runs, commands or tests use. They import it where they use it.
NOT_FOR_TRAINING = {
    *("diffusers", "jax", "lm_eval", "matplotlib", "sklearn", "tensorflow", "torchmetrics"),
    *("hypothesis", "torchao", "torchvision", "transformers", "wandb", "webdataset"),
}


def loaded_by(statement: str) -> set[str]:
    """Modules in a new process after ``statement``."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", f"import sys; {statement}; print(*sys.modules)"]
    done = subprocess.run(command, env=environment, capture_output=True, check=True, text=True)
    return set(done.stdout.split())


def not_needed(modules: set[str]) -> set[str]:
    return {m for m in modules if any(is_part_of(m, package) for package in NOT_FOR_TRAINING)}


@pytest.fixture(scope="module")
def training() -> set[str]:
    return import_train(ROOT)[0]


def test_training_loads_at_most_110_modules_of_ours(training):
    assert f"{PACKAGE}.training.trainer" in training
    assert len(ours(training)) <= MOST_MODULES


def test_training_loads_no_library_that_only_some_runs_use(training):
    assert not not_needed(training)


@pytest.mark.skipif(has_accelerator(), reason="FlexAttention compiles its kernels there")
def test_on_a_cpu_training_does_not_load_the_compiler(training):
    assert "torchtitan.models.attention" in training
    assert not {"torch._inductor.compile_fx", "torch._inductor.select_algorithm"} & training


def test_entry_points_load_no_library_before_they_know_what_to_do():
    loaded = loaded_by(f"import {PACKAGE}.train, {PACKAGE}.cli")
    assert {f"{PACKAGE}.train", f"{PACKAGE}.cli"} <= loaded
    assert not {"numpy", "torch", "torchtitan"} & loaded


def test_the_figures_do_not_wait_for_torchtitan():
    loaded = loaded_by(f"import {PACKAGE}.commands.plot")
    assert "matplotlib" in loaded
    assert "torchtitan" not in loaded


def test_a_library_that_should_not_be_loaded_is_seen():
    assert not_needed({"torch", "torchao", "torchao.float8", "jaxtyping"}) == {
        "torchao",
        "torchao.float8",
    }


def test_a_program_collects_no_garbage_while_it_imports_and_none_of_it_later(monkeypatch):
    frozen = gc.get_freeze_count()
    monkeypatch.setitem(sys.modules, "tests.a_new_module", None)
    with loading():
        assert not gc.isenabled()
        monkeypatch.setitem(sys.modules, "tests.another_module", None)
    assert gc.isenabled()
    assert gc.get_freeze_count() > frozen


def test_the_collector_stays_as_it_was_where_nothing_is_imported():
    gc.disable()
    try:
        frozen = gc.get_freeze_count()
        with loading():
            pass
        assert not gc.isenabled()
        assert gc.get_freeze_count() == frozen
    finally:
        gc.enable()
