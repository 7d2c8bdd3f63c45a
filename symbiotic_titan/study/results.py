"""What the runs of a study have left in its folder: curves, losses before the first step, scores and gradient norms.

    OUT/settings.json                  what the study was begun with;  record.json: on what it was run, and for how long
    OUT/seed-N/SYSTEM/tb/              curves, as every run logs them
    OUT/seed-N/SYSTEM/before.json      losses before the first step: symbiotic convert check --json
    OUT/seed-N/SYSTEM/scores_before.json       answers before the first step: symbiotic evaluate
    OUT/seed-N/SYSTEM/scores.json      scores after the last one: symbiotic evaluate
    OUT/seed-N/SYSTEM/scores_shared_only.json  optional: the same with --probe shared_only
    OUT/seed-N/SYSTEM/gradients.json   optional: norms in the shared expert, tag -> number

Any of them may be missing, because a system was not asked for, is still training or has failed; the study says which are.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from symbiotic_titan.config.files import read_json
from symbiotic_titan.evaluation.suite import Scores
from symbiotic_titan.plots.logs import Run, event_files, read_run
from symbiotic_titan.study.record import read_record
from symbiotic_titan.study.runs import START
from symbiotic_titan.study.statistics import Estimate, differences, estimate

# Columns of a report on the split model that are measured before the first step as if they were systems of their own.
COLUMNS = ("original", "shared_only")
OF_A_SPLIT = "symbiotic"  # whose report has them


@dataclass(frozen=True)
class Measure:
    """One number of a run.

    source   ``before``, ``first`` (answers before the first step), ``scores``, ``alone`` (scores of the shared expert alone) or
             ``gradients``: ``key`` is a name in that file. Or what of the curve ``key``: ``start`` its first value, ``end`` the mean of
             its last tenth, ``change`` end - start, ``peak`` its highest value.
    also     further keys of a source of scores: the share of all their samples together. Not with ``minus``.
    minus    another key of the source, whose number is subtracted.
    after    the first step of a curve that counts.
    better   ``lower`` or ``higher``; empty where neither is.
    """

    name: str
    source: str
    key: str
    minus: str = ""
    better: str = "lower"
    also: tuple[str, ...] = ()
    after: int = 0


@dataclass(frozen=True)
class SystemRun:
    """What one system left for one seed."""

    before: Mapping[str, float] = field(default_factory=dict)
    first: Scores = field(default_factory=dict)
    scores: Scores = field(default_factory=dict)
    alone: Scores = field(default_factory=dict)
    gradients: Mapping[str, float] = field(default_factory=dict)
    log: Run | None = None

    def value(self, measure: Measure) -> float | None:
        """None where it was not measured, or is not a finite number."""
        keys = [measure.key, measure.minus] if measure.minus else [measure.key]
        if measure.also:
            values = [pooled(getattr(self, measure.source), (measure.key, *measure.also))]
        else:
            values = [self._number(measure.source, key, measure.after) for key in keys]
        if any(value is None or not math.isfinite(value) for value in values):
            return None
        first, *second = [float(value) for value in values if value is not None]
        return first - sum(second)

    def _number(self, source: str, key: str, after: int) -> float | None:
        if source in ("first", "scores", "alone"):
            scores: Scores = getattr(self, source)
            return scores[key]["score"] if key in scores else None
        if source in ("before", "gradients"):
            return (self.before if source == "before" else self.gradients).get(key)
        if self.log is None:
            return None
        steps, values = self.log.curve(key)
        values = values[steps >= after]
        if not len(values):
            return None
        end = float(np.mean(values[-max(1, len(values) // 10) :]))
        start = float(values[0])
        of_curve = {"start": start, "end": end, "peak": float(values.max()), "change": end - start}
        return of_curve[source]


def pooled(scores: Scores, keys: Iterable[str]) -> float | None:
    """The mean score of all samples of ``keys``; None where one is missing."""
    found = [scores.get(key) for key in keys]
    parts = [(score["score"], score["number"]) for score in found if score is not None]
    if len(parts) < len(found):
        return None
    return sum(score * number for score, number in parts) / sum(number for _, number in parts)


@dataclass(frozen=True)
class Study:
    """runs: system -> seed -> what it left.   missing: a line for each thing that was expected and does not exist.

    settings: of settings.json and record.json; empty without them.
    """

    folder: Path
    seeds: tuple[int, ...]
    runs: Mapping[str, Mapping[int, SystemRun]]
    missing: tuple[str, ...]
    settings: Mapping[str, Any]

    def values(self, system: str, measure: Measure) -> dict[int, float]:
        """seed -> value, of the seeds that have one."""
        found = {seed: run.value(measure) for seed, run in self.runs.get(system, {}).items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def estimate(self, system: str, measure: Measure) -> Estimate | None:
        """Mean and interval; None with fewer than two seeds."""
        values = self.values(system, measure)
        return estimate(values, f"{system}: {measure.name}") if len(values) > 1 else None

    def difference(self, first: str, second: str, measure: Measure) -> Estimate | None:
        """first - second, seed by seed; None with fewer than two seeds that both have."""
        pairs = differences(self.values(first, measure), self.values(second, measure))
        what = f"{first} - {second}: {measure.name}"
        return estimate(pairs, what) if len(pairs) > 1 else None

    def curves(self, system: str, tag: str) -> dict[int, dict[int, float]]:
        """seed -> step -> value, of the seeds that logged ``tag``."""
        logs = {seed: run.log for seed, run in self.runs.get(system, {}).items()}
        return {seed: log.scalars[tag] for seed, log in logs.items() if log and tag in log.scalars}


def read_study(folder: Path, trained: Iterable[str], untrained: Iterable[str] = ()) -> Study:
    """The study in ``folder``.

    trained, untrained  systems that are expected in every seed: with curves and scores, or only with losses before the first step.
                        Others that exist are read too. A list ``systems`` in settings.json says which were asked for.

    Raises:
        ValueError: no study, fewer than two seeds, or a damaged file.
    """
    places = seed_folders(folder)
    settings = _read_object(folder / "settings.json")
    asked = settings.get("systems") or [*trained, *untrained]
    trained = [name for name in trained if name in asked]
    expected = trained + [name for name in untrained if name in asked]
    runs: dict[str, dict[int, SystemRun]] = {}
    missing: list[str] = []
    for seed, place in places.items():
        found = {path.name: read_system(path) for path in _systems(place)}
        for column in COLUMNS:
            values = _columns(place / OF_A_SPLIT).get(column)
            if values and column not in found:
                found[column] = SystemRun(before=values)
        if "original" in found and START in found:
            found["original"] = replace(found["original"], first=found[START].scores)
        missing += [
            f"seed {seed}, {name}: {what}"
            for name in expected
            if (what := lacks(found.get(name), name in trained))
        ]
        for name, run in found.items():
            runs.setdefault(name, {})[seed] = run
    return Study(folder, tuple(places), runs, tuple(missing), settings | read_record(folder))


def seed_folders(folder: Path) -> dict[int, Path]:
    """seed -> its folder, in order.

    Raises:
        ValueError: there are none, or one alone.
    """
    found = {
        int(match[1]): path
        for path in folder.glob("seed-*")
        if path.is_dir() and (match := re.fullmatch(r"seed-(\d+)", path.name))
    }
    if not found:
        raise ValueError(
            f"{folder}: no study (no folder seed-0, seed-1, ...); run symbiotic reproduce, or name its --out"
        )
    if len(found) < 2:
        raise ValueError(
            f"{folder}: an interval needs at least 2 seeds, got seed {next(iter(found))} alone; run more of them with symbiotic "
            "reproduce --seeds"
        )
    return dict(sorted(found.items()))


def read_system(folder: Path) -> SystemRun:
    """Raises:
    ValueError: a damaged file.
    """
    gradients = _read_object(folder / "gradients.json")
    return SystemRun(
        before=_columns(folder).get("partitioned", {}),
        first=_scores(folder / "scores_before.json"),
        scores=_scores(folder / "scores.json"),
        alone=_scores(folder / "scores_shared_only.json"),
        gradients={k: float(v) for k, v in gradients.items() if isinstance(v, int | float)},
        log=read_run(folder, folder.name) if event_files(folder) else None,
    )


def lacks(run: SystemRun | None, is_trained: bool) -> str:
    """What an expected system has not left; empty if it has everything."""
    if run is None:
        return "was not run"
    parts: dict[str, object] = {"losses before the first step (before.json)": run.before}
    if is_trained:
        parts |= {"curves (tb/)": run.log, "scores (scores.json): not finished": run.scores}
    absent = [f"no {name}" for name, part in parts.items() if not part]
    scores = {name: score["score"] for name, score in run.scores.items()}
    infinite = [n for n, v in (dict(run.before) | scores).items() if not math.isfinite(v)]
    absent += [f"no finite {name}" for name in infinite]
    return f"has {', '.join(absent)}" if absent else ""


def _systems(place: Path) -> list[Path]:
    """Folders that hold a system's results."""
    names = ("before.json", "scores.json", "tb")
    return [
        path for path in sorted(place.iterdir()) if any((path / name).exists() for name in names)
    ]


def _columns(folder: Path) -> dict[str, dict[str, float]]:
    path = folder / "before.json"
    return read_json(path, "step zero report", ("columns",))["columns"] if path.is_file() else {}


def _scores(path: Path) -> Scores:
    return read_json(path, "evaluation", ("scores",))["scores"] if path.is_file() else {}


def _read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}); remove it to have it written anew"
        ) from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object; remove it to have it written anew")
    return values
