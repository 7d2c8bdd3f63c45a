"""Draws a run's training curves and expert use, or those of several runs together, into files and one HTML page.

Example: symbiotic plot outputs/reproduce/seed-0/symbiotic outputs/reproduce/seed-0/standard_moe --out outputs/plots

A run is its dump folder. The figures carry the numbers that they have in arXiv 2604.07753:

  5a  capacity rate                             7   imbalance ratio and standard deviation by layer
  5b  text-to-image flow loss                   8   selections of every expert in one layer
  6a  scores of the shared expert alone         9   capacity rate by modality
  6b  language loss, held out                   10  tokens by modality
  6c  image-understanding loss, held out        11  scores over training steps

6a and 11 show what symbiotic evaluate has kept below --evaluation of the runs' checkpoints, 6a that with --probe shared_only. 6b and 6c
show the training loss where a run has no held-out loss. 7 and 8 are drawn from the counts that runs log every metrics.routing_freq
steps, or from a profile. A figure without data is skipped, with the reason.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from symbiotic_titan.evaluation.kept import (
    NONE,
    SHARED_ONLY,
    KeptResult,
    chosen_scores,
    of_usual_options,
    read_results,
)
from symbiotic_titan.evaluation.suite import Score
from symbiotic_titan.plots import curves, expert_figures
from symbiotic_titan.plots.expert_use import ExpertUse, from_profile, from_run
from symbiotic_titan.plots.html import Picture
from symbiotic_titan.plots.logs import Run, default_labels, read_run
from symbiotic_titan.plots.page import page
from symbiotic_titan.plots.score_curves import ScoreCurve, ScorePoint, score_figure
from symbiotic_titan.plots.style import Drawing, MissingData, as_file, as_png
from symbiotic_titan.process import exit_status

CURVES: dict[str, Callable[[list[Run]], Drawing]] = {
    "5a": curves.capacity_rate,
    "5b": curves.flow_loss,
    "6b": curves.language,
    "6c": curves.image_understanding,
    "9": curves.capacity_by_modality,
    "10": curves.token_counts,
}
# Figures of kept scores -> (ablation of the model, title).
SCORES = {
    "6a": (SHARED_ONLY, "6a  Scores of the shared expert alone"),
    "11": (NONE, "11  Scores over training steps"),
}
FIGURES = ("5a", "5b", "6a", "6b", "6c", "7", "8", "9", "10", "11")
FORMATS = ("png", "pdf", "svg")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", nargs="*", type=Path, help="dump folder of a run")
    parser.add_argument("--out", type=Path, default=Path("outputs/plots"), help="folder to write")
    parser.add_argument("--labels", nargs="+", help="names of the runs; default: of their folders")
    parser.add_argument("--figures", nargs="+", help="which ones; default: all that can be drawn")
    parser.add_argument("--profile", type=Path, help="JSON file whose counts figures 7 and 8 show")
    parser.add_argument("--layer", type=int, help="of figure 8; default: the middle MoE layer")
    parser.add_argument("--step", type=int, help="whose logged counts figures 7 and 8 show")
    parser.add_argument(
        "--window", type=int, default=4, help="without --step: how many of the last are summed"
    )
    parser.add_argument(
        "--evaluation",
        type=Path,
        metavar="FOLDER",
        help="the --out of symbiotic evaluate, whose scores figures 6a and 11 show",
    )
    parser.add_argument(
        "--scores",
        nargs="+",
        default=[],
        metavar="NAME",
        help="of figures 6a and 11; default: those over all questions of a suite",
    )
    parser.add_argument(
        "--weights", default="trained", help="of figures 6a and 11: trained (default) or ema"
    )
    parser.add_argument(
        "--format",
        nargs="+",
        choices=FORMATS,
        default=["png"],
        help="of the files; the page has PNGs in any case",
    )
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    """Raise ValueError unless the options fit each other."""
    for name in options.figures or ():
        if name not in FIGURES:
            raise ValueError(
                f"--figures: unknown figure {name!r}; choose from {', '.join(FIGURES)}"
            )
    if not options.runs and not options.profile:
        raise ValueError("name the dump folder of at least one run, or a file with --profile")
    if options.labels and len(options.labels) != len(options.runs):
        raise ValueError(
            f"--labels: {len(options.labels)} names for {len(options.runs)} runs; give one for each"
        )
    if options.labels and len(set(options.labels)) < len(options.labels):
        raise ValueError(f"--labels: names must differ, got {' '.join(options.labels)}")
    if options.scores and not options.evaluation:
        raise ValueError("--scores: needs --evaluation, the folder of symbiotic evaluate")
    if options.window < 1:
        raise ValueError(f"--window: must be at least 1, got {options.window}")


def chosen_figures(options: argparse.Namespace) -> list[str]:
    """In the paper's order; a profile alone has no curves."""
    chosen = options.figures or (FIGURES if options.runs else ("7", "8"))
    return [name for name in FIGURES if name in chosen]


