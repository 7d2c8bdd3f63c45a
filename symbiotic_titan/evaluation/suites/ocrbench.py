"""The suite ``ocrbench``: questions about images from a TSV file in the format of OCRBench (arXiv 2305.07895), with its rule.

    ocrbench/all       share of right answers; for the full 1000 questions, the published score divided by 1000
    ocrbench/CATEGORY  the same by category

An answer is right if it contains one of the true ones, ignoring case; formulas are compared with case and without spaces.
In its folder: answers.jsonl.
"""

import ast
import base64
import binascii
import csv
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from PIL import Image

from symbiotic_titan.evaluation.files import check_file, check_limit, decoded
from symbiotic_titan.evaluation.suite import Progress, Scores, Suite, measure_mean
from symbiotic_titan.inference.generator import Generator
from symbiotic_titan.process import is_first_process

COLUMNS = ("index", "image", "question", "answer", "category")
FORMULA = "Handwritten Mathematical Expression Recognition"
# Six of the ten categories are published as one.
TEXT_RECOGNITION = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
)
# An image field of at most this many characters is the index of the row that has the image.
MAX_REFERENCE = 64


@dataclass(frozen=True)
class OcrQuestion:
    """``image`` is base64; any of ``answers`` is right."""

    index: str
    image: str
    question: str
    answers: tuple[str, ...]
    category: str


@dataclass(frozen=True)
class OcrBenchOptions:
    """Options of the suite."""

    file: str = ""
    """TSV file with the columns index, image (base64), question, answer and category"""

    limit: int | None = None
    """Questions to ask, counted from the first; all by default"""

    max_tokens: int = 128
    """Tokens that an answer may have"""

    batch_size: int = 8
    """Questions at a time"""

    def __post_init__(self) -> None:
        check_file("file", self.file, "a TSV file of questions about images")
        check_limit(self.limit)
        for name in ("max_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        read_questions(Path(self.file), self.limit)


def read_questions(path: Path, limit: int | None = None) -> list[OcrQuestion]:
    """Questions of a TSV file.

    Raises:
        ValueError: it lacks one of COLUMNS, or has no rows; or an image refers to a row that does not exist.
    """
    csv.field_size_limit(sys.maxsize)  # images are longer than the limit of the whole process
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, delimiter="\t")
        found = reader.fieldnames or []
        if missing := [column for column in COLUMNS if column not in found]:
            raise ValueError(
                f"{path}: column {', '.join(map(repr, missing))} is missing, there are: {', '.join(found) or 'none'}; "
                f"a file in the format of OCRBench has {', '.join(COLUMNS)}, separated by tabs"
            )
        rows = list(reader)
    if not rows:
        raise ValueError(f"{path}: holds no questions")
    images = {row["index"]: row["image"] for row in rows}
    return [_question(row, images, path) for row in rows[:limit]]


def _question(row: dict[str, str], images: dict[str, str], path: Path) -> OcrQuestion:
    where = f"{path}: question {row['index']}"
    if absent := [column for column in COLUMNS if not row[column]]:
        raise ValueError(f"{where}: has no {', '.join(absent)}")
    image = row["image"]
    if len(image) <= MAX_REFERENCE:
        if image not in images:
            raise ValueError(f"{where}: its image is that of {image!r}, which is no index of a row")
        image = images[image]
    category = row["category"]
    return OcrQuestion(row["index"], image, row["question"], _answers(row["answer"]), category)


def _answers(text: str) -> tuple[str, ...]:
    """The strings of a Python list, or ``text`` itself where it is none."""
    try:
        answers = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        answers = None
    return tuple(map(str, answers)) if isinstance(answers, list) and answers else (text,)


def is_right(prediction: str, question: OcrQuestion) -> bool:
    """Whether ``prediction`` contains an answer, by the rule of OCRBench."""
    normalised = _formula if question.category == FORMULA else _words
    return any(normalised(a) in normalised(prediction) for a in question.answers)


def _formula(text: str) -> str:
    return text.strip().replace("\n", "").replace(" ", "")


def _words(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def ocr_score(predictions: Sequence[str], questions: Sequence[OcrQuestion]) -> Scores:
    """Share of right predictions, of all questions and by category.

    Chance is the best score without images: in each of the file's categories always the answer that is right most often.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    blind: dict[str, list[bool]] = defaultdict(list)
    without_images = _blind_answers(questions)
    for prediction, question in zip(predictions, questions, strict=True):
        is_recognition = question.category in TEXT_RECOGNITION
        for name in ("all", "Text Recognition" if is_recognition else question.category):
            right[name].append(is_right(prediction, question))
            blind[name].append(is_right(without_images[question.category], question))
    return {
        f"ocrbench/{name}": measure_mean(values, chance=fmean(blind[name]), upper_bound=1.0)
        for name, values in right.items()
    }


def _blind_answers(questions: Sequence[OcrQuestion]) -> dict[str, str]:
    """Category -> of its questions' answers the one that is right for most of them."""
    by_category: dict[str, list[OcrQuestion]] = defaultdict(list)
    for question in questions:
        by_category[question.category].append(question)
    answers = {
        category: dict.fromkeys(answer for question in asked for answer in question.answers)
        for category, asked in by_category.items()
    }
    return {
        category: max(answers[category], key=lambda answer: sum(is_right(answer, q) for q in asked))
        for category, asked in by_category.items()
    }


def run_ocrbench(
    generator: Generator, options: OcrBenchOptions, folder: Path, progress: Progress
) -> Scores:
    """Images are decoded a batch at a time. Raises ValueError for one that is damaged."""
    questions = read_questions(Path(options.file), options.limit)
    advance = progress("answers", len(questions))
    predictions: list[str] = []
    for start in range(0, len(questions), options.batch_size):
        batch = questions[start : start + options.batch_size]
        completions = generator.text(
            [question.question for question in batch],
            [[_image(question, options.file)] for question in batch],
            max_tokens=options.max_tokens,
            batch_size=options.batch_size,
            advance=advance,
        )
        predictions += [completion.text for completion in completions]
    if is_first_process():
        with (folder / "answers.jsonl").open("w", encoding="utf-8") as file:
            for prediction, question in zip(predictions, questions, strict=True):
                row = {
                    "index": question.index,
                    "question": question.question,
                    "answers": question.answers,
                    "given": prediction,
                    "right": is_right(prediction, question),
                }
                file.write(json.dumps(row) + "\n")
    return ocr_score(predictions, questions)


def _image(question: OcrQuestion, path: str) -> Image.Image:
    where = f"{path}: image of question {question.index}"
    try:
        data = base64.b64decode(question.image)
    except binascii.Error as error:
        raise ValueError(f"{where}: is not base64 ({error})") from error
    return decoded(data, where)


OCRBENCH = Suite(
    name="ocrbench",
    description="questions about images from a TSV file in the format of OCRBench",
    options=OcrBenchOptions,
    run=run_ocrbench,
)
