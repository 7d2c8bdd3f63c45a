"""The benchmark of a training step runs the shipped configs as they are, at toy size, and prints finite figures."""

import json
import math
from dataclasses import replace

import pytest

from symbiotic_titan.demo.write import WorldSize, write_world
from symbiotic_titan.model.flavors import FLAVORS
from symbiotic_titan.model.model_config import write_model_config
from tests.helpers.forked import script_here, start
from tests.helpers.structure import ROOT

STEP = ROOT / "tools" / "bench" / "step.py"
TOY = [
    *("--training.seq_len", "160", "--training.local_batch_size", "1"),
    *("--training.global_batch_size", "1", "--training.mixed_precision_param", "float32"),
    *("--data.max_vit_tokens", "64", "--data.max_vae_tokens", "64", "--data.too_long", "skip"),
]
MACHINE = {"torch", "threads", "device", "commit"}
PARTS = {"data", "vit", "attention", "routing", "experts", "optimizer", "other"}


def toy(name, folder):
    """The shipped config ``name`` with few tokens and, where its model is not small, a small one with the same groups of experts."""
    arguments = [str(ROOT / "train_configs" / f"{name}.toml"), *TOY]
    if name == "mini":
        arguments += ["--model.flavor", str(folder / "mini.json")]
    return arguments


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the paths of the shipped configs lead to a small demo world."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder / "demo_data", 0, WorldSize(4, 8, 100, 60, train_shards=1))
    small = {"dim": 64, "num_layers": 2, "dense_hidden_dim": 64, "expert_hidden_dim": 32}
    args = replace(FLAVORS["mini"], **small, vit=FLAVORS["debug"].vit)
    write_model_config(folder / "mini.json", args)
    return folder


def run_step(folder, *arguments):
    """(exit status, output) of step.py, started in ``folder``."""
    log = folder / "output.log"
    log.write_text("")
    environment = {"OMP_WAIT_POLICY": "PASSIVE"}
    process = start(script_here, str(STEP), list(arguments), str(folder), str(log), environment)
    process.join()
    return process.exitcode, log.read_text()


def last_line(folder, *arguments):
    """The JSON that step.py prints, all of whose numbers are finite."""
    status, text = run_step(folder, *arguments)
    assert status == 0, text
    found = json.loads(text.splitlines()[-1])
    assert all(map(math.isfinite, numbers(found)))
    return found


def numbers(value):
    """Every number in nested tables and lists."""
    if isinstance(value, dict):
        return [n for v in value.values() for n in numbers(v)]
    if isinstance(value, list):
        return [n for v in value for n in numbers(v)]
    return [value] if isinstance(value, (int, float)) else []


@pytest.mark.parametrize("name", ["debug", "mini"])
def test_shares_of_a_step_of_a_shipped_config(folder, name):
    found = last_line(folder, *toy(name, folder), "--steps", "2", "--warmup", "1")
    assert found.keys() == {*MACHINE, name}
    result = found[name]
    assert result.keys() == {"tokens_per_second", "step_seconds", "share"}
    assert result["tokens_per_second"] > 0 and result["step_seconds"] > 0
    assert result["share"].keys() == PARTS
    assert sum(result["share"].values()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("name", ["debug", "mini"])
def test_variants_of_a_shipped_config_side_by_side(folder, name):
    counts = ["--steps", "2", "--warmup", "1"]
    found = last_line(
        folder, *toy(name, folder), "--compare", "--variants", "eager", "ema", *counts
    )
    assert found.keys() == {*MACHINE, name}
    assert found[name].keys() == {"ema_over_eager", "times"}
    assert found[name]["ema_over_eager"] > 0
    assert found[name]["times"].keys() == {"eager", "ema"}


def test_a_mistake_in_a_config_is_told_in_one_line(folder):
    status, text = run_step(folder, "nowhere.toml")
    assert status == 2
    assert text.splitlines()[-1].startswith("error: job.config_file: no such file: ")
    assert "Traceback" not in text
