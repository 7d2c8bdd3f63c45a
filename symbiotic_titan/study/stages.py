"""The stages of symbiotic reproduce: for every seed its data, the pre-trained model, the splits, checks before the first step, training and
scores of every system.

    OUT/settings.json                what the study was begun with
    OUT/seed-N/configs/*.toml        the configs of train_configs/study with the paths of this seed
    OUT/seed-N/data                  the demo world of this seed
    OUT/seed-N/vlm                   the pre-trained model; profile.json: how often its experts are chosen
    OUT/seed-N/start/24_8            the checkpoint that systems with these groups begin with, and 24_8_plan.json
    OUT/seed-N/SYSTEM                a run's dump folder; before.json: held-out losses before the first step; scores.json: of its end;
                                     gradients.json: of the shared expert by modality, at its end; scores_shared_only.json: what that
                                     expert answers alone
    OUT/seed-N/logs/*.txt            what each stage printed

A seed is that of the world, of the initial weights, of the order of the data and of the noise. All systems of a seed read the same
samples in the same order.
"""

import hashlib
import json
import re
import shutil
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from symbiotic_titan.config.files import replacing
from symbiotic_titan.evaluation.kept import newest_result
from symbiotic_titan.process import ROOT
from symbiotic_titan.study import runs
from symbiotic_titan.study.queue import Stage
from symbiotic_titan.study.runs import Check, Command, StudyRun

FOLDER = ROOT / "train_configs/study"
SEED_FOLDER = "outputs/reproduce/seed-0"  # of the configs
STAGE = re.compile(r"^from_step = (\d+)$", re.MULTILINE)
BEFORE = "before.json"
SCORE_FILE, SCORES_ALONE = "scores.json", "scores_shared_only.json"
SCORES_BEFORE = "scores_before.json"
# Systems whose shared expert is scored alone, as in the paper's Figure 6a.
ALONE = ("symbiotic", "only_lm_mmu")

ROWS = 4  # of a step
QUESTIONS = 300
# Batches of 4 rows that a check reads.
CHECK_BATCHES = 12
# Of symbiotic evaluate. Few steps of the solver: pictures would take longer than all else.
SCORES = {"pictures": 32, "steps": 10, "questions": 300, "knowledge": 60, "loss_rows": 64}

# Seconds on one core of the machine that train_configs/study/base.toml names.
STARTUP = 10.0
# Of a row by whether the run trains on target images, whose positions cost least. A row of questions alone has 18 pictures.
SECONDS_PER_ROW = {True: 0.2, False: 0.4}
SECONDS = {
    "data": 34.0,
    "profile": 18.0,
    "plan": 2.0,
    "partition": 4.0,
    "check": 18.0,
    "answers": 14.0,
    "evaluate": 31.0,
    "gradients": 8.0,
    "shared_only": 14.0,
}
# Bytes of a checkpoint of the flavor study with its optimizer, and without.
WHOLE_CHECKPOINT, MODEL_CHECKPOINT = 39 * 10**6, 13 * 10**6
LOGS = 4 * 10**6
DATA = 65 * 10**6


@dataclass(frozen=True)
class Scale:
    """How much larger or shorter a study is than its configs say.

    steps:   of every system, and of the pre-trained model in proportion; None: those of the configs.
    factor:  on steps, warm-up and shield, and on the rows of a step; its square is that on the questions, which are then read as often.
    usual:   steps of a system by its config.
    """

    steps: int | None = None
    factor: int = 1
    usual: int = field(default_factory=lambda: systems_of()["symbiotic"].steps)

    def scaled(self, steps: int) -> int:
        """As many steps of a run here as ``steps`` of its config."""
        if self.steps is None:
            return steps * self.factor
        return max(1, round(steps * self.steps / self.usual))

    def steps_of(self, run: StudyRun) -> int:
        return self.scaled(run.steps)

    def training(self, run: StudyRun) -> list[str]:
        """Options of its training. ``run``: as its config has it."""
        values: dict[str, Any] = {"training.steps": self.steps_of(run)}
        if self.factor > 1:
            rows = run.rows * self.factor
            values |= {"training.local_batch_size": rows, "training.global_batch_size": rows}
            values["lr_scheduler.warmup_steps"] = run.warmup_steps * self.factor
            if run.shield_steps:
                values["shielding.steps"] = run.shield_steps * self.factor
        return _options(values)

    def questions(self) -> list[str]:
        """Options of the demo world: none where it has as many as its size says."""
        return [] if self.factor == 1 else ["--questions", str(QUESTIONS * self.factor**2)]


def _options(values: dict[str, Any]) -> list[str]:
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def configs_hash() -> str:
    """Of all values in the configs of the study: tells whether one was changed since it was begun. Comments may change."""
    digest = hashlib.sha256()
    for path in sorted(FOLDER.rglob("*.toml")):
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        digest.update(json.dumps([path.name, table], sort_keys=True).encode())
    return digest.hexdigest()[:16]


