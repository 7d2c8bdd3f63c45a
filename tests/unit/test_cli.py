"""The command ``symbiotic``: every subcommand explains itself, and what is missing is one line."""

import os
import re
import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest

from symbiotic_titan import cli
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.upstream import settings
from tests.helpers.structure import ROOT

NAMES = sorted(set(cli.COMMANDS) - {"train"})


def test_without_a_command_all_are_listed(capsys):
    assert cli.main([]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in cli.COMMANDS)


def test_an_unknown_command_is_named_with_those_that_exist(capsys):
    assert cli.main(["draw"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("symbiotic: no command 'draw'\n") and "generate" in error


@pytest.mark.parametrize("name", NAMES)
def test_help_shows_an_example_of_the_command(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest"])
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert text.startswith(f"usage: symbiotic {name}")
    assert re.search(rf"(?m)^ *(Examples?: )? *symbiotic {name} ", text) and "tools/" not in text


def test_every_tool_is_a_command_under_its_old_name():
    others = {"launch.py", "cuda_compile.py"}  # of run_train.sh; for those who work on the kernels
    commands = {path for path in ROOT.glob("tools/*.py") if path.name not in others}
    for path in commands:
        name = path.stem.replace("_", "-")
        assert f'main(["{name}", *sys.argv[1:]])' in path.read_text()
        assert name in cli.COMMANDS and os.access(path, os.X_OK)


@pytest.mark.parametrize(
    ("package", "extra"), [("matplotlib.axes", "plot"), ("sklearn", "demo"), ("lm_eval", "lm-eval")]
)
def test_a_missing_extra_is_one_line_that_installs_it(monkeypatch, capsys, package, extra):
    def load(module):
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(cli, "load", load)
    assert cli.main(["plot"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: symbiotic plot needs {package.partition('.')[0]}: ")
    assert error.endswith(f" -m pip install 'symbiotic_titan[{extra}]'\n")


def test_a_package_of_ours_that_is_missing_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "load", lambda module: import_module("symbiotic_titan.nothing"))
    with pytest.raises(ModuleNotFoundError, match="nothing"):
        cli.main(["plot"])


@pytest.fixture
def trained(monkeypatch):
    """The arguments that train.main gets, and the environment at that time."""
    calls = []

    def main(arguments):
        calls.append((arguments, dict(os.environ)))
        return 0

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(cli, "load", lambda module: SimpleNamespace(main=main, leave=leave))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    monkeypatch.setenv("MASTER_ADDR", "x")
    monkeypatch.setenv("MASTER_PORT", "x")
    return calls


@pytest.mark.parametrize("given", [["a.toml"], ["--job.config_file", "a.toml"]])
def test_train_needs_no_launcher_for_one_process(trained, given):
    assert cli.main(["train", *given, "--training.steps", "5"]) == 0
    [(arguments, environment)] = trained
    assert arguments == ["--job.config_file", "a.toml", "--training.steps", "5"]
    assert environment["RANK"] == "0" and environment["WORLD_SIZE"] == "1"
    assert environment["MASTER_ADDR"] == "127.0.0.1" and environment["MASTER_PORT"] == "0"


def test_train_leaves_the_ranks_of_torchrun_as_they_are(trained, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(SystemExit):
        cli.main(["train", "a.toml"])
    [(_, environment)] = trained
    assert environment["RANK"] == "3" and environment["MASTER_PORT"] == "x"


def test_train_without_a_config_shows_how_to_name_one(trained, capsys):
    assert cli.main(["train"]) == 2 and not trained
    assert "symbiotic train train_configs/debug.toml" in capsys.readouterr().out


def test_help_of_training_is_short_and_names_real_options(trained, capsys):
    assert cli.main(["train", "--help"]) == 0 and not trained
    assert cli.MOST_USED in capsys.readouterr().out
    options = re.findall(r"--(\w+\.\w+)", cli.MOST_USED.partition("\n\n")[2])
    assert len(options) > 10 and set(options) <= dict(settings(JobConfig)).keys()
    assert cli.main(["train", "a.toml", "--help-all"]) == 0
    assert trained[0][0] == ["--job.config_file", "a.toml", "--help"]


def test_help_of_run_train_needs_no_environment(tmp_path):
    environment = {"PATH": os.environ["PATH"], "SYMBIOTIC_PYTHON": str(tmp_path / "none")}
    command = [str(ROOT / "run_train.sh"), "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=10)
    assert done.returncode == 0 and "NGPU=N" in done.stdout
    assert done.stdout.endswith(f"\n\n{cli.MOST_USED}") and len(done.stdout.splitlines()) < 50


def test_the_module_is_the_command(tmp_path):
    command = [sys.executable, "-m", "symbiotic_titan.cli", "train", "no.toml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "no such file: no.toml" in done.stdout + done.stderr


def test_an_interrupt_while_a_command_is_loaded_is_one_line(monkeypatch, capsys):
    def load(module):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load", load)
    assert cli.main(["plot", "run"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
