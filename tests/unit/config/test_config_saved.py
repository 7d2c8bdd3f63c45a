"""What a run keeps of its config is the config, wherever it came from."""

import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from symbiotic_titan.config.experts import ROUTER_SCORES, SHIELD_SCHEDULES
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.config.losses import LOSS_TERMS
from symbiotic_titan.config.saved import SavedConfig, check_extension, saved_config
from symbiotic_titan.inference.generator import Generator
from tests.helpers.users_parts import forget_modules, users_parts

CONFIGS = Path(__file__).parents[3] / "train_configs"


@pytest.fixture(autouse=True)
def own_registries():
    with users_parts(LOSS_TERMS, ROUTER_SCORES, SHIELD_SCHEDULES):
        yield


def config_of(name, folder, *overrides):
    file = str(CONFIGS / name)
    return load_job_config(
        ["--job.config_file", file, "--job.dump_folder", str(folder), *overrides]
    )


def values(config):
    table = asdict(config)
    del table["job"]["config_file"]
    return table


@pytest.mark.parametrize(
    "name", [str(path.relative_to(CONFIGS)) for path in sorted(CONFIGS.rglob("*.toml"))]
)
def test_the_saved_file_is_the_whole_config(name, tmp_path):
    config = config_of(name, tmp_path / "run", "--training.steps", "7")
    saved = SavedConfig(config)
    config.checkpoint.load_step = 3  # as a start fills it in
    saved.write()
    config.checkpoint.load_step = -1
    back = load_job_config(["--job.config_file", str(tmp_path / "run" / "config.toml")])
    assert values(back) == values(config) and back.training.steps == 7


def test_a_later_start_replaces_it_and_leaves_nothing_else(tmp_path):
    for steps in ("7", "8"):
        SavedConfig(config_of("debug.toml", tmp_path, "--training.steps", steps)).write()
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"]
    assert "\nsteps = 8\n" in (tmp_path / "config.toml").read_text()


def test_it_is_found_from_the_run_and_from_its_checkpoints(tmp_path):
    checkpoint = tmp_path / "run" / "checkpoint" / "step-8"
    checkpoint.mkdir(parents=True)
    with pytest.raises(ValueError, match=r"step-8 is not in the folder of a run that kept its"):
        saved_config(checkpoint)
    SavedConfig(config_of("debug.toml", tmp_path / "run")).write()
    for path in (checkpoint, checkpoint.parent, tmp_path / "run"):
        assert saved_config(path) == tmp_path / "run" / "config.toml"


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        ("z_loss", ["--losses.z", "0.001"], "losses: unknown key 'z'"),
        (
            "softplus_score",
            ["--experts.score_function=softplus"],
            "score_function = 'softplus': nothing",
        ),
    ],
)
def test_a_run_is_not_resumed_without_the_parts_of_its_extension(
    tmp_path, monkeypatch, module, options, message
):
    monkeypatch.chdir(CONFIGS.parent)
    own = ["--experimental.custom_import", f"docs.examples.{module}"]
    with LOSS_TERMS.temporarily(), ROUTER_SCORES.temporarily():
        SavedConfig(config_of("debug.toml", tmp_path, *own, *options)).write()
    without = config_of("debug.toml", tmp_path)
    check_extension(without)  # there is no checkpoint to go on from
    (tmp_path / "checkpoint" / "step-5").mkdir(parents=True)
    with pytest.raises(ValueError, match="were trained with 'docs.examples") as error:
        check_extension(without)
    assert message in str(error.value) and "this run has 'none'" in str(error.value)
    assert f"take what is not to go on out of {tmp_path / 'config.toml'}" in str(error.value)
    other = ["--experimental.custom_import", "docs.examples.cosine_shield"]
    with pytest.raises(ValueError, match="this run has 'docs.examples.cosine_shield'"):
        check_extension(config_of("debug.toml", tmp_path, *other))
    forget_modules()
    with LOSS_TERMS.temporarily(), ROUTER_SCORES.temporarily():
        check_extension(config_of("debug.toml", tmp_path, *own, *options))


def test_a_resumed_run_that_needs_nothing_of_its_extension_is_told_what_changed(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(CONFIGS.parent)
    SavedConfig(config_of("debug.toml", tmp_path, "--experimental.custom_import=json")).write()
    (tmp_path / "checkpoint" / "step-5").mkdir(parents=True)
    with caplog.at_level("WARNING"):
        check_extension(config_of("debug.toml", tmp_path))
    assert "were trained with 'json', this run has 'none'" in caplog.text


@pytest.mark.parametrize("key", ["experimental.custom_import", "job.custom_config_module"])
def test_a_module_that_a_kept_config_names_is_imported_only_if_it_is_named_again(tmp_path, key):
    section, name = key.split(".")
    (tmp_path / "base.toml").write_text(f'[{section}]\n{name} = "antigravity"\n')
    kept = tmp_path / "config.toml"
    kept.write_text('extends = "base.toml"\n')
    message = f"{key} = 'antigravity' in {kept}: .* if you trust it, say --{key} antigravity, or"
    for overrides in ([], [f"--{key}", "this"], ["--experimental.custom_import"]):
        with pytest.raises(ValueError, match=message):
            saved_config(tmp_path, overrides)
    with pytest.raises(ValueError, match=message):
        Generator.load(tmp_path)
    assert saved_config(tmp_path, [f"--{key}", "antigravity"]) == kept
    kept.write_text(f'[{section}]\n{name} = "symbiotic_titan.extensions.momentum_projection"\n')
    assert saved_config(tmp_path) == kept
    assert "antigravity" not in sys.modules
