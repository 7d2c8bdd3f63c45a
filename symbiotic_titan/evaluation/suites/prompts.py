"""The suites ``geneval_images`` and ``t2i_compbench_images``: pictures of a benchmark's own prompts, laid out as its scorer reads
them. The scorers need detectors and models of their own, so they are run by themselves; docs/evaluation.md has the commands.

    geneval_images         images/00000/metadata.jsonl, images/00000/samples/00000.png
    t2i_compbench_images   <prompt file>/samples/<prompt>_000000.png

Their only score is how many pictures there are.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symbiotic_titan.evaluation.files import check_file, check_limit, read_prompts
from symbiotic_titan.evaluation.suite import Progress, Scores, Suite, measure
from symbiotic_titan.evaluation.suites.generation import (
    ImageRequest,
    ImageSettings,
    generate_images,
)
from symbiotic_titan.inference.generator import Generator
from symbiotic_titan.process import is_first_process

GENEVAL_COLUMNS = ("tag", "prompt", "include")
# Not allowed in prompts: _ separates prompt and number in a file name, and / cannot be in one.
FORBIDDEN = ("_", "/")


@dataclass(frozen=True)
class GenevalOptions(ImageSettings):
    """Options of the suite ``geneval_images``."""

    prompts: str = ""
    """GenEval's evaluation_metadata.jsonl"""

    samples: int = 4
    """Images of each prompt; 4 in the paper"""

    limit: int | None = None
    """Prompts to use, counted from the first; all by default"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_file("prompts", self.prompts, "GenEval's evaluation_metadata.jsonl")
        read_geneval(self.prompts, self.limit)
        _check_counts(self.samples, self.limit)


@dataclass(frozen=True)
class CompBenchOptions(ImageSettings):
    """Options of the suite ``t2i_compbench_images``."""

    prompts: tuple[str, ...] = ()
    """T2I-CompBench's prompt files, such as color_val.txt, comma separated; each gets a folder of its own"""

    samples: int = 10
    """Images of each prompt; 10 in the paper"""

    limit: int | None = None
    """Prompts of each file to use, counted from the first; all by default"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompts:
            raise ValueError("prompts: must be T2I-CompBench's prompt files, such as color_val.txt")
        names = [Path(path).stem for path in self.prompts]
        if len(set(names)) < len(names):
            raise ValueError(f"prompts: two files have the same name, got {', '.join(names)}")
        for path in self.prompts:
            check_file("prompts", path, "a prompt file of T2I-CompBench")
            read_compbench(path, self.limit)
        _check_counts(self.samples, self.limit)


def _check_counts(samples: int, limit: int | None) -> None:
    if samples < 1:
        raise ValueError(f"samples: must be at least 1, got {samples}")
    check_limit(limit)


def read_geneval(path: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The objects in evaluation_metadata.jsonl, one per line.

    Raises:
        ValueError: a line is no JSON object, or lacks one of GENEVAL_COLUMNS; or there are no lines.
    """
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: must be a JSON object, got {type(row).__name__}")
        if missing := [column for column in GENEVAL_COLUMNS if column not in row]:
            raise ValueError(
                f"{where}: column {', '.join(map(repr, missing))} is missing, there are: {', '.join(sorted(row)) or 'none'}"
            )
        rows.append(row)
    if not rows:
        raise ValueError(
            f"{path}: holds no prompts; it should be GenEval's evaluation_metadata.jsonl"
        )
    return rows[:limit]


def read_compbench(path: str, limit: int | None = None) -> list[str]:
    """Prompts of a file of T2I-CompBench, which its scorers will read from the names of images."""
    prompts = read_prompts(path, limit)
    for prompt in prompts:
        if any(character in prompt for character in FORBIDDEN):
            raise ValueError(
                f"{path}: prompt {prompt!r} has a {' or '.join(FORBIDDEN)}, so T2I-CompBench cannot read it from a file name"
            )
    return prompts


def run_geneval(
    generator: Generator, options: GenevalOptions, folder: Path, progress: Progress
) -> Scores:
    requests = []
    for number, row in enumerate(read_geneval(options.prompts, options.limit)):
        place = folder / "images" / f"{number:05d}"
        if is_first_process():
            place.mkdir(parents=True, exist_ok=True)
            (place / "metadata.jsonl").write_text(json.dumps(row), encoding="utf-8")
        requests += [
            ImageRequest(row["prompt"], place / "samples" / f"{sample:05d}.png")
            for sample in range(options.samples)
        ]
    return _count("geneval_images", generator, requests, options, progress, folder)


def run_compbench(
    generator: Generator, options: CompBenchOptions, folder: Path, progress: Progress
) -> Scores:
    """The images of a prompt file are numbered consecutively, as its scorers identify results by that number."""
    requests = []
    for path in options.prompts:
        place = folder / Path(path).stem / "samples"
        for number, prompt in enumerate(read_compbench(path, options.limit)):
            requests += [
                ImageRequest(
                    prompt, place / f"{prompt}_{number * options.samples + sample:06d}.png"
                )
                for sample in range(options.samples)
            ]
    return _count("t2i_compbench_images", generator, requests, options, progress, folder)


def _count(
    suite: str,
    generator: Generator,
    requests: Sequence[ImageRequest],
    options: ImageSettings,
    progress: Progress,
    folder: Path,
) -> Scores:
    images = generate_images(generator, requests, options, progress, folder)
    return {f"{suite}/images": measure(len(images), number=len(images))}


GENEVAL_IMAGES = Suite(
    name="geneval_images",
    description="pictures of GenEval's prompts, in the layout of its scorer",
    options=GenevalOptions,
    run=run_geneval,
)
T2I_COMPBENCH_IMAGES = Suite(
    name="t2i_compbench_images",
    description="pictures of T2I-CompBench's prompts, in the layout of its scorers",
    options=CompBenchOptions,
    run=run_compbench,
)
