"""What a suite is: one way of measuring a checkpoint, that ``tools/evaluate.py --suite NAME`` runs.

    @dataclass(frozen=True)
    class Lengths:
        prompts: int = 4
        \"\"\"How many texts are written\"\"\"

    def run(generator, options, folder, progress):
        texts = generator.text(["Say something."] * options.prompts, advance=progress("texts", options.prompts))
        mean = sum(len(text.text) for text in texts) / options.prompts
        return {"lengths/mean": measure(mean, number=options.prompts)}

    SUITES.register("lengths", Suite("lengths", "how much a model says", Lengths, run))

``--lengths.prompts 8`` sets the option. A module of yours that registers one is named in ``experimental.custom_import``.

A score beside what it has to be compared with.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar

from symbiotic_titan.inference.generator import (
    Advance,
    Generator,
)
from symbiotic_titan.registry import Registry


class Measure(TypedDict):
    """``score`` of the model, between ``chance`` and ``upper_bound``, from ``number`` samples. Plain data, for JSON.

    chance:      what is reached without looking at the prompt or at the image.
    upper_bound: what the real pictures or answers themselves reach under the same rules.

    Both are None where nobody knows them.
    """

    score: float
    chance: float | None
    upper_bound: float | None
    number: int


# Measures by name, as tables and TensorBoard show them.
Scores = dict[str, Measure]


Options = TypeVar("Options")

# (what is counted, how many there will be) -> called with how many more are done, as Generator's ``advance``.
Progress = Callable[[str, int], Advance]

# (generator, options, folder, progress) -> scores by name, as "answers/all".
#
# folder: exists, and belongs to this suite with this checkpoint, config and probe. What a run that was broken off left there is
# still there: a suite may go on from it (``evaluation.drawing`` does for images). With several processes only the first may write.
# Raises ValueError where the user has to change something.
Run = Callable[[Generator, Options, Path, Progress], Scores]


@dataclass(frozen=True)
class Suite(Generic[Options]):
    """One way of measuring.

    options     a frozen dataclass of bool, int, float, str, X | None and tuples of them, all with defaults, each with a sentence
                below it. Its ``__post_init__`` raises ValueError for what can be known before a model is loaded: a number out of
                range, a file that is missing. Of a string that names a file or folder the content counts as a setting too.
    modules     what ``run`` imports besides the project's own dependencies.
    install     the command that brings them.
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


# Suites by name; ``evaluation.suites`` registers ours.
SUITES: Registry[Suite[Any]] = Registry("--suite")


def measure(
    score: float,
    *,
    number: int,
    chance: float | None = None,
    upper_bound: float | None = None,
) -> Measure:
    """A score of ``number`` samples, of which chance and upper bound may be unknown."""
    return Measure(score=score, chance=chance, upper_bound=upper_bound, number=number)
