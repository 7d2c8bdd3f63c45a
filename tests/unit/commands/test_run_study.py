"""The study calls the commands of a user, each as often as needed, with arguments that these commands take."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from symbiotic_titan.commands import convert, run_study
from tests.helpers.documented import documented

ROOT = Path(__file__).parents[3]
VLM = "outputs/mini/vlm/checkpoint/step-400"


class Commands(list):
    """Every command the study calls, with what it would leave behind."""

    def __call__(self, command, **environment):
        words = [str(word) for word in command]
        self.append(words)
        pairs = zip(words, words[1:], strict=False)
        value = {key: Path(word) for key, word in pairs if key.startswith("--")}
        if words[0] == "./run_train.sh":
            name = Path(environment["CONFIG_FILE"]).stem
            step = Path(f"outputs/mini/{name}/checkpoint/step-{value['--training.steps']}")
            step.mkdir(parents=True)
            (step / ".metadata").touch()
        elif "partition" in words:
            value["--out"].mkdir()
        elif "check" in words:
            report = {"columns": {"partitioned": {"text": 1.25}}, "differences": {"text": 0.5}}
            value["--json"].write_text(json.dumps(report))
        else:
            value["--out"].touch()

    def of(self, word):
        return [words for words in self if word in words]


@pytest.fixture
def study(tmp_path, monkeypatch):
    """(the tool in an empty repository, the commands that it calls)."""
    shutil.copytree(ROOT / "train_configs/mini", tmp_path / "train_configs/mini")
    monkeypatch.chdir(tmp_path)
    commands = Commands()
    monkeypatch.setattr(run_study, "ROOT", tmp_path)
    monkeypatch.setattr(run_study, "call", commands)

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["run_study.py", *arguments])
        return run_study.main()

    return main, commands


def test_every_run_of_the_study_is_trained_from_its_own_start(study, capsys):
    main, commands = study
    assert main("--steps", "50") == 0
    runs = {path.parents[1].name for path in Path("outputs/mini").glob("*/checkpoint/step-50")}
    assert len(runs) == 13 and {"symbiotic", "standard_moe", "tripartite_8_8_16"} <= runs
    starts = {path.name for path in Path("outputs/mini/start").iterdir() if path.is_dir()}
    assert starts == {"24_8", "8_24", "16_16", "22_10", "8_8_16", "11_11_10"}
    assert len(commands.of("check")) == 13 and len(commands.of("partition")) == 6
    assert "symbiotic" in capsys.readouterr().out


def test_what_is_there_is_not_done_again(study):
    main, commands = study
    assert main("symbiotic", "mot", "--steps", "50") == 0
    first = len(commands)
    assert main("symbiotic", "mot", "--steps", "50") == 0
    assert len(commands) == first
    assert main("symbiotic", "--steps", "60") == 0
    assert [words[0] for words in commands[first:]] == ["./run_train.sh"]


def test_runs_without_shared_experts_begin_with_a_checkpoint_that_others_can_use(study):
    main, commands = study
    assert main("mot") == 0
    (words,) = commands.of("partition")
    assert words[-1] == "--experts.shared"


def test_the_commands_take_their_arguments(study):
    main, commands = study
    assert main("mot", "standard_moe") == 0
    parser = convert.parser()
    for words in [*commands.of("plan"), *commands.of("partition"), *commands.of("check")]:
        options, overrides = parser.parse_known_args(words[4:])
        assert options.config.startswith("train_configs/mini/")
        assert overrides in ([], ["--experts.shared"])
    assert all(VLM in words for words in commands.of("check"))


def test_controls_are_random_splits_of_the_same_groups_and_leave_only_a_report(study, capsys):
    main, commands = study
    names = ["symbiotic", "mot", "standard_moe", "tripartite_8_8_16"]
    assert main(*names, "--controls", "2", "--check-only") == 0
    at_random = [words for words in commands.of("plan") if "random" in words]
    assert [(words[words.index("--out") + 1], words[-1]) for words in at_random] == [
        (f"outputs/mini/start/{split}_random_{seed}_plan.json", str(seed))
        for split in ("24_8", "8_8_16")
        for seed in (0, 1)
    ]
    parser = convert.parser()
    for words in at_random:
        assert parser.parse_known_args(words[4:])[1] == []
    checks = {path.stem for path in Path("outputs/mini/check").glob("*.json")}
    drawn = {f"{s}_{r}" for s in ("24_8", "8_8_16") for r in ("activation", "random_0", "random_1")}
    assert checks == {*names, *drawn}
    assert not list(Path("outputs/mini/start").glob("*_random_?"))
    assert [words[0] for words in commands if words[0] == "./run_train.sh"] == ["./run_train.sh"]
    assert "24_8_random_1" in capsys.readouterr().out
    first = len(commands)
    assert main(*names, "--controls", "2", "--check-only") == 0
    assert len(commands) == first


def test_an_unknown_run_is_named_with_those_there_are(study, capsys):
    main, commands = study
    assert main("symbiosis") == 2
    assert "no run named symbiosis; choose from bimodal_16_16" in capsys.readouterr().err
    assert not commands


def test_a_stage_that_fails_ends_the_study(study, monkeypatch, capsys):
    main, commands = study

    def fail(command, **environment):
        raise RuntimeError("it failed")

    monkeypatch.setattr(run_study, "call", fail)
    assert main("symbiotic") == 2
    assert "error: it failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", sorted({str(c) for c in documented() if c.words[:2] == ("symbiotic", "run-study")})
)
def test_a_documented_study_calls_documented_commands(study, line):
    """Which are run: tests/integration/test_documented_commands.py."""
    main, commands = study
    assert main(*line.split()[2:]) == 0
    named = {" ".join(c.words[1:3]) for c in documented() if c.words[0] == "symbiotic"}
    called = {" ".join(words[3:5]) for words in commands if words[0] == sys.executable}
    conversions = {name for name in called if name.startswith("convert")}
    assert "convert check" in conversions and conversions <= named
    assert commands.of("./run_train.sh") and commands.of("profile-experts")
