"""Held-out losses: right, the same on any number of ranks, and without a trace in the model or the random state."""

import math
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.config.losses import Flow
from symbiotic_titan.data.tokenizer import ByteTokenizer
from symbiotic_titan.demo.write import (
    WorldSize,
    write_world,
)
from symbiotic_titan.flow.noise import draw_noise_and_timesteps
from symbiotic_titan.inference.held_out import (
    NOISE_STEP,
    SEED,
    held_out_losses,
)
from symbiotic_titan.losses.step import LossFunction
from symbiotic_titan.model.symbiotic import ModelOutput
from symbiotic_titan.parallel.compile import apply_compile
from symbiotic_titan.sequence.batch import stack_rows
from symbiotic_titan.sequence.modality import IGNORE_INDEX
from symbiotic_titan.training.checks import check_job
from symbiotic_titan.training.train_spec import build_validator
from symbiotic_titan.training.validation import (
    HeldOutRows,
    SymbioticValidator,
)
from tests.helpers.tiny_models import MIXED, OTHER, pack_row, tiny_args, tiny_model

DEBUG = Path(__file__).parents[3] / "train_configs" / "debug.toml"
SOURCES = {"lm": "jsonl", "mmu": "tar", "t2i": "tar"}


def labelled_rows(num=4):
    """Rows of three documents, of the tasks lm, mmu and t2i, with labels on most text."""
    args, rows = tiny_args(), []
    for i in range(num):
        row = pack_row(MIXED if i % 2 else OTHER, args, seed=10 * i)
        row.labels[:] = torch.where(row.span < 0, row.tokens.roll(-1), IGNORE_INDEX)
        row.labels[row.document < 0] = IGNORE_INDEX
        row.task[:] = row.document
        rows.append(row)
    return rows


def expected_losses(model, row, index, flow):
    """(text sum, count, right tokens, flow sum, count) of one row, by a plain loop."""
    noise, timesteps = draw_noise_and_timesteps(
        row.vae_image, row.latents.shape[-1], config=flow, step=NOISE_STEP, first_row=index
    )
    t = timesteps.unsqueeze(-1)
    output = model(row, (1 - t) * row.latents + t * noise, timesteps, torch.tensor(1.0))
    target = noise - row.latents
    text = num_text = right = 0.0
    for place in (row.labels[0] != IGNORE_INDEX).nonzero().flatten():
        logits, label = output.logits[0, place].float(), row.labels[0, place]
        text += F.cross_entropy(logits, label).item()
        right += int(logits.argmax() == label)
        num_text += 1
    used = (row.vae_image[0] >= 0).nonzero().flatten()
    errors = [(output.velocity[0, i] - target[0, i]).square().mean().item() for i in used]
    return text, num_text, right, sum(errors), len(errors)


def test_losses_and_accuracy_equal_a_plain_loop():
    rows, model, flow = labelled_rows(), tiny_model(tiny_args()), Flow(seed=SEED)
    losses = held_out_losses(model, [stack_rows(rows[:2]), stack_rows(rows[2:])], flow)
    with torch.no_grad():
        parts = [expected_losses(model, row, i, flow) for i, row in enumerate(rows)]
    text, num_text, _, errors, num_flow = (sum(column) for column in zip(*parts, strict=True))
    assert losses["text"] == pytest.approx(text / num_text, rel=1e-5)
    assert losses["flow"] == pytest.approx(errors / num_flow, rel=1e-5)
    assert {"by_task/lm_text", "by_task/mmu_text", "by_task/lm_flow"} <= set(losses)
    assert {"accuracy/lm", "accuracy/mmu", "accuracy/t2i"} <= set(losses)


