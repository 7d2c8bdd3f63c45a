"""Sample grids: when they are drawn, what they show, what they leave behind (nothing), and which settings are refused."""

import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from symbiotic_titan.codecs.codec import build_codec
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.data.tokenizer import ByteTokenizer
from symbiotic_titan.inference.generator import Generator
from symbiotic_titan.inference.images import picture_grid
from symbiotic_titan.parallel.compile import apply_compile
from symbiotic_titan.parallel.ranks import DataRanks
from symbiotic_titan.sequence.batch import stack_rows
from symbiotic_titan.training.checks import check_job
from symbiotic_titan.training.sample_grids import SampleGrids
from tests.helpers.tiny_models import MIXED, OTHER, pack_row, tiny_args, tiny_model

DEBUG = Path(__file__).parents[3] / "train_configs" / "debug.toml"
PROMPTS = ["a red circle", "the digit seven"]
TINY = "--data.vae_pixels 256 --sampling.steps 2 --sampling.guidance 2"


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")


def config_of(overrides=""):
    arguments = ["--job.config_file", str(DEBUG), "--sampling.enable", *overrides.split()]
    return load_job_config(arguments)


class Metrics:
    """What sampling asks of the trainer's metrics."""

    def __init__(self):
        self.time_last_log, self.written = 100.0, []
        self.color = SimpleNamespace(yellow="", green="", blue="", reset="")

    shows_images = True

    def log_image(self, tag, image_HW3, step):
        self.written.append((tag, step, image_HW3))


def samples_of(model, overrides=TINY, stops=(), ranks=None, prompts=PROMPTS):
    config, answers = config_of(overrides), iter(stops)
    config.sampling.prompts = prompts
    return SampleGrids(
        model,
        config,
        ByteTokenizer(),
        ranks or DataRanks(torch.device("cpu"), 0, 1, None),
        Metrics(),
        autocast=nullcontext,
        stop_requested=lambda: next(answers, False),
    )


def written_by(samples):
    return samples._metrics.written


def test_a_grid_shows_what_the_generator_draws_and_its_time_is_not_trainings(caplog):
    model = tiny_model(tiny_args())
    samples, start = samples_of(model), time.perf_counter()
    with caplog.at_level("INFO"):
        samples.write_if_due(0)
    [(tag, step, image_HW3)] = written_by(samples)
    assert (tag, step) == ("sampling/pictures", 0)
    generator = Generator(model, config_of(TINY), ByteTokenizer(), torch.device("cpu"))
    pictures = generator.images(PROMPTS, steps=2, guidance=2.0)
    assert np.array_equal(image_HW3, picture_grid([p.image for p in pictures], PROMPTS))
    assert "sampling at step 0:  2 pictures" in caplog.text
    assert 0 < samples._metrics.time_last_log - 100.0 <= time.perf_counter() - start


def test_steps_that_have_a_grid():
    model = tiny_model(tiny_args())
    samples = samples_of(model, "--sampling.freq 150")
    assert [step for step in range(401) if samples.is_due(step)] == [0, 150, 300, 400]


def test_grids_of_two_steps_compare_and_differ_by_the_weights():
    model = tiny_model(tiny_args())
    samples = samples_of(model)
    samples.write_if_due(0)
    samples.write_if_due(100)
    with torch.no_grad():
        for parameter in model.flow_head.parameters():
            parameter.mul_(1.5)
    samples.write_if_due(200)
    first, again, later = (image for _, _, image in written_by(samples))
    assert np.array_equal(first, again) and not np.array_equal(first, later)


def test_ranks_share_the_prompts_with_as_many_forwards_each():
    prompts = [f"number {i}" for i in range(5)]
    whole = samples_of(tiny_model(tiny_args()), prompts=prompts)._pictures()
    shares, forwards = [], []
    for rank in range(4):  # two prompts each; the last one would have none
        model = tiny_model(tiny_args())
        count = []
        model.register_forward_hook(lambda *unused, count=count: count.append(None))
        place = DataRanks(torch.device("cpu"), rank, 4, None)
        shares.append(samples_of(model, prompts=prompts, ranks=place)._pictures().astype(int))
        forwards.append(len(count))
    assert np.abs(sum(shares) - whole).max() <= 1
    assert not shares[3].any() and len(set(forwards)) == 1


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_behind_even_by_an_error(training):
    model = tiny_model(tiny_args()).train(training)
    before, state = [p.clone() for p in model.parameters()], torch.random.get_rng_state()
    samples = samples_of(model)
    samples.write_if_due(0)

    def broken():
        raise KeyError

    samples._stop_requested = broken
    with pytest.raises(KeyError):
        samples.write_if_due(0)
    assert all(m.training is training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state) and torch.is_grad_enabled()


