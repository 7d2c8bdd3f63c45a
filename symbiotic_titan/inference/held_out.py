"""Losses on held-out data: every evaluation uses the same rows, noise and timesteps, on any number of ranks.

Shape letters: sequence/shapes.py.
"""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice

import torch

from symbiotic_titan.build import (
    build_dataloader,
    build_tokenizer,
)
from symbiotic_titan.config.data import Data
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.losses import Flow
from symbiotic_titan.flow.noise import noised_latents
from symbiotic_titan.losses.step import (
    LossFunction,
    accuracies,
    correct_tokens,
    mean_losses,
)
from symbiotic_titan.losses.terms import StepInputs
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.parallel.ranks import DataRanks
from symbiotic_titan.sequence.batch import PackedBatch
from symbiotic_titan.sequence.tasks import TASKS

# Seeds the order of held-out samples and their noise, so that runs with different seeds are comparable.
SEED = 0
# Step of the noise. Training counts from 1, so held-out noise never equals training's.
NOISE_STEP = 0


def held_out_losses(
    model: SymbioticModel,
    batches: Iterable[PackedBatch],
    flow: Flow,
    *,
    first_rows: Iterable[int] | None = None,
    loss_fn: LossFunction | None = None,
    autocast: contextlib.AbstractContextManager | None = None,
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, float]:
    """Mean losses of ``model`` over all rows of ``batches``, and the share of labelled tokens that it predicts, by name.

    Names are the trainer's, ``text``, ``flow`` and ``by_task/*``, and ``accuracy/<task>``; those without tokens are left out.
    ``batches`` are on the model's device. ``first_rows`` are the indices of their first rows among the held-out rows of all
    ranks (None: consecutive): a row's noise depends on its index alone. Under FSDP or expert parallelism every rank must pass
    the same number of batches, as forwards contain collectives. Train or eval mode is restored.
    """
    loss_fn = loss_fn or LossFunction()
    was_training = model.training
    model.eval()
    sums: list[torch.Tensor] = []
    try:
        with torch.no_grad():
            for first_row, batch in _numbered(batches, first_rows):
                one = torch.ones(
                    (), device=batch.tokens.device
                )  # the shield acts on gradients alone
                read = held_out_inputs(model, batch, flow, first_row, loss_fn, autocast, one)
                sums.append(_sums(loss_fn, *read))
    finally:
        model.train(was_training)
    total = torch.stack(sums).sum(0)
    if sum_over_ranks is not None:
        total = sum_over_ranks(total)
    *parts, correct_J = total.cpu().unbind()  # device sync
    terms = loss_fn.counted
    sums_of = dict(zip(terms, parts[: len(terms)], strict=True))
    counts_of = dict(zip(terms, parts[len(terms) :], strict=True))
    return mean_losses(sums_of, counts_of) | accuracies(correct_J, counts_of["text"])


def _numbered(
    batches: Iterable[PackedBatch], first_rows: Iterable[int] | None
) -> Iterator[tuple[int, PackedBatch]]:
    if first_rows is not None:
        yield from zip(first_rows, batches, strict=True)
        return
    row = 0
    for batch in batches:
        yield row, batch
        row += batch.tokens.shape[0]


def _sums(loss_fn: LossFunction, own: PackedBatch, inputs: StepInputs) -> torch.Tensor:
    """(2 * terms + 1, J) float64: sums and counts of the terms that are means over targets, then correct tokens."""
    values, counts = loss_fn.values(inputs), loss_fn.counts(own)
    # Sums and counts, not means: only these add up over batches and ranks with different numbers of tokens.
    parts = [*(values[name] for name in counts), *counts.values()]
    return torch.stack([*parts, correct_tokens(inputs)]).double()


def held_out_inputs(
    model: SymbioticModel,
    batch: PackedBatch,
    flow: Flow,
    first_row: int,
    loss_fn: LossFunction,
    autocast: contextlib.AbstractContextManager | None,
    shield_scale: torch.Tensor,
) -> tuple[PackedBatch, StepInputs]:
    """(the rank's own part of ``batch``, what the loss terms read after a forward with the noise that rows from ``first_row`` on always
    have). ``shield_scale``: (), the factor on the gradients of shielded tokens."""
    noised_BLZ, timesteps_BL, target_BLZ = noised_latents(
        batch.latents,
        batch.vae_image,
        config=replace(flow, seed=SEED),
        step=NOISE_STEP,
        first_row=first_row,
    )
    own = model.own_part(batch)
    index_N = loss_fn.logit_index(own)  # device sync
    with autocast or contextlib.nullcontext():
        output = model(batch, noised_BLZ, timesteps_BL, shield_scale, logit_index_N=index_N)
    inputs = StepInputs(
        batch=own,
        logits=output.logits,
        velocity=output.velocity,
        target_velocity=target_BLZ,
        records=output.records,
        cross_entropy=loss_fn.cross_entropy,
        logit_index=index_N,
    )
    return own, inputs


def held_out_data(config: JobConfig) -> Data:
    """[data] for the held-out sources: a fixed order, no caption dropped, and a stream for every row of a global batch.

    Training's limits on the mixture, its stages and its end of data are reset; a held-out source may still set ``at_end``.
    """
    return replace(
        config.data,
        sources=config.validation.sources,
        seed=SEED,
        num_lanes=0,
        condition_dropout=0.0,
        at_end="repeat",
        max_row_share={},
        stages=[],
    )


# The config's tables with the sources of each split.
TABLES = {"train": "[[data.sources]]", "validation": "[[validation.sources]]"}


def understanding_data(config: JobConfig, split: str) -> Data:
    """[data] with the sources of ``split`` (``train``: [[data.sources]], ``validation``: [[validation.sources]]) that are text or
    questions about images; the others get weight 0. Sequences have no room for target images.

    Raises:
        ValueError: there is none.
    """
    data = held_out_data(config) if split == "validation" else config.data
    sources = [
        row if TASKS[row.task].is_understanding else replace(row, weight=0.0)
        for row in data.sources
    ]
    if not any(row.weight > 0 for row in sources):
        names = " or ".join(name for name in TASKS if TASKS[name].is_understanding)
        raise ValueError(
            f"{TABLES[split]}: none has the task {names}, which is what is read here; "
            "add one, or choose another --split"
        )
    return replace(data, sources=sources, max_vae_tokens=1, stages=[])


def packed_batches(
    config: JobConfig, data: Data, num_batches: int, ranks: DataRanks, split: str = "train"
) -> Iterator[PackedBatch]:
    """``num_batches`` batches of ``training.local_batch_size`` rows of ``data`` for this process, the same at every call. ``split``:
    that of its sources, for messages."""
    config = copy.deepcopy(config)
    config.data = data
    loader = build_dataloader(
        dp_world_size=ranks.size,
        dp_rank=ranks.rank,
        tokenizer=build_tokenizer(config),
        job_config=config,
        table=TABLES[split],
    )
    for batch in islice(loader, num_batches):
        yield batch.to(ranks.device)
