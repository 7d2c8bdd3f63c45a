"""The study's configs: every run can be trained, starts from what is made for it, and differs from symbiotic as it should."""

import functools
from pathlib import Path

import pytest

from symbiotic_titan.config import extends
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.model.flavors import FLAVORS
from symbiotic_titan.training.checks import check_job
from tests.helpers.flat_config import differences, flat, group_sizes

FOLDER = Path(__file__).parents[3] / "train_configs" / "mini"
PARTS = {"base", "progressive", "understanding_data"}
FILES = {path.stem: path for path in FOLDER.glob("*.toml")}
RUNS = sorted(FILES.keys() - PARTS)

VLM = "outputs/mini/vlm/checkpoint/step-400"
START = "checkpoint.initial_load_path"
ONE_POOL = {"experts.partition": {}, START: VLM}
NO_SHIELD = {"shielding.steps": 0, "shielding.after_scale": 1.0}
UNDERSTANDING = {"data.sources": ["lm", "mmu"]}


def split(**sizes):
    """What a run with these groups differs in."""
    folder = "_".join(map(str, sizes.values()))
    return {"experts.partition": sizes, START: f"outputs/mini/start/{folder}"}


# Run -> where it differs from symbiotic, besides its name, its description and its dump folder.
DIFFERENCES = {
    "symbiotic": {},
    "standard_moe": {**ONE_POOL, **NO_SHIELD, "optimizer.lr": 1e-3, "optimizer.param_groups": {}},
    "mot": {**NO_SHIELD, "experts.shared": False},
    "only_lm_mmu": UNDERSTANDING,
    "only_lm_mmu_1e-4": {**UNDERSTANDING, "optimizer.lr": 1e-3},
    "wo_shielding": {"shielding.steps": 0},
    "wo_shared_expert": {
        **ONE_POOL,
        **NO_SHIELD,
        **UNDERSTANDING,
        "experts.shared": False,
        "optimizer.param_groups": {},
    },
    "understanding_lr_low": {"optimizer.lr": 1e-5},
    "bimodal_8_24": split(understanding=8, generation=24),
    "bimodal_16_16": split(understanding=16, generation=16),
    "bimodal_22_10": split(understanding=22, generation=10),
    "tripartite_8_8_16": split(text=8, vit=8, generation=16),
    "tripartite_11_11_10": split(text=11, vit=11, generation=10),
    "vlm": {
        **NO_SHIELD,
        **UNDERSTANDING,
        "experts.partition": {},
        START: None,
        "optimizer.lr": 5e-4,
        "optimizer.param_groups": {},
        "losses.balance": 0.001,
    },
}


@functools.cache  # the tests only read them
def load(name: str) -> JobConfig:
    return load_job_config(["--job.config_file", str(FILES[name])])


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")


@pytest.mark.parametrize("name", RUNS)
def test_a_run_passes_all_checks_and_writes_to_a_folder_of_its_name(name):
    config = load(name)
    check_job(config)
    assert config.job.dump_folder == f"outputs/mini/{name}"


@pytest.mark.parametrize("name", RUNS)
def test_a_run_differs_from_symbiotic_in_what_its_definition_says(name):
    assert differences(load(name), load("symbiotic")) == DIFFERENCES[name]


def test_symbiotic_is_what_the_method_says():
    config = load("symbiotic")
    values = flat(config)
    assert values["experts.partition"] == {"understanding": 24, "generation": 8}
    assert config.experts.partition["understanding"].modalities == ["text", "vit"]
    assert config.experts.shared
    assert values["optimizer.param_groups"] == {"generation": 1e-3, "understanding": None}
    assert config.optimizer.lr == 1e-4 and config.optimizer.weight_decay == 0.0
    assert (config.shielding.steps, config.shielding.after_scale) == (100, 0.1)
    assert config.shielding.modalities == ["vae"] and config.shielding.mode == "output"
    assert (config.losses.text, config.losses.flow, config.losses.balance) == (1.0, 1.0, 0.01)
    assert (config.lr_scheduler.warmup_steps, config.lr_scheduler.decay_ratio) == (100, 0.0)
    assert config.training.max_norm == 1.0
    weights = {row.name: row.weight for row in config.data.sources}
    assert weights == {"t2i": 3, "t2i_long": 3, "lm": 2, "mmu": 2}


def test_rows_of_understanding_data_are_those_of_the_mixture():
    mixture = {row.name: row for row in load("symbiotic").data.sources}
    assert load("only_lm_mmu").data.sources == [mixture["lm"], mixture["mmu"]]


@pytest.mark.parametrize("name", RUNS)
def test_a_split_deals_out_all_experts_and_starts_from_the_folder_of_its_sizes(name):
    config = load(name)
    groups = group_sizes(config)
    if not groups:
        assert config.checkpoint.initial_load_path in (VLM, None)
        return
    assert sum(groups) == FLAVORS["mini"].num_experts
    folder = "_".join(map(str, groups))
    assert config.checkpoint.initial_load_path == f"outputs/mini/start/{folder}"


def test_the_checkpoint_that_runs_start_from_is_the_last_of_the_vlm():
    config = load("vlm")
    assert f"{config.job.dump_folder}/checkpoint/step-{config.training.steps}" == VLM


def test_every_file_is_a_run_or_part_of_one():
    assert set(RUNS) == DIFFERENCES.keys()
    used = {
        Path(layer.path).stem for name in RUNS for layer in extends.read_layers(str(FILES[name]))
    }
    assert used >= PARTS
    for name in PARTS:
        assert load(name).job.dump_folder == JobConfig().job.dump_folder


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_header_says_what_the_file_is_for_and_the_command_names_it(name):
    header = FILES[name].read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    if name in PARTS:
        assert "this file is extended" in header
        return
    assert f"CONFIG_FILE=train_configs/mini/{name}.toml ./run_train.sh" in header
    assert "# Hardware:" in header and "# Expected:" in header
