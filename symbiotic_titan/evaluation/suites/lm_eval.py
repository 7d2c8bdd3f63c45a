"""The suite ``lm_eval``: tasks of lm-eval from local files, such as MMLU's.

    lm_eval/TASK/METRIC   as lm-eval reports it, of tasks and of groups that say how to put their tasks together

In its folder: results.json, the rest of lm-eval's report: versions and settings of the tasks.
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symbiotic_titan.evaluation.files import check_folder, check_limit
from symbiotic_titan.evaluation.suite import Progress, Scores, Suite, measure
from symbiotic_titan.inference.generator import Generator
from symbiotic_titan.process import is_first_process

# The keys of lm-eval's results that are kept: those with short values.
REPORTED = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "n-samples")


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
    with contextlib.chdir(options.folder):
        results = lm_eval.simple_evaluate(
            GeneratorLM(generator, batch_size=options.batch_size, progress=progress),
            tasks=list(options.tasks),
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            task_manager=tasks,
            bootstrap_iters=0,
            log_samples=False,
        )
    if is_first_process():
        reported = {name: results[name] for name in REPORTED if name in results}
        path.write_text(json.dumps(reported, indent=1, default=str) + "\n", encoding="utf-8")
    return {
        f"lm_eval/{task}/{key.removesuffix(',none')}": measure(
            value, number=_num_questions(task, results)
        )
        for task, values in results["results"].items()
        for key, value in values.items()
        if isinstance(value, float) and "_stderr" not in key
    }


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
