"""Every command that a document names is run: here as it stands but at toy size, by .ci/run, or by the test that is named below.

A new command in a document is run here without being listed. One that cannot be needs a row in ``ELSEWHERE`` or ``NOT_RUN``, and a row
that no command needs any longer fails too.
"""

import ast
import re
from collections.abc import Collection
from importlib.util import find_spec

import pytest

from tests.helpers.documented import ROOT, Command, commands_of_ci, documented
from tests.helpers.toy_checkout import ToyCheckout

# Beginning of a command -> file and name of the test that runs it.
STEP = "tools/bench/step.py train_configs/"
ELSEWHERE = {
    "-m mkdocs build": (
        "tests/integration/test_docs_site.py",
        "test_the_site_builds_without_a_warning",
    ),
    "-m tests.helpers.parity_table": (
        "tests/unit/hf/test_parity_table.py",
        "test_every_architecture_is_within_1e_5_of_transformers",
    ),
    "symbiotic make-demo-data": (
        "tests/unit/demo/test_data_demo.py",
        "test_tool_writes_a_world_and_replaces_it_only_by_force",
    ),
    "symbiotic reproduce": (
        "tests/unit/study/test_study_stages.py",
        "test_a_documented_study_has_the_stages_of_its_systems_and_seeds",
    ),
    "symbiotic reliability": (
        "tests/integration/test_reliability.py",
        "test_a_campaign_hurts_runs_and_finds_them_well",
    ),
    f"{STEP}debug.toml train_configs/mini.toml --steps": (
        "tests/unit/bench/test_bench_step.py",
        "test_shares_of_a_step_of_a_shipped_config",
    ),
    f"{STEP}mini.toml --compare": (
        "tests/unit/bench/test_bench_step.py",
        "test_variants_of_a_shipped_config_side_by_side",
    ),
    f"{STEP}debug.toml train_configs/mini.toml --against": (
        "tests/unit/bench/test_bench_step.py",
        "test_the_step_against_that_of_a_commit_with_another_layout",
    ),
    "tools/gpu_check.sh": (
        "tests/integration/test_gpu_check.py",
        "test_every_stage_runs_without_a_gpu_and_the_page_has_its_figures",
    ),
    "tools/bench/output_layer.py": (
        "tests/unit/bench/test_bench_output_layer.py",
        "test_it_prints_one_line_of_json_with_finite_numbers",
    ),
    "tools/bench/startup.py": (
        "tests/unit/bench/test_bench_startup.py",
        "test_a_start_of_the_real_command_has_every_stage",
    ),
    "tools/bench/": (
        "tests/unit/bench/test_documented_benches.py",
        "test_a_documented_benchmark_prints_finite_figures",
    ),
}
# Beginning of a command -> why no run of CI does it.
NOT_RUN = {
    "-m tests.helpers.row_kernels_compiled": "needs Triton; tests/unit/moe/test_moe_row_kernels.py runs it where that is installed",
    "pip install": "the environment is made by tools/setup_env.sh",
    "tensorboard": "serves until it is stopped; .ci/run reads the same logs with --inspect",
    "tests/bitwise_guard.py": "compares two commits",
    "tools/cuda_compile.py": "needs torch's CUDA build; tests/unit/bench/test_cuda_compile.py tests that it says so",
    "tests/run.sh -": "chooses among the tests; without an option .ci/run starts it",
}
# Packages that CI does not install: a command that needs one says so before it loads a model.
EXTRAS = ("lm_eval", "torchmetrics")


def row_of(command: Command, table: Collection[str]) -> str | None:
    """The longest key of ``table`` that ``command`` begins with."""
    text = " ".join(command.words)
    return max((key for key in table if text.startswith(key)), key=len, default=None)


def is_in_ci(command: Command) -> bool:
    """Whether .ci/run starts the program in this environment with all these options, wherever it writes."""
    return any(command.is_part_of(other) for other in commands_of_ci())


COMMANDS = {str(command): command for command in documented()}
TOY = {
    text: command
    for text, command in COMMANDS.items()
    if not row_of(command, ELSEWHERE) and not row_of(command, NOT_RUN) and not is_in_ci(command)
}


def maker(toy, waiting: dict[str, Command], found: Collection[str]) -> str | None:
    """A command of .ci/run, not run yet, that writes what one of ``waiting`` reads."""
    needed = {path for command in waiting.values() for path in toy.missing(command)}
    for text, command in COMMANDS.items():
        if text in found or not (command.is_ours and is_in_ci(command)) or toy.missing(command):
            continue
        out = toy.output(command)
        if out and any(f"{path}/".startswith(f"{out}/") for path in needed):
            return text
    return None


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Command -> what became of it. Those of .ci/run are run here where another one reads what they write."""
    toy = ToyCheckout(tmp_path_factory.mktemp("toy"))
    found, waiting = {}, dict(TOY)
    try:
        while waiting:
            ready = next((text for text, c in waiting.items() if not toy.missing(c)), None)
            ready = ready or maker(toy, waiting, found)
            if ready is None:
                break
            found[ready] = toy.run(COMMANDS[ready])
            waiting.pop(ready, None)
    finally:
        toy.close()
    for text, command in waiting.items():
        found[text] = toy.never_run(command)
    return found


@pytest.mark.parametrize("text", TOY)
def test_a_documented_command_does_what_it_says(text, results):
    result = results[text]
    missing = [name for name in EXTRAS if not find_spec(name)]
    if any(f"needs {name}; install it: pip install" in result.text for name in missing):
        assert result.status == 2 and result.text.count("\n") == 1
        return
    assert result.status == 0, f"{TOY[text].place}: {result.arguments}\n{result.text[-3000:]}"
    assert "Traceback" not in result.text
    for path in result.written:
        assert path.exists() and (path.is_file() or any(path.iterdir())), path
    assert not result.is_training or re.search(r"step: +\d+ ", result.text)


@pytest.mark.parametrize("table", [ELSEWHERE, NOT_RUN], ids=["elsewhere", "not run"])
def test_every_row_is_needed_by_a_command(table):
    assert {row_of(c, table) for c in COMMANDS.values()} - {None} == set(table)


@pytest.mark.parametrize(("file", "name"), sorted(set(ELSEWHERE.values())))
def test_a_test_that_runs_commands_exists(file, name):
    tree = ast.parse((ROOT / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_main_commands_are_those_of_ci():
    by_ci = {text for text, command in COMMANDS.items() if is_in_ci(command)}
    assert {"run_train.sh", "tests/run.sh", "CONFIG_FILE=train_configs/mini.toml run_train.sh"} <= by_ci  # fmt: skip
    assert not {"run_train.sh --training.steps 800", "tests/run.sh -m slow"} & by_ci
