"""The suite ``demo_world``: what a model draws, answers, knows and predicts of the demo world's held-out files.

    pictures/*            do pictures show what their captions say: see ``demo.scores``
    answers/*             are answers to questions about images right: see ``demo.questions``
    knowledge/*           multiple choice on facts of the training text: see ``demo.references``
    knowledge_heldout/*   the same on texts that were not trained on: how much of it is language, not knowledge
    heldout/*             losses and token accuracies by task: see ``inference.held_out``

In its folder: pictures/*.png; pictures.png, some of them beside the real ones; answers.jsonl.
"""

import copy
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import TypeVar

from PIL import Image

from symbiotic_titan.codecs.batch import BatchEncoder
from symbiotic_titan.data.images import nearest_bucket
from symbiotic_titan.demo.captions import parse_caption
from symbiotic_titan.demo.held_out import (
    LONG_CAPTIONS,
    QUESTIONS,
    SHORT_CAPTIONS,
    TEXTS,
    PictureSample,
    Split,
    demo_source,
    read_pictures,
    read_questions,
    read_texts,
)
from symbiotic_titan.demo.questions import answer_score
from symbiotic_titan.demo.references import (
    ChoiceItem,
    choice_score,
    knowledge_items,
    read_items,
)
from symbiotic_titan.demo.scores import demo_world_score
from symbiotic_titan.demo.writing import is_number
from symbiotic_titan.evaluation.suite import Advance, Progress, Scores, Suite, measure
from symbiotic_titan.evaluation.suites.generation import (
    ImageRequest,
    ImageSettings,
    generate_images,
)
from symbiotic_titan.inference.generator import Generator
from symbiotic_titan.inference.held_out import (
    held_out_data,
    held_out_losses,
    packed_batches,
)
from symbiotic_titan.inference.images import picture_grid
from symbiotic_titan.parallel.ranks import DataRanks
from symbiotic_titan.process import is_first_process
from symbiotic_titan.sequence.batch import PackedBatch

T = TypeVar("T")

TASKS = (TEXTS, QUESTIONS, SHORT_CAPTIONS, LONG_CAPTIONS)
# Pairs of pictures in the overview.
NUM_SHOWN = 20
# No answer of the demo world has as many bytes.
MAX_ANSWER_TOKENS = 24


