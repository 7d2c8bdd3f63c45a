"""Run suites on a subject, once: a finished suite's scores are read from its file.

OUT/<run>-step-N-<identity>/<suite>.json    settings and scores
OUT/<run>-step-N-<identity>/<suite>/        what the suite writes: pictures, answers

Which of several processes writes: those that share a model all come to the same results.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from symbiotic_titan.config.files import read_json, write_json
from symbiotic_titan.evaluation.ablation import probed
from symbiotic_titan.evaluation.suite import Progress, Scores, Suite
from symbiotic_titan.evaluation.target import (
    Subject,
    files_hash,
)
from symbiotic_titan.inference.generator import Generator
from symbiotic_titan.process import is_first_process

KIND = "evaluation"


@dataclass(frozen=True)
class Chosen:
    """A suite with its options."""

    suite: Suite[Any]
    options: Any

    def settings(self) -> dict[str, Any]:
        """The options, and which content the files among them had."""
        # As JSON reads it back: tuples are lists.
        values = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self.options).items()
        }
        files = {}
        for key, value in values.items():
            words = [w for w in (value if isinstance(value, list) else [value]) if w]
            paths = [Path(word) for word in words if isinstance(word, str)]
            if hashes := [files_hash(path) for path in paths if path.exists()]:
                files[key] = hashes if isinstance(value, list) else hashes[0]
        return {**values, "files": files}


@dataclass(frozen=True)
class Result:
    """Scores of one suite, and the file that they lie in. ``is_old``: they were there already."""

    suite: str
    path: Path
    scores: Scores
    is_old: bool


def evaluate(
    subject: Subject, chosen: Sequence[Chosen], out: Path, progress: Progress
) -> list[Result]:
    """Scores of each suite. The model is loaded only if one has not been finished with these settings.

    Raises:
        ValueError: a user's mistake; what was finished before it stays.
    """
    folder = out / subject.folder_name
    results = [_finished(item, folder) for item in chosen]
    if all(results):
        return [result for result in results if result]
    generator = Generator.load(subject.config, subject.checkpoint)
    with probed(generator.model, subject.probe):
        return [
            old or _run(generator, item, folder, subject, progress)
            for old, item in zip(results, chosen, strict=True)
        ]


def _finished(chosen: Chosen, folder: Path) -> Result | None:
    path = folder / f"{chosen.suite.name}.json"
    if not path.exists():
        return None
    values = read_json(path, KIND, ("settings", "scores"))
    if values["settings"] != chosen.settings():
        return None
    return Result(chosen.suite.name, path, values["scores"], is_old=True)


def _run(
    generator: Generator, chosen: Chosen, folder: Path, subject: Subject, progress: Progress
) -> Result:
    name = chosen.suite.name
    path, own_folder = folder / f"{name}.json", folder / name
    own_folder.mkdir(parents=True, exist_ok=True)
    settings = chosen.settings()
    start = time.perf_counter()
    named = partial(_named_progress, progress, f"{subject.label} {name}")
    scores = chosen.suite.run(generator, chosen.options, own_folder, named)
    seconds = round(time.perf_counter() - start, 1)
    if is_first_process():
        values = {"suite": name, **subject.description(), "settings": settings}
        write_json(path, KIND, values | {"seconds": seconds, "scores": scores})
    return Result(name, path, scores, is_old=False)


def _named_progress(progress: Progress, name: str, what: str, total: int) -> Any:
    return progress(f"{name}: {what}", total)
