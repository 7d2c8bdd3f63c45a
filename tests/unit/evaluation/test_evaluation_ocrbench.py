"""Questions from a TSV file: how it is read, OCRBench's rule for right answers, and a run from file to scores."""

import base64
import csv
import io
import json

import pytest
from PIL import Image

from symbiotic_titan.evaluation.intervals import of_share
from symbiotic_titan.evaluation.suites.ocrbench import (
    FORMULA,
    OcrBenchOptions,
    OcrQuestion,
    is_right,
    ocr_score,
    read_questions,
    run_ocrbench,
)
from symbiotic_titan.inference.generator import Completion

COLUMNS = ("index", "image", "question", "answer", "category")
VQA = "Scene Text-centric VQA"


def encoded(colour, size=(24, 16)):
    """Long enough not to be taken for an index."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


ROWS = [
    ("0", encoded("red"), "what is\nwritten?", "['CENTRE', 'center']", "Regular Text Recognition"),
    ("1", "0", 'what does the "sign" say?', "['stop']", VQA),
    ("2", encoded("blue"), "which number?", "12", VQA),
]


@pytest.fixture
def make_file(tmp_path):
    def make(rows=ROWS, columns=COLUMNS):
        path = tmp_path / "ocr.tsv"
        with path.open("w", newline="") as file:
            csv.writer(file, delimiter="\t").writerows([columns, *rows])
        return path

    return make


def question(*answers, category=VQA):
    return OcrQuestion("0", "", "?", answers, category)


def test_a_file_is_read_with_its_line_ends_quotes_and_shared_images(make_file):
    first, second, third = read_questions(make_file())
    assert first.question == "what is\nwritten?" and first.answers == ("CENTRE", "center")
    assert second.question == 'what does the "sign" say?' and second.image == first.image
    assert third.answers == ("12",) and third.image != first.image


def test_an_image_may_be_longer_than_the_csv_module_allows(make_file):
    image = encoded("red") + "A" * 200_000
    [read] = read_questions(make_file([("0", image, "?", "x", VQA)]))
    assert read.image == image


@pytest.mark.parametrize(
    ("prediction", "asked", "right"),
    [
        ("The sign says STOP.", question("stop"), True),
        ("sto p", question("stop"), False),
        ("go", question("stop", "go"), True),
        ("two\nlines", question("Two lines "), True),
        ("", question("stop"), False),
        (r"so \frac{a} {B}", question(r"\frac {a}{B}", category=FORMULA), True),
        (r"\frac{a}{b}", question(r"\frac{a}{B}", category=FORMULA), False),
    ],
)
def test_an_answer_is_right_where_it_holds_a_true_one(prediction, asked, right):
    assert is_right(prediction, asked) == right


def test_text_recognition_is_one_category_of_six():
    kinds = ["Handwriting Recognition", "Digit String Recognition", VQA, FORMULA]
    scores = ocr_score(["yes", "no", "yes", "no"], [question("yes", category=k) for k in kinds])
    assert {name.removeprefix("ocrbench/"): m["score"] for name, m in scores.items()} == {
        "all": 0.5,
        "Text Recognition": 0.5,
        VQA: 1.0,
        FORMULA: 0.0,
    }
    assert scores["ocrbench/all"]["number"] == 4


def test_chance_is_always_giving_the_best_answer_of_a_category():
    first = [question(*answers) for answers in (("stop",), ("go", "stop"), ("slow",), ("go",))]
    second = [question("x y", category=FORMULA), question("xy z", category=FORMULA)]
    scores = ocr_score(["no"] * 6, first + second)
    # Of signs "stop" and "go" are right twice each; a formula that holds another one answers both.
    assert (
        scores[f"ocrbench/{VQA}"]["chance"] == 0.5 and scores[f"ocrbench/{FORMULA}"]["chance"] == 1
    )
    assert scores["ocrbench/all"]["chance"] == pytest.approx(4 / 6)
    assert scores["ocrbench/all"]["score"] == 0 and scores["ocrbench/all"]["interval"][0] == 0


class Reader:
    """Says the colour of the image, and the first word of the question."""

    def text(self, prompts, images, *, max_tokens, batch_size, advance):
        assert len(prompts) <= batch_size and max_tokens == 7
        advance(len(prompts))
        colours = ["red" if i.getpixel((0, 0)) == (255, 0, 0) else "blue" for [i] in images]
        texts = [f"{c} {p.split()[0]}" for c, p in zip(colours, prompts, strict=True)]
        return [Completion(text, [], "end") for text in texts]


def test_a_run_asks_every_question_about_its_image(make_file, tmp_path):
    rows = [
        (*row[:3], answer, VQA) for row, answer in zip(ROWS, ("RED", "blue", "blue w"), strict=True)
    ]
    done = []
    options = OcrBenchOptions(str(make_file(rows)), max_tokens=7, batch_size=2)
    scores = run_ocrbench(Reader(), options, tmp_path, lambda what, total: done.append)
    assert scores["ocrbench/all"] == {
        "score": pytest.approx(2 / 3),
        "interval": list(of_share(2, 3)),
        "chance": pytest.approx(2 / 3),  # "blue" is right where "blue w" is wanted not, nor "RED"
        "upper_bound": 1.0,
        "number": 3,
    }
    assert sum(done) == 3
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["right"] for line in lines] == [True, False, True]
    assert json.loads(lines[1])["given"] == "red what"


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (
            ROWS,
            ("index", "image", "question", "answers", "kind"),
            "'answer', 'category' is missing, there are: index",
        ),
        ([], COLUMNS, "holds no questions"),
        ([("0", "7", "?", "x", VQA)], COLUMNS, "question 0: its image is that of '7'"),
        ([("0", encoded("red"), "?", "", VQA)], COLUMNS, "question 0: has no answer"),
    ],
)
def test_a_bad_file_is_named_before_a_model_is_loaded(make_file, rows, columns, message):
    with pytest.raises(ValueError, match=message):
        OcrBenchOptions(str(make_file(rows, columns)))


@pytest.mark.parametrize("image", ["A" * 100, "A" * 101])
def test_a_damaged_image_is_named(make_file, tmp_path, image):
    options = OcrBenchOptions(str(make_file([("5", image, "?", "x", VQA)])), max_tokens=7)
    with pytest.raises(ValueError, match="ocr.tsv: image of question 5: is no"):
        run_ocrbench(Reader(), options, tmp_path, lambda what, total: lambda count: None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"file": "nowhere.tsv"},
            "file: must be a TSV file .* got 'nowhere.tsv', which is no file",
        ),
        ({"limit": 0}, "limit: must be at least 1, got 0"),
        ({"max_tokens": 0}, "max_tokens: must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: must be at least 1, got 0"),
    ],
)
def test_a_wrong_option_is_named(make_file, options, message):
    with pytest.raises(ValueError, match=message):
        OcrBenchOptions(**{"file": str(make_file())} | options)
