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
from dataclasses import dataclass
from pathlib import Path

from symbiotic_titan.process import exit_status
from symbiotic_titan.study import runs as study
from symbiotic_titan.study.runs import START, StudyRun, find_runs, is_saved, read_runs

ROOT = Path(__file__).resolve().parents[2]

FOLDER = Path("train_configs/mini")


def call(words: study.Command, **environment: str) -> None:
    """Run one command of the study, with its output on the terminal.

    Raises:
        RuntimeError: it failed.
    """
    shown = [f"{key}={value}" for key, value in environment.items()] + words
    print("\n$ " + " ".join(shown), flush=True)
    status = subprocess.run(words, env={**os.environ, **environment}).returncode
    if status != 0:
        raise RuntimeError(f"{words[0]} ended with status {status}: {' '.join(shown)}")


def train(run: StudyRun, steps: int) -> None:
    if is_saved(run.checkpoint_at(steps)):
        print(f"\n{run.name}: has its {steps} steps")
        return
    call(["./run_train.sh", "--training.steps", str(steps)], CONFIG_FILE=str(run.config))


def profile(start: StudyRun, checkpoint: Path) -> Path:
    """The profile that every split is planned from."""
    out = start.dump_folder / "profile.json"
    if not out.is_file():
        call(study.profile(start, checkpoint, out))
    return out


def split(config: Path, checkpoint: Path, profile_file: Path, out: Path, *rule: str) -> None:
    """Plan and write the checkpoint ``out`` with the groups of ``config``."""
    plan = study.plan_file_of(out)
    plan.parent.mkdir(parents=True, exist_ok=True)
    call(study.plan(config, profile_file, plan, *rule))
    call(study.partition(config, checkpoint, plan, out))


@dataclass(frozen=True)
class Check(study.Check):
    """A check that is made unless its report exists."""

    def out(self, name: str) -> Path:
        return Path("outputs/mini/check") / f"{name}.json"

    def __call__(self, name: str, config: Path, checkpoint: Path, *overrides: str) -> Path:
        """The report."""
        out = self.out(name)
        out.parent.mkdir(parents=True, exist_ok=True)
        if not out.is_file():
            call(self.command(config, checkpoint, out, *overrides))
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
    runs = read_runs(FOLDER.glob("*.toml"))
    start = runs.pop(START)
    chosen = find_runs(options.runs, runs, "run")
    checkpoint = start.last_checkpoint
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