def test_a_stop_signal_ends_it_between_two_steps_without_a_grid(caplog):
    model, forwards = tiny_model(tiny_args()).train(), []
    model.register_forward_hook(lambda *unused: forwards.append(None))
    samples = samples_of(model, TINY, stops=[True])
    with caplog.at_level("INFO"):
        samples.write_if_due(0)
    assert "sampling at step 0 interrupted by a stop signal" in caplog.text
    assert not written_by(samples) and model.training and len(forwards) == 2
    assert samples._metrics.time_last_log > 100.0


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute:UserWarning",
    "ignore:.* should not be instantiated:DeprecationWarning",
)
def test_drawing_compiles_nothing():
    torch._dynamo.reset()
    counters.clear()
    model = tiny_model(tiny_args())
    apply_compile(model, "eager")
    samples = samples_of(model)
    batch = stack_rows([pack_row(MIXED, tiny_args()), pack_row(OTHER, tiny_args(), seed=1)])

    def train():
        model.zero_grad()
        shape = batch.vae_image.shape
        output = model(batch, batch.latents, torch.full(shape, 0.5), torch.tensor(0.1))
        (output.logits.sum() + output.velocity.sum()).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    samples.write_if_due(0)
    assert not counters["stats"].get("unique_graphs")
    expected = train()
    num_graphs = counters["stats"]["unique_graphs"]
    samples.write_if_due(100)
    assert all(torch.equal(p, q) for p, q in zip(train(), expected, strict=True))
    assert counters["stats"]["unique_graphs"] == num_graphs > 0
    torch._dynamo.reset()


def test_a_codec_that_training_has_is_not_loaded_again():
    config = config_of(TINY)
    codec = build_codec(config.latents)
    ranks = DataRanks(torch.device("cpu"), 0, 1, None)
    model = tiny_model(tiny_args())
    arguments = (model, config, ByteTokenizer(), ranks, Metrics())
    settings = {"autocast": nullcontext, "stop_requested": lambda: False}
    samples = SampleGrids(*arguments, **settings, codec=codec)
    assert samples._generator.codec is codec


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("--sampling.steps 0", "sampling.steps: must be at least 1, got 0"),
        ("--sampling.guidance -1", "sampling.guidance: must be zero or positive, got -1.0"),
        ("--sampling.shift 0", "sampling.shift: must be positive, got 0.0"),
        ("--sampling.sampler ode", "sampling.sampler = 'ode': nothing is registered under this"),
        ("--sampling.aspect 9:1", "[sampling] aspect '9:1': must be width:height, as 3:2"),
        ("--sampling.aspect square", "sampling.aspect: must be width:height, as 3:2, got 'square'"),
        (
            "--training.seq_len 64",
            "[sampling] prompt #0: its 16 tokens and 64 of its image are more than a row holds",
        ),
        (
            "--metrics.no_enable_tensorboard",
            "sampling.enable = true: sample grids are shown in TensorBoard and W&B; set metrics.enable_t",
        ),
        ("--latents.codec flux", "latents.path: codec 'flux' needs its weights"),
    ],
)
def test_bad_settings_are_refused(overrides, message):
    with pytest.raises(ValueError) as error:
        check_job(config_of(overrides))
    assert message in str(error.value)


def test_without_prompts_or_a_task_that_draws_it_is_refused():
    config = config_of()
    check_job(config)
    config.sampling.prompts = []
    with pytest.raises(ValueError, match="there are no prompts; give captions in sampling.pr"):
        check_job(config)
    config = config_of()
    config.data.sources = [row for row in config.data.sources if row.task in ("lm", "mmu")]
    with pytest.raises(ValueError, match=r"no source in \[\[data.sources\]\] has target images"):
        check_job(config)
    config.sampling.enable = False
    check_job(config)


def test_it_can_be_shown_in_wandb_alone(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    alone = "--metrics.no_enable_tensorboard"
    with pytest.raises(ValueError, match="sample grids are shown in TensorBoard and W&B"):
        check_job(config_of(alone))
    config = config_of(f"{alone} --metrics.enable_wandb")
    check_job(config)
    assert config.sampling.enable and not config.metrics.enable_tensorboard


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("freq = 0", "sampling.freq: must be at least 1, got 0"),
        ("batch_size = 0", "sampling.batch_size: must be at least 1, got 0"),
        ('prompts = "a circle"', "sampling.prompts: must be a list, each item a string"),
        ("prompts = [1]", "sampling.prompts[0]: must be a string, got 1"),
        ("prompt = ['a']", "sampling: unknown key 'prompt'; did you mean 'prompts'?"),
        ("guidance = true", "sampling.guidance: must be a number, got True"),
    ],
)
def test_keys_and_types_and_ranges_are_checked(tmp_path, text, message):
    file = tmp_path / "job.toml"
    file.write_text(f"[sampling]\n{text}\n")
    with pytest.raises(ValueError) as error:
        load_job_config(["--job.config_file", str(file)])
    assert message in str(error.value)
