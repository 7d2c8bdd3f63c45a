"""symbiotic plot as a user calls it: pictures, page, messages."""

import base64
import json
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

from symbiotic_titan import cli
from symbiotic_titan.commands import plot
from symbiotic_titan.evaluation.kept import result_file
from symbiotic_titan.evaluation.suite import measure
from symbiotic_titan.plots import curves
from symbiotic_titan.plots.expert_figures import expert_counts, layer_imbalance
from symbiotic_titan.plots.expert_use import from_run
from symbiotic_titan.plots.logs import read_run
from symbiotic_titan.plots.page import final_values
from symbiotic_titan.plots.style import COLORS, MissingData
from tests.helpers.written_runs import GROUPS, Log, write_full_run

ROOT = Path(__file__).parents[3]
ON_PAGE, OTHERS = ("5b", "6b", "7", "10"), ("5a", "6c", "8", "9")
OF_RESULTS = ("6a", "11")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """(folder of the output, run): half of the figures of two runs, drawn once."""
    folder = tmp_path_factory.mktemp("plot")
    run = write_full_run(folder / "full")
    other = Log(folder / "other").scalars("loss/by_task/t2i_flow", {10: 2.0, 20: 1.0})
    other.scalars("loss/by_task/lm_text", {10: 2.0, 20: 1.0}).close()
    arguments = [str(run), str(folder / "other"), "--labels", "ours", "<other>"]
    assert plot.main([*arguments, "--out", str(folder / "out"), "--figures", *ON_PAGE]) == 0
    return folder / "out", run


def has_sensible_size(path):
    with Image.open(path) as picture:
        width, height = picture.size
    return 900 <= width <= 2400 and 450 <= height <= 2400


def test_figures_are_pictures_of_a_sensible_size(drawn):
    out, _ = drawn
    assert {path.name for path in out.glob("*.png")} == {f"figure_{name}.png" for name in ON_PAGE}
    assert all(has_sensible_size(path) for path in out.glob("*.png"))


def test_so_are_all_the_others(drawn, tmp_path):
    _, run = drawn
    assert plot.main([str(run), "--out", str(tmp_path), "--figures", *OTHERS]) == 0
    assert all(has_sensible_size(tmp_path / f"figure_{name}.png") for name in OTHERS)
    assert not set(OTHERS + ON_PAGE + OF_RESULTS) ^ set(plot.FIGURES)


def test_the_page_holds_the_pictures_themselves_and_asks_no_network(drawn):
    out, _ = drawn
    text = (out / "index.html").read_text()
    embedded = [base64.b64decode(found) for found in re.findall(r"base64,([^\"]+)", text)]
    assert embedded == [(out / f"figure_{name}.png").read_bytes() for name in ON_PAGE]
    assert not re.search(r"(src|href)=\"(?!data:)|https?:", text)


def test_the_page_has_the_final_values(drawn):
    out, _ = drawn
    text = (out / "index.html").read_text()
    rows = dict(re.findall(r"<tr><td>([^<]*)</td>(.*?)</tr>", text))
    cells = {tag: re.findall(r"<td>(.*?)</td>", row) for tag, row in rows.items()}
    # 40 values: the last one, and the mean of the last four; the second run has two.
    assert cells["loss/by_task/t2i_flow"] == ["401", "386", "1", "1"]
    assert cells["validation/by_task/lm_text"] == ["404", "389", "", ""]
    assert cells["tokens/vae"] == ["411", "", "", ""]
    assert "&lt;other&gt;" in text and "<other>" not in text


def test_final_values_of_a_short_run(tmp_path):
    Log(tmp_path).scalars("a", {1: 4.0, 2: 6.0}).close()
    run = read_run(tmp_path, "r")
    assert final_values(run, "a") == (6.0, 6.0) and final_values(run, "b") is None


