"""Whatever a key of the config is given, the config is valid or refused in one line, at once: drawn for every key there is."""

import copy
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from symbiotic_titan.config.data import DataSource
from symbiotic_titan.config.experts import ExpertGroupRow
from symbiotic_titan.config.job import JobConfig, job_config_class
from symbiotic_titan.config.load import check_table, load_job_config
from symbiotic_titan.config.optimizer import ParamGroupRow
from symbiotic_titan.config.rows import row_from_dict, shown
from symbiotic_titan.config.stages import Stage
from symbiotic_titan.config.upstream import RANGES, UNSUPPORTED, settings, value_of
from symbiotic_titan.process import raised_by_us
from symbiotic_titan.training.check_parts import check_rows
from symbiotic_titan.training.checks import check_job
from tests.helpers.odd_values import draws, fields_of_row, has_range

DEBUG = ["--job.config_file", "train_configs/debug.toml"]
SETTINGS = dict(settings(job_config_class()))
SECONDS = 2.0  # of the process, for one case; most take some milliseconds
ROWS: dict[type, dict[str, Any]] = {
    DataSource: {"name": "a", "task": "lm", "format": "jsonl", "path": "x"},
    ParamGroupRow: {"name": "a", "match": ["x"]},
    Stage: {"from_step": 2, "weights": {"a": 1.0}},
    ExpertGroupRow: {"modalities": ["text"], "num_experts": 2},
}
# What a command reads that only some runs use, or that no number or string is.
FREE = {"optimizer.builder_options"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> JobConfig:
    """A run that samples, validates and keeps an average, so that the keys of these have an effect."""
    folder = tmp_path_factory.mktemp("ranges")
    path = folder / "job.toml"
    rows = [f"{key} = {value!r}" for key, value in ROWS[DataSource].items()]
    path.write_text(
        f"extends = {str(Path('train_configs/debug.toml').absolute())!r}\n"
        "[sampling]\nenable = true\n[ema]\nenable = true\n[validation]\nenable = true\n"
        + "\n".join(["[[validation.sources]]", *rows])
    )
    options = ["--job.config_file", str(path), "--job.dump_folder", str(folder / "run")]
    return load_job_config(options)


def is_ignored(key: str) -> bool:
    """Whether the key must stay at its default, by itself or with its section."""
    return any(key == o.key or key.startswith(f"{o.key}.") for o in UNSUPPORTED)


def refusal(function: Any, *args: Any) -> str | None:
    """The one line that a user is told, or None where nothing is wrong. Every other outcome is an error of the test."""
    start = time.process_time()
    try:
        function(*args)
    except ValueError as error:
        text = str(error)
        assert raised_by_us(error) and "\n" not in text and 10 < len(text) < 1500, text[:300]
        return text
    finally:
        assert time.process_time() - start < SECONDS
    return None


def with_value(config: Any, key: str, value: Any) -> Any:
    """A copy of a config or section with another value of ``key``."""
    name, _, rest = key.partition(".")
    if not rest:
        return replace(config, **{name: value})
    changed = copy.copy(config)
    setattr(changed, name, with_value(getattr(config, name), rest, value))
    return changed


def as_table(key: str, value: Any) -> dict[str, Any]:
    name, _, rest = key.partition(".")
    return {name: as_table(rest, value) if rest else value}


def check_whole(base: JobConfig, key: str, value: Any) -> None:
    config = with_value(base, key, copy.deepcopy(value))
    check_job(config)
    if key.startswith(("data.", "latents.", "training.", "validation.")):
        check_rows(config)


def test_every_key_states_what_it_may_be():
    for key, setting in SETTINGS.items():
        assert key in FREE or is_ignored(key) or has_range(setting), f"{key} has no range"
    for row in ROWS:
        for name, setting in fields_of_row(row).items():
            assert has_range(setting), f"{row.__name__}.{name} has no range"
    assert {setting.row for setting in SETTINGS.values()} - {None} == set(ROWS)
    assert not RANGES.keys() - SETTINGS.keys()


def test_any_value_of_any_key_is_valid_or_refused_in_one_line_at_once(base, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    cls, count, slipped = job_config_class(), Counter(), []
    for key, setting in SETTINGS.items():
        good, bad = draws(setting, Random(key))
        if is_ignored(key):
            default = value_of(base, key)
            bad = [value for value in (*good, *bad) if value != default]
            good = [default]
        for value in bad:
            text = refusal(check_table, cls, as_table(key, value))
            if text is None:  # rows, and what is ignored, are looked at later
                text = refusal(check_whole, base, key, value)
            if text is None or key not in text:
                slipped.append(f"{key} = {shown(value)}: {text}")
            count["refused"] += 1
        for value in good:
            assert refusal(check_table, cls, as_table(key, value)) is None
        # Alone it is possible; with the rest of the config it may not be.
        for value in good if len(good) < 4 else Random(key).sample(good, 3):
            text = refusal(check_whole, base, key, value)
            count["valid" if text is None else "refused with the others"] += 1
    assert not slipped
    assert count["refused"] >= 1500 and count["valid"] >= 200, count
    assert count.total() >= 2000, count


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.__name__)
def test_any_value_in_a_row_is_valid_or_refused_in_one_line(row):
    for name, setting in fields_of_row(row).items():
        good, bad = draws(setting, Random(name))
        for value in bad:
            text = refusal(row_from_dict, row, {**ROWS[row], name: value}, "[[rows]] #1")
            assert text is not None, f"{name} = {value!r} was accepted"
            assert text.startswith("[[rows]] #1"), text
        for value in good:
            refusal(row_from_dict, row, {**ROWS[row], name: value}, "[[rows]] #1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = " + "[" * 5000, "nested at most 32 deep"),
        ("a = " + "[" * 60 + "]" * 60, "nested at most 32 deep"),
        ("[a" + ".a" * 3000 + "]", "nested at most 32 deep"),
        ("x = " + "9" * 6000, "is not valid TOML: Exceeds the limit"),
        ("[training]\nsteps = 0x" + "f" * 6000, "training.steps: must be at most 1000000000, got"),
        ("[training]\nsteps = 1" + "0" * 20, "training.steps: must be at most 1000000000, got"),
        ("[training]\nseq_len = 4096000", "training.seq_len: must be at most 1048576, got 4096000"),
        ("[data]\nnum_lanes = 1000000000", "data.num_lanes: must be at most 65536, got"),
        ("[flow]\nmean = -1e300", "flow.mean: must be at least -1000, got -1e+300"),
        ("[job]\ndump_folder = ''", "job.dump_folder: must be a path of 1 to 4096 characters"),
        (
            '[job]\ndump_folder = "a\\u0001"',
            r"job.dump_folder: must be a path of 1 to 4096 characters",
        ),
        ("[training]\nsteps = 1\nsteps = 2", "is not valid TOML: Cannot overwrite a value"),
    ],
    ids=range(12),
)
def test_a_file_that_cannot_be_right_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "job.toml"
    path.write_text(text)
    told = refusal(load_job_config, ["--job.config_file", str(path)])
    assert told is not None and message in told


def test_what_the_command_line_gives_has_the_same_ranges():
    for options, message in (
        (["--training.steps", "9" * 5000], "training.steps: must be an integer, got '999"),
        (["--job.dump_folder", "a\x01"], "job.dump_folder: must be a path of 1 to 4096 characters"),
        (["--job.dump_folder="], "job.dump_folder: must be a path of 1 to 4096 characters, no"),
        (["--compile.components", "model,x"], "compile.components[1]: must be 'model' or 'loss'"),
        (["--sampling.steps", "1000000000"], "sampling.steps: must be at most 10000, got 10000"),
        (["--"], "'--' is no option"),
    ):
        told = refusal(load_job_config, [*DEBUG, *options])
        assert told is not None and message in told