def read_runs(options: argparse.Namespace) -> list[Run]:
    labels = options.labels or default_labels(options.runs)
    named = zip(options.runs, labels, strict=True)
    return [read_run(folder, label, index) for index, (folder, label) in enumerate(named)]


def expert_uses(options: argparse.Namespace, runs: list[Run]) -> list[ExpertUse]:
    """The profile, or what the runs have logged."""
    if options.profile:
        return [from_profile(options.profile)]
    found = [from_run(run, step=options.step, window=options.window) for run in runs]
    return [use for use in found if use is not None]


def kept_results(options: argparse.Namespace, runs: list[Run]) -> list[KeptResult]:
    """Of the runs' checkpoints, below --evaluation; none without that option.

    Raises:
        ValueError: the folder is missing or a file in it is damaged, or no result has one of --scores.
    """
    if options.evaluation is None:
        return []
    folders = {run.folder.resolve() for run in runs}
    of_runs = [result for result in read_results(options.evaluation) if result.run in folders]
    results = [result for result in of_runs if result.weights == options.weights]
    if of_runs and not results:
        known = ", ".join(sorted({result.weights for result in of_runs}))
        raise ValueError(
            f"--weights: no kept result is of {options.weights!r}; choose from {known}"
        )
    chosen_scores(results, options.scores)
    return results


def score_drawing(
    name: str, runs: list[Run], results: list[KeptResult], names: list[str]
) -> Drawing:
    """A figure of SCORES.

    Raises:
        MissingData: there are no results for it.
    """
    ablation, title = SCORES[name]
    found, notes = of_usual_options([r for r in results if r.ablation == ablation])
    curves: dict[str, list[ScoreCurve]] = {}
    for score in names or chosen_scores(found, ()):
        for run in runs:
            points = {
                result.step: score_point(result.step, result.scores[score])
                for result in found
                if result.run == run.folder.resolve() and score in result.scores
            }
            if points:  # of two configs at one step the later result
                curve = ScoreCurve(run.index, run.label, tuple(points.values()))
                curves.setdefault(score, []).append(curve)
    return score_figure(title, curves, notes)


def score_point(step: int, score: Score) -> ScorePoint:
    low_high = score.get("interval")  # results of older versions have none
    interval = (low_high[0], low_high[1]) if low_high else None
    return ScorePoint(step, score["score"], interval, score["chance"])


@dataclass(frozen=True)
class Sources:
    """What the figures show."""

    runs: list[Run]
    uses: list[ExpertUse]
    results: list[KeptResult]


def draw(name: str, sources: Sources, options: argparse.Namespace) -> Drawing:
    if name == "7":
        return expert_figures.layer_imbalance(sources.uses)
    if name == "8":
        return expert_figures.expert_counts(sources.uses, options.layer)
    if name in SCORES:
        return score_drawing(name, sources.runs, sources.results, options.scores)
    return CURVES[name](sources.runs)


def write(options: argparse.Namespace) -> None:
    """Draw the figures and the page.

    Raises:
        ValueError: options or logs that cannot be used, or not one figure has data.
    """
    check(options)
    runs = read_runs(options)
    uses = expert_uses(options, runs)
    sources = Sources(runs, uses, kept_results(options, runs))
    pictures: list[Picture] = []
    skipped: list[str] = []
    for name in chosen_figures(options):
        try:
            drawing = draw(name, sources, options)
        except MissingData as reason:
            skipped.append(f"figure {name} is skipped: {reason}")
            print(skipped[-1])
            continue
        files = {kind: as_file(drawing.figure, kind) for kind in FORMATS if kind in options.format}
        for kind, content in files.items():
            save(options.out / f"figure_{name}.{kind}", content)
        png = files.get("png") or as_png(drawing.figure)
        for note in drawing.notes:
            print(f"figure {name}: {note}")
        pictures.append(Picture(drawing.title, png, drawing.notes))
    if not pictures:
        raise ValueError("there is nothing to draw")
    heading = ", ".join([run.label for run in runs] or [use.label for use in uses])
    save(options.out / "index.html", page(heading, runs, pictures, skipped).encode())


def save(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    print(path)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    return exit_status(lambda: write(options))
