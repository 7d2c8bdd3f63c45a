"""The HTML pages that commands write, in a browser: nothing is cut off on a phone or beside a wide window, and they follow the reader's
choice of light or dark."""

from itertools import product

import numpy as np
import pytest

from symbiotic_titan.commands import plot, show_batch
from symbiotic_titan.study.page import write_page
from symbiotic_titan.study.paper import LANGUAGE
from tests.helpers.browser import page_widths, screenshots
from tests.helpers.launch import ROOT
from tests.helpers.written_runs import write_full_run
from tests.helpers.written_studies import write_system

PHONE, DESK = (390, 700), (1280, 700)
PAPER = {False: (255, 255, 255), True: (20, 23, 26)}  # of the template, light and dark


@pytest.fixture(scope="module")
def pages(tmp_path_factory, demo):
    folder = tmp_path_factory.mktemp("pages")
    return {"plot": plots(folder), "reproduce": study(folder), "show-batch": batch(folder, demo)}


def plots(folder):
    run = write_full_run(folder / "run")
    assert plot.main([str(run), "--out", str(folder / "plots"), "--figures", "5b", "7"]) == 0
    (page,) = (folder / "plots").glob("*.html")
    return page


def study(folder):
    for seed, (number, system) in product(range(3), enumerate(("symbiotic", "mot"))):
        loss = 1.5 + 0.01 * seed + number
        curves = {"validation/by_task/lm_text": {0: 1.6, 50: loss}}
        place = folder / f"study/seed-{seed}" / system
        write_system(place, before={"text": loss}, scores={LANGUAGE.key: loss}, curves=curves)
    (folder / "study/settings.json").write_text("{}")
    return write_page(folder / "study")


def batch(folder, demo):
    config = folder / "job.toml"
    text = (ROOT / "train_configs/debug.toml").read_text()
    config.write_text(text.replace("demo_data/", f"{demo}/"))
    assert (
        show_batch.main([str(config), "--batches", "2", "--out", str(folder / "batch.html")]) == 0
    )
    return folder / "batch.html"


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_no_page_is_wider_than_its_window(pages, size, tmp_path):
    widths = page_widths(list(pages.values()), size[0], tmp_path)
    assert 0 < min(widths.values()) and max(widths.values()) <= size[0], widths


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_pages_are_light_or_dark_as_the_reader_likes(pages, size, dark, tmp_path):
    shown = screenshots(list(pages.values()), size, tmp_path, dark=dark)
    for name, picture in zip(pages, shown, strict=True):
        pixels_HW3 = np.asarray(picture).astype(int)
        assert picture.getpixel((2, 2)) == PAPER[dark], name
        is_ink_HW = np.abs(pixels_HW3 - PAPER[dark]).max(-1) > 60
        assert 0.005 < is_ink_HW.mean() < 0.5, name
        assert not is_ink_HW[:, :4].any() and not is_ink_HW[:, -4:].any(), f"{name} has no margin"


def test_the_browser_measures_what_is_too_wide(tmp_path):
    page = tmp_path / "wide.html"
    page.write_text("<!doctype html><body style='margin: 0'><div style='width: 900px'>wide</div>")
    assert page_widths([page], PHONE[0], tmp_path) == {page.as_uri(): 900}
