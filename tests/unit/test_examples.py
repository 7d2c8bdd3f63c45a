"""The examples of docs/extending.md act as their page says; tests/unit/test_extend.py checks that each registers its part."""

from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from symbiotic_titan.build import build_dataloader, build_tokenizer
from symbiotic_titan.config.data import FORMATS, PACKINGS
from symbiotic_titan.config.extension import import_extension
from symbiotic_titan.config.generation import SOLVERS
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.config.losses import LOSS_TERMS, TIMESTEP_DISTRIBUTIONS, Flow
from symbiotic_titan.config.optimizer import LR_DECAYS
from symbiotic_titan.data.documents import Document, TextSegment
from symbiotic_titan.data.packing import SequenceSize
from symbiotic_titan.losses.terms import StepInputs
from symbiotic_titan.sequence.modality import IGNORE_INDEX, NO_TASK
from symbiotic_titan.sequence.tasks import TASKS, task_names, task_number
from tests.helpers.users_parts import users_parts

REGISTRIES = (FORMATS, PACKINGS, LOSS_TERMS, LR_DECAYS, SOLVERS, TASKS, TIMESTEP_DISTRIBUTIONS)


@pytest.fixture(autouse=True)
def own_registries():
    """What an example registers is forgotten after its test."""
    with users_parts(*REGISTRIES):
        yield


def import_example(name: str) -> None:
    import_extension(f"docs.examples.{name}")


def test_a_task_from_outside_gets_the_next_number_and_keeps_the_others():
    before = task_names()
    import_example("describe_task")
    assert task_names() == (*before, "describe")
    assert task_number("describe") == len(before)
    task = TASKS["describe"]
    assert task.is_understanding and task.has_images and not task.is_cacheable


def packed_rows(tmp_path, name, data, source, number=4):
    """The first rows that a TOML file, which names the example, gives."""
    config = tmp_path / "run.toml"
    config.write_text(
        f"""
        [experimental]
        custom_import = "docs.examples.{name}"
        [training]
        seq_len = 32
        local_batch_size = 1
        [data]
        {data}
        [[data.sources]]
        name = "texts"
        task = "lm"
        {source}
        """
    )
    job = load_job_config(["--job.config_file", str(config)])
    tokenizer = build_tokenizer(job)
    loader = build_dataloader(dp_world_size=1, dp_rank=0, tokenizer=tokenizer, job_config=job)
    documents = [
        tokenizer.decode(row.tokens[row.document == number].tolist())
        for row in islice(loader, number)
        for number in range(int(row.document.max()) + 1)
    ]
    return documents


def test_csv_files_are_read_by_the_loader_like_any_format(tmp_path):
    (tmp_path / "a.csv").write_text('text,other\none,x\n"two, and a comma",y\n')
    (tmp_path / "b.csv").write_text("text\nthree\n")
    source = f'format = "csv"\npath = "{tmp_path}/*.csv"'
    documents = packed_rows(tmp_path, "csv_format", "lookahead = 3", source)
    assert {"one", "two, and a comma", "three"} == set(documents)


def test_first_fit_chooses_by_age(tmp_path):
    lines = "".join(f'{{"text": "{"x" * n}"}}\n' for n in (5, 9, 13, 20))
    (tmp_path / "a.jsonl").write_text(lines)
    source = f'format = "jsonl"\npath = "{tmp_path}/a.jsonl"'
    assert packed_rows(tmp_path, "first_fit", 'packing = "first_fit"', source)
    waiting = [Document(0, (TextSegment([1] * n),)) for n in (5, 9, 3, 2, 1)]
    assert PACKINGS["first_fit"](waiting, SequenceSize(10, 0, 0)) == [0, 2, 3]


def test_the_z_loss_is_the_squared_normaliser_of_labelled_tokens():
    import_example("z_loss")
    term = LOSS_TERMS["z"]
    logits_BTV = torch.randn(2, 5, 7)
    labels_BT = torch.randint(7, (2, 5))
    labels_BT[0, :2] = IGNORE_INDEX
    task_BT = torch.zeros(2, 5, dtype=torch.int64)
    task_BT[1] = 1
    task_BT[1, 4], labels_BT[1, 4] = NO_TASK, IGNORE_INDEX
    batch = SimpleNamespace(labels=labels_BT, task=task_BT)
    index_N = torch.tensor([9, 8, 2, 7, 6, 3, 5, 4, 0])  # of the labelled tokens and two others
    logits_NV = logits_BTV.flatten(0, 1)[index_N]
    inputs = StepInputs(batch, logits_NV, logits_NV, logits_NV, logit_index=index_N)
    assert not term.all_logits
    sums_J = term.value_function()(inputs)
    squares_BT = logits_BTV.exp().sum(-1).log() ** 2
    torch.testing.assert_close(
        sums_J[:2], torch.stack([squares_BT[0, 2:].sum(), squares_BT[1, :4].sum()])
    )
    assert term.count_function()(batch)[:2].tolist() == [3, 4]


def test_the_quadratic_decay_falls_from_1_to_0():
    import_example("quadratic_decay")
    assert [LR_DECAYS["quadratic"](p) for p in (0.0, 0.5, 1.0)] == [1.0, 0.25, 0.0]


def test_the_midpoint_solver_is_exact_where_the_velocity_is_linear_in_time():
    import_example("midpoint_solver")
    x_t = torch.tensor([1.0, 2.0])
    # dx/dt = t: x(t') = x(t) + (t'^2 - t^2) / 2
    x_next = SOLVERS["midpoint"](lambda x, t: torch.full_like(x, t), x_t, 1.0, 0.5)
    torch.testing.assert_close(x_next, x_t + (0.25 - 1.0) / 2)


def test_cosmap_timesteps_lie_in_0_to_1_and_are_symmetric():
    import_example("cosmap_timesteps")
    t = TIMESTEP_DISTRIBUTIONS["cosmap"]((20_000,), Flow(), torch.Generator().manual_seed(0))
    assert t.min() >= 0 and t.max() <= 1
    assert t.mean().item() == pytest.approx(0.5, abs=0.01)
    # P(t < a) = 2/pi * atan(a / (1 - a))
    assert (t < 0.25).float().mean().item() == pytest.approx(0.2048, abs=0.01)
