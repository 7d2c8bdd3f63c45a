"""Running models to plan and to evaluate a partition: expert counts before it, a comparison with the original after it."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from symbiotic_titan.build import build_tokenizer
from symbiotic_titan.config.data import Data
from symbiotic_titan.config.experts import Shielding
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.evaluation.ablation import (
    SHARED_ONLY,
    ablated,
)
from symbiotic_titan.inference.held_out import (
    held_out_losses,
    packed_batches,
    understanding_data,
)
from symbiotic_titan.inference.loaded_model import LoadedModel
from symbiotic_titan.moe.experts import PartitionedMoE
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.moe.record import RoutingRecord, routing_totals
from symbiotic_titan.moe.router import Routing, group_of_token
from symbiotic_titan.parallel.ranks import DataRanks
from symbiotic_titan.partition.apply import plan_of_checkpoint
from symbiotic_titan.partition.plan import (
    Plan,
    check_layers,
    percent,
)
from symbiotic_titan.partition.pools import pool_columns
from symbiotic_titan.partition.profile import (
    ModelIdentity,
    Profile,
    router_hash,
)
from symbiotic_titan.sequence.batch import PackedBatch
from symbiotic_titan.sequence.modality import MODALITY_NAMES, NUM_MODALITIES, VIT
from symbiotic_titan.weights.compatibility import absent_parts
from symbiotic_titan.weights.reader import CheckpointReader


def moe_layers(model: nn.Module) -> dict[str, PartitionedMoE]:
    """The MoE layers by the names of their blocks, e.g. layers.3."""
    named = {
        name: getattr(block, "moe", None)
        for name, block in model.get_submodule("layers").named_children()
    }
    return {f"layers.{name}": moe for name, moe in named.items() if moe is not None}


def lacks_encoder(reader: CheckpointReader) -> bool:
    """Whether the checkpoint has no image encoder. ViT tokens then come from an untrained one, and their routing means nothing."""
    return "vit" in absent_parts(reader.tensors)


def describe_data(config: JobConfig, data: Data, split: str, num_rows: int) -> dict[str, Any]:
    """Describes the data in a report: the sources, and what turned them into tokens."""
    return {
        "split": split,
        "tokenizer": build_tokenizer(config).fingerprint,
        "vit_pixels": data.vit_pixels,
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
    """Expert counts of every layer over the ``batches`` of all processes; 0 for ViT if the checkpoint has no image encoder."""
    layers = moe_layers(loaded.model)
    if not layers:
        raise ValueError(f"model.flavor = {config.model.flavor!r} has no MoE layer to profile")
    counts_YME = torch.zeros(
        len(layers), NUM_MODALITIES, loaded.args.num_experts, dtype=torch.int64, device=ranks.device
    )
    tokens_M = torch.zeros(NUM_MODALITIES, dtype=torch.int64, device=ranks.device)
    for batch in batches:
        counts_YME += routing_totals(loaded(batch).records).counts
        tokens_M += batch.num_tokens()
    if lacks_encoder(loaded.stored):
        counts_YME[:, VIT], tokens_M[VIT] = 0, 0
    tokens = ranks.sum(tokens_M).tolist()
    return Profile(
        model=ModelIdentity(
            flavor=config.model.flavor,
            step=loaded.stored.step,
            routers=router_hash(loaded.stored),
            groups={group.name: group.num_experts for group in loaded.args.groups},
            top_k=loaded.args.top_k,
            top_ks={g.name: g.top_k for g in loaded.args.groups if g.top_k is not None},
        ),
        layers=tuple(layers),
        counts=ranks.sum(counts_YME).cpu(),
        tokens=dict(zip(MODALITY_NAMES, tokens, strict=True)),
        data=data,
    )


def text_losses(
    loaded: LoadedModel, config: JobConfig, batches: Iterable[PackedBatch], ranks: DataRanks
) -> dict[str, float]:
    """``text`` and ``by_task/<task>_text`` losses and ``accuracy/<task>`` over the ``batches`` of all processes."""
    return held_out_losses(
        loaded.model, batches, config.flow, autocast=loaded.autocast, sum_over_ranks=ranks.sum
    )


class TokenShares:
    """Counts the tokens that satisfy a condition, by layer and modality."""

    def __init__(self, num_layers: int, device: torch.device) -> None:
        shape = (num_layers, NUM_MODALITIES)
        self._hits_YM = torch.zeros(shape, dtype=torch.int64, device=device)
        self._tokens_YM = torch.zeros_like(self._hits_YM)

    def count(self, layer: int, hit_T: Tensor, modality_T: Tensor) -> None:
        for m in range(NUM_MODALITIES):
            self._hits_YM[layer, m] += (hit_T & (modality_T == m)).sum()
            self._tokens_YM[layer, m] += (modality_T == m).sum()

    def shares(self, ranks: DataRanks) -> dict[str, list[float]]:
        """Modality -> share of its tokens by layer, over all processes. Modalities without tokens are left out. A collective."""
        hits_YM, tokens_YM = ranks.sum(self._hits_YM).cpu(), ranks.sum(self._tokens_YM).cpu()
        return {
            name: (hits_YM[:, m].double() / tokens_YM[:, m]).tolist()
            for m, name in enumerate(MODALITY_NAMES)
            if tokens_YM[:, m].all()
        }


class InsideShares(TokenShares):
    """Counts, while the original model runs, the tokens whose top-k experts are all in the group that ``plan`` gives their modality.
    For these the partitioned layer computes the same, up to rounding of sums, if the group's top-k is the original's."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        super().__init__(len(plan.layers), device)
        self.plan = plan
        self._device = device

    @contextmanager
    def counting(self, model: nn.Module) -> Iterator[None]:
        """Every forward of ``model`` inside the block is counted."""
        layers = moe_layers(model)
        check_layers(self.plan, layers)
        holds_GYE = self._holds(layers[self.plan.layers[0]].args.groups)
        handles = [
            layers[name].router.register_forward_hook(partial(self._count, i, holds_GYE[:, i]))
            for i, name in enumerate(self.plan.layers)
        ]
        with _removed(handles):
            yield

    def _holds(self, pools: Sequence[ExpertGroup]) -> Tensor:
        """(G + 1, Y, E + 1) bool: whether the plan puts an expert of the original into a group. The last row is of padding, the last
        column of unused places, which are inside every group."""
        columns = pool_columns({pool.name: pool.num_experts for pool in pools})
        num_experts = sum(pool.num_experts for pool in pools)
        holds_GYE = torch.zeros(len(self.plan.groups) + 1, len(self.plan.layers), num_experts + 1)
        holds_GYE[..., num_experts] = 1
        for index, (_, source, order_YE) in enumerate(self.plan.by_group()):
            holds_GYE[index].scatter_(1, order_YE + columns[source.pool].start, 1)
        return holds_GYE.bool().to(self._device)

    def _count(
        self,
        layer: int,
        holds_GE: Tensor,
        router: nn.Module,
        arguments: tuple[Tensor, Tensor],
        routing: Routing,
    ) -> None:
        _, modality_T = arguments
        group_T = group_of_token(modality_T, self.plan.groups)
        inside_T = holds_GE[group_T.unsqueeze(-1), routing.experts_TK].all(-1)
        self.count(layer, inside_T, modality_T)


