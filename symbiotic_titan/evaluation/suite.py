"""A suite is one way of scoring a checkpoint, run by ``symbiotic evaluate --suite NAME``.

    @dataclass(frozen=True)
    class Lengths:
        prompts: int = 4
        \"\"\"How many texts are written\"\"\"

    def run(generator, options, folder, progress):
        texts = generator.text(["Say something."] * options.prompts, advance=progress("texts", options.prompts))
        return {"lengths/mean": measure_mean([len(text.text) for text in texts])}

    SUITES.register("lengths", Suite("lengths", "how much a model says", Lengths, run))

``--lengths.prompts 8`` sets the option. A module of yours that registers one is named in ``experimental.custom_import``.
This module imports neither models nor suites, so that registering a suite costs nothing.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar

from symbiotic_titan.evaluation import intervals
from symbiotic_titan.evaluation.intervals import Interval
from symbiotic_titan.registry import Registry


class Score(TypedDict):
    """``score`` of the model, between ``chance`` and ``upper_bound``, from ``number`` samples. Plain data, for JSON.

    interval:    [low, high] of 95 %, see ``evaluation.intervals``.
    chance:      the score without looking at the prompt or at the image.
    upper_bound: the score of the real images or answers under the same rules.

    These are None where they are unknown.
    """

    score: float
    interval: list[float] | None
    chance: float | None
    upper_bound: float | None
    number: int


# Score by name, as tables and TensorBoard show them.
Scores = dict[str, Score]

Options = TypeVar("Options")

# Called with how many more items are done.
Advance = Callable[[int], None]
# (what is counted, how many there will be) -> the ``Advance`` that counts them.
Progress = Callable[[str, int], Advance]

# (generator, options, folder, progress) -> scores by name, such as "answers/all". The generator is an ``inference.Generator``.
#
# folder: exists and belongs to this suite with these options, this checkpoint, config and ablation. Files of an interrupted run are
# still there, and a suite may continue from them (``suites.generation`` does for images). With several processes only the first may write.
# Raises ValueError for a user's mistake.
Run = Callable[[Any, Options, Path, Progress], Scores]


@dataclass(frozen=True)
class Suite(Generic[Options]):
    """One way of scoring.

    options     a frozen dataclass of bool, int, float, str, X | None and tuples of them, all with defaults, each with a sentence
                below it. Its ``__post_init__`` raises ValueError for mistakes that can be found without a model: a number out
                of range, a missing file. Where an option names a file or folder, its content counts as a setting too.
    modules     what ``run`` imports besides the project's own dependencies.
    install     the command that installs them.
    """

    name: str
    description: str
    options: type[Options]
    run: Run[Options]
    modules: tuple[str, ...] = ()
    install: str = ""

    def check_installed(self) -> None:
        """ValueError where one of ``modules`` is not installed."""
        missing = [module for module in self.modules if find_spec(module) is None]
        if missing:
            raise ValueError(
                f"--suite {self.name}: needs {', '.join(missing)}; install it: {self.install}"
            )


class SuiteRegistry(Registry[Suite[Any]]):
    """Suites under their own names, by which their options and their files are named."""

    def register(self, name: str, part: Suite[Any]) -> Suite[Any]:
        if not isinstance(part, Suite) or part.name != name:
            got = f"a suite named {part.name!r}" if isinstance(part, Suite) else repr(part)
            raise ValueError(f"{self.key} {name}: must be a Suite of that name, got {got}")
        return super().register(name, part)


_OURS = "symbiotic_titan.evaluation.suites"
SUITES = SuiteRegistry(
    "--suite",
    {
        "clip_score": f"{_OURS}.clip_score:CLIP_SCORE",
        "demo_world": "symbiotic_titan.demo.suite:DEMO_WORLD",
        "fid": f"{_OURS}.fid:FID",
        "geneval_images": f"{_OURS}.prompts:GENEVAL_IMAGES",
        "hpsv2": f"{_OURS}.hpsv2:HPSV2",
        "lm_eval": f"{_OURS}.lm_eval:LM_EVAL",
        "ocrbench": f"{_OURS}.ocrbench:OCRBENCH",
        "t2i_compbench_images": f"{_OURS}.prompts:T2I_COMPBENCH_IMAGES",
    },
)


def measure(
    score: float,
    *,
    number: int,
    interval: Interval | None = None,
    chance: float | None = None,
    upper_bound: float | None = None,
) -> Score:
    """A score over ``number`` samples; its interval, chance and upper bound may be unknown."""
    return Score(
        score=score,
        interval=list(interval) if interval else None,
        chance=chance,
        upper_bound=upper_bound,
        number=number,
    )


def measure_mean(
    values: Collection[float], *, chance: float | None = None, upper_bound: float | None = None
) -> Score:
    """The mean of ``values``, one of each sample, with its interval. Where each is 0 or 1 it is a share."""
    return measure(
        sum(values) / len(values),
        number=len(values),
        interval=intervals.of_mean(values),
        chance=chance,
        upper_bound=upper_bound,
    )
