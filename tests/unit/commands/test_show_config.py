"""What show_config prints is the config: it can be loaded again, and names what differs and where it was said."""

import tomllib
from pathlib import Path

import pytest

from symbiotic_titan.commands import show_config
from symbiotic_titan.config.load import load_job_config

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "train_configs"


def shown(capsys, *arguments):
    assert show_config.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def loaded(path, *overrides):
    config = load_job_config(["--job.config_file", str(path), *overrides])
    config.job.config_file = None
    return config


@pytest.mark.parametrize("flags", [[], ["--changed"]], ids=["all", "changed"])
@pytest.mark.parametrize("name", ["debug_gpu", "1b_a0.3b", "study/step_zero/tripartite_11_11_10"])
def test_what_is_printed_loads_to_the_same_config(name, flags, tmp_path, capsys):
    path = CONFIGS / f"{name}.toml"
    copy = tmp_path / "copy.toml"
    copy.write_text(shown(capsys, path, *flags, "--training.steps", "7"))
    assert loaded(copy) == loaded(path, "--training.steps", "7")


def test_changed_leaves_out_what_is_a_default(capsys):
    table = tomllib.loads(shown(capsys, CONFIGS / "study" / "mot.toml", "--changed"))
    assert table["experts"]["shared"] is False
    assert "shielding" not in table and "flow" not in table


def test_a_comment_names_the_file_that_set_a_value_or_the_command_line(tmp_path, capsys):
    (tmp_path / "base.toml").write_text("[training]\nsteps = 5\nseq_len = 64\n[flow]\nseed = 3\n")
    top = tmp_path / "top.toml"
    top.write_text('extends = "base.toml"\n[training]\nseq_len = 128\n')
    lines = shown(capsys, top, "--flow.seed", "4").splitlines()
    comments = {line.split("  # ")[0].strip(): line.partition("  # ")[2] for line in lines}
    assert comments["steps = 5"] == f"{tmp_path}/base.toml"
    assert comments["seq_len = 128"] == f"{tmp_path}/top.toml"
    assert comments["seed = 4"] == "command line"
    assert comments["shift = 1.0"] == ""


def test_diff_goes_key_by_key_and_compares_rows_by_name(tmp_path, capsys):
    row = '[[data.sources]]\nname = "{}"\ntask = "lm"\nformat = "jsonl"\npath = "x"\nweight = {}\n'
    old, new = tmp_path / "old.toml", tmp_path / "new.toml"
    old.write_text("[losses]\ntext = 2.0\n" + row.format("a", 1) + row.format("b", 1))
    new.write_text("[experts]\nshared = false\n" + row.format("b", 3) + row.format("a", 1))
    assert shown(capsys, old, "--diff", new).splitlines() == [
        f"# {old} -> {new}",
        "experts.shared: true -> false",
        "losses.text: 2.0 -> 1.0",
        'data.sources (order): ["a", "b"] -> ["b", "a"]',
        "data.sources[b].weight: 1 -> 3",
    ]
    new.write_text("[losses]\ntext = 2.0\n" + row.format("a", 1))
    assert shown(capsys, old, "--diff", new).splitlines()[1:] == [
        'data.sources[b]: {name = "b", task = "lm", format = "jsonl", path = "x", keys = {}, image_folder = "", image_roots = [], '
        'truncated_images = "bad", weight = 1, skip_list = ""} -> (not set)'
    ]
    assert shown(capsys, old, "--diff", old) == f"# {old} -> {old}: no difference\n"


@pytest.mark.parametrize(
    "value",
    [
        'quote " and backslash \\ and \t tab',
        r"\.generation\.",
        "it's \\d",
        "del \x7f, nul \x00, snow ☃, emoji 😀",
        -3,
        1e-5,
        1e22,
        float("inf"),
        0.1,
        True,
        [],
        [1, [2, 3]],
        {"a key": {"b": 'x"'}, "": 1},
    ],
    ids=repr,
)
def test_a_written_value_reads_back_as_it_was(value):
    assert tomllib.loads(f"x = {show_config.value_text(value)}") == {"x": value}


def test_tables_rows_and_odd_keys_are_written_as_toml():
    table = {"a": {"x": 1, "sub table": {"y": [1]}, "rows": [{"n": 1}, {"n": 2, "t": {"u": 1}}]}}
    assert tomllib.loads("\n".join(show_config.blocks(table, {}))) == table


def test_a_users_mistake_ends_with_status_2_and_one_line(capsys, tmp_path):
    assert show_config.main([str(tmp_path / "nowhere.toml")]) == 2
    assert (
        capsys.readouterr().err
        == f"error: job.config_file: no such file: {tmp_path}/nowhere.toml\n"
    )
    assert show_config.main([str(CONFIGS / "debug.toml"), "--losses.text", "2", "--diff", "x"]) == 2
