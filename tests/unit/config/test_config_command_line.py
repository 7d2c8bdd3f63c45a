"""Options of the command line: one line for each mistake, and the last of several holds."""

import pytest

from symbiotic_titan.config.command_line import last_of_each, option_of
from symbiotic_titan.config.load import load_job_config

DEBUG = ["--job.config_file", "train_configs/debug.toml"]


def test_an_option_is_found_in_every_spelling_and_the_last_one_holds():
    assert option_of(["--x", "1", "--job.config_file", "a.toml"], "job.config_file") == "a.toml"
    assert option_of(["--job.config-file=b.toml"], "job.config_file") == "b.toml"
    twice = ["--job.config_file=a.toml", "--x", "--job.config-file", "b.toml"]
    assert option_of(twice, "job.config_file") == "b.toml"
    assert last_of_each(twice) == twice[1:]
    assert option_of(["--x"], "job.config_file") is None
    assert option_of([], "job.config_file") is None


def test_of_an_option_given_twice_the_last_holds_for_every_reader(tmp_path, monkeypatch):
    """The file, the extension and the custom sections are read before the parser reads the rest, upstream's by the first."""
    (tmp_path / "sections_of_mine.py").write_text(
        "from dataclasses import dataclass, field\n"
        "@dataclass\nclass Mine:\n    size: int = 1\n"
        "@dataclass\nclass JobConfig:\n    mine: Mine = field(default_factory=Mine)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = load_job_config(
        [
            *("--job.config_file", "nowhere.toml", *DEBUG),
            *("--experimental.custom_import=absent", "--experimental.custom_import", "json"),
            *("--job.custom_config_module=absent", "--job.custom-config-module=sections_of_mine"),
            *("--training.steps=3", "--training.steps", "4", "--experts.no_shared"),
            *("--experts.shared", "--mine.size", "5", "--experts.no-shared"),
        ]
    )
    assert config.job.config_file == "train_configs/debug.toml"
    assert config.experimental.custom_import == "json"
    assert (config.training.steps, config.mine.size, config.experts.shared) == (4, 5, False)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--training.stepps 3", "training: unknown key 'stepps'; did you mean 'steps'?"),
        ("--trainin.steps 3", "command line: unknown key 'trainin.steps'; did you mean 'training."),
        ("--losses.z 1", "register"),
        ("--zzz.size 1", "a section of your own comes from the module in job.custom_config_module"),
        ("--training.steps three", "training.steps: must be an integer, got 'three'"),
        ("--training.steps 3.0", "training.steps: must be an integer, got '3.0'"),
        ("--losses.text=x", "losses.text: must be a number, got 'x'"),
        ("--losses.text nan", "losses.text: must be a finite number, got nan"),
        ("--losses.text=-1", "losses.text: must be zero or positive, got -1.0; set 0 to train"),
        ("--training.max_norm x", "training.max_norm: must be a number or an integer, got 'x'"),
        ("--training.dataloader.num-workers x", "training.dataloader.num_workers: must be an int"),
        ("--latents.scale x", "latents.scale: must be a number, got 'x'"),
        ("--activation_checkpoint.mode half", "activation_checkpoint.mode: must be one of 'select"),
        ("--data.packing x", "data.packing = 'x': nothing is registered under this name"),
        ("--data.sources x", "data.sources: a table is set in the TOML file, not on the command l"),
        (
            "--training.steps",
            "training.steps: needs a value; one that begins with a hyphen is given",
        ),
        (
            "--compile.components a b",
            "compile.components: takes one value, got a b; quote one with",
        ),
        (
            "--experts.shared yes",
            "experts.shared: is switched on with --experts.shared and off with ",
        ),
        ("--experts.no-shared=1", "--experts.no_shared, without a value, got '1'"),
        (
            "--job.description -x",
            "job.description: needs a value; one that begins with a hyphen is given",
        ),
        ("--quantize.linear.float8.filter_fqns --x", "filter_fqns: needs a value"),
    ],
)
def test_a_mistake_is_told_in_one_line(options, message, capsys):
    with pytest.raises(ValueError) as error:
        load_job_config([*DEBUG, *options.split()])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert capsys.readouterr() == ("", "")


def test_a_word_before_the_options_is_no_option():
    with pytest.raises(ValueError, match=r"'stray' is no option; write --section.key value"):
        load_job_config(["stray", *DEBUG])


def test_values_of_every_kind_are_read():
    options = "--losses.text 1e-3 --latents.scale None --compile.components loss,model --training.max_norm 2"
    config = load_job_config([*DEBUG, *options.split(), "--job.description=--x y"])
    assert (config.losses.weight("text"), config.latents.scale) == (1e-3, None)
    assert (config.compile.components, config.training.max_norm) == (["loss", "model"], 2)
    assert config.job.description == "--x y"


def test_help_is_shown_whatever_else_is_given(capsys):
    with pytest.raises(SystemExit) as end:
        load_job_config([*DEBUG, "--training.stepps", "3", "--help"])
    assert not end.value.code
    assert "--training.steps INT" in capsys.readouterr().out
