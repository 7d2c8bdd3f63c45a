"""The page of a study: what was run, what it says to each claim, figures beside the paper's, tables. ``write_page`` writes

OUT/page/index.html         one file with its figures in it
OUT/page/page.md            the claims and tables, for a benchmarks page, with links to the figures
OUT/page/figure_*.png       the figures;  study.png: four of them in one, for a README
OUT/page/statistics.json    every mean, paired difference and verdict, with the values of the seeds
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from symbiotic_titan.config.files import replacing, write_json
from symbiotic_titan.plots.html import Picture, templates
from symbiotic_titan.plots.logs import Run
from symbiotic_titan.plots.style import MissingData, as_png
from symbiotic_titan.sequence.modality import MODALITY_NAMES
from symbiotic_titan.study.claims import Judgement, Verdict, judge
from symbiotic_titan.study.figures import (
    ANSWERS_PAPER,
    CURVES,
    answers_figure,
    curve_figure,
    difference_figure,
    label,
    scores_of,
    style_of,
    summary_figure,
)
from symbiotic_titan.study.paper import (
    ANSWERS,
    CLAIMS,
    FINAL,
    FLOW,
    LANGUAGE,
    SPLITS,
    STEP_ZERO,
    STEP_ZERO_ANSWERS,
    STEP_ZERO_READING,
    SYSTEMS,
    UNTRAINED,
)
from symbiotic_titan.study.results import Measure, Study, read_study
from symbiotic_titan.study.statistics import Estimate

HEADING = "Symbiotic-MoE's comparison on a laptop"
OURS = "symbiotic"
# Fields of ``System``, as a reader sees them.
PAPER = {"mmlu": "MMLU", "ocrbench": "OCRBench", "t2i": "T2I-CompBench", "fid": "FID"}
DIFFERENCES = {"language": LANGUAGE, "flow": FLOW} | {
    f"answers_{kind}": ANSWERS[kind] for kind in ("all", "ocr")
}
COLUMNS_OF_STEP_ZERO = (STEP_ZERO, STEP_ZERO_ANSWERS, STEP_ZERO_READING)


def write_page(out: Path) -> Path:
    """Read the study in ``out`` and write its page. Returns the path of the HTML file.

    Raises:
        ValueError: no study, fewer than two seeds, a damaged file.
        OSError: nothing can be written; DiskFull where that is the reason.
    """
    study = read_study(out, SYSTEMS, UNTRAINED)
    folder = out / "page"
    judgements = [judge(study, claim) for claim in CLAIMS]
    figures = draw_figures(study)
    for name, picture in figures.items():
        save(folder / f"{name}.png", picture.png)
    save(folder / "study.png", as_png(summary_figure(study)))
    write_json(folder / "statistics.json", "study statistics", statistics(study, judgements))
    values = content(study, judgements) | {"figures": figures}
    pages = templates("symbiotic_titan.study")
    pages.filters |= {"md": markdown, "label": label}
    pages.filters |= {f.__name__: f for f in (interval, signed, thousands, plain)}
    page = folder / "index.html"
    for path, template in ((folder / "page.md", "study.md"), (page, "study.html")):
        save(path, pages.get_template(template).render(values).encode())
    return page


def save(path: Path, content: bytes) -> None:
    with replacing(path) as unfinished:
        unfinished.write_bytes(content)


# ---- what is shown --------------------------------------------------------------------------------------------------------


def content(study: Study, judgements: list[Judgement]) -> dict[str, Any]:
    """The values of both templates."""
    shown = [name for name in (*SYSTEMS, *others(study)) if name in study.runs]
    trained = [name for name in shown if any(run.log for run in study.runs[name].values())]
    return {
        "heading": HEADING,
        "study": study,
        "systems": [row_of_system(study, name) for name in shown],
        "settings": scalars(study.settings),
        "judgements": judgements,
        "counts": Counter(judgement.verdict for judgement in judgements),
        "verdicts": list(Verdict),
        "open": [j for j in judgements if j.verdict in (Verdict.UNDECIDED, Verdict.UNMEASURED)],
        "splits": split_rows(study),
        "columns": COLUMNS_OF_STEP_ZERO,
        "trained": trained,
        "rivals": [name for name in trained if name != OURS],
        "final": [(m, [cell(study, name, m) for name in trained]) for m in measured(study)],
        "differences": difference_rows(study, [name for name in trained if name != OURS]),
        "ours": OURS,
        "gradients": gradient_rows(study, trained),
        "paper": [
            (what, [getattr(SYSTEMS.get(n), key, None) for n in trained])
            for key, what in PAPER.items()
        ],
        "strokes": {name: stroke(name) for name in shown},
    }


def stroke(name: str) -> tuple[str, str]:
    """(colour, dashes of an SVG line) of a system's curves."""
    style = style_of(name)
    return style["color"], "none" if style["linestyle"] == "-" else "5 3"


