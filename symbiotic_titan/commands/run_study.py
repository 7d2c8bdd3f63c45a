"""The study of train_configs/mini from beginning to end: train the start, profile it, split it, check every split, train every run.

Examples: symbiotic run-study --steps 50                            all runs for 50 steps
          symbiotic run-study symbiotic standard_moe --steps 400    two of them, longer
          symbiotic run-study --controls 3 --check-only             no run: every split beside three random ones

Each stage calls the command that a user would call, and prints it. What is already there is not done again, and training goes on
from its last checkpoint, so an interrupted study is started again with the same command. Losses before the first step of every
run go to outputs/mini/check/RUN.json and to the table printed at the end; symbiotic plot draws the rest.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from symbiotic_titan.config.extends import merged_table, read_layers
from symbiotic_titan.process import exit_status

ROOT = Path(__file__).resolve().parents[2]

FOLDER = Path("train_configs/mini")
START = "vlm"


@dataclass(frozen=True)
class StudyRun:
    """One config of the study. ``start``: the checkpoint that it begins with; None for the one that begins from scratch."""

    name: str
    config: Path
    dump_folder: Path
    start: Path | None
    steps: int


def read_runs() -> dict[str, StudyRun]:
    """All configs of the study that set job.dump_folder; the others are only extended by these."""
    runs = {}
    for config in sorted(FOLDER.glob("*.toml")):
        layers = read_layers(str(config))
        if "dump_folder" not in layers[-1].table.get("job", {}):
            continue
        table = merged_table(layers)
        start = table["checkpoint"].get("initial_load_path")
        runs[config.stem] = StudyRun(
            name=config.stem,
            config=config,
            dump_folder=Path(table["job"]["dump_folder"]),
            start=None if start is None else Path(start),
            steps=table["training"]["steps"],
        )
    return runs


def call(command: list[str | Path], **environment: str) -> None:
    """Run one command of the study, with its output on the terminal.

    Raises:
        RuntimeError: it failed.
    """
    words = [str(word) for word in command]
    shown = [f"{key}={value}" for key, value in environment.items()] + words
    print("\n$ " + " ".join(shown), flush=True)
    status = subprocess.run(words, env={**os.environ, **environment}).returncode
    if status != 0:
        raise RuntimeError(f"{words[0]} ended with status {status}: {' '.join(shown)}")


def train(run: StudyRun, steps: int) -> None:
    if (run.dump_folder / f"checkpoint/step-{steps}/.metadata").is_file():
        print(f"\n{run.name}: has its {steps} steps")
        return
    call(["./run_train.sh", "--training.steps", str(steps)], CONFIG_FILE=str(run.config))


def tool(name: str, *arguments: str | Path) -> None:
    call([sys.executable, "-m", "symbiotic_titan.cli", name, *arguments])


def profile(start: StudyRun, checkpoint: Path) -> Path:
    """The profile that every split is planned from."""
    out = start.dump_folder / "profile.json"
    if not out.is_file():
        tool("profile-experts", "--config", start.config, "--checkpoint", checkpoint, "--out", out)
    return out


def split(config: Path, checkpoint: Path, profile_file: Path, out: Path, *rule: str) -> None:
    """Plan and write the checkpoint ``out`` with the groups of ``config``."""
    plan = out.parent / f"{out.name}_plan.json"
    plan.parent.mkdir(parents=True, exist_ok=True)
    tool("convert", "plan", "--profile", profile_file, "--config", config, "--out", plan, *rule)
    where: list[str | Path] = ["--checkpoint", checkpoint, "--plan", plan, "--out", out]
    # Shared experts are kept: a run without them ignores them, and others begin with the same checkpoint.
    tool("convert", "partition", "--config", config, *where, "--experts.shared")


@dataclass(frozen=True)
class Check:
    """Held-out losses of a checkpoint beside those of the model that all runs come from."""

    start: StudyRun
    original: Path
    batches: int

    def out(self, name: str) -> Path:
        return Path("outputs/mini/check") / f"{name}.json"

    def __call__(self, name: str, config: Path, checkpoint: Path, *overrides: str) -> Path:
        """The report, made unless it exists."""
        out = self.out(name)
        out.parent.mkdir(parents=True, exist_ok=True)
        if not out.is_file():
            what: list[str | Path] = ["--config", config, "--checkpoint", checkpoint]
            what += ["--original", self.original, "--original-config", self.start.config]
            what += ["--batches", str(self.batches), "--json", out, *overrides]
            tool("convert", "check", *what)
        return out


def check_controls(
    runs: list[StudyRun], check: Check, profile_file: Path, number: int
) -> dict[str, Path]:
    """Reports of every split that ``runs`` begin with, and of ``number`` with the same groups whose experts are chosen at
    random. Their difference is the cost of choosing experts badly; the rest is the cost of having so few. All with the shared expert."""
    reports = {}
    splits = {run.start: run for run in runs if run.start not in (None, check.original)}
    for start, run in splits.items():
        assert start is not None
        name = f"{start.name}_activation"
        reports[name] = check(name, run.config, start, "--experts.shared")
        for seed in range(number):
            name = f"{start.name}_random_{seed}"
            reports[name] = check.out(name)
            if reports[name].is_file():
                continue
            drawn = start.parent / name
            if not drawn.is_dir():
                rule = ("--rule", "random", "--seed", str(seed))
                split(run.config, check.original, profile_file, drawn, *rule)
            check(name, run.config, drawn, "--experts.shared")
            shutil.rmtree(drawn)  # nothing trains from it
    return reports


def print_table(reports: dict[str, Path]) -> None:
    """Losses before the first step, and by how much the text loss differs from the original model's."""
    print("\nheld-out losses before the first step; for text, the difference from the original's")
    for name, path in reports.items():
        report = json.loads(path.read_text(encoding="utf-8"))
        losses, difference = report["columns"]["partitioned"], report["differences"]["text"]
        answers = losses.get("by_task/mmu_text")
        shown = "" if answers is None else f"   mmu{answers:9.4f}"
        print(f"  {name:24s}text{losses['text']:9.4f}{difference:+9.2%}{shown}")