@dataclass(frozen=True)
class DemoWorldOptions(ImageSettings):
    """Options of the suite; 0 leaves a part out."""

    data: str = "demo_data"
    """Folder of the demo world"""

    pictures: int = 60
    """Held-out captions to use, short and long, of digits, words and numbers, and scenes by turns"""

    questions: int = 200
    """Held-out questions about images to answer"""

    knowledge: int = 150
    """Multiple-choice items of the training text, and as many of the held-out text"""

    knowledge_file: str | None = None
    """JSONL file of items to use instead: question, choices, answer (the number of the right choice, from 0)"""

    loss_rows: int = 64
    """Rows of held-out samples, all tasks mixed, to measure losses on; whole batches are read"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("pictures", "questions", "knowledge", "loss_rows"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must be zero or positive, got {getattr(self, name)}")
        if not (Path(self.data) / "heldout").is_dir():
            raise ValueError(
                f"data: no demo world in {self.data!r}; make it with symbiotic make-demo-data, or name its folder"
            )
        if self.knowledge_file is not None:
            if not Path(self.knowledge_file).is_file():
                raise ValueError(f"knowledge_file: no such file: {self.knowledge_file}")
            read_items(Path(self.knowledge_file))


def run_demo_world(
    generator: Generator, options: DemoWorldOptions, folder: Path, progress: Progress
) -> Scores:
    """All parts that ``options`` ask for."""
    parts = (
        (options.pictures, score_pictures),
        (options.questions, score_answers),
        (options.knowledge, score_knowledge),
        (options.loss_rows, held_out),
    )
    scores: Scores = {}
    for number, part in parts:
        if number:
            scores |= part(generator, options, folder, progress)
    return scores


def score_pictures(
    generator: Generator, options: DemoWorldOptions, folder: Path, progress: Progress
) -> Scores:
    """Each caption is drawn in the bucket of its real image."""
    sources = [
        demo_source(Path(options.data), "heldout", task) for task in (SHORT_CAPTIONS, LONG_CAPTIONS)
    ]
    tasks = [read_pictures(source) for source in sources]
    samples = list(by_turns(by_turns(_strata(task)) for task in tasks))[: options.pictures]
    requests = [
        ImageRequest(
            sample.caption,
            folder / "pictures" / f"{number:05d}.png",
            nearest_bucket(sample.image.height, sample.image.width, generator.buckets),
        )
        for number, sample in enumerate(samples)
    ]
    images = generate_images(generator, requests, options, progress, folder)
    if is_first_process():
        shown = slice(min(NUM_SHOWN, len(images)))
        pairs = [_beside(i, s.image) for i, s in zip(images[shown], samples[shown], strict=True)]
        captions = [sample.caption for sample in samples[shown]]
        picture_grid(_of_one_size(pairs), captions).save(folder / "pictures.png", optimize=True)
    scores = demo_world_score(images, samples)
    return {f"pictures/{name}": score for name, score in scores.items()}


def _strata(samples: list[PictureSample]) -> list[list[PictureSample]]:
    """[digits, writing, scenes], so that any prefix is balanced: digits are interleaved by value, words with numbers, scenes by number
    of things."""
    digits: dict[int, list[PictureSample]] = defaultdict(list)
    writing: dict[int, list[PictureSample]] = defaultdict(list)
    scenes: dict[int, list[PictureSample]] = defaultdict(list)
    for sample in samples:
        parsed = parse_caption(sample.caption)
        if parsed.digit is not None:
            digits[parsed.digit].append(sample)
        elif parsed.text is not None:
            writing[is_number(parsed.text)].append(sample)
        else:
            scenes[len(parsed.things)].append(sample)
    return [list(by_turns(kind[k] for k in sorted(kind))) for kind in (digits, writing, scenes)]


def by_turns(lists: Iterable[Iterable[T]]) -> Iterator[T]:
    """Interleave: the first of each, the second of each, and so on; exhausted ones are skipped."""
    ended = object()
    turns = chain.from_iterable(zip_longest(*lists, fillvalue=ended))
    return (item for item in turns if item is not ended)  # type: ignore[misc]


def _beside(made: Image.Image, real: Image.Image) -> Image.Image:
    """``made`` on the left, ``real`` on the right at its size."""
    pair = Image.new("RGB", (2 * made.width, made.height))
    pair.paste(made, (0, 0))
    pair.paste(real.resize(made.size, Image.Resampling.BICUBIC), (made.width, 0))
    return pair


def _of_one_size(images: Sequence[Image.Image]) -> list[Image.Image]:
    """``images`` centred on white ones as wide and high as the largest."""
    size = max(i.width for i in images), max(i.height for i in images)
    backgrounds = [Image.new("RGB", size, "white") for _ in images]
    for background, image in zip(backgrounds, images, strict=True):
        background.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return backgrounds


def score_answers(
    generator: Generator, options: DemoWorldOptions, folder: Path, progress: Progress
) -> Scores:
    samples = read_questions(
        demo_source(Path(options.data), "heldout", QUESTIONS), options.questions
    )
    completions = generator.text(
        [sample.question for sample in samples],
        [[sample.image] for sample in samples],
        max_tokens=MAX_ANSWER_TOKENS,
        batch_size=options.batch_size,
        advance=progress("answers", len(samples)),
    )
    answers = [completion.text for completion in completions]
    if is_first_process():
        rows = [
            {
                "question": sample.question,
                "kind": sample.kind,
                "answer": sample.answer,
                "given": given,
            }
            for sample, given in zip(samples, answers, strict=True)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "answers.jsonl").write_text(lines, encoding="utf-8")
    return answer_score(answers, samples)


def score_knowledge(
    generator: Generator, options: DemoWorldOptions, folder: Path, progress: Progress
) -> Scores:
    def likelihoods(pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
        results = generator.log_likelihoods(
            pairs, batch_size=options.batch_size, advance=progress("choices", len(pairs))
        )
        return [(result.sum, result.is_greedy) for result in results]

    if options.knowledge_file is not None:
        return choice_score(
            read_items(Path(options.knowledge_file))[: options.knowledge], likelihoods
        )
    trained = choice_score(_items(options, "train"), likelihoods)
    unseen = choice_score(_items(options, "heldout"), likelihoods)
    heldout = {k.replace("knowledge/", "knowledge_heldout/"): v for k, v in unseen.items()}
    return trained | heldout


def _items(options: DemoWorldOptions, split: Split) -> list[ChoiceItem]:
    texts = read_texts(demo_source(Path(options.data), split, TEXTS))
    return knowledge_items(texts, options.knowledge)


def held_out(
    generator: Generator, options: DemoWorldOptions, folder: Path, progress: Progress
) -> Scores:
    """The rows are the same for all processes, and for all models with this tokenizer and seq_len. ``number`` counts rows."""
    config = copy.deepcopy(generator.config)
    config.latents.cache = ""
    config.validation.sources = [demo_source(Path(options.data), "heldout", t) for t in TASKS]
    config.training.local_batch_size = config.training.global_batch_size = options.batch_size
    num_batches = -(-options.loss_rows // options.batch_size)
    alone = DataRanks(generator.device, 0, 1, None)
    batches = packed_batches(config, held_out_data(config), num_batches, alone)
    codec = generator.codec if config.latents.carries_pixels else None
    encode = BatchEncoder(codec, generator.geometry)
    losses = held_out_losses(
        generator.model,
        _counted(map(encode, batches), progress("held-out batches", num_batches)),
        config.flow,
        autocast=generator.autocast,
    )
    number = num_batches * options.batch_size
    return {f"heldout/{name}": measure(value, number=number) for name, value in losses.items()}


def _counted(batches: Iterable[PackedBatch], advance: Advance) -> Iterator[PackedBatch]:
    for batch in batches:
        yield batch
        advance(1)


DEMO_WORLD = Suite(
    name="demo_world",
    description="pictures, answers, knowledge and losses on the demo world's held-out files",
    options=DemoWorldOptions,
    run=run_demo_world,
    modules=("sklearn", "scipy"),
    install="pip install scikit-learn",
)
