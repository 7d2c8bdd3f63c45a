"""Run suites on a target, each once: the scores of a finished suite are read from its file, see ``evaluation.kept``.

Several processes that share a model all compute the same results, and the first one writes them.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from symbiotic_titan.config.files import read_json, write_json
from symbiotic_titan.evaluation.ablation import ablated
from symbiotic_titan.evaluation.kept import FILES, KIND, files_of, result_file
from symbiotic_titan.evaluation.suite import Advance, Progress, Scores, Suite
from symbiotic_titan.evaluation.target import Target, files_hash
from symbiotic_titan.inference.generator import Generator
from symbiotic_titan.process import is_first_process


@dataclass(frozen=True)
class ChosenSuite:
    """A suite with its options."""

    suite: Suite[Any]
    options: Any

    def settings(self) -> dict[str, Any]:
        """The options, and hashes of the files among them, so that scores of changed files are not reused."""
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
        return {**values, FILES: files}


@dataclass(frozen=True)
class Result:
    """Scores of one suite and their file. ``is_old``: they were finished before."""

    suite: str
    path: Path
    scores: Scores
    is_old: bool


def evaluate(
    target: Target, chosen: Sequence[ChosenSuite], out: Path, progress: Progress
) -> list[Result]:
    """Scores of each suite. The model is loaded only if one has not been finished with these settings.

    Raises:
        ValueError: a user's mistake; suites that finished before it keep their results.
    """
    folder = out / target.folder_name
    results = [_finished(item, folder) for item in chosen]
    if all(results):
        return [result for result in results if result]
    generator = Generator.load(target.config, target.checkpoint, weights=target.weights)
    with ablated(generator.model, target.ablation):
        return [
            old or _run(generator, item, folder, target, progress)
            for old, item in zip(results, chosen, strict=True)
        ]


def _finished(chosen: ChosenSuite, folder: Path) -> Result | None:
    settings = chosen.settings()
    path = result_file(folder, chosen.suite.name, settings)
    if not path.exists():
        return None
    values = read_json(path, KIND, ("settings", "scores"))
    if values["settings"] != settings:  # a file that an option names has changed
        return None
    return Result(chosen.suite.name, path, values["scores"], is_old=True)


def _run(
    generator: Generator, chosen: ChosenSuite, folder: Path, target: Target, progress: Progress
) -> Result:
    name, settings = chosen.suite.name, chosen.settings()
    path = result_file(folder, name, settings)
    own_folder = files_of(path)
    own_folder.mkdir(parents=True, exist_ok=True)

    def named_progress(what: str, total: int) -> Advance:
        return progress(f"{target.label} {name}: {what}", total)

    start = time.perf_counter()
    scores = chosen.suite.run(generator, chosen.options, own_folder, named_progress)
    seconds = round(time.perf_counter() - start, 1)
    if is_first_process():
        values = {"suite": name, **target.description(), "settings": settings}
        write_json(path, KIND, values | {"seconds": seconds, "scores": scores})
    return Result(name, path, scores, is_old=False)