def run_study(options: argparse.Namespace) -> None:
    """Raises:
    ValueError: a run that does not exist.
    RuntimeError: a stage failed.
    """
    runs = read_runs()
    start = runs.pop(START)
    unknown = sorted(set(options.runs) - set(runs))
    if unknown:
        raise ValueError(f"no run named {', '.join(unknown)}; choose from {', '.join(runs)}")
    chosen = [runs[name] for name in (options.runs or runs)]
    checkpoint = start.dump_folder / f"checkpoint/step-{start.steps}"
    train(start, start.steps)
    profile_file = profile(start, checkpoint)
    check, reports = Check(start, checkpoint, options.batches), {}
    for run in chosen:
        assert run.start is not None
        if run.start != checkpoint and not run.start.is_dir():
            split(run.config, checkpoint, profile_file, run.start)
        reports[run.name] = check(run.name, run.config, run.start)
    if options.controls:
        reports |= check_controls(chosen, check, profile_file, options.controls)
    if not options.check_only:
        for run in chosen:
            train(run, options.steps or run.steps)
    print_table(reports)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="names of configs; default: all")
    parser.add_argument("--steps", type=int, help="steps of each run; default: as its config says")
    parser.add_argument("--batches", type=int, default=25, help="held-out batches of a check")
    parser.add_argument(
        "--controls", type=int, default=0, help="random splits to check beside each one"
    )
    parser.add_argument("--check-only", action="store_true", help="train no run but the start")
    options = parser.parse_args(arguments)
    os.chdir(ROOT)
    return exit_status(lambda: run_study(options), (RuntimeError, ValueError))
