"""How much of a model's understanding a partition keeps: expert counts before it, losses and in-group shares after it.

Letters: L MoE layers, M modalities, E experts, T tokens, K experts per token.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from symbiotic_titan.checkpoint.partition import plan_of_checkpoint
from symbiotic_titan.checkpoint.plan import Plan
from symbiotic_titan.checkpoint.profile import ModelIdentity, Profile, router_hash
from symbiotic_titan.config.data import Data
from symbiotic_titan.config.experts import Shielding
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.evaluation.probe import SHARED_ONLY, probed
from symbiotic_titan.inference import (
    DataRanks,
    LoadedModel,
    packed_batches,
    understanding_data,
)
from symbiotic_titan.moe.layer import PartitionedMoE
from symbiotic_titan.moe.record import routing_totals
from symbiotic_titan.moe.router import Routing, group_of_token
from symbiotic_titan.sequence.batch import PackedBatch
from symbiotic_titan.sequence.modality import MODALITY_NAMES, NUM_MODALITIES
from symbiotic_titan.validation import held_out_losses


def moe_layers(model: nn.Module) -> dict[str, PartitionedMoE]:
    """MoE layers by the name of their block, as in parameter names."""
    named = {
        name: getattr(block, "moe", None)
        for name, block in model.get_submodule("layers").named_children()
    }
    return {f"layers.{name}": moe for name, moe in named.items() if moe is not None}


def describe_data(config: JobConfig, data: Data, split: str, num_rows: int) -> dict[str, Any]:
    """What was read, for the readers of a report."""
    return {
        "split": split,
        "sources": [
            {"name": s.name, "task": s.task, "path": s.path, "weight": s.weight}
            for s in data.sources
            if s.weight > 0
        ],
        "rows": num_rows,
        "seq_len": config.training.seq_len,
    }


def profile_model(
    loaded: LoadedModel,
    config: JobConfig,
    batches: Iterable[PackedBatch],
    data: dict[str, Any],
    ranks: DataRanks,
) -> Profile:
    """Counts of every layer over ``batches``, of all processes."""
    layers = moe_layers(loaded.model)
    if not layers:
        raise ValueError(f"model.flavor = {config.model.flavor!r} has no MoE layer to profile")
    counts_LME = torch.zeros(
        len(layers), NUM_MODALITIES, loaded.args.num_experts, dtype=torch.int64, device=ranks.device
    )
    tokens_M = torch.zeros(NUM_MODALITIES, dtype=torch.int64, device=ranks.device)
    for batch in batches:
        counts_LME += routing_totals(loaded(batch).records).counts
        tokens_M += batch.num_tokens()
    tokens = ranks.sum(tokens_M).tolist()
    return Profile(
        model=ModelIdentity(
            flavor=config.model.flavor,
            step=loaded.stored.step,
            routers=router_hash(loaded.stored),
            groups={group.name: group.num_experts for group in loaded.args.groups},
            top_k=loaded.args.top_k,
        ),
        layers=tuple(layers),
        counts=ranks.sum(counts_LME).cpu(),
        tokens=dict(zip(MODALITY_NAMES, tokens, strict=True)),
        data=data,
    )


def text_losses(
    loaded: LoadedModel, config: JobConfig, batches: Iterable[PackedBatch], ranks: DataRanks
) -> dict[str, float]:
    """``text`` and ``by_task/<task>_text`` losses and ``accuracy/<task>`` of the model over ``batches``, of all processes."""
    return held_out_losses(
        loaded.model, batches, config.flow, autocast=loaded.autocast, sum_over_ranks=ranks.sum
    )


class InsideShares:
    """Counts, while an unpartitioned model runs, the tokens whose top-k all lie in the group that ``plan`` gives their modality:
    the partitioned layer computes for them what this one does."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan = plan
        self.inside_LM = torch.zeros(
            len(plan.layers), NUM_MODALITIES, dtype=torch.int64, device=device
        )
        self.tokens_LM = torch.zeros_like(self.inside_LM)
        sizes = torch.tensor([group.num_experts for group in plan.groups])
        group_of_slot_E = torch.arange(len(sizes)).repeat_interleave(sizes)
        self._owner_LE = group_of_slot_E[plan.order.argsort(-1)].to(device)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Within it every forward of ``model`` is counted."""
        layers = moe_layers(model)
        handles = [
            layers[name].router.register_forward_hook(partial(self._count, i))
            for i, name in enumerate(self.plan.layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _count(
        self, layer: int, router: nn.Module, arguments: tuple[Tensor, Tensor], routing: Routing
    ) -> None:
        _, modality_T = arguments
        group_T = group_of_token(modality_T, self.plan.groups)
        inside_T = (self._owner_LE[layer][routing.experts_TK] == group_T.unsqueeze(-1)).all(-1)
        for m in range(NUM_MODALITIES):
            self.inside_LM[layer, m] += (inside_T & (modality_T == m)).sum()
            self.tokens_LM[layer, m] += (modality_T == m).sum()

    def shares(self, ranks: DataRanks) -> dict[str, list[float]]:
        """Modality -> share of its tokens by layer, over all processes; without those of which there was no token."""
        inside_LM, tokens_LM = ranks.sum(self.inside_LM).cpu(), ranks.sum(self.tokens_LM).cpu()
        return {
            name: (inside_LM[:, m].double() / tokens_LM[:, m]).tolist()
            for m, name in enumerate(MODALITY_NAMES)
            if tokens_LM[:, m].all()
        }


@dataclass(frozen=True)
class StepZeroReport:
    """A checkpoint before its first step, on understanding data.

    columns:      model -> name -> loss or accuracy. The first is ``original`` where one was given, then ``partitioned``, then
                  ``shared_only``: the partitioned model with its routed experts masked.
    layers, inside: of the original, modality -> share by layer of tokens whose top-k stays inside the plan's group.
    """

    data: dict[str, Any]
    columns: dict[str, dict[str, float]]
    layers: tuple[str, ...]
    inside: dict[str, list[float]]

    @property
    def differences(self) -> dict[str, float]:
        """(partitioned - original) / original, by name."""
        before = self.columns.get("original", {})
        after = self.columns["partitioned"]
        return {name: after[name] / value - 1 for name, value in before.items() if value}

    def values(self) -> dict[str, Any]:
        """JSON-able."""
        return {**vars(self), "layers": list(self.layers), "differences": self.differences}


def unpartitioned(config: JobConfig) -> JobConfig:
    """The config of the model that ``config`` partitions: one pool, with the flavor's shared expert."""
    config = copy.deepcopy(config)
    config.experts.partition = {}
    config.experts.shared = True
    config.experts.new_shared_experts = 0
    config.shielding = Shielding()  # there may be nothing to shield
    return config


