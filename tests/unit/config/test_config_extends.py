"""What ``extends`` makes of several files, and what it says about chains that cannot be read."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from symbiotic_titan.config import extends
from symbiotic_titan.config.load import load_job_config

SOURCE = '[[data.sources]]\nname = "{}"\ntask = "lm"\nformat = "jsonl"\npath = "x"\n'
PROGRAM = Path(extends.__file__)


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    """Files are named as a user names them who stands in the folder."""
    monkeypatch.chdir(tmp_path)


def write(**files):
    for name, text in files.items():
        path = Path(name.replace("__", "/") + ".toml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def merged(path):
    return extends.merged_table(extends.read_layers(path))


def test_tables_merge_and_every_other_value_is_replaced():
    write(
        base='a = [1, 2]\n[t]\nx = 1\ny = 1\n[t.deep]\nz = 1\n[[rows]]\nname = "r"\nsize = 1\n',
        top='extends = "base.toml"\na = [3]\n[t]\ny = 2\n[t.deep]\nw = 2\n[[rows]]\nname = "s"\n',
    )
    assert merged("top.toml") == {
        "a": [3],
        "t": {"x": 1, "y": 2, "deep": {"z": 1, "w": 2}},
        "rows": [{"name": "s"}],
    }


def test_later_files_of_a_list_win_and_the_file_itself_wins_over_all():
    write(
        one="a = 1\nb = 1\nc = 1\nd = 1",
        two="b = 2\nc = 2",
        top='extends = ["one.toml", "two.toml"]\nc = 3',
    )
    assert merged("top.toml") == {"a": 1, "b": 2, "c": 3, "d": 1}
    assert [layer.path for layer in extends.read_layers("top.toml")] == [
        "one.toml",
        "two.toml",
        "top.toml",
    ]


def test_a_file_named_in_a_list_stands_for_all_that_it_extends():
    write(
        base="a = 0\nb = 0",
        one='extends = "base.toml"\na = 1',
        two='extends = "base.toml"\nb = 2',
        top='extends = ["one.toml", "two.toml"]',
    )
    assert merged("top.toml") == {"a": 0, "b": 2}


def test_paths_are_relative_to_the_file_that_names_them(tmp_path):
    write(base="a = 1", deep__middle='extends = "../base.toml"', top='extends = "deep/middle.toml"')
    assert merged("top.toml") == {"a": 1}
    assert merged(str(tmp_path / "top.toml")) == {"a": 1}
    write(far=f'extends = "{tmp_path}/base.toml"')
    assert merged("far.toml") == {"a": 1}


def test_origins_name_the_file_whose_value_counts():
    write(base="[t]\nx = 1\ny = 1", top='extends = "base.toml"\n[t]\ny = 2')
    origins = extends.origins(extends.read_layers("top.toml"))
    assert origins == {"t": {"x": "base.toml", "y": "top.toml"}}


def test_false_takes_back_a_table_of_the_files_below():
    write(
        base="[groups.a]\nsize = 1\n[groups.b]\nsize = 2\n[t]\non = true",
        top='extends = "base.toml"\n[groups]\na = false\n[groups.c]\nsize = 3\n[t]\non = false',
    )
    assert merged("top.toml") == {
        "groups": {"b": {"size": 2}, "c": {"size": 3}},
        "t": {"on": False},
    }
    assert extends.origins(extends.read_layers("top.toml")) == {
        "groups": {"b": {"size": "base.toml"}, "c": {"size": "top.toml"}},
        "t": {"on": "top.toml"},
    }


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"top": 'extends = "top.toml"'},
            "extends: top.toml -> top.toml is a circle: no file may extend itself, directly or through others; "
            "remove one of these extends lines",
        ),
        (
            {"top": 'extends = ["b.toml"]', "b": 'extends = "c.toml"', "c": 'extends = "b.toml"'},
            "extends: top.toml -> b.toml -> c.toml -> b.toml is a circle",
        ),
        (
            {"top": 'extends = "d/b.toml"', "d__b": 'extends = "base.toml"', "base": ""},
            "extends: top.toml -> d/b.toml -> d/base.toml: no such file; a path is relative to the file that names it: "
            "correct it or remove it",
        ),
        (
            {"top": 'extends = "b.toml"', "b": "x = = 1"},
            "extends: top.toml -> b.toml is not valid TOML:",
        ),
        (
            {"top": "extends = 3"},
            'extends: top.toml: must be a path or a list of paths, got 3; write extends = "base.toml" or',
        ),
        ({"top": 'extends = "b.toml"', "b": "extends = [1]"}, "top.toml -> b.toml: must be a path"),
        ({"top": 'extends = ""'}, "must be a path or a list of paths, got ''"),
        ({"top": "[extends]\nx = 1"}, "must be a path or a list of paths, got {'x': 1}"),
        (
            {"top": 'extends = "b.toml"', "b": "[training]\nstep = 1"},
            "b.toml: training: unknown key 'step'; did you mean 'steps'?",
        ),
        (
            {"top": 'extends = "b.toml"\n[losses]\ntext = "x"', "b": ""},
            "top.toml: losses.text: must be a number, got 'x'",
        ),
        (
            {"top": '[model]\nextends = "b.toml"', "b": ""},
            "model.extends: a whole file extends others, not a section; put it above the first [section]",
        ),
    ],
)
def test_a_bad_chain_is_told_with_its_files_rule_and_remedy(files, message):
    write(**files)
    with pytest.raises(ValueError) as error:
        load_job_config(["--job.config_file", "top.toml"])
    assert message in str(error.value)


def test_the_job_config_is_that_of_the_merged_table():
    write(
        base=f"[training]\nsteps = 5\nseq_len = 64\n[losses]\ntext = 2\n{SOURCE.format('a')}",
        top=f'extends = "base.toml"\n[training]\nseq_len = 128\n{SOURCE.format("b")}',
    )
    config = load_job_config(["--job.config-file=top.toml", "--losses.text", "3"])
    assert (config.training.steps, config.training.seq_len, config.losses.text) == (5, 128, 3.0)
    assert [source.name for source in config.data.sources] == ["b"]


def test_a_custom_config_module_of_an_extended_file_counts(tmp_path, monkeypatch):
    Path("sections_of_a_base.py").write_text(
        "from dataclasses import dataclass, field\n"
        "@dataclass\nclass Mine:\n    size: int = 1\n"
        "@dataclass\nclass JobConfig:\n    mine: Mine = field(default_factory=Mine)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    write(
        base='[job]\ncustom_config_module = "sections_of_a_base"',
        top='extends = "base.toml"\n[mine]\nsize = 5',
    )
    config = load_job_config(["--job.config_file", "top.toml"])
    assert config.mine.size == 5  # type: ignore[attr-defined]


# ---- as a program -----------------------------------------------------------------------------------------------------


def run_program(*arguments):
    command = [sys.executable, "-P", str(PROGRAM), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_program_prints_the_merged_table_as_json():
    write(base="[t]\nx = 1", top='extends = "base.toml"\n[t]\nday = 2026-01-01')
    done = run_program("top.toml")
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"t": {"x": 1, "day": "2026-01-01"}}


def test_the_program_tells_a_mistake_in_one_line():
    done = run_program("nowhere.toml")
    assert done.returncode == 2
    assert done.stderr == "error: job.config_file: no such file: nowhere.toml\n"
    assert run_program().returncode == 2


def test_the_program_needs_the_standard_library_only():
    """It runs before every training run, which must show its first loss within seconds."""
    imported = [
        alias.name if isinstance(node, ast.Import) else str(node.module)
        for node in ast.walk(ast.parse(PROGRAM.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    ]
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names
