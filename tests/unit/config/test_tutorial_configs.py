"""The TOML of the pages that users follow has keys, types and ranges that a run accepts."""

import re
import tomllib
from pathlib import Path

import pytest

from symbiotic_titan.config.job import job_config_class
from symbiotic_titan.config.load import check_table, load_job_config

ROOT = Path(__file__).parents[3]
PAGES = [
    ROOT / "docs/getting_started.md",
    ROOT / "docs/troubleshooting.md",
    *sorted((ROOT / "docs/tutorials").glob("*.md")),
]
BLOCKS = [
    pytest.param(block, id=f"{path.stem} {number}")
    for path in PAGES
    for number, block in enumerate(
        re.findall(r"^ *```toml\n(.*?)^ *```", path.read_text(), re.MULTILINE | re.DOTALL), 1
    )
]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_run_accepts_every_key_of_a_documented_config(block):
    table = tomllib.loads(block)
    table.pop("extends", None)
    check_table(job_config_class(), table)
    assert table


@pytest.mark.parametrize("block", [block for block in BLOCKS if "extends = " in block.values[0]])
def test_a_documented_config_can_be_loaded_with_what_it_extends(block, tmp_path):
    config = tmp_path / "mine.toml"
    config.write_text(block.replace('extends = "', f'extends = "{ROOT}/'))
    job = load_job_config(["--job.config_file", str(config)])
    assert job.job.dump_folder.startswith("outputs/")
    assert job.data.sources
