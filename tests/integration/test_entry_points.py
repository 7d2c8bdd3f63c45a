"""Every way to start a training run gives the same run, and a wheel holds all that its commands need."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from tests.helpers.launch import ROOT, arguments_of, read_scalars

STEPS = 2
STARTS = {
    "a config": lambda config, rest: [sys.executable, "-m", "symbiotic_titan.cli", "train", config, *rest],
    "an option": lambda config, rest: [
        *(sys.executable, "-m", "symbiotic_titan.cli", "train"),
        *("--job.config_file", config, *rest),
    ],
    "run_train.sh": lambda config, rest: ["./run_train.sh", *rest],
}  # fmt: skip
WHEEL = "a wheel"
# Of an installed package without its repository: the help of every command, and the statuses of those that need the repository.
EVERY_COMMAND = """
import json
from symbiotic_titan.cli import COMMANDS, main
statuses = {}
for name in COMMANDS:
    try:
        main([name, "--help"])
    except SystemExit as end:
        statuses[name] = end.code
    else:
        statuses[name] = 0
print(json.dumps([statuses, [main(["reproduce"]), main(["reliability"])]]))
"""


def without_repository() -> dict[str, str]:
    """The environment variables, without those by which Python finds the repository."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK")}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The programs' folder of an environment that has the wheel of this repository, and all else from that of the tests."""
    pytest.importorskip("setuptools", minversion="77")  # builds the wheel, without the network
    folder = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "symbiotic_titan", folder / "source/symbiotic_titan", ignore=left_out)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    # Neither PYTHONPATH nor the current folder: beside an editable package pip finds its egg-info, and would install nothing.
    alone = {"cwd": folder, "env": without_repository(), "check": True, "capture_output": True}
    pip, quiet = [sys.executable, "-m", "pip"], ["--quiet", "--no-deps"]
    build = ["wheel", *quiet, "--no-build-isolation", "--wheel-dir", folder, folder / "source"]
    subprocess.run([*pip, *build], **alone)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    [site] = (folder / "venv" / "lib").glob("python3*/site-packages")
    [wheel] = folder.glob("*.whl")
    install = [*pip, "--python", python, "install", *quiet, "--no-index", wheel]
    subprocess.run(install, **alone)
    # Not before, for the same reason.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shutil.rmtree(folder / "source")
    return python.parent


def outside(installed: Path, folder: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    """A program of the environment, run in ``folder``, which cannot find the repository."""
    environment = without_repository() | {"OMP_NUM_THREADS": "1"}
    program = [str(installed / command[0]), *command[1:]]
    return subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def losses(tmp_path_factory, demo, installed):
    """Start -> step -> loss."""
    found = {}
    launched = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"}
    clean = {key: value for key, value in os.environ.items() if key not in launched}
    for name, command in STARTS.items():
        folder = tmp_path_factory.mktemp("start")
        _, config, *rest = arguments_of(folder, demo, {"training.steps": STEPS})
        environment = clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment |= {"CONFIG_FILE": config, "SYMBIOTIC_PYTHON": sys.executable}
        done = subprocess.run(
            command(config, rest), cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        found[name] = read_scalars(folder, "loss/total")
    folder = tmp_path_factory.mktemp("start")
    _, config, *rest = arguments_of(folder, demo, {"training.steps": STEPS})
    done = outside(installed, folder, ["symbiotic", "train", config, *rest])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found[WHEEL] = read_scalars(folder, "loss/total")
    return found


@pytest.mark.parametrize("start", [*STARTS, WHEEL])
def test_every_start_gives_the_same_losses(losses, start):
    assert list(losses[start]) == [1, 2] and losses[start] == losses["a config"]


def test_every_command_of_a_wheel_explains_itself_and_says_where_it_needs_the_repository(
    installed, tmp_path
):
    done = outside(installed, tmp_path, ["python", "-c", EVERY_COMMAND])
    assert done.returncode == 0, done.stderr[-2000:]
    statuses, of_repository = json.loads(done.stdout.splitlines()[-1])
    assert set(statuses.values()) == {0} and {"train", "make-demo-data", "evaluate"} <= set(
        statuses
    )
    assert of_repository == [2, 2]
    first, second = done.stderr.splitlines()
    assert first.startswith("error: this command needs train_configs/study of the repository")
    assert second.startswith("error: this command needs run_train.sh of the repository")
    listed = outside(installed, tmp_path, ["symbiotic", "--help"])
    assert listed.returncode == 0 and all(f"\n  {name} " in listed.stdout for name in statuses)
    assert not any(tmp_path.iterdir())


def test_a_wheel_has_the_data_of_the_package_and_says_that_it_is_typed(installed):
    [package] = installed.parent.glob("lib/python3*/site-packages/symbiotic_titan")

    def files(root):
        return {str(path.relative_to(root)) for path in root.rglob("*.*") if path.suffix != ".pyc"}

    assert (
        files(package)
        == files(ROOT / "symbiotic_titan")
        >= {"py.typed", "model/flavors/debug.json"}
    )
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    from symbiotic_titan.cli import EXTRAS

    assert set(EXTRAS.values()) <= set(extras)
