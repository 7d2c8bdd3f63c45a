"""The suite ``lm_eval``: tasks of lm-eval from local files, such as MMLU's.

    lm_eval/TASK/METRIC   as lm-eval reports it, of tasks and of groups that say how to put their tasks together

The interval is the normal one by lm-eval's standard error. Chance is known of accuracies of multiple choice: one by the number of choices.

In its folder: results.json, the rest of lm-eval's report: versions and settings of the tasks.
"""

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symbiotic_titan.evaluation.files import check_folder, check_limit
from symbiotic_titan.evaluation.intervals import Interval, of_error
from symbiotic_titan.evaluation.suite import Progress, Scores, Suite, measure
from symbiotic_titan.inference.generator import Generator
from symbiotic_titan.process import is_first_process

# The keys of lm-eval's results that are kept: those with short values.
REPORTED = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "n-samples")
# Beginning of the metrics whose chance is that of a choice at random.
ACCURACY = "acc"
# Draws for the standard errors of metrics that have no formula for it.
BOOTSTRAP = 1000


@dataclass(frozen=True)
class LmEvalOptions:
    """Options of the suite."""

    folder: str = ""
    """Folder of the tasks' YAML files; relative paths in them begin here"""

    tasks: tuple[str, ...] = ()
    """Names of tasks or groups, comma separated"""

    limit: int | None = None
    """Questions of each task, counted from its first; all by default"""

    num_fewshot: int | None = None
    """Examples before each question; by default as the task says"""

    batch_size: int = 8
    """Texts at a time"""

    def __post_init__(self) -> None:
        check_folder("folder", self.folder, "the folder of the tasks' YAML files")
        check_limit(self.limit)
        if self.batch_size < 1:
            raise ValueError(f"batch_size: must be at least 1, got {self.batch_size}")
        if not self.tasks:
            raise ValueError("tasks: names no task; give the names that the YAML files have")


def run_lm_eval(
    generator: Generator, options: LmEvalOptions, folder: Path, progress: Progress
) -> Scores:
    """Raises ValueError for an unknown task."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from symbiotic_titan.evaluation.suites.lm_eval_model import GeneratorLM

    path = folder.resolve() / "results.json"
    tasks = TaskManager(include_path=str(Path(options.folder).resolve()), include_defaults=False)
    for name in options.tasks:
        if name not in tasks.all_tasks:
            known = ", ".join(sorted(tasks.all_tasks)) or "none"
            raise ValueError(
                f"--lm_eval.tasks: there is no task {name!r} in {options.folder}, which has {known}"
            )
    # Its bootstrap would fork processes of their own, which may hang where torch has started threads.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    with contextlib.chdir(options.folder):
        results = lm_eval.simple_evaluate(
            GeneratorLM(generator, batch_size=options.batch_size, progress=progress),
            tasks=list(options.tasks),
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            task_manager=tasks,
            bootstrap_iters=BOOTSTRAP,
        )
    if is_first_process():
        reported = {name: results[name] for name in REPORTED if name in results}
        path.write_text(json.dumps(reported, indent=1, default=str) + "\n", encoding="utf-8")
    return lm_eval_scores(results)


def lm_eval_scores(results: dict[str, Any]) -> Scores:
    """The numbers of a report of lm-eval that has its samples."""
    return {
        f"lm_eval/{task}/{key.removesuffix(',none')}": measure(
            value,
            number=_num_questions(task, results),
            interval=_interval(value, values.get(key.replace(",", "_stderr,", 1))),
            chance=_chance(task, results) if key.startswith(ACCURACY) else None,
        )
        for task, values in results["results"].items()
        for key, value in values.items()
        if isinstance(value, float) and "_stderr" not in key
    }


def _interval(value: float, standard_error: Any) -> Interval | None:
    """None where lm-eval has no standard error and says so in letters."""
    return of_error(value, standard_error) if isinstance(standard_error, float) else None


def _chance(task: str, results: dict[str, Any]) -> float | None:
    """The accuracy of choosing at random, of a task or over all questions of a group; None where it is not multiple choice."""
    if task not in results["n-samples"]:
        parts = results["group_subtasks"][task]
        known = [(_chance(part, results), _num_questions(part, results)) for part in parts]
        weighted = [chance * number for chance, number in known if chance is not None]
        return (
            sum(weighted) / _num_questions(task, results) if len(weighted) == len(known) else None
        )
    config = results["configs"][task]
    if config.get("output_type") != "multiple_choice":
        return None
    metrics = [row.get("metric") for row in config.get("metric_list") or []]
    requests_each = (
        2 if "acc_mutual_info" in metrics else 1
    )  # every choice also without the question
    choices = [len(sample["resps"]) / requests_each for sample in results["samples"][task]]
    return sum(1 / number for number in choices) / len(choices)


def _num_questions(task: str, results: dict[str, Any]) -> int:
    """Questions of a task, or of all tasks of a group."""
    if task in results["n-samples"]:
        return results["n-samples"][task]["effective"]
    return sum(_num_questions(part, results) for part in results["group_subtasks"][task])


LM_EVAL = Suite(
    name="lm_eval",
    description="tasks of lm-eval from local files, such as MMLU's",
    options=LmEvalOptions,
    run=run_lm_eval,
    modules=("lm_eval",),
    install="pip install lm-eval",
)
