"""What a TOML file and a command line may say, and what is refused before anything is built."""

import pytest

from symbiotic_titan.config.data import Data
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.config.upstream import check_ranges

SOURCE = '[[data.sources]]\nname = "a"\ntask = "lm"\nformat = "jsonl"\npath = "x"\n'


def load(tmp_path, text, *overrides):
    path = tmp_path / "job.toml"
    path.write_text(text)
    return load_job_config(["--job.config_file", str(path), *overrides])


def test_command_line_wins_over_file_and_file_over_defaults(tmp_path):
    config = load(
        tmp_path,
        f"[training]\nsteps = 7\nseq_len = 64\n[losses]\nbalance = 0.5\n{SOURCE}",
        "--training.seq_len",
        "128",
    )
    assert (config.training.steps, config.training.seq_len) == (7, 128)
    assert config.losses.balance == 0.5 and config.losses.text == 1.0
    assert config.data.sources[0].name == "a"


def test_partition_and_groups_survive_the_command_line_parser(tmp_path):
    config = load(
        tmp_path,
        '[experts.partition.understanding]\nmodalities = ["text", "vit"]\nnum_experts = 3\n'
        '[[optimizer.param_groups]]\nname = "g"\nmatch = ["x"]\nlr = 0.1\n',
        "--training.steps",
        "3",
    )
    assert config.experts.partition["understanding"].num_experts == 3
    assert config.optimizer.param_groups[0].lr == 0.1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[trainin]\nsteps = 1", "config file: unknown key 'trainin'; did you mean 'training'?"),
        ("[training]\nstep = 1", "training: unknown key 'step'; did you mean 'steps'?"),
        ('[training]\nsteps = "ten"', "training.steps: must be an integer, got 'ten'"),
        ("[losses]\ntext = true", "losses.text: must be a number, got True"),
        (
            '[activation_checkpoint]\nmode = "half"',
            "activation_checkpoint.mode: must be one of 'selective', 'full', 'memory_budget', 'none', got 'half'",
        ),
        ("training = 3", "training: must be a table [training], got 3"),
        ("[losses]\ntext = -1", "losses.text: must be zero or positive, got -1"),
        ("[flow]\nshift = 0", "flow.shift: must be positive, got 0"),
        ("[shielding]\nsteps = -1", "shielding.steps: must be zero or positive, got -1"),
        ("[shielding]\nafter_scale = 2", "shielding.after_scale: must lie in [0, 1], got 2"),
        ('[shielding]\nramp = "linear"', "shielding.ramp: 'linear' rises over shielding.steps"),
        (
            '[experts.partition.a]\nmodalities = ["text"]\nnum_expert = 1',
            "experts.partition.a: unknown key 'num_expert'; did you mean 'num_experts'?",
        ),
        (
            '[experts.partition.a]\nmodalities = "text"\nnum_experts = 1',
            "experts.partition.a.modalities: must be a list, each item a string, got 'text'",
        ),
        (
            '[experts.partition.a]\nmodalities = ["text"]\nnum_experts = 4\nhidden_dim = 20',
            "experts.partition.a.hidden_dim: must be a multiple of 8 (grouped matmuls read rows of 16 bytes), got 20",
        ),
        (
            '[experts.partition.a]\nmodalities = ["text"]\nnum_experts = 4\ntop_k = 0',
            "experts.partition.a.top_k: must be at least 1, got 0",
        ),
        (
            '[experts.partition.a]\nmodalities = ["text"]\nnum_experts = 4\nhidden_dim = -8',
            "experts.partition.a.hidden_dim: must be at least 1, got -8",
        ),
        (
            '[experts.partition.a]\nmodalities = ["text"]\nnum_experts = 4\ncopy = 1',
            "experts.partition.a.copy: must be true or false, got 1",
        ),
        (
            "[losses]\nz = 1.0",
            "losses: unknown key 'z'; known keys: balance, balance_scope, flow, task_weights, text, z_loss; a term of your own is known "
            "once experimental.custom_import names the module that registers it",
        ),
        (
            "[mine]\nx = 1",
            "; a section of your own comes from the module in job.custom_config_module",
        ),
        ("x = = 1", "is not valid TOML"),
        ("job = 5", "job: must be a table [job], got 5"),
        ('[optimizer]\nname = "SGD"', "optimizer.name: must be one of 'Adam', 'AdamW', got 'SGD'"),
        ("[optimizer]\nlr = -1.0", "optimizer.lr: must be zero or positive, got -1.0"),
        ("[optimizer]\nbeta1 = 2.0", "optimizer.beta1: must lie in [0, 1), got 2.0"),
        ("[losses]\ntext = nan", "losses.text: must be a finite number, got nan"),
        ("[checkpoint]\ninterval = 0", "checkpoint.interval: must be at least 1, got 0"),
        (
            "[checkpoint]\nkeep_latest_k = 1",
            "checkpoint.keep_latest_k: must be at least 2, or 0 (all), got 1; the newest may still be in the middle of its save",
        ),
    ],
)
def test_bad_files_are_refused_with_key_rule_and_value(tmp_path, text, message):
    with pytest.raises(ValueError) as error:
        load(tmp_path, text)
    assert message in str(error.value)


def test_missing_config_file_is_named():
    with pytest.raises(ValueError, match="job.config_file: no such file: nowhere.toml"):
        load_job_config(["--job.config_file", "nowhere.toml"])


ROW = {"name": "a", "task": "lm", "format": "jsonl", "path": "x"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{**ROW, "weight": -1}],
            "[[data.sources]] #1.weight: must be zero or positive, got -1",
        ),
        ([{**ROW, "weight": 0}], "[[data.sources]]: the weights sum to zero"),
        ([ROW, ROW], "[[data.sources]] #1 (a): name is used twice"),
        (
            [{**ROW, "task": "t2v"}],
            "#1.task = 't2v': nothing is registered under this name; choose from lm, mmu, t2i, t2i_long, interleaved",
        ),
        ([{**ROW, "taks": "lm"}], "unknown key 'taks'; did you mean 'task'?"),
        ([{"name": "a"}], "[[data.sources]] #1: missing key 'task'"),
    ],
)
def test_bad_sources_are_refused(rows, message):
    with pytest.raises(ValueError) as error:
        Data(sources=rows)
    assert message in str(error.value)


def test_custom_config_module_adds_a_section(tmp_path, monkeypatch):
    (tmp_path / "user_sections.py").write_text(
        "from dataclasses import dataclass, field\n"
        "from typing import Annotated\n"
        "from symbiotic_titan.config.rows import Range\n"
        "@dataclass\nclass Mine:\n    size: Annotated[int, Range(1, 64)] = 1\n"
        "@dataclass\nclass JobConfig:\n    mine: Mine = field(default_factory=Mine)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = load(tmp_path, '[job]\ncustom_config_module = "user_sections"\n[mine]\nsize = 5\n')
    assert config.mine.size == 5 and config.model.name == "symbiotic"
    by_option = load(tmp_path, "[mine]\nsize = 6\n", "--job.custom_config_module", "user_sections")
    assert by_option.mine.size == 6  # type: ignore[attr-defined]
    beyond = load(tmp_path, '[job]\ncustom_config_module = "user_sections"\n[mine]\nsize = 65\n')
    with pytest.raises(ValueError, match=r"mine\.size: must be at most 64, got 65"):
        check_ranges(beyond)