def test_a_missing_tag_is_told_in_one_line(tmp_path, capsys):
    Log(tmp_path / "run").scalars("loss/by_task/lm_text", {1: 2.0, 2: 1.0}).close()
    assert plot.main([str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        "figure 5a is skipped: no run has routing/capacity_rate/all or routing/capacity_rate_global/all"
        in lines
    )
    assert "figure 6b: training loss, because run logged no validation/by_task/lm_text" in lines
    assert [line for line in lines if "figure 7 is skipped: no counts of text and vit" in line]
    assert [path.name for path in tmp_path.glob("out/*.png")] == ["figure_6b.png"]


def test_a_run_keeps_its_colour_where_another_has_no_data(tmp_path):
    Log(tmp_path / "a").scalars("loss/text", {1: 1.0}).close()
    Log(tmp_path / "b").scalars("routing/capacity_rate/all", {1: 1.0}).counts(1).close()
    first, second = (read_run(tmp_path / name, name, i) for i, name in enumerate(("a", "b")))
    (line,) = curves.capacity_rate([first, second]).figure.axes[0].lines
    use = from_run(second, step=None, window=1)
    assert line.get_color() == COLORS[1]
    assert layer_imbalance([use]).figure.axes[0].lines[0].get_color() == COLORS[1]


def test_both_capacity_rates_are_shown_and_named_and_an_older_run_has_one(tmp_path):
    new, old = read_run(write_full_run(tmp_path / "new"), "new"), Log(tmp_path / "old")
    for name in ("all", "text", "vit", "vae"):
        old.scalars(f"routing/capacity_rate/{name}", {1: 1.0, 2: 0.5})
    old.close()
    old = read_run(tmp_path / "old", "old")
    both, one = curves.capacity_rate([new]), curves.capacity_rate([old])
    headings = ["within each group", "over all experts of the layer"]
    assert [panel.get_title() for panel in both.figure.axes] == headings
    assert len(one.figure.axes) == 1 and one.notes == [
        "old has no routing/capacity_rate_global/all"
    ]
    grid = curves.capacity_by_modality([new, old]).figure.axes
    assert [panel.get_title() for panel in grid] == 2 * ["text tokens", "vit tokens", "vae tokens"]
    assert [panel.get_ylabel() for panel in (grid[0], grid[3])] == [
        f"capacity rate {scope}" for scope in headings
    ]
    assert [len(panel.lines) for panel in grid] == [3, 3, 3, 2, 2, 2]  # the new one is smoothed
    assert len(curves.capacity_by_modality([old]).figure.axes) == 3


def test_held_out_and_training_loss_never_share_an_axis(tmp_path):
    def run(label, *tags):
        log = Log(tmp_path / label)
        for tag in tags:
            log.scalars(tag, {1: 2.0, 2: 1.0})
        log.close()
        return read_run(tmp_path / label, label)

    held_out, training = "validation/by_task/lm_text", "loss/by_task/lm_text"
    both, one, neither = run("both", held_out, training), run("one", training), run("neither", "a")
    drawing = curves.language([both, neither])
    assert "held-out loss" in drawing.title and drawing.notes == [f"neither has no {held_out}"]
    drawing = curves.language([both, one])
    assert "TRAINING loss" in drawing.title
    assert drawing.notes == [f"training loss, because one logged no {held_out}"]
    with pytest.raises(MissingData, match=f"no run has {held_out} or {training}"):
        curves.language([neither])


def test_a_profile_alone_gives_figures_7_and_8(tmp_path, capsys):
    counts = [[[5, 4, 3, 2], [1, 2, 3, 4], [0, 0, 0, 0]]] * 3
    (tmp_path / "p.json").write_text(json.dumps({"counts": counts}))
    assert plot.main(["--profile", str(tmp_path / "p.json"), "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["figure_7.png", "figure_8.png"]
    assert "skipped" not in capsys.readouterr().out


def test_figure_8_takes_the_layer_and_says_what_is_shared(tmp_path):
    use = from_run(read_run(write_full_run(tmp_path), "r"), step=None, window=2)
    upper, lower = expert_counts([use], 3).figure.axes
    assert upper.get_title(loc="left") == (
        "r, layer 3, 2 logged steps, 100 to 200: top 2 in common: 0 (-); bottom 2 in common: 0 (-)"
    )
    heights = [patch.get_height() for patch in upper.containers[0]]
    assert heights == [n * 300 * 3 for n in range(8, 0, -1)]
    assert len(lower.containers[0]) == GROUPS[0].num_experts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the dump folder of at least one run, or a file with --profile"),
        (["RUN", "--figures", "5a", "5c"], "--figures: unknown figure '5c'; choose from 5a, 5b,"),
        (["RUN", "--labels", "a", "b"], "--labels: 2 names for 1 runs; give one for each"),
        (["RUN", "RUN", "--labels", "a", "a"], "--labels: names must differ, got a a"),
        (["RUN", "RUN"], "the run is given twice"),
        (["RUN", "--window", "0"], "--window: must be at least 1, got 0"),
        (["RUN", "--figures", "8", "--layer", "9"], "--layer 9: full has the MoE layers 1 to 3"),
        (["RUN", "--step", "3"], "--step 3: full logged counts at 1, 100, 200"),
        (["nowhere"], "nowhere: no such folder"),
        (["EMPTY"], "EMPTY: no TensorBoard logs below"),
    ],
)
def test_mistakes_are_told_in_one_line(drawn, tmp_path, capsys, arguments, message):
    (tmp_path / "EMPTY").mkdir()
    places = {"RUN": str(drawn[1]), "EMPTY": str(tmp_path / "EMPTY")}
    words = [places.get(word, word) for word in arguments]
    assert plot.main([*words, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_without_data_nothing_is_written(tmp_path, capsys):
    Log(tmp_path).scalars("a", {1: 1.0}).close()
    assert plot.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "error: there is nothing to draw\n"
    assert not (tmp_path / "out").exists()


# ---- kept scores ----------------------------------------------------------------------------------------------------------


def keep(out, run, step, score, *, probe="none", weights="trained", **options):
    """A result as symbiotic evaluate keeps it."""
    settings = {"pictures": 60, **options, "files": {"data": str(score)}}
    place = out / f"{run.name}-step-{step}-{probe}-{weights}"
    values = {
        "kind": "evaluation",
        "suite": "demo_world",
        "checkpoint": str(run / "checkpoint" / f"step-{step}"),
        "step": step,
        "probe": probe,
        "weights": weights,
        "settings": settings,
        "scores": {
            "answers/all": measure(
                score, number=9, interval=(score - 0.1, score + 0.2), chance=0.3
            ),
            "heldout/text": measure(2 * score, number=9),
        },
    }
    path = result_file(place, "demo_world", settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


@pytest.fixture
def scored(tmp_path):
    """(folder of results, two runs), with results of other options, ablations, weights and runs beside those that count."""
    out = tmp_path / "evaluation"
    ours, other = tmp_path / "ours", tmp_path / "other"
    for run in (ours, other, tmp_path / "third"):
        Log(run).scalars("a", {1: 1.0}).close()
        for step in (200, 100):
            keep(out, run, step, step / 400)
    keep(out, ours, 300, 0.9, pictures=8)
    keep(out, ours, 100, 0.1, probe="shared_only")
    keep(out, ours, 100, 0.7, weights="ema")
    return out, ours, other


def score_figures(out, *runs, name="11", **values):
    options = plot.parse([*map(str, runs), "--evaluation", str(out)])
    vars(options).update(values)
    found = plot.read_runs(options)
    return plot.score_drawing(name, found, plot.kept_results(options, found), options.scores)


def test_scores_are_drawn_against_steps_with_intervals_and_chance(scored):
    drawing = score_figures(*scored)
    [panel] = drawing.figure.axes
    first, second, chance = [line for line in panel.lines if line.get_linestyle() != "None"][:3]
    for line, color in ((first, COLORS[0]), (second, COLORS[1])):
        assert line.get_xydata().tolist() == [[100, 0.25], [200, 0.5]]
        assert line.get_color() == color
    assert chance.get_ydata() == [0.3, 0.3] and panel.get_title() == "answers/all"
    [bars, _] = panel.collections
    ends = [end for segment in bars.get_segments() for end in segment[:, 1].tolist()]
    assert ends == pytest.approx([0.15, 0.45, 0.4, 0.7])
    assert drawing.notes[0].startswith("demo_world: 1 results with other options than demo_world-")


def test_the_shared_expert_alone_averages_and_any_score_can_be_chosen(scored):
    out, ours, _ = scored
    [panel] = score_figures(out, ours, name="6a").figure.axes
    assert panel.lines[0].get_xydata().tolist() == [[100, 0.1]]
    [panel] = score_figures(out, ours, weights="ema").figure.axes
    assert panel.lines[0].get_xydata().tolist() == [[100, 0.7]]
    [panel] = score_figures(out, ours, scores=["heldout/text"]).figure.axes
    assert panel.get_title() == "heldout/text" and panel.lines[0].get_ydata().tolist() == [0.5, 1.0]
    with pytest.raises(
        MissingData, match="name the folder of symbiotic evaluate with --evaluation"
    ):
        score_figures(out, ours, name="6a", weights="ema")


def test_files_of_every_format_are_written_and_are_the_same_every_time(scored, tmp_path):
    out, ours, _ = scored
    words = [str(ours), "--evaluation", str(out), "--figures", "11", "--format", "svg", "pdf"]
    for folder in ("a", "b"):
        assert plot.main([*words, "--out", str(tmp_path / folder)]) == 0
    names = {"figure_11.svg", "figure_11.pdf", "index.html"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names
    assert (tmp_path / "a" / "figure_11.pdf").read_bytes().startswith(b"%PDF")
    assert "<svg" in (tmp_path / "a" / "figure_11.svg").read_text()
    assert "data:image/png;base64" in (tmp_path / "a" / "index.html").read_text()
    for name in names:
        first, second = ((tmp_path / folder / name).read_bytes() for folder in ("a", "b"))
        assert first == second, name


def test_a_score_that_no_result_has_and_a_folder_that_is_missing_are_named(scored, capsys):
    out, ours, _ = scored
    assert plot.main([str(ours), "--evaluation", str(out), "--scores", "answer"]) == 2
    message = "--scores: no kept result has 'answer'; choose from answers/all, heldout/text"
    assert message in capsys.readouterr().err
    assert plot.main([str(ours), "--evaluation", str(out / "no")]) == 2
    assert "no such folder; name the --out of symbiotic evaluate" in capsys.readouterr().err
    assert plot.main([str(ours), "--scores", "answers/all"]) == 2
    assert "--scores: needs --evaluation" in capsys.readouterr().err


def test_without_matplotlib_the_command_that_installs_it_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    packages = ("matplotlib.", "symbiotic_titan.plots", "symbiotic_titan.commands.plot")
    for name in [name for name in sys.modules if name.startswith(packages)]:
        monkeypatch.delitem(sys.modules, name)
    assert cli.main(["plot", "outputs/none"]) == 2
    assert "symbiotic plot needs matplotlib: " in capsys.readouterr().err
