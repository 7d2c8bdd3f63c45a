"""lm-eval through our model class: the accuracy of our own scorer, and texts and sums of our own generator."""

import csv
import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from symbiotic_titan.build import build_tokenizer
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.demo.references import (
    ChoiceItem,
    choice_score,
    write_items,
)
from symbiotic_titan.evaluation.suites.lm_eval import (
    LmEvalOptions,
    run_lm_eval,
)
from symbiotic_titan.inference.generator import (
    Completion,
    Generator,
)
from symbiotic_titan.model.flavors import model_args
from symbiotic_titan.model.symbiotic import SymbioticModel

pytestmark = pytest.mark.slow  # importing lm-eval takes seconds
pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

Instance = importlib.import_module("lm_eval.api.instance").Instance
GeneratorLM = importlib.import_module("symbiotic_titan.evaluation.suites.lm_eval_model").GeneratorLM

ROOT = Path(__file__).parents[3]
WORDS = ["red", "circle", "the digit four", "seven", "a", "of blue squares", "at the top left", "x"]


def no_progress(what, total):
    return lambda count: None


@pytest.fixture(scope="module")
def generator():
    """The debug model with random weights that make a difference."""
    config = load_job_config(["--job.config_file", str(ROOT / "train_configs" / "debug.toml")])
    with torch.device("meta"):
        model = SymbioticModel(model_args(config))
    model.to_empty(device="cpu")
    model.init_weights()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.output.weight.copy_(0.3 * torch.randn(model.output.weight.shape, generator=random))
    return Generator(model.eval(), config, build_tokenizer(config), torch.device("cpu"))


@pytest.fixture
def lm(generator):
    return GeneratorLM(generator, batch_size=3)


@pytest.fixture
def items():
    random = np.random.default_rng(0)
    return [
        ChoiceItem(
            f"{number} is {random.choice(WORDS)}",
            tuple(map(str, random.choice(WORDS, 4, replace=False))),
            int(random.integers(4)),
        )
        for number in range(32)
    ]


@pytest.fixture
def tasks(tmp_path, items):
    folder = tmp_path / "tasks"
    shutil.copytree(ROOT / "docs" / "examples" / "lm_eval", folder)
    write_items(folder / "facts.jsonl", items)
    for name, count in (("dev", 3), ("test", 8)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            rows = [[i.question, *i.choices, "ABCD"[i.answer]] for i in items[:count]]
            csv.writer(file).writerows(rows)
    return folder


def requests(kind, *arguments):
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def test_lm_eval_gives_the_accuracy_of_our_own_scorer(generator, tasks, items, tmp_path):
    def likelihoods(pairs):
        return [(one.sum, one.is_greedy) for one in generator.log_likelihoods(pairs)]

    own = choice_score(items, likelihoods)
    scores = run_lm_eval(generator, LmEvalOptions(str(tasks), ("facts",)), tmp_path, no_progress)
    assert scores["lm_eval/facts/acc"]["score"] == own["knowledge/accuracy"]["score"]
    normalised = own["knowledge/accuracy_per_character"]["score"]
    assert scores["lm_eval/facts/acc_norm"]["score"] == normalised
    accuracy = scores["lm_eval/facts/acc"]
    assert accuracy["number"] == len(items) and accuracy["chance"] == 0.25
    low, high = accuracy["interval"]
    reported = json.loads((tmp_path / "results.json").read_text())["results"]["facts"]
    assert (high - low) / 2 == pytest.approx(1.959964 * reported["acc_stderr,none"])
    assert 0 < own["knowledge/accuracy"]["score"] != normalised, "the two can be told apart"
    assert (
        json.loads((tmp_path / "results.json").read_text())["n-samples"]["facts"]["effective"] == 32
    )


def test_mmlus_own_files_are_asked_with_letters_behind_examples(generator, tasks, items, tmp_path):
    asked = []

    class Watched(Generator):
        def log_likelihoods(self, pairs, *arguments, **settings):
            asked.extend(pairs)
            return super().log_likelihoods(pairs, *arguments, **settings)

    watched = Watched(generator.model, generator.config, generator.tokenizer, generator.device)
    options = LmEvalOptions(str(tasks), ("mmlu_csv",), limit=5, num_fewshot=1)
    scores = run_lm_eval(watched, options, tmp_path, no_progress)
    assert scores["lm_eval/mmlu_csv/acc"]["number"] == 5

    def shown(item):
        choices = "\n".join(
            f"{letter}. {c}" for letter, c in zip("ABCD", item.choices, strict=True)
        )
        return f"{item.question}\n{choices}\nAnswer:"

    decode = generator.tokenizer.decode
    texts = {(decode(context), decode(answer)) for context, answer in asked}
    example = f"{shown(items[0])} {'ABCD'[items[0].answer]}\n\n"
    assert texts == {(example + shown(i), f" {letter}") for i in items[:5] for letter in "ABCD"}


def test_the_mmlu_group_asks_each_of_its_57_subjects_for_its_own_files(
    generator, tasks, items, tmp_path
):
    """A subject has as many questions as the one before it and one more, up to three, then one again."""
    group = yaml.safe_load((tasks / "mmlu.yaml").read_text())
    subjects = [task["task"] for task in group["task"]]
    assert len(set(subjects)) == 57
    for number, subject in enumerate(subjects):
        for kind, count in (("dev", 1), ("test", 1 + number % 3)):
            path = tasks / "data" / kind / f"{subject}_{kind}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="") as file:
                rows = [[i.question, *i.choices, "ABCD"[i.answer]] for i in items[:count]]
                csv.writer(file).writerows(rows)
    scores = run_lm_eval(generator, LmEvalOptions(str(tasks), ("mmlu",)), tmp_path, no_progress)
    own = [scores[f"lm_eval/mmlu::{subject}/acc"] for subject in subjects]
    assert [score["number"] for score in own] == [1 + number % 3 for number in range(57)]
    right = sum(score["score"] * score["number"] for score in own)
    assert scores["lm_eval/mmlu/acc"]["score"] == pytest.approx(right / 114)
    assert scores["lm_eval/mmlu/acc"]["number"] == 114
    said = {task["task"]: task["description"] for task in group["task"]}
    assert all(name.replace("_", " ") in text for name, text in said.items())


def test_a_group_is_scored_over_all_questions_of_its_tasks(generator, tasks, tmp_path):
    (tasks / "both.yaml").write_text(
        "group: both\ntask: [facts, mmlu_csv]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    options = LmEvalOptions(str(tasks), ("both",), limit=6)
    scores = run_lm_eval(generator, options, tmp_path, no_progress)
    one, other = (scores[f"lm_eval/{name}/acc"]["score"] for name in ("facts", "mmlu_csv"))
    assert scores["lm_eval/both/acc"]["score"] == pytest.approx((one + other) / 2)
    assert scores["lm_eval/both/acc"]["number"] == 12
    assert scores["lm_eval/both/acc"]["chance"] == 0.25


def test_a_text_without_context_begins_behind_the_opening(lm, generator):
    [[value, _]] = lm.loglikelihood(
        requests("loglikelihood", ("", "red circle")), disable_tqdm=True
    )
    [wanted] = generator.log_likelihoods([("", "red circle")])
    assert value == pytest.approx(wanted.sum, abs=1e-4)


def test_likelihoods_come_in_the_order_asked(lm, generator):
    pairs = [("a", " red"), ("a much longer question", " x"), ("b", " and a long answer")]
    found = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    wanted = [one.sum for one in generator.log_likelihoods(pairs, batch_size=1)]
    assert [value for value, _ in found] == pytest.approx(wanted, abs=1e-4)


def test_a_context_that_is_too_long_loses_its_beginning(lm, generator, caplog):
    context, answer = "lost " + "k" * (lm.max_length - 4), " red"
    [[value, _]] = lm.loglikelihood(requests("loglikelihood", (context, answer)), disable_tqdm=True)
    [wanted] = generator.log_likelihoods([("k" * (lm.max_length - 4), answer)])
    assert value == pytest.approx(wanted.sum, abs=1e-4)
    assert "1 contexts are cut at their beginning" in caplog.text


def test_a_rolling_likelihood_covers_every_token_once(lm, generator):
    short, long = "a red circle", "".join("abcdefg"[i % 7] for i in range(2 * lm.max_length))
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (short,), (long,)))
    [wanted] = generator.log_likelihoods([("", short)])
    assert found[0] == pytest.approx(wanted.sum, abs=1e-4)
    size = lm.max_length - 1
    first = generator.log_likelihoods([("", long[:size]), (long[size - 1], long[size : 2 * size])])
    rest = generator.log_likelihoods([(long[size + 1 : 2 * size], long[2 * size :])])
    assert found[1] == pytest.approx(sum(one.sum for one in first + rest), abs=1e-3)