def others(study: Study) -> list[str]:
    """Systems of the folder that the study does not know."""
    return sorted(set(study.runs) - set(SYSTEMS) - set(SPLITS))


def row_of_system(study: Study, name: str) -> dict[str, Any]:
    runs = study.runs[name]
    logs = [run.log for run in runs.values() if run.log]
    seconds = [t for log in logs if (t := training_seconds(log.scalars, log.last_step))]
    system = SYSTEMS.get(name)
    return {
        "name": name,
        "what": system.what if system else "not one of the study's systems",
        "seeds": [seed for seed, run in runs.items() if run.scores],
        "steps": sorted({log.last_step for log in logs}),
        "seconds": sum(seconds) / len(seconds) if seconds else None,
        "tokens": [mean_end(logs, f"tokens/{name}") for name in MODALITY_NAMES],
    }


def mean_end(logs: list[Run], tag: str) -> float | None:
    """Mean over runs of the last value; None where none was logged."""
    ends = [list(log.scalars[tag].values())[-1] for log in logs if tag in log.scalars]
    return sum(ends) / len(ends) if ends else None


def training_seconds(scalars: Mapping[str, Mapping[int, float]], steps: int) -> float:
    """Mean seconds of a step times steps; 0 where they were not logged."""
    logged = scalars.get("perf/step_seconds", {})
    return sum(logged.values()) / len(logged) * steps if logged else 0.0


def scalars(settings: Mapping[str, Any]) -> dict[str, str]:
    """The settings that fit a line; a list is joined, seconds are hours and minutes too."""
    shown = {
        key: ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        for key, value in settings.items()
        if not isinstance(value, dict) and key != "kind"
    }
    if isinstance(seconds := settings.get("seconds"), int | float):
        shown["seconds"] += f" ({seconds / 60:.0f} minutes)"
    return shown


def measured(study: Study) -> list[Measure]:
    """The final scores that any system has."""
    return [m for m in FINAL if any(study.values(name, m) for name in SYSTEMS)]


def cell(study: Study, system: str, measure: Measure) -> Estimate | dict[int, float] | None:
    """The estimate; the only seed's value where there is one alone; None without any."""
    return study.estimate(system, measure) or study.values(system, measure) or None


def split_rows(study: Study) -> list[dict[str, Any]]:
    """Rows like those of the paper's Table 2."""
    return [
        {
            "split": split,
            "cells": [cell(study, name, measure) for measure in COLUMNS_OF_STEP_ZERO],
            "rise": None
            if name == "original"
            else study.difference(name, "original", COLUMNS_OF_STEP_ZERO[0]),
        }
        for name, split in SPLITS.items()
    ]


def difference_rows(
    study: Study, rivals: Iterable[str]
) -> list[tuple[Measure, list[tuple[Estimate | None, str]]]]:
    """(measure, for each rival: ours - theirs, and ``better``, ``worse`` or ``level``)."""
    rivals = list(rivals)
    return [
        (
            measure,
            [
                (pair := study.difference(OURS, rival, measure), direction(pair, measure))
                for rival in rivals
            ],
        )
        for measure in measured(study)
    ]


def gradient_rows(study: Study, systems: list[str]) -> list[tuple[str, list[Any]]]:
    """(tag of gradients.json, the cell of each system), but not of single layers."""
    runs = [run for name in systems for run in study.runs[name].values()]
    tags = dict.fromkeys(tag for run in runs for tag in run.gradients if "/layer_" not in tag)
    return [(t, [cell(study, n, Measure(t, "gradients", t)) for n in systems]) for t in tags]


