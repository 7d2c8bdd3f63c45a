"""The page of a study that the test has written: what is on it, and that it needs nothing else."""

import json
import re

import pytest
from PIL import Image

from symbiotic_titan.study import figures
from symbiotic_titan.study.page import direction, interval, markdown, signed, write_page
from symbiotic_titan.study.paper import ANSWERS, CLAIMS, FLOW, LANGUAGE
from symbiotic_titan.study.results import Measure, read_study
from symbiotic_titan.study.statistics import estimate
from tests.helpers.written_studies import write_system

STRANGER = "<b>x|y</b>"
CURVE = "validation/by_task/lm_text"
# System -> (language loss, share of right answers); MoT is missing.
LEVELS = {"symbiotic": (1.5, 0.6), "only_lm_mmu": (1.2, 0.6), "standard_moe": (2.0, 0.3)}
LEVELS |= {"wo_shield": (1.5, 0.6)}


def write_seed(place, seed):
    """Of <b>x|y</b> only what was measured before the first step, of standard_moe no curve."""
    shift = (0.0, 0.02, -0.01)[seed]
    for name, (loss, right) in LEVELS.items():
        noise = shift * (name == "wo_shield")
        scores = {LANGUAGE.key: loss + shift + noise, ANSWERS["all"].key: right + 10 * noise}
        curves = {CURVE: {0: 1.6 + shift, 50: loss + shift}, "perf/step_seconds": {50: 1.2}}
        before = {"text": loss + shift, "by_task/mmu_text": 0.5}
        shown = None if name == "standard_moe" else curves
        columns = {"original": {"text": 1.4 + shift}} if name == "symbiotic" else None
        folder = place / name
        gradients = (
            {"norm/vae": 0.5 + shift, "norm/vae/layer_01": 1.0} if name == "wo_shield" else None
        )
        curves["tokens/vae"] = {50: 52_000.0}
        write_system(
            folder,
            before=before,
            scores=scores,
            curves=shown,
            columns=columns,
            gradients=gradients,
        )
    write_system(place / "bimodal_22_10", before={"text": 1.55 + shift})
    # A slash cannot be in a folder's name.
    write_system(place / STRANGER.replace("/", ""), before={"text": 1.0})


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder of the page, its HTML, its statistics)."""
    out = tmp_path_factory.mktemp("study")
    for seed in range(3):
        write_seed(out / f"seed-{seed}", seed)
    (out / "settings.json").write_text(json.dumps({"commit": "<abc>", "seconds": 90, "more": {}}))
    path = write_page(out)
    assert path == out / "page/index.html"
    statistics = json.loads((path.parent / "statistics.json").read_text())
    return path.parent, path.read_text(), statistics


def verdicts(statistics):
    return {claim["claim"]: claim["verdict"] for claim in statistics["claims"]}


def test_a_claim_is_confirmed_refuted_undecided_or_not_measured(written):
    found = verdicts(written[2])
    assert len(found) == len(CLAIMS)
    assert found["Understanding data alone forgets"] == "refuted here"
    assert found["Language: Symbiotic > understanding only > MoT > standard MoE"] == "refuted here"
    assert found["Symbiotic's flow loss is the lowest"] == "not measured"
    splits = "Before the first step: the more experts understanding keeps, the less is lost"
    assert found[splits] == "not measured"
    parts = {c["claim"]: [p["verdict"] for p in c["parts"]] for c in written[2]["claims"]}
    assert parts[splits] == ["confirmed", "confirmed", "not measured", "not measured"]
    shield = "The shield protects understanding from the first steps of generation"
    assert parts[shield] == ["not decided", "not measured", "not decided"]


def test_the_page_shows_verdicts_and_numbers(written):
    _, text, statistics = written
    for verdict in ("confirmed", "refuted here", "not decided", "not measured"):
        number = list(verdicts(statistics).values()).count(verdict)
        assert (f"<b>{number}</b>" in text) == (number > 0) and verdict in text
    pair = statistics["symbiotic - other"][LANGUAGE.name]["only_lm_mmu"]
    assert pair["mean"] == pytest.approx(0.3) and pair["low"] == pytest.approx(pair["high"])
    assert "+0.300 ± 0.000 (−)" in text and "−0.500 ± 0.000 (+)" not in text
    low, high = (statistics["estimates"][LANGUAGE.name]["symbiotic"][k] for k in ("low", "high"))
    assert f"{(low + high) / 2:.3f} ± {(high - low) / 2:.3f}" in text


def test_what_is_missing_is_named(written):
    folder, text, _ = written
    assert "<li>seed 0, mot: was not run</li>" in text
    assert "<li>seed 2, standard_moe: has no curves (tb/)</li>" in text
    assert "- seed 0, mot: was not run" in (folder / "page.md").read_text()


def test_tokens_and_gradients_are_shown_where_they_were_measured(written):
    folder, text, _ = written
    rows = re.findall(r"<tr><td>norm/vae</td>(.*?)</tr>", text)
    assert [re.findall(r"<td>(.*?)</td>", row) for row in rows] == [["–"] * 2 + ["0.503 ± 0.038"]]
    assert "layer_01" not in text
    assert "<td>– / – / 52</td>" in text and "| – / – / 52 |" in (folder / "page.md").read_text()


def test_names_are_escaped(written):
    folder, text, _ = written
    assert "&lt;b&gt;x|y&lt;b&gt;" in text and "<b>x" not in text
    assert "90 (2 minutes)" in text and "&lt;abc&gt;" in text and "<abc>" not in text
    table = (folder / "page.md").read_text()
    assert "| \\<b>x\\|y\\<b> |" in table
    assert markdown("a_b*c`d[e\\") == "a\\_b\\*c\\`d\\[e\\\\"


def test_the_page_is_one_file_with_alternative_texts(written):
    folder, text, _ = written
    assert len(text.encode()) < 1_000_000
    assert not re.search(r"(src|href)=\"(?!data:|#)|https?:|@import|url\(", text)
    alts = re.findall(r"<img alt=\"([^\"]+)\" src=\"data:image/png;base64,", text)
    assert len(alts) == text.count("<img") == len(list(folder.glob("figure_*.png")))
    assert any("At the end: Symbiotic 1.5" in alt for alt in alts)
    assert "Here 40 held-out questions in each seed." in text
    assert {"prefers-color-scheme: dark", "width=device-width"} <= set(
        re.findall(r"prefers-color-scheme: dark|width=device-width", text)
    )


def test_figures_are_small_pictures_and_those_without_data_are_left_out(written):
    folder, _, _ = written
    names = {path.stem for path in folder.glob("*.png")}
    expected = ("language", "shield", "answers", "difference_language", "difference_answers_all")
    assert names == {"study", *(f"figure_{name}" for name in expected)}
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            assert picture.size[0] >= 700 and path.stat().st_size < 200_000


def test_the_markdown_has_whole_tables_and_links_to_its_figures(written):
    folder, _, _ = written
    lines = (folder / "page.md").read_text().splitlines()
    linked = {match[1] for line in lines if (match := re.fullmatch(r"!\[.*\]\((\S+)\)", line))}
    assert linked == {path.name for path in folder.glob("*.png")}
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")]
    tables = "\n".join(line if line.startswith("|") else "" for line in lines).split("\n\n")
    for table in filter(str.strip, tables):
        rows = [len(re.findall(r"(?<!\\)\|", row)) for row in table.strip().splitlines()]
        assert len(rows) >= 2 and set(rows) == {rows[0]}
    assert len(widths) > 40


def test_a_system_has_one_colour_and_the_papers_four_are_solid():
    styles = {name: figures.style_of(name) for name in figures.SYSTEMS}
    assert len({(style["color"], style["linestyle"]) for style in styles.values()}) == len(styles)
    solid = {name for name, style in styles.items() if style["linestyle"] == "-"}
    assert solid == {"symbiotic", "standard_moe", "mot", "only_lm_mmu"}
    assert figures.line_of("mot").get_color() == figures.point("mot").get_color()


def test_flow_is_shown_of_systems_that_train_it(tmp_path):
    for seed in range(2):
        for name in ("symbiotic", "mot", "only_lm_mmu"):
            scores, curve = {FLOW.key: 0.5 + seed}, {figures.FLOW_CURVE: {1: 1.5, 2: 0.5}}
            write_system(tmp_path / f"seed-{seed}/{name}", scores=scores, curves=curve)
    study = read_study(tmp_path, ())
    (flow,) = (curve for curve in figures.CURVES if curve.tag == figures.FLOW_CURVE)
    assert len(figures.curve_figure(study, flow).axes[0].lines) == 2
    panel = figures.difference_figure(study, FLOW).axes[0]
    assert [text.get_text() for text in panel.get_yticklabels()] == ["MoT"]


def test_a_curve_is_the_mean_over_seeds_at_steps_that_all_have():
    steps, values = figures.mean_curve({0: {1: 2.0, 2: 4.0, 3: 9.0}, 5: {2: 6.0, 1: 0.0}})
    assert steps.tolist() == [1, 2] and values.mean(0).tolist() == [1.0, 5.0]


def test_directions_and_words():
    lower = estimate({0: -1.0, 1: -1.1, 2: -0.9}, "d")
    assert direction(lower, FLOW) == "better" and direction(lower, ANSWERS["all"]) == "worse"
    assert direction(estimate({0: -1.0, 1: 1.0}, "d"), FLOW) == "level"
    assert direction(None, FLOW) == "level"
    assert signed(lower) == "−1.000 ± 0.248" and signed(None) == "–" == interval(None)
    assert signed(estimate({0: -1e-9, 1: 1e-9}, "d")) == "0.000 ± 0.000"
    assert interval({4: 0.5}) == "0.500 (seed 4 alone)"


def test_one_seed_is_no_study(tmp_path):
    write_seed(tmp_path / "seed-0", 0)
    with pytest.raises(ValueError, match="at least 2 seeds, got seed 0 alone"):
        write_page(tmp_path)
    assert not (tmp_path / "page").exists()


def test_a_study_that_has_only_begun_has_a_page(tmp_path):
    for seed in range(2):
        write_system(tmp_path / f"seed-{seed}/symbiotic", before={"text": 1.0 + seed})
    text = write_page(tmp_path).read_text()
    assert "not measured" in text and "<img" not in text
    study = read_study(tmp_path, ("symbiotic",))
    assert study.estimate("symbiotic", Measure("t", "before", "text")).mean == 1.5