class Oracle(torch.nn.Module):
    """Knows the next token of task lm, and the clean latents."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def own_part(self, batch):
        return batch

    def forward(self, batch, noised_BLZ, timesteps_BL, shield_scale, logit_index_N):
        known = (batch.labels >= 0) & (batch.task == 0)
        answers = torch.where(known, batch.labels, 271).flatten()[logit_index_N]
        logits = F.one_hot(answers, 272) * 50.0 + self.weight
        t = timesteps_BL.unsqueeze(-1).clamp(min=1e-3)
        return ModelOutput(logits, (noised_BLZ - batch.latents) / t, ())


def test_a_model_that_knows_the_answers_is_right():
    losses = held_out_losses(Oracle(), labelled_rows(), Flow())
    assert losses["accuracy/lm"] == 1.0 and losses["accuracy/mmu"] == 0.0
    assert losses["by_task/lm_text"] < 1e-6 < losses["by_task/mmu_text"]
    assert losses["flow"] < 1e-5


def test_a_row_keeps_its_noise_however_rows_are_shared_out():
    rows, model, flow = labelled_rows(), tiny_model(tiny_args()), Flow(seed=7)
    whole = held_out_losses(model, [stack_rows(rows)], flow)
    sums = []
    for rank in range(2):  # two steps of two rows, a row for each of two ranks
        own = [rows[rank], rows[2 + rank]]
        held_out_losses(model, own, flow, first_rows=[rank, 2 + rank], sum_over_ranks=keep(sums))
    shared = held_out_losses(model, rows[:1], flow, sum_over_ranks=lambda _: sums[0] + sums[1])
    assert shared == pytest.approx(whole, rel=1e-6)
    moved = held_out_losses(model, [stack_rows(rows)], flow, first_rows=[4])
    assert moved["text"] != whole["text"] or moved["flow"] != whole["flow"]


def keep(sums):
    def sum_over_ranks(values):
        sums.append(values.clone())
        return values

    return sum_over_ranks


def test_flow_seed_does_not_change_the_held_out_noise():
    rows, model = labelled_rows(2), tiny_model(tiny_args())
    assert held_out_losses(model, rows, Flow(seed=1)) == held_out_losses(model, rows, Flow(seed=2))


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_behind_even_by_an_error(training):
    rows, model = labelled_rows(2), tiny_model(tiny_args()).train(training)
    before, state = [p.clone() for p in model.parameters()], torch.random.get_rng_state()
    held_out_losses(model, rows, Flow())

    def broken():
        yield rows[0]
        raise KeyError

    with pytest.raises(KeyError):
        held_out_losses(model, broken(), Flow())
    assert model.training is training and all(m.training is training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state) and torch.is_grad_enabled()


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute:UserWarning",
    "ignore:.* should not be instantiated:DeprecationWarning",
)
def test_compiled_parts_are_compiled_for_the_first_validation_only():
    torch._dynamo.reset()
    counters.clear()
    model = tiny_model(tiny_args())
    apply_compile(model, "eager")
    batch = stack_rows(labelled_rows(2))

    def train():
        shape = batch.vae_image.shape
        model.zero_grad()
        output = model(batch, batch.latents, torch.full(shape, 0.5), torch.tensor(0.1))
        (output.logits.sum() + output.velocity.sum()).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = train()
    held_out_losses(model, [batch], Flow())
    num_graphs = counters["stats"]["unique_graphs"]
    for _ in range(2):
        assert all(torch.equal(p, q) for p, q in zip(train(), expected, strict=True))
        held_out_losses(model, [batch], Flow())
    assert counters["stats"]["unique_graphs"] == num_graphs
    torch._dynamo.reset()


# ---- the validator of the train spec --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, seed=0, size=WorldSize(4, 12, 4, 12, train_shards=1))
    return folder


@pytest.fixture
def config_of(tmp_path, world):
    """Debug's config with a [validation] of ``text`` and the held-out sources of ``tasks``."""

    def make(text="enable = true", tasks=tuple(SOURCES), overrides=(), extra=""):
        config = DEBUG.read_text().replace("demo_data/", f"{world}/") + f"\n[validation]\n{text}\n"
        for task in tasks:
            kind = {"jsonl": "jsonl", "tar": "webdataset"}[SOURCES[task]]
            path = f"{world}/heldout/{task}/*.{SOURCES[task]}"
            config += f'[[validation.sources]]\nname = "{task}"\ntask = "{task}"\n'
            config += f'format = "{kind}"\npath = "{path}"\n{extra}\n'
        file = tmp_path / "job.toml"
        file.write_text(config)
        return load_job_config(["--job.config_file", str(file), *overrides])

    return make


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")


def rows_of(config, rank=0, num_ranks=1):
    return build_validator(
        job_config=config, dp_rank=rank, dp_world_size=num_ranks, tokenizer=ByteTokenizer(),
        loss_fn=LossFunction(), metrics_processor=None,
    ).rows  # fmt: skip


def by_index(held_out):
    """Index over all ranks -> row, of one rank's share."""
    rows = {}
    for first, batch in zip(held_out.first_rows, held_out.batches, strict=True):
        for i in range(batch.tokens.shape[0]):
            row = {name: tensor[i] for name, tensor in batch.tensors().items()}
            rows[first + i] = row
    return rows


def test_held_out_rows_are_the_same_on_any_number_of_ranks_and_under_any_data_seed(config_of):
    one = by_index(rows_of(config_of("enable = true\nsteps = 3")))
    assert sorted(one) == list(range(12))
    settings = ["--training.local_batch_size", "1", "--data.seed", "9", "--data.num_lanes", "8"]
    config = config_of("enable = true\nsteps = 3", overrides=settings)
    shares = [by_index(rows_of(config, rank, 2)) for rank in range(2)]
    assert not set(shares[0]) & set(shares[1]) and len(shares[0]) == len(shares[1])
    shared = shares[0] | shares[1]
    assert sorted(shared) == sorted(one)
    for index, row in one.items():
        assert all(torch.equal(row[name], shared[index][name]) for name in row)