def step_zero_report(
    config: JobConfig,
    checkpoint: Path,
    ranks: DataRanks,
    *,
    original_config: JobConfig | None = None,
    original: Path | None = None,
    split: str | None = None,
    num_batches: int,
) -> StepZeroReport:
    """Compare ``checkpoint`` with the checkpoint ``original`` that it was made from, on the same rows. One model at a time is in
    memory. ``original_config`` None: ``config`` without its partition; ``split`` None: held-out sources where there are some.

    Raises:
        ValueError: a checkpoint is not of its config's model, or there is no understanding source.
    """
    split = split or ("validation" if config.validation.sources else "train")
    data = understanding_data(config, split)
    columns: dict[str, dict[str, float]] = {}

    def losses_of(model: LoadedModel) -> dict[str, float]:
        batches = packed_batches(config, data, num_batches, ranks, split)
        return text_losses(model, config, batches, ranks)

    plan = plan_of_checkpoint(checkpoint)
    inside = InsideShares(plan, ranks.device) if plan and original else None
    if original is not None:
        before = LoadedModel(original_config or unpartitioned(config), original, ranks)
        with inside.watching(before.model) if inside else nullcontext():
            columns["original"] = losses_of(before)
        del before
    after = LoadedModel(config, checkpoint, ranks)
    columns["partitioned"] = losses_of(after)
    if after.args.shared_hidden_dim:
        with probed(after.model, SHARED_ONLY):
            columns["shared_only"] = losses_of(after)
    num_rows = num_batches * config.training.local_batch_size * ranks.size
    return StepZeroReport(
        data=describe_data(config, data, split, num_rows),
        columns=columns,
        layers=inside.plan.layers if inside else (),
        inside=inside.shares(ranks) if inside else {},
    )