# A MoE layer's arguments (tokens, their modalities, the shield's scale) and what it returns.
_Arguments = tuple[Tensor, Tensor, Tensor]
_Output = tuple[Tensor, RoutingRecord]


class EqualShares(TokenShares):
    """Counts the tokens for which ``layers`` of two models give bitwise equal outputs for equal inputs: the second model's layers get
    the inputs of the first model's. Inputs and outputs of one batch are kept on the CPU, as one model at a time is in memory."""

    def __init__(self, layers: Sequence[str], device: torch.device) -> None:
        super().__init__(len(layers), device)
        self._layers = layers
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Run one batch of the first model inside the block."""
        moes = moe_layers(model)
        handles = [
            moes[name].register_forward_hook(partial(self._keep, i))
            for i, name in enumerate(self._layers)
        ]
        with _removed(handles):
            yield

    @contextmanager
    def comparing(self, model: nn.Module) -> Iterator[None]:
        """Run the same batch of the second model inside the block. Its outputs are meaningless, as its layers' inputs are replaced."""
        moes = moe_layers(model)
        handles = []
        for i, name in enumerate(self._layers):
            handles.append(moes[name].register_forward_pre_hook(partial(self._replace, i)))
            handles.append(moes[name].register_forward_hook(partial(self._compare, i)))
        with _removed(handles):
            yield

    def _keep(self, layer: int, moe: nn.Module, arguments: _Arguments, output: _Output) -> None:
        self._kept[layer] = arguments[0].cpu(), output[0].cpu()  # device sync

    def _replace(self, layer: int, moe: nn.Module, arguments: _Arguments) -> _Arguments:
        x_TD, modality_T, shield_scale = arguments
        return self._kept[layer][0].to(x_TD.device), modality_T, shield_scale

    def _compare(self, layer: int, moe: nn.Module, arguments: _Arguments, output: _Output) -> None:
        _, before_TD = self._kept.pop(layer)
        equal_T = (output[0] == before_TD.to(output[0].device)).all(-1)
        self.count(layer, equal_T, arguments[1])