def direction(pair: Estimate | None, measure: Measure) -> str:
    """Whether ours is ``better`` or ``worse`` in all seeds and beyond the interval; else ``level``."""
    if pair is None or not pair.same_sign or pair.low <= 0 <= pair.high:
        return "level"
    return "better" if (pair.mean < 0) == (measure.better == "lower") else "worse"


# ---- figures --------------------------------------------------------------------------------------------------------------


def draw_figures(study: Study) -> dict[str, Picture]:
    """Name of its file -> figure, of those with data."""
    drawn: dict[str, Picture] = {}
    for name, figure, alt, paper in planned_figures(study):
        with suppress(MissingData):
            drawn[f"figure_{name}"] = Picture(alt, as_png(figure()), (f"Paper, {paper}",))
    return drawn


Plan = tuple[str, Callable[[], Figure], str, str]


def planned_figures(study: Study) -> Iterator[Plan]:
    """(name, what draws it, what it shows in words, what the paper has)."""
    for curve in CURVES:
        found = {
            name: study.estimate(name, Measure(curve.title, "end", curve.tag))
            for name in curve.systems
        }
        ends = ", ".join(f"{label(name)} {end.mean:.3g}" for name, end in found.items() if end)
        alt = f"{curve.title}, over training steps. At the end: {ends or 'one seed alone'}."
        yield curve.name, partial(curve_figure, study, curve), alt, curve.paper
    answers = (
        "Right answers to questions about images by kind; the numbers are in the final scores."
    )
    numbers = sorted({score["number"] for score in scores_of(study, ANSWERS["all"])})
    asked = (
        f"{ANSWERS_PAPER} Here {' or '.join(map(str, numbers))} held-out questions in each seed."
    )
    yield "answers", partial(answers_figure, study), answers, asked
    for name, measure in DIFFERENCES.items():
        alt = f"{measure.name}: {label(OURS)} less each other system, with paired intervals; the numbers are in the table of differences."
        draw = partial(difference_figure, study, measure)
        yield f"difference_{name}", draw, alt, "no such figure; its Table 1 gives one run of each."


# ---- words ----------------------------------------------------------------------------------------------------------------


def interval(found: Estimate | Mapping[int, float] | None) -> str:
    """``1.234 ± 0.056``, ``1.234 (seed 0 alone)`` or a dash."""
    if not found:
        return "–"
    if isinstance(found, Estimate):
        return f"{found.mean:.3f} ± {found.half_width:.3f}".replace("-", "−")
    ((seed, value),) = found.items()
    return f"{value:.3f} (seed {seed} alone)"


def signed(found: Estimate | None) -> str:
    if found is None:
        return "–"
    mean = f"{found.mean:+.3f}".replace("-", "−")
    return f"{'0.000' if mean[1:] == '0.000' else mean} ± {found.half_width:.3f}"


def thousands(value: float | None) -> str:
    return "–" if value is None else f"{value / 1000:,.0f}"


def plain(value: float | None) -> str:
    return "–" if value is None else str(value)


def markdown(text: object) -> str:
    """``text`` inside a table of Markdown: no cell ends early, no markup starts."""
    for letter in "\\`*_|<[":
        text = str(text).replace(letter, "\\" + letter)
    return str(text)


def statistics(study: Study, judgements: list[Judgement]) -> dict[str, Any]:
    """JSON-able: what the page shows, with the values of every seed."""
    measures = [*measured(study), *COLUMNS_OF_STEP_ZERO]
    estimates = {
        m.name: {n: found.summary() for n in study.runs if (found := study.estimate(n, m))}
        for m in measures
    }
    pairs = {
        m.name: {
            n: d.summary() for n in study.runs if n != OURS and (d := study.difference(OURS, n, m))
        }
        for m in measures
    }
    return {
        "settings": dict(study.settings),
        "seeds": list(study.seeds),
        "missing": list(study.missing),
        "estimates": estimates,
        f"{OURS} - other": pairs,
        "claims": [judgement.summary() for judgement in judgements],
    }
