"""Folders of studies with known numbers, as symbiotic reproduce leaves them."""

import json
from collections.abc import Mapping
from pathlib import Path

from tests.helpers.written_runs import Log


def write_system(
    folder: Path,
    *,
    before: Mapping[str, float] | None = None,
    first: Mapping[str, float] | None = None,
    scores: Mapping[str, float] | None = None,
    alone: Mapping[str, float] | None = None,
    curves: Mapping[str, Mapping[int, float]] | None = None,
    gradients: Mapping[str, float] | None = None,
    columns: Mapping[str, Mapping[str, float]] | None = None,
) -> Path:
    """What one run leaves.   before, first: its losses and answers before the first step.   columns: of its report, besides
    ``partitioned``.   alone: scores of its shared expert alone.
    """
    folder.mkdir(parents=True)
    if before:
        report = {"kind": "step zero report", "columns": {"partitioned": before, **(columns or {})}}
        (folder / "before.json").write_text(json.dumps(report))
    files = {"scores_before": first, "scores": scores, "scores_shared_only": alone}
    for name, values in files.items():
        if values:
            write_scores(folder / f"{name}.json", values)
    if gradients:
        (folder / "gradients.json").write_text(json.dumps(gradients))
    if curves:
        log = Log(folder)
        for tag, points in curves.items():
            log.scalars(tag, dict(points))
        log.close()
    return folder


def write_scores(path: Path, values: Mapping[str, float]) -> None:
    scores = {
        name: {"score": value, "chance": 0.25, "upper_bound": 1.0, "number": 40}
        for name, value in values.items()
    }
    path.write_text(json.dumps({"kind": "evaluation", "scores": scores}))
