"""Score checkpoints: runs suites, and shows each score with its interval of 95 %, its chance level and its upper bound.

Examples:
    symbiotic evaluate outputs/mini --suite demo_world
    symbiotic evaluate outputs/mini --suite demo_world --probe none --probe shared_only --compare
    symbiotic evaluate outputs/mini --suite demo_world --weights trained --weights ema --compare
    symbiotic evaluate outputs/reproduce/seed-0/symbiotic outputs/reproduce/seed-0/standard_moe --compare --suite demo_world
    symbiotic evaluate --suites

A checkpoint is its folder, .../step-N, or that of a run, whose newest complete one is taken. Its config is the one that the run kept;
--config names another, once for all checkpoints or once for each. Options of a suite follow as --suite_name.option value, those of the
config as --section.key value. A module in --experimental.custom_import is imported besides the one that a config names; one that only a
run's kept config names is not, unless --config names that file.

The table is printed, and everything is written below --out, a folder per checkpoint: <suite>-<options>.json, and <suite>-<options>/ with
images and answers. <options> is a hash of the suite's options, so that scores with others stay beside it. A suite that was finished with
the same options is not run again unless a file that they name has changed, and existing images are reused. With --compare one table shows
all, and OUT/comparison.json holds it. symbiotic plot --evaluation OUT shows scores over training steps.

torchrun spreads a model that is too large for one device over several processes, as its config says.
"""

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from symbiotic_titan.config.command_line import option_of
from symbiotic_titan.config.extension import import_extension
from symbiotic_titan.config.files import write_json
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.load import import_parts_of, load_job_config
from symbiotic_titan.config.optimizer import WEIGHTS
from symbiotic_titan.config.saved import saved_config
from symbiotic_titan.data.formats.shard import BadSample
from symbiotic_titan.evaluation.ablation import NONE
from symbiotic_titan.evaluation.options import (
    explained_options,
    read_options,
    split_sections,
    take_sections,
)
from symbiotic_titan.evaluation.report import comparison_table
from symbiotic_titan.evaluation.results import ChosenSuite, Result, evaluate
from symbiotic_titan.evaluation.suite import SUITES, Scores, Suite
from symbiotic_titan.evaluation.target import Target, labelled
from symbiotic_titan.process import Counter, exit_status, is_first_process


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """(the command's own options; those of suites and of the config)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT_OR_RUN")
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        help="TOML file, once or for each; default: the config that each run kept",
    )
    parser.add_argument("--suite", action="append", default=[], metavar="NAME")
    parser.add_argument("--suites", action="store_true", help="list suites and their options")
    parser.add_argument(
        "--probe",
        action="append",
        default=[],
        help="ablation: none (default), shared_only, or without:GROUP, whose routed experts then output zero; repeatable",
    )
    parser.add_argument(
        "--weights",
        action="append",
        default=[],
        choices=WEIGHTS,
        help="trained (default), or ema: the average that the run kept, see [ema]; repeatable",
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/evaluation"), metavar="FOLDER")
    parser.add_argument("--compare", action="store_true", help="one table, side by side")
    sections, others = take_sections(sys.argv[1:] if arguments is None else arguments)
    return parser.parse_intermixed_args(others), sections


def config_paths(
    given: Sequence[str], checkpoints: Sequence[Path], overrides: Sequence[str]
) -> Sequence[str]:
    """The config files ``given``, or else those that the runs kept."""
    return given or [str(saved_config(path, overrides)) for path in checkpoints]


def import_parts(paths: Sequence[str], overrides: list[str]) -> None:
    """Import the modules that the config files name, and the one of the command line besides: a run's own parts are still needed where
    that brings a suite."""
    for path in paths:
        import_parts_of(path)
    extension = option_of(overrides, "experimental.custom_import")
    if extension:
        import_extension(extension)


def read_configs(
    given: Sequence[str], overrides: list[str], checkpoints: Sequence[Path]
) -> list[JobConfig]:
    """A config per checkpoint: those ``given``, or what their runs kept.

    Raises:
        ValueError: the number ``given`` is not 0, 1 or that of the checkpoints; a run kept no config; or a config is invalid.
    """
    if not checkpoints:
        raise ValueError("no checkpoint; name its folder, or that of a run")
    paths = config_paths(given, checkpoints, overrides)
    count = len(checkpoints)
    if len(paths) not in (1, count):
        raise ValueError(
            f"--config: must be given once, or once for each of the {count} checkpoints, got {len(paths)}"
        )
    import_parts(paths, overrides)
    configs = [load_job_config(["--job.config_file", path, *overrides]) for path in paths]
    return configs if len(configs) == count else [copy.deepcopy(configs[0]) for _ in range(count)]


def find_suites(names: Sequence[str]) -> list[Suite[Any]]:
    """The suites of these names; those not named are not imported.

    Raises:
        ValueError: none, or an unknown one.
    """
    if not names:
        raise ValueError(f"no suite; give --suite NAME, one of {', '.join(SUITES)}")
    return [SUITES[name] for name in dict.fromkeys(names)]


def print_suites(options: argparse.Namespace, overrides: list[str]) -> None:
    """All suites and their options, those of the modules that are named among them."""
    import_parts(config_paths(options.config, options.checkpoints, overrides), overrides)
    for name in SUITES:
        suite = SUITES[name]
        try:
            suite.check_installed()
            print(f"{name}: {suite.description}")
        except ValueError:
            print(f"{name}: {suite.description} (not installed: {suite.install})")
        for option in explained_options(suite):
            print(f"    --{name}.{option.name} {option.default}")
            print(f"        {option.sentence}")


def write_comparison(path: Path, columns: dict[str, Scores], chosen: Sequence[ChosenSuite]) -> None:
    settings: dict[str, Any] = {item.suite.name: item.settings() for item in chosen}
    write_json(path, "comparison", {"settings": settings, "columns": columns})


def report(label: str, results: Sequence[Result]) -> Scores:
    """The scores of all suites; prints their files."""
    for result in results:
        old = " (finished before)" if result.is_old else ""
        print(f"{label}: {result.path}{old}", file=sys.stderr)
    return {name: score for result in results for name, score in result.scores.items()}


def run(options: argparse.Namespace, sections: list[str]) -> None:
    """Raises ValueError for a user's mistake, if possible before the first suite runs."""
    of_suites, overrides = split_sections(sections, options.suite)
    configs = read_configs(options.config, overrides, options.checkpoints)
    suites = find_suites(options.suite)
    settings = read_options(suites, of_suites)
    for suite in suites:
        suite.check_installed()
    chosen = [ChosenSuite(suite, settings[suite.name]) for suite in suites]
    ablations = list(dict.fromkeys(options.probe)) or [NONE]
    weights = list(dict.fromkeys(options.weights)) or ["trained"]
    pairs = zip(configs, options.checkpoints, strict=True)
    targets = labelled([t for pair in pairs for t in Target.find(*pair, ablations, weights)])
    columns: dict[str, Scores] = {}
    for label, target in targets.items():
        results = evaluate(target, chosen, options.out, Counter)
        if not is_first_process():
            continue
        columns[label] = report(label, results)
        if not options.compare:
            print(f"\n{comparison_table({label: columns[label]})}\n")
    if options.compare and is_first_process():
        print(f"\n{comparison_table(columns)}\n")
        write_comparison(options.out / "comparison.json", columns, chosen)


def main(arguments: list[str] | None = None) -> int:
    options, sections = parse(arguments)
    return exit_status(
        lambda: print_suites(options, sections) if options.suites else run(options, sections),
        (OSError, ValueError, BadSample),
        "stopped; the same command goes on from here",
    )