@contextmanager
def _removed(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class StepZeroReport:
    """A partitioned checkpoint before its first step, on understanding data.

    columns  model -> name -> loss or accuracy, for the models ``original`` (if given), ``partitioned``, and ``shared_only``, the
             partitioned model with its routed experts masked.
    layers   names of the MoE layers, in the order of the shares below.
    inside   modality -> share by layer of the original's tokens whose top-k experts are all in the plan's group.
    equal    modality -> share by layer of tokens for which the partitioned layer, given the original's input, gives bitwise the
             original's output; first batch only. It may be below ``inside``: which rows share a matmul can decide its last bit. Measured
             in float32 on a CPU, for up to 2.6 % of the tokens by 5e-7: those with an expert of one to three rows in either layer.
    """

    data: dict[str, Any]
    columns: dict[str, dict[str, float]]
    layers: tuple[str, ...]
    inside: dict[str, list[float]]
    equal: dict[str, list[float]] = field(default_factory=dict)

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
    """The config of the model that ``config`` partitions: the flavor's own groups, most often one pool, and its shared expert."""
    config = copy.deepcopy(config)
    config.experts.partition = {}
    config.experts.shared = True
    config.experts.new_shared_experts = 0
    config.shielding = Shielding()  # one pool may have nothing to shield
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
    """Compare ``checkpoint`` with the checkpoint ``original`` that it was made from, on the same batches. One model at a time is in
    memory. A collective.

    original_config  None: ``config`` without its partition.
    split            None: validation where the config has validation sources, else train.

    Raises:
        ValueError: a checkpoint does not match its config, or there is no understanding source.
    """
    split = split or ("validation" if config.validation.sources else "train")
    data = understanding_data(config, split)
    columns: dict[str, dict[str, float]] = {}

    def losses_of(model: LoadedModel) -> dict[str, float]:
        batches = packed_batches(config, data, num_batches, ranks, split)
        return text_losses(model, config, batches, ranks)

    def run_one_batch(model: LoadedModel) -> None:
        for batch in packed_batches(config, data, 1, ranks, split):
            model(batch)

    plan = plan_of_checkpoint(checkpoint)
    inside = InsideShares(plan, ranks.device) if plan and original else None
    equal = EqualShares(plan.layers, ranks.device) if plan and original else None
    if original is not None:
        before = LoadedModel(original_config or unpartitioned(config), original, ranks)
        with inside.counting(before.model) if inside else nullcontext():
            columns["original"] = losses_of(before)
        with equal.recording(before.model) if equal else nullcontext():
            run_one_batch(before)
        del before
    after = LoadedModel(config, checkpoint, ranks)
    columns["partitioned"] = losses_of(after)
    if equal:
        with equal.comparing(after.model):
            run_one_batch(after)
    if after.args.shared_hidden_dim:
        with ablated(after.model, SHARED_ONLY):
            columns["shared_only"] = losses_of(after)
    num_rows = num_batches * config.training.local_batch_size * ranks.size
    return StepZeroReport(
        data=describe_data(config, data, split, num_rows),
        columns=columns,
        layers=inside.plan.layers if inside else (),
        inside=inside.shares(ranks) if inside else {},
        equal=equal.shares(ranks) if equal else {},
    )


def step_zero_table(
    columns: Mapping[str, Mapping[str, float]],
    differences: Mapping[str, float],
    layers: Sequence[str],
    inside: Mapping[str, Sequence[float]],
    equal: Mapping[str, Sequence[float]],
) -> str:
    """The fields of a StepZeroReport as text."""
    lines = ["  " + " " * 22 + "".join(name.rjust(14) for name in columns) + "    difference"]
    for name in dict.fromkeys(name for values in columns.values() for name in values):
        cells = "".join(f"{values[name]:14.4f}" for values in columns.values())
        end = f"{100 * differences[name]:+12.2f} %" if name in differences else ""
        lines.append(f"  {name:22s}{cells}{end}")
    for what, shares in (
        ("whose top-k stays inside the group", inside),
        ("for which a layer gives the original's bits for its input (first batch)", equal),
    ):
        if shares:
            lines += [f"\nshare of tokens {what}", *_shares_by_layer(layers, shares)]
    return "\n".join(lines)


def _shares_by_layer(layers: Sequence[str], shares: Mapping[str, Sequence[float]]) -> Iterator[str]:
    rows = [(layer, [values[i] for values in shares.values()]) for i, layer in enumerate(layers)]
    rows.append(("mean", [sum(values) / len(values) for values in shares.values()]))
    for label, row in rows:
        cells = "  ".join(f"{n} {percent(v):>8s}" for n, v in zip(shares, row, strict=True))
        yield f"  {label:10s} {cells}"