def test_no_caption_is_dropped(config_of):
    config = config_of(tasks=("t2i",), overrides=["--data.condition_dropout", "1.0"])
    rows = by_index(rows_of(config)).values()
    labels = sum(int((row["labels"] != IGNORE_INDEX).sum()) for row in rows)
    assert labels / sum(int(row["document"].max()) + 1 for row in rows) > 5  # <vae_start>, <eos>


class Metrics:
    """What the validator asks of the trainer's metrics."""

    def __init__(self):
        self.time_last_log, self.logged = 100.0, []
        self.logger = SimpleNamespace(log=lambda metrics, step: self.logged.append((step, metrics)))
        self.color = SimpleNamespace(yellow="", green="", orange="", blue="", reset="")


def validator_of(config, stops=()):
    rows, answers = labelled_rows(), iter(stops)
    validator = SymbioticValidator(
        config, HeldOutRows(rows, [0, 1, 2, 3]), LossFunction(), Metrics()
    )
    validator.connect(
        to_device=lambda batch: batch, autocast=nullcontext(),
        sum_over_ranks=lambda values: values, stop_requested=lambda: next(answers, False),
    )  # fmt: skip
    return validator


def test_a_validation_logs_its_names_and_its_time_is_not_trainings(config_of, caplog):
    validator, model = validator_of(config_of()), tiny_model(tiny_args())
    start = time.perf_counter()
    with caplog.at_level("INFO"):
        validator.validate([model], step=40)
    ((step, metrics),) = validator.metrics_processor.logged
    assert step == 40
    assert metrics == {
        f"validation/{k}": v for k, v in held_out_losses(model, labelled_rows(), Flow()).items()
    }
    passed = validator.metrics_processor.time_last_log - 100.0
    assert 0 < passed <= time.perf_counter() - start
    assert "validation at step 40:  text: " in caplog.text and "accuracy: lm 0." in caplog.text


def test_a_stop_signal_ends_the_validation_without_a_number(config_of, caplog):
    validator, model = validator_of(config_of(), stops=[False, True]), tiny_model(tiny_args())
    with caplog.at_level("INFO"):
        validator.validate([model], step=40)
    assert "validation at step 40 interrupted by a stop signal" in caplog.text
    assert not validator.metrics_processor.logged and model.training
    assert validator.metrics_processor.time_last_log > 100.0


def test_a_loss_that_is_not_finite_is_warned_of_and_logged(config_of, caplog):
    validator, model = validator_of(config_of()), tiny_model(tiny_args())
    with torch.no_grad():
        model.output.weight[3] = math.nan
    validator.validate([model], step=40)
    assert "validation at step 40: text, by_task/lm_text" in caplog.text
    assert "not finite" in caplog.text
    assert math.isnan(validator.metrics_processor.logged[0][1]["validation/text"])


def test_steps_that_are_validated(config_of):
    validator = validator_of(config_of("enable = true\nfreq = 150"))
    steps = [step for step in range(401) if validator.should_validate(step)]
    assert steps == [0, 150, 300, 400]


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("freq = 0", "", "validation.freq: must be at least 1, got 0"),
        ("steps = -1", "", "validation.steps: must be at least 1, got -1"),
        ("frequency = 3", "", "validation: unknown key 'frequency'"),
        ("enable = true", "--validation.seq_len 384", "validation.seq_len = 384 is not supported"),
        (
            "enable = true",
            "--validation.local_batch_size 4",
            "validation.local_batch_size = 4 is not supported by this trainer; validation uses the batch size of training",
        ),
        ("enable = true", "--validation.dataset c4", "name files in [[validation.sources]]"),
        (
            "enable = true",
            "--validation.dataloader.num_workers 2",
            "held-out sequences are packed once, before training",
        ),
    ],
)
def test_bad_settings_are_refused(config_of, text, overrides, message):
    with pytest.raises(ValueError) as error:
        check_job(config_of(text, overrides=overrides.split()))
    assert message in str(error.value)


def test_validation_without_sources_is_refused(config_of):
    with pytest.raises(ValueError, match=r"name at least one source in \[\[validation.sources\]\]"):
        check_job(config_of(tasks=()))
    check_job(config_of("enable = false", tasks=()))


def test_a_bad_source_is_named_by_its_table(config_of):
    for extra, message in (
        ("waight = 2", r"\[\[validation.sources\]\] #1: unknown key 'waight'; did you mean 'weigh"),
        ("weight = -1", r"\[\[validation.sources\]\] #1.weight: must be zero or positive"),
        ("weight = 0", r"\[\[validation.sources\]\]: the weights sum to zero"),
    ):
        with pytest.raises(ValueError, match=message):
            config_of(extra=extra)


def test_a_missing_file_is_told_like_one_of_the_training_data(config_of, world):
    config = config_of(tasks=("lm", "mmu"))
    config.validation.sources[1].path = f"{world}/heldout/nothing-*.tar"
    with pytest.raises(ValueError, match=r"\[\[validation.sources\]\] #2 \(mmu\): no file matches"):
        rows_of(config)
