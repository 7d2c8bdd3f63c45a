"""The notebook of the documentation runs on a run of the tests, and is stored without results."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs/examples/explore_run.ipynb"


@pytest.fixture(scope="module")
def cells():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_it_is_stored_without_results_and_explains_itself(cells):
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert cells[0]["cell_type"] == "markdown" and len({cell["id"] for cell in cells}) == len(cells)


def test_its_cells_load_a_run_generate_ask_and_show_routing(cells, reference, capsys):
    first, *others = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    names: dict = {}
    exec(first, names)
    assert names.keys() >= {"RUN", "PROMPTS", "QUESTION", "SOLVER_STEPS"}
    names |= {"RUN": str(reference.folder), "SOLVER_STEPS": 2}
    for source in others:
        exec(source, names)
    assert len(names["pictures"]) == len(names["answers"]) == len(names["PROMPTS"])
    assert names["grid"].width > 200 and {"text", "vae"} <= names["images"].keys()
    printed = capsys.readouterr().out
    assert "million parameters" in printed and "text: busiest expert over the mean" in printed
