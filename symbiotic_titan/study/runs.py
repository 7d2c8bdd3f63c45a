"""The runs of a study and the commands that it calls: train, profile, split, check, evaluate. No process is started here.

A run is a config that sets job.dump_folder; the others of its folder are only extended. Commands are those that a user would call.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symbiotic_titan.config.extends import merged_table, read_layers
from symbiotic_titan.sequence.tasks import TASKS

START = "vlm"
Command = list[str]


@dataclass(frozen=True)
class StudyRun:
    """One config of a study.

    start:         the checkpoint that it begins with; None for the one that begins from scratch.
    rows:          packed sequences of a step.
    warmup_steps:  of the learning rate; shield_steps: of the warm-up shield.
    has_shared:    whether it has the shared expert.
    makes_images:  whether it trains on target images.
    groups:        names and sizes of its groups of experts; none: one pool.
    """

    name: str
    config: Path
    dump_folder: Path
    start: Path | None
    steps: int
    rows: int
    warmup_steps: int
    shield_steps: int
    has_shared: bool
    makes_images: bool
    groups: tuple[tuple[str, int], ...]

    @property
    def last_checkpoint(self) -> Path:
        return self.checkpoint_at(self.steps)

    def checkpoint_at(self, step: int) -> Path:
        return self.dump_folder / f"checkpoint/step-{step}"


def read_runs(configs: Iterable[Path]) -> dict[str, StudyRun]:
    """Name -> run, of those configs that set job.dump_folder.

    Raises:
        ValueError: a config is missing or no TOML.
    """
    runs = {}
    for config in sorted(configs):
        layers = read_layers(str(config))
        if "dump_folder" not in layers[-1].table.get("job", {}):
            continue
        runs[config.stem] = _run_of(config, merged_table(layers))
    return runs


def _run_of(config: Path, table: dict[str, Any]) -> StudyRun:
    start = table["checkpoint"].get("initial_load_path")
    experts = table.get("experts", {})
    tasks = [TASKS[source["task"]] for source in table["data"]["sources"]]
    return StudyRun(
        name=config.stem,
        config=config,
        dump_folder=Path(table["job"]["dump_folder"]),
        start=None if start is None else Path(start),
        steps=table["training"]["steps"],
        rows=table["training"]["global_batch_size"],
        warmup_steps=table["lr_scheduler"]["warmup_steps"],
        shield_steps=table.get("shielding", {}).get("steps", 0),
        has_shared=experts.get("shared", True),
        makes_images=not all(task.is_understanding for task in tasks),
        groups=tuple((n, g["num_experts"]) for n, g in experts.get("partition", {}).items()),
    )


def find_runs(names: Iterable[str], runs: dict[str, StudyRun], what: str) -> list[StudyRun]:
    """Those of ``names``, in the order of the study; all where there are none. ``what`` they are, for the message.

    Raises:
        ValueError: one does not exist.
    """
    names = list(names)
    unknown = sorted(set(names) - set(runs))
    if unknown:
        raise ValueError(f"no {what} named {', '.join(unknown)}; choose from {', '.join(runs)}")
    return [run for name, run in runs.items() if name in names or not names]


def is_saved(checkpoint: Path) -> bool:
    """Whether a run has saved this checkpoint to its end."""
    return (checkpoint / ".metadata").is_file()


# ---- commands -------------------------------------------------------------------------------------------------------------


def tool(name: str, *arguments: str | Path) -> Command:
    """``symbiotic NAME ARGUMENT ...`` with this Python."""
    return [sys.executable, "-m", "symbiotic_titan.cli", name, *map(str, arguments)]


def profile(start: StudyRun, checkpoint: Path, out: Path, *overrides: str) -> Command:
    """Write the profile that every split is planned from."""
    where = ("--config", start.config, "--checkpoint", checkpoint, "--out", out)
    return tool("profile-experts", *where, *overrides)


def plan(config: Path, profile_file: Path, out: Path, *rule: str) -> Command:
    """Write which experts go to which group of ``config``."""
    where = ("--profile", profile_file, "--config", config, "--out", out)
    return tool("convert", "plan", *where, *rule)


def partition(config: Path, checkpoint: Path, plan_file: Path, out: Path) -> Command:
    """Write the checkpoint ``out`` with the groups of ``config``."""
    where = ("--checkpoint", checkpoint, "--plan", plan_file, "--out", out)
    # Shared experts are kept: a run without them ignores them, and others begin with the same checkpoint.
    return tool("convert", "partition", "--config", config, *where, "--experts.shared")


def gradients(dump_folder: Path, out: Path) -> Command:
    """Write the gradients of the shared expert in the newest checkpoint of a run."""
    return [sys.executable, "-m", "symbiotic_titan.study.gradients", str(dump_folder), str(out)]


def plan_file_of(split: Path) -> Path:
    """Of the checkpoint that ``partition`` writes."""
    return split.parent / f"{split.name}_plan.json"


@dataclass(frozen=True)
class Check:
    """Held-out losses of a checkpoint beside those of the model that all runs come from. ``overrides``: of every check."""

    start: StudyRun
    original: Path
    batches: int
    overrides: tuple[str, ...] = ()

    def command(self, config: Path, checkpoint: Path, out: Path, *overrides: str) -> Command:
        """Write the report ``out``."""
        what: list[str | Path] = ["--config", config, "--checkpoint", checkpoint]
        what += ["--original", self.original, "--original-config", self.start.config]
        what += ["--batches", str(self.batches), "--json", out, *self.overrides, *overrides]
        return tool("convert", "check", *what)
