"""A run's last lines say where its files are, and the commands that they name exist and take the options that they show."""

import logging
import re
import shlex

import pytest

from symbiotic_titan.commands import evaluate, generate
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.train import is_told
from symbiotic_titan.training.ending import closing_lines

DEBUG = ["--job.config_file", "train_configs/debug.toml"]


@pytest.fixture
def config_in(tmp_path):
    """The debug config of a run in a folder with a space in its name, which has a checkpoint of step 9."""
    folder = tmp_path / "my run"
    (folder / "checkpoint" / "step-9").mkdir(parents=True)

    def make(*options):
        steps = ["--training.steps", "9", "--job.dump_folder", str(folder)]
        return load_job_config([*DEBUG, *steps, *options])

    return make


def command_in(line):
    """The words after the program and the subcommand."""
    words = shlex.split(line.removeprefix("next: ").partition("  (")[0])
    assert words[0].endswith("symbiotic")
    return words[2:]


def test_a_finished_run_names_its_files_and_the_next_commands(config_in):
    config = config_in("--sampling.enable")
    *files, generates, scores = closing_lines(config, 9)
    folder = config.job.dump_folder
    assert files[0] == f"checkpoint: {folder}/checkpoint/step-9"
    assert re.fullmatch(r"TensorBoard: \S*tensorboard --logdir '.*/my run/tb'", files[1])
    assert files[2:] == [
        "samples: in TensorBoard, under Images, sampling/pictures",
        "finished: all 9 steps are done",
    ]
    options, overrides = generate.parse(command_in(generates))
    assert str(options.run) == folder and options.kind == "image" and not overrides
    options, overrides = evaluate.parse(command_in(scores))
    assert [str(path) for path in options.checkpoints] == [folder] and not overrides
    assert options.suite == ["demo_world"]


def test_data_of_the_user_leave_the_choice_of_a_suite(config_in):
    config = config_in()
    config.data.sources = [source for source in config.data.sources if source.task == "lm"]
    config.data.sources[0].path = "mine/*.jsonl"
    *_, generates, scores = closing_lines(config, 9)
    assert generate.parse(command_in(generates))[0].kind == "text"
    assert scores.endswith(" --suite NAME  (evaluate --suites lists the names)")


@pytest.mark.parametrize(
    ("options", "step", "last"),
    [
        ((), 7, "stopped at step 7 of 9; the same command starts it"),
        (("--training.steps", "12"), 9, "stopped at step 9 of 12; the same command goes on from there"),
        (("--checkpoint.no_enable", "--metrics.no_enable_tensorboard"), 9, "finished: all 9 steps are done"),
    ],
)  # fmt: skip
def test_a_run_without_its_last_step_or_a_checkpoint_says_so(config_in, options, step, last):
    lines = closing_lines(config_in(*options), step)
    is_saved = step == 9 and "--checkpoint.no_enable" not in options
    assert lines[0].startswith("checkpoint: none of step") != is_saved
    assert lines[-1] == last and not any(line.startswith("next") for line in lines)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("Destroying the purge thread.", False),
        ("[GC] Initial GC collection took 0.00 seconds", False),
        ("Peak FLOPS used for computing MFU: nan", False),
        ("Peak FLOPS used for computing MFU: 9.890e+14", True),
        ('Building symbiotic debugwith {\n  "dim": 128', False),
        ("Saving a full checkpoint at last step, step 10.", True),
    ],
)
def test_lines_of_torchtitan_that_tell_nothing_are_left_out(line, told):
    assert is_told(logging.makeLogRecord({"msg": line})) == told