def write_configs(folder: Path, scale: Scale) -> None:
    """The configs of the study for the seed whose ``folder`` this is. Stages of a mixture begin as ``scale`` has it, since no option of a
    command can move them."""
    for path in sorted(FOLDER.rglob("*.toml")):
        out = folder / "configs" / path.relative_to(FOLDER)
        out.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8").replace(SEED_FOLDER, folder.as_posix())
        text = STAGE.sub(lambda found: f"from_step = {scale.scaled(int(found[1]) - 1) + 1}", text)
        out.write_text(text, encoding="utf-8")


def systems_of(folder: Path = FOLDER) -> dict[str, StudyRun]:
    """Name -> system, of a folder of configs; those in its folder step_zero are measured before the first step only."""
    trained = runs.read_runs(folder.glob("*.toml"))
    measured = runs.read_runs((folder / "step_zero").glob("*.toml"))
    return trained | {name: replace(run, steps=0) for name, run in measured.items()}


class SeedStages:
    """The stages of one seed. ``chosen``: names of systems."""

    def __init__(self, out: Path, seed: int, chosen: list[str], scale: Scale) -> None:
        self.name, self.folder = f"seed-{seed}", out / f"seed-{seed}"
        self.seed, self.scale = seed, scale
        systems = systems_of(self.folder / "configs")
        self.chosen = [systems[name] for name in chosen]
        self.vlm = systems[runs.START]
        # Its last step may not be the one that configs name as their start.
        self.original = self.vlm.checkpoint_at(scale.steps_of(self.vlm))
        self.profile = self.vlm.dump_folder / "profile.json"

    def stages(self) -> Iterator[Stage]:
        """In an order in which each comes after those that it needs."""
        yield self._stage("data", self.folder / "data/manifest.json", self._data())
        yield from self._train(self.vlm, self._name("data"))
        splits = {run.start: run for run in self.chosen if run.groups and run.start is not None}
        if splits:
            command = runs.profile(self.vlm, self.original, self.profile)
            need = self._name(runs.START, "train")
            yield self._stage("profile", self.profile, command, (need,))
        for start, run in splits.items():
            yield from self._split(run, start)
        yield from self._checks()
        for run in self.chosen:
            if run.steps:
                yield from self._train(run, self._name(run.name, "check"))

    # ---- parts ---------------------------------------------------------------------------------------------------------

    def _name(self, *words: str) -> str:
        return "/".join((self.name, *words))

    def _stage(
        self, what: str, result: Path, command: Command, needs: tuple[str, ...] = (), **more: Any
    ) -> Stage:
        """``what``: the last words of its name."""
        log = self.folder / "logs" / f"{what.replace('/', '_')}.txt"
        seconds = more.pop("seconds", SECONDS.get(what.rpartition("/")[2], 1.0))
        return Stage(self._name(what), result, log, tuple(command), seconds, needs, **more)

    def _data(self) -> Command:
        where = ("--out", self.folder / "data", "--size", "study", "--seed", str(self.seed))
        return runs.tool("make-demo-data", *where, *self.scale.questions())

    def _start_of(self, run: StudyRun) -> Path:
        assert run.start is not None
        return self.original if run.start == self.vlm.last_checkpoint else run.start

    def _train(self, run: StudyRun, need: str) -> Iterator[Stage]:
        """Training and scores; of systems with target images and a shared expert its gradients."""
        what, steps = f"{run.name}/train", self.scale.steps_of(run)
        values: dict[str, Any] = {"debug.seed": self.seed, "data.seed": self.seed}
        if run.start is not None and self._start_of(run) != run.start:
            values["checkpoint.initial_load_path"] = self._start_of(run)
        command = runs.tool("train", run.config, *self.scale.training(run), *_options(values))
        last = run.checkpoint_at(steps)
        seconds = STARTUP + SECONDS_PER_ROW[run.makes_images] * run.rows * self.scale.factor * steps
        result = last / ".metadata"
        yield self._stage(what, result, command, (need,), seconds=seconds, steps=steps)
        yield self._evaluate(run, last, self._name(what))
        if run.start is None:
            return
        if run.name in ALONE:
            yield self._evaluate_alone(run, last, self._name(what))
        if run.has_shared and run.makes_images:
            out = run.dump_folder / "gradients.json"
            command, need = runs.gradients(run.dump_folder, out), self._name(what)
            yield self._stage(f"{run.name}/gradients", out, command, (need,))

    def _split(self, run: StudyRun, start: Path) -> Iterator[Stage]:
        plan = runs.plan_file_of(start)
        command = runs.plan(run.config, self.profile, plan)
        planned = self._stage(f"{start.name}/plan", plan, command, (self._name("profile"),))
        yield planned
        command = runs.partition(run.config, self.original, plan, start)
        yield self._stage(f"{start.name}/partition", start, command, (planned.name,))

    def _checks(self) -> Iterator[Stage]:
        """A report and the answers of every system before its first step. Those that begin with the same model share them."""
        rows = ("--training.local_batch_size", str(ROWS), "--training.global_batch_size", str(ROWS))
        check = Check(self.vlm, self.original, CHECK_BATCHES, rows)
        first: dict[Any, StudyRun] = {}
        for run in self.chosen:
            start, out = self._start_of(run), run.dump_folder / BEFORE
            same = first.setdefault((start, run.groups, run.has_shared), run)
            if same is run:
                words = (start.name, "partition") if run.groups else (runs.START, "train")
                command = check.command(run.config, start, out)
                yield self._stage(f"{run.name}/check", out, command, (self._name(*words),))
                yield self._answers_before(run, start, self._name(*words))
            else:
                yield self._copied(f"{run.name}/check", same, BEFORE, out)
                out = run.dump_folder / SCORES_BEFORE
                yield self._copied(f"{run.name}/answers", same, SCORES_BEFORE, out)

    def _copied(self, what: str, other: StudyRun, file: str, out: Path) -> Stage:
        """``file`` of the system ``other``, whose stage ends with the same word as ``what``."""
        need = self._name(other.name, what.rpartition("/")[2])
        return self._stage(
            what, out, [], (need,), finish=partial(copy_file, other.dump_folder / file, out)
        )

    def _answers_before(self, run: StudyRun, start: Path, need: str) -> Stage:
        draws = dict.fromkeys(SCORES, 0) | {name: SCORES[name] for name in ("steps", "questions")}
        return self._scores(
            run, "answers", start, need, SCORES_BEFORE, draws, "--config", str(run.config)
        )

    def _evaluate(self, run: StudyRun, checkpoint: Path, need: str) -> Stage:
        draws = SCORES if run.makes_images else SCORES | {"pictures": 0}
        return self._scores(run, "evaluate", checkpoint, need, SCORE_FILE, draws)

    def _evaluate_alone(self, run: StudyRun, checkpoint: Path, need: str) -> Stage:
        """Answers and losses with all routed experts masked."""
        draws, probe = SCORES | {"pictures": 0, "knowledge": 0}, ("--probe", "shared_only")
        return self._scores(run, "shared_only", checkpoint, need, SCORES_ALONE, draws, *probe)

    def _scores(
        self,
        run: StudyRun,
        what: str,
        checkpoint: Path,
        need: str,
        file: str,
        draws: dict[str, int],
        *more: str,
    ) -> Stage:
        """``draws``: options of the suite.   file: below the run's folder, where the scores are kept."""
        results, out = run.dump_folder / what, run.dump_folder / file
        options = _options({f"demo_world.{key}": value for key, value in draws.items()})
        data = ("--demo_world.data", str(self.folder / "data"))
        where = (checkpoint, "--suite", "demo_world", "--out", results)
        command = runs.tool("evaluate", *where, *data, *options, *more)
        finish = partial(keep_scores, checkpoint, results, out)
        return self._stage(f"{run.name}/{what}", out, command, (need,), finish=finish)


