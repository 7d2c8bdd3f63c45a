"""What every file of the repository keeps to."""

import ast
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LARGEST_BYTES = 1_000_000

# Paths that exist on one machine only, and addresses of package registries. The brackets keep this file from matching.
PERSONAL_PATH = re.compile(r"(?<![\w.~-])/(?:home|Users|root|work)/[\w.]")
REGISTRY = re.compile(
    r"p[y]pi\.org|p[y]thonhosted\.|download\.p[y]torch\.|repo\.anac[o]nda\.|index-[u]rl"
)


def repository_files() -> list[Path]:
    """Files that git tracks, or would track with the next ``git add``."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name]
    return [path for path in files if path.is_file()]


def text_files() -> list[Path]:
    binary = {".png", ".jpg", ".tar", ".parquet", ".npz", ".pt", ".safetensors", ".xz"}
    return [path for path in repository_files() if path.suffix not in binary]


def lines_matching(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]


def test_no_file_is_larger_than_a_megabyte():
    assert not [str(path) for path in repository_files() if path.stat().st_size > LARGEST_BYTES]


def test_no_file_names_a_path_of_somebodys_machine():
    assert PERSONAL_PATH.search("see /" + "home/x/y") and not PERSONAL_PATH.search("a/home/x")
    assert not lines_matching(PERSONAL_PATH)


def test_no_file_names_a_package_registry():
    assert REGISTRY.search("https://p" + "ypi.org/simple")
    assert not lines_matching(REGISTRY)


def test_no_link_is_tracked():
    command = ["git", "ls-files", "--stage"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    assert not [line for line in listed.splitlines() if line.startswith("120000")]


# What loads may come from a stranger. A call -> the keyword that keeps it from running what it finds; None: there is none.
SAFE_BY = {
    **{"torch.load": "weights_only", "dcp.load": "planner"},
    # Unlike transformers, which reads pickled tensors with weights_only by itself.
    **{"AutoencoderKL.from_pretrained": "use_safetensors"},
    **dict.fromkeys(("pickle.load", "pickle.loads", "np.load", "yaml.load", "FileSystemReader")),
}
# Its own parent writes what it reads.
OWN_PICKLES = {"symbiotic_titan/data/index_helper.py"}


def is_safe(keyword: ast.keyword, wanted: str | None) -> bool:
    return keyword.arg == wanted is not None and ast.unparse(keyword.value) not in ("False", "None")


def unsafe_loads(source: str) -> list[str]:
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        f"{call.lineno}: {name}"
        for call in calls
        if (name := ast.unparse(call.func)) in SAFE_BY
        and not any(is_safe(keyword, SAFE_BY[name]) for keyword in call.keywords)
        or any(keyword.arg == "trust_remote_code" for keyword in call.keywords)
    ]


def test_the_package_loads_nothing_that_could_run():
    wrong = "torch.load(f)", "np.load(f)", "FileSystemReader(f)", "f(trust_remote_code=x)"
    wrong += "torch.load(f, weights_only=False)", "dcp.load(s, planner=None)"
    assert all(map(unsafe_loads, wrong)) and not unsafe_loads("torch.load(f, weights_only=True)")
    files = {str(path.relative_to(ROOT)): path for path in ROOT.glob("symbiotic_titan/**/*.py")}
    found = {name: unsafe_loads(path.read_text()) for name, path in files.items()}
    assert {name for name, calls in found.items() if calls} == OWN_PICKLES


def test_license_is_bsd_3_clause_and_says_whose():
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith("BSD 3-Clause License")
    assert "symbiotic_titan authors" in text


def test_citation_and_changelog_are_of_this_version():
    source = (ROOT / "symbiotic_titan" / "__init__.py").read_text()
    version = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    assert version
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {version[1]}\n" in citation and "arXiv:2604.07753" in citation
    changes = re.findall(r"^## ([\w.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert changes[:2] == ["Unreleased", version[1]]


@pytest.mark.parametrize(
    "script", ["run_train.sh", "tests/run.sh", "tools/setup_env.sh", ".ci/run"]
)
def test_script_can_be_executed(script):
    assert os.access(ROOT / script, os.X_OK)
    assert (ROOT / script).read_text().startswith("#!/usr/bin/env bash\n")


@pytest.mark.parametrize("tool", sorted(path.name for path in ROOT.glob("tools/*.py")))
def test_tool_can_be_executed(tool):
    assert os.access(ROOT / "tools" / tool, os.X_OK)
    assert (ROOT / "tools" / tool).read_text().startswith("#!/usr/bin/env python")


@pytest.mark.parametrize("config", sorted(path.name for path in ROOT.glob("train_configs/*.toml")))
def test_config_parses_and_opens_with_what_it_is_for(config):
    text = (ROOT / "train_configs" / config).read_text()
    assert text.startswith("# ")
    assert "Command:" in text.split("\n\n")[0] + text.split("\n\n")[1]
    assert tomllib.loads(text)
