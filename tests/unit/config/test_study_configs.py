"""The configs of symbiotic reproduce: each can be trained, has its own start, and differs from symbiotic as its definition says."""

import functools
from pathlib import Path

import pytest

from symbiotic_titan.config import extends
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.model.flavors import FLAVORS
from symbiotic_titan.training.checks import check_job
from tests.helpers.flat_config import differences, flat, group_sizes

FOLDER = Path(__file__).parents[3] / "train_configs" / "study"
PARTS = {"base", "understanding_data"}
FILES = {path.stem: path for path in FOLDER.rglob("*.toml")}
SYSTEMS = sorted(FILES.keys() - PARTS)

SEED = "outputs/reproduce/seed-0"
VLM = f"{SEED}/vlm/checkpoint/step-1500"
START = "checkpoint.initial_load_path"
ONE_POOL = {"experts.partition": {}, START: VLM}
NO_SHIELD = {"shielding.steps": 0, "shielding.after_scale": 1.0}
ONE_RATE = {"optimizer.param_groups": {}}
SOURCES = {"data.sources": ["lm", "mmu"]}
# As many understanding tokens a step: one packed sequence of four.
UNDERSTANDING = {
    **SOURCES,
    "training.local_batch_size": 1,
    "training.global_batch_size": 1,
    "validation.steps": 32,
}


def split(**sizes):
    """What a system with these groups differs in."""
    folder = "_".join(map(str, sizes.values()))
    return {"experts.partition": sizes, START: f"{SEED}/start/{folder}"}


# System -> where it differs from symbiotic, besides its name, its description and its dump folder.
DIFFERENCES = {
    "symbiotic": {},
    "standard_moe": {**ONE_POOL, **NO_SHIELD, **ONE_RATE, "optimizer.lr": 3e-3},
    "standard_moe_two_rates": {**ONE_POOL, **NO_SHIELD},
    "mot": {**NO_SHIELD, "experts.shared": False},
    "only_lm_mmu": UNDERSTANDING,
    "wo_shield": NO_SHIELD,
    "shield_weights": {"shielding.mode": "weights"},
    "wo_shared_expert": {
        **ONE_POOL,
        **NO_SHIELD,
        **ONE_RATE,
        **UNDERSTANDING,
        "experts.shared": False,
    },
    "bimodal_8_24": split(understanding=8, generation=24),
    "bimodal_16_16": split(understanding=16, generation=16),
    "bimodal_22_10": split(understanding=22, generation=10),
    "tripartite_8_8_16": split(generation=16, text=8, vit=8) | {START: f"{SEED}/start/8_8_16"},
    "tripartite_11_11_10": split(generation=10, text=11, vit=11)
    | {START: f"{SEED}/start/11_11_10"},
    "vlm": {
        **NO_SHIELD,
        **ONE_RATE,
        "data.sources": ["lm", "reading", "mmu"],
        "experts.partition": {},
        START: None,
        "optimizer.lr": 1.5e-3,
        "optimizer.beta2": 0.99,
        "lr_scheduler.warmup_steps": 50,
        "lr_scheduler.decay_ratio": 0.5,
        "losses.balance": 0.001,
        "losses.task_weights": {"mmu": 4.0},
        "data.stages": [
            {"from_step": 151, "weights": {"reading": 0, "mmu": 1}, "lr": {}},
            {"from_step": 1201, "weights": {"lm": 1.5}, "lr": {}},
        ],
        "training.local_batch_size": 2,
        "training.global_batch_size": 2,
        "training.steps": 1500,
        "validation.steps": 16,
        "validation.freq": 200,
    },
}


@functools.cache  # the tests only read them
def load(name: str) -> JobConfig:
    return load_job_config(["--job.config_file", str(FILES[name])])


def weights_of(name: str) -> dict[str, float]:
    return {row.name: row.weight for row in load(name).data.sources}


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_passes_all_checks_and_writes_to_a_folder_of_its_name(name):
    config = load(name)
    check_job(config)
    assert config.job.dump_folder == f"{SEED}/{name}"


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_differs_from_symbiotic_in_what_its_definition_says(name):
    assert differences(load(name), load("symbiotic")) == DIFFERENCES[name]


def test_the_shield_lasts_as_long_as_the_warm_up_and_rates_are_ten_to_one():
    config = load("symbiotic")
    assert config.shielding.steps == config.lr_scheduler.warmup_steps == 100
    assert config.optimizer.lr == 3e-4
    assert flat(config)["optimizer.param_groups"] == {"generation": 3e-3, "understanding": None}
    two_rates = load("standard_moe_two_rates").optimizer.param_groups
    assert [row.match for row in two_rates] == [["^latent_embedding\\.", "^flow_head\\."], [".*"]]


def test_the_system_without_target_images_reads_the_understanding_share_of_the_others_tokens():
    config, alone = load("symbiotic"), load("only_lm_mmu")
    assert config.data.mixture_by == "tokens"
    weights = weights_of("symbiotic")
    understanding = weights["lm"] + weights["mmu"]
    share = understanding / sum(weights.values())
    assert share * config.training.global_batch_size == alone.training.global_batch_size
    assert config.training.seq_len == alone.training.seq_len
    assert weights_of("only_lm_mmu") == {name: weights[name] for name in ("lm", "mmu")}
    rows = [load(n).validation.steps * load(n).training.global_batch_size for n in SYSTEMS]
    assert set(rows) == {32}


@pytest.mark.parametrize("name", SYSTEMS)
def test_groups_hold_all_experts_of_the_flavor(name):
    sizes = group_sizes(load(name))
    assert not sizes or sum(sizes) == FLAVORS["study"].num_experts


def test_the_checkpoint_that_systems_start_from_is_the_last_of_the_vlm():
    config = load("vlm")
    assert f"{config.job.dump_folder}/checkpoint/step-{config.training.steps}" == VLM


def test_every_file_is_a_system_or_part_of_one_and_all_read_the_data_of_the_same_seed():
    assert set(SYSTEMS) == DIFFERENCES.keys()
    used = {layer.path for name in SYSTEMS for layer in extends.read_layers(str(FILES[name]))}
    assert {Path(path).stem for path in used} >= PARTS
    for path in FILES.values():
        words = [word for word in path.read_text().split('"') if "/seed-" in word]
        assert all(word.startswith(f"{SEED}/") for word in words)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_header_says_what_the_file_is_for_and_the_command_names_it(name):
    header = FILES[name].read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    if name in PARTS:
        assert "this file is extended" in header
    else:
        assert f"# Command:   symbiotic reproduce{'' if name == 'vlm' else f' {name}'}" in header