# ---- what is done with the results of a command --------------------------------------------------------------------------


def copy_file(source: Path, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as unfinished:
        shutil.copy(source, unfinished)


def keep_scores(last: Path, folder: Path, out: Path) -> None:
    """Copy the scores that symbiotic evaluate has written below ``folder``, and delete the checkpoints of the run before its ``last``."""
    copy_file(newest_result(folder, "demo_world"), out)
    for path in last.parent.glob("step-*"):
        if path != last:
            shutil.rmtree(path)


# ---- the whole study ------------------------------------------------------------------------------------------------------


def all_stages(out: Path, seeds: Sequence[int], systems: list[str], scale: Scale) -> list[Stage]:
    """Of all seeds, after their configs were written."""
    for seed in seeds:
        write_configs(out / f"seed-{seed}", scale)
    return [s for seed in seeds for s in SeedStages(out, seed, systems, scale).stages()]


def bytes_of(num_seeds: int, systems: Sequence[StudyRun], at_once: int) -> int:
    """That a study takes on the disk: per seed its data, the start, the splits, and the model of every system; and, of the runs that are
    under way, two checkpoints that they could go on from."""
    splits = len({run.start for run in systems if run.groups})
    trained = sum(bool(run.steps) for run in systems)
    seed = DATA + (1 + splits + trained) * MODEL_CHECKPOINT + (1 + len(systems)) * LOGS
    return num_seeds * seed + 2 * at_once * WHOLE_CHECKPOINT