def test_texts_are_the_generators_with_the_settings_of_each_request(lm, generator):
    greedy = {"until": ["never"], "max_gen_toks": 6}
    drawn = {"until": "never", "max_gen_toks": 4, "do_sample": True, "temperature": 2.0}
    asked = [("how many", greedy), ("the", drawn), ("where", greedy)]
    found = lm.generate_until(requests("generate_until", *asked))
    plain = generator.text(["how many", "where"], max_tokens=6, conversation=False)
    [other] = generator.text(["the"], max_tokens=4, temperature=2.0, conversation=False)
    assert found == [plain[0].text, other.text, plain[1].text]
    stop = found[0][2:4]
    [stopped] = lm.generate_until(
        requests("generate_until", ("how many", {"until": [stop], "max_gen_toks": 6}))
    )
    assert stopped == found[0][: found[0].index(stop)]


def test_a_prompt_leaves_room_for_half_a_row(lm, generator, monkeypatch):
    asked = []

    def text(prompts, images, *, max_tokens, **settings):
        asked.append((generator.tokenizer.decode(prompts[0]), max_tokens))
        return [Completion("", [], "end")]

    monkeypatch.setattr(generator, "text", text)
    question = "lost" + "k" * (lm.max_length - lm.max_length // 2)
    lm.generate_until(requests("generate_until", (question, {"until": [], "max_gen_toks": 999})))
    assert asked == [(question[4:], lm.max_length // 2)]


def test_images_are_shown_in_a_conversation(lm, generator):
    image = Image.effect_noise((32, 24), 50)
    asked = ("<image>Which digit?", {"until": [], "max_gen_toks": 5}, {"visual": [image]})
    [text] = lm.generate_until(requests("generate_until", asked))
    [wanted] = generator.text(["Which digit?"], [[image]], max_tokens=5)
    assert text == wanted.text


def test_an_unknown_task_is_named(generator, tasks, tmp_path):
    with pytest.raises(ValueError, match="no task 'mmlu_pro' in .*, which has facts, mmlu, mmlu_"):
        run_lm_eval(generator, LmEvalOptions(str(tasks), ("mmlu_pro",)), tmp_path, no_progress)
