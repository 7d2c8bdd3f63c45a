"""Heat maps of routing: what a cell shows, and that out of reach is not the same as idle."""

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.plots.expert_maps import equal_shares, expert_map
from symbiotic_titan.plots.style import as_pixels
from symbiotic_titan.sequence.modality import TEXT, VAE, VIT

GROUPS = (ExpertGroup("und", (TEXT, VIT), 4), ExpertGroup("gen", (VAE,), 2))


def test_a_cell_is_in_units_of_an_equal_share_of_its_layer():
    reach = np.array([True] * 4 + [False] * 2)
    shares = equal_shares(np.array([[4, 2, 2, 0, 0, 0], [0] * 6]), reach)
    assert shares[:, :4].tolist() == [[2, 1, 1, 0], [0, 0, 0, 0]]
    assert np.isnan(shares[:, 4:]).all()


def map_of(modality, counts):
    figure = expert_map("a title", np.array(counts), modality, GROUPS, [1, 5])
    panel, bar = figure.axes
    [image] = panel.images
    hatched = [p for p in panel.patches if isinstance(p, Rectangle) and p.get_hatch()]
    return figure, panel, bar, image, [(p.get_x(), p.get_width(), p.get_height()) for p in hatched]


def test_axes_scale_groups_and_what_is_out_of_reach_are_shown():
    figure, panel, bar, image, hatched = map_of(TEXT, [[4, 2, 2, 0, 0, 0], [2, 2, 2, 2, 0, 0]])
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("expert", "layer")
    assert [tick.get_text() for tick in panel.get_yticklabels()] == ["1", "5"]
    assert bar.get_ylabel() == "assignments / equal share"
    assert [text.get_text() for text in panel.texts] == ["und", "gen"]
    assert [line.get_xdata()[0] for line in panel.lines] == [3.5] and hatched == [(3.5, 2, 2)]
    mask = np.ma.getmaskarray(image.get_array())
    assert mask[:, 4:].all() and not mask[:, :4].any(), "an idle expert has a colour, that of 0"
    assert image.get_clim() == (0, 2)
    assert figure.legends[0].get_texts()[0].get_text() == "out of reach of this modality"


def test_the_scale_grows_with_a_busier_expert_and_a_group_of_all_has_no_hatching():
    *_, image, hatched = map_of(VAE, [[0, 0, 0, 0, 8, 0], [0] * 6])
    assert image.get_clim() == (0, 2) and hatched == [(-0.5, 4, 2)]
    everyone = (ExpertGroup("all", (TEXT, VIT, VAE), 6),)
    figure = expert_map("t", np.array([[9, 0, 0, 0, 0, 0]]), VIT, everyone, [0])
    assert figure.axes[0].images[0].get_clim() == (0, 6) and not figure.legends


@pytest.mark.parametrize(("num_layers", "num_experts"), [(2, 6), (47, 128)])
def test_a_map_of_any_size_can_be_read(num_layers, num_experts):
    group = (ExpertGroup("und", (TEXT,), num_experts),)
    counts = np.random.default_rng(0).integers(0, 9, (num_layers, num_experts))
    pixels = as_pixels(expert_map("t", counts, TEXT, group, range(num_layers)))
    height, width, colours = pixels.shape
    assert colours == 3 and 250 <= height <= 1200 and 500 <= width <= 1500
