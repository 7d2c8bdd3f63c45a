"""Where the results of suites are kept, and how they are found again. Imports neither a model nor a suite.

    OUT/<run>-step-N-<fingerprint>/<suite>-<options>.json    settings and scores
    OUT/<run>-step-N-<fingerprint>/<suite>-<options>/        the suite's own files: images, answers

The fingerprint is that of the checkpoint, its config, the choice of weights and the ablation; <options> is a hash of the suite's options.
Another number of pictures or other tasks are another result beside the first one, and the same options replace it.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from symbiotic_titan.config.files import read_json
from symbiotic_titan.evaluation.suite import Scores

KIND = "evaluation"
# Ablations by their names in results; ``evaluation.ablation`` says what they do.
NONE = "none"
SHARED_ONLY = "shared_only"
# The key of settings that says which files the options named, as they were then. Changed files do not make other options.
FILES = "files"
_SHORT = 8
_HASH = "[0-9a-f]" * _SHORT  # in a pattern of names


def options_hash(settings: Mapping[str, Any]) -> str:
    """Of a suite's options in ``settings``, as JSON has them."""
    options = {key: value for key, value in settings.items() if key != FILES}
    return sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:_SHORT]


def result_file(folder: Path, suite: str, settings: Mapping[str, Any]) -> Path:
    """The JSON file of ``suite`` with ``settings`` in the ``folder`` of a checkpoint."""
    return folder / f"{suite}-{options_hash(settings)}.json"


def files_of(path: Path) -> Path:
    """The folder for the suite's own files beside the result ``path``."""
    return path.with_suffix("")


def other_results(folder: Path) -> list[Path]:
    """Folders of suites beside ``folder``, so of the same checkpoint: the same suite with other options, and other suites."""
    return sorted(p for p in folder.parent.glob(f"*-{_HASH}") if p.is_dir() and p != folder)


def newest_result(out: Path, suite: str) -> Path:
    """The last one written for ``suite`` below ``out``. Raises ValueError where there is none."""
    found = list(out.glob(f"*/{suite}-{_HASH}.json"))
    if not found:
        raise ValueError(f"{out}: holds no result of the suite {suite}")
    return max(found, key=lambda path: path.stat().st_mtime)


@dataclass(frozen=True)
class KeptResult:
    """One result file.   run: the dump folder of its checkpoint.   options: hash of the suite's options."""

    path: Path
    suite: str
    run: Path
    step: int
    ablation: str
    weights: str
    options: str
    scores: Scores


def read_result(path: Path) -> KeptResult | None:
    """The result in ``path``; None where its checkpoint is of no training step.

    Raises:
        ValueError: it is no result of ``symbiotic evaluate``.
    """
    keys = ("suite", "checkpoint", "step", "settings", "scores")
    values = read_json(path, KIND, keys)
    if values["step"] is None:
        return None
    return KeptResult(
        path=path,
        suite=values["suite"],
        run=Path(values["checkpoint"]).resolve().parents[1],
        step=values["step"],
        ablation=values.get("probe", NONE),
        weights=values.get("weights", "trained"),
        options=options_hash(values["settings"]),
        scores=values["scores"],
    )


def read_results(out: Path) -> list[KeptResult]:
    """Those below ``out``, sorted by step, then the older file first.

    Raises:
        ValueError: there is no such folder, or a file in it is damaged.
    """
    if not out.is_dir():
        raise ValueError(f"{out}: no such folder; name the --out of symbiotic evaluate")
    paths = sorted(out.glob(f"*/*-{_HASH}.json"), key=lambda path: path.stat().st_mtime)
    found = [result for path in paths if (result := read_result(path)) is not None]
    return sorted(found, key=lambda result: result.step)


# Ends of the names of scores that say most: shares of right answers over all of a suite's questions.
MAIN = ("/all", "/accuracy", "/acc")


def chosen_scores(results: Sequence[KeptResult], names: Sequence[str]) -> list[str]:
    """``names``, or without any those of MAIN that ``results`` have.

    Raises:
        ValueError: no result has one of ``names``.
    """
    found = sorted({name for result in results for name in result.scores})
    for name in names:
        if name not in found:
            raise ValueError(
                f"--scores: no kept result has {name!r}; choose from {', '.join(found) or 'none'}"
            )
    return list(names) or [name for name in found if name.endswith(MAIN)]


def of_usual_options(results: Sequence[KeptResult]) -> tuple[list[KeptResult], list[str]]:
    """(the results of each suite with the options that most of them have, the later ones where two are as many; a note for each suite
    that has results with others)."""
    kept: list[KeptResult] = []
    notes: list[str] = []
    for suite in dict.fromkeys(result.suite for result in results):
        of_suite = [result for result in results if result.suite == suite]
        counts = Counter(result.options for result in reversed(of_suite))
        [(usual, number)] = counts.most_common(1)
        kept += [result for result in of_suite if result.options == usual]
        if number < len(of_suite):
            others = len(of_suite) - number
            notes.append(
                f"{suite}: {others} results with other options than {suite}-{usual} are left out"
            )
    return kept, notes
