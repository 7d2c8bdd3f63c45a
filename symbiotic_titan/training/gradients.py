"""The gradients of a step: micro-batch -> noise -> model -> loss terms -> backward, one micro-batch after another.

Every micro-batch is divided by the step's totals, so gradients add up and need no rescaling. A micro-batch is on the device only while
it is computed on, and the next one while it is being copied; with ``losses.balance_scope = "global"`` and several micro-batches all are,
because the first backward needs the expert counts of the last one.
"""

import collections
import contextlib
import functools
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.flow.noise import noised_latents
from symbiotic_titan.losses.step import LossFunction, MicroBatchResult, StepTotals
from symbiotic_titan.losses.terms import StepInputs
from symbiotic_titan.model.symbiotic import ModelOutput, SymbioticModel
from symbiotic_titan.moe.partition import ExpertGroup, batches_of_groups, tokens_of_groups
from symbiotic_titan.moe.record import LoggedRouting, RoutingTotals, routing_totals
from symbiotic_titan.parallel.fsdp import reduce_after
from symbiotic_titan.parallel.ranks import DataRanks, gather_over_ranks
from symbiotic_titan.sequence.batch import PackedBatch
from symbiotic_titan.training.step_data import MicroBatch


@dataclass(frozen=True)
class StepGradients:
    """Computes the gradients of a step.

    num_micro_batches:  of a step on this rank.
    on_device:          what the model reads of a micro-batch: with target images encoded.
    context:            that of a forward: autocast, and what torchtitan's parallelisms need.
    shield_scale:       () on the device, see ``optim.shield_schedule``.
    """

    model: SymbioticModel
    config: JobConfig
    loss_fn: LossFunction
    ranks: DataRanks
    groups: tuple[ExpertGroup, ...]
    num_micro_batches: int
    on_device: Callable[[MicroBatch], MicroBatch]
    context: Callable[[], contextlib.AbstractContextManager[None]]
    shield_scale: Tensor

    def of_step(
        self, step: int, micro_batches: Iterable[MicroBatch], totals: StepTotals
    ) -> list[MicroBatchResult]:
        """Add the gradients of all ``micro_batches`` to the parameters', in order."""
        # A map: each is encoded when its turn comes.
        coming: Iterable[MicroBatch] = map(self.on_device, micro_batches)
        routing = None
        if self.config.losses.balance_scope == "global" and self.num_micro_batches > 1:
            coming = list(coming)
            routing = self.routing_of_step(step, coming)
        results = [
            self.forward_backward(step, i, micro_batch, totals, routing)
            for i, micro_batch in enumerate(coming)
        ]
        counts = [result.routing.counts for result in results if result.routing is not None]
        if counts:
            self.recent_counts.append(functools.reduce(operator.add, counts))
        return results

    @functools.cached_property
    def recent_counts(self) -> collections.deque[Tensor]:
        """(Y, M, E) assignments on this rank in each of the last ``metrics.routing_window`` steps."""
        return collections.deque(maxlen=self.config.metrics.routing_window)

    def first_row(self, index: int) -> int:
        """Index, in the step's global batch, of the first row of this rank's micro-batch ``index``."""
        number = self.ranks.rank * self.num_micro_batches + index
        return number * self.config.training.local_batch_size

    def forward(
        self, step: int, index: int, batch: PackedBatch, logit_index_N: Tensor | None
    ) -> tuple[ModelOutput, Tensor]:
        """(the model's output on a freshly noised batch, its (B, L, Z) velocity target)."""
        noised_BLZ, timesteps_BL, target_BLZ = noised_latents(
            batch.latents,
            batch.vae_image,
            config=self.config.flow,
            step=step,
            first_row=self.first_row(index),
        )
        with self.context():
            output = self.model(
                batch, noised_BLZ, timesteps_BL, self.shield_scale, logit_index_N=logit_index_N
            )
        return output, target_BLZ

    def routing_of_step(self, step: int, micro_batches: Iterable[MicroBatch]) -> RoutingTotals:
        """Expert counts of the whole step over all ranks, by a forward without gradients and logits."""
        totals = []
        with torch.no_grad():
            for i, micro_batch in enumerate(micro_batches):
                no_logits = micro_batch.batch.tokens.new_empty(0)
                output, _ = self.forward(step, i, micro_batch.batch, no_logits)
                totals.append(routing_totals(output.records))
        return self.sum_routing(totals)

    def sum_routing(self, totals: Iterable[RoutingTotals]) -> RoutingTotals:
        """Counts of several micro-batches, summed over them and over all ranks."""
        # Copied, because a single micro-batch's own counts are reported, too.
        return functools.reduce(operator.add, totals).map(lambda n: self.ranks.sum(n.clone()))

    def logged_routing(self, results: Iterable[MicroBatchResult]) -> LoggedRouting | None:
        """Of the step of ``results``, which was the last; None without MoE layers. Collective."""
        found = [result.routing for result in results if result.routing is not None]
        if not found:
            return None
        recent_YME = torch.stack(list(self.recent_counts)).sum(0)
        return LoggedRouting(self.sum_routing(found), self.ranks.sum(recent_YME))

    def check_finite(
        self,
        step: int,
        losses: dict[str, float],
        grad_norm: float,
        results: Iterable[MicroBatchResult],
    ) -> None:
        """Raise FloatingPointError if a loss of ``step`` or the gradient norm is not finite, before the weights change. Collective then."""
        bad = self.loss_fn.not_finite(losses, grad_norm)
        if not bad:
            return
        # Losses and norm are global, so all ranks get here together and the collective cannot hang.
        flags = gather_over_ranks(all(bool(result.is_finite) for result in results))
        ranks = [rank for rank, finite in enumerate(flags) if not finite]
        where = f"on ranks {ranks}" if ranks else "in the backward pass"
        raise FloatingPointError(
            f"step {step}: {', '.join(bad)} not finite, {where} ({bad}); the weights were not changed. Resume from the last checkpoint "
            "with a lower learning rate or other data, or let stability.on_bad_step skip such steps or roll them back"
        )

    def forward_backward(
        self,
        step: int,
        index: int,
        micro_batch: MicroBatch,
        totals: StepTotals,
        step_routing: RoutingTotals | None,
    ) -> MicroBatchResult:
        """Forward and backward of this rank's micro-batch ``index``."""
        if self.num_micro_batches > 1:
            reduce_after(
                self.model,
                is_last=index == self.num_micro_batches - 1,
                gradient_sync=self.config.parallelism.fsdp_gradient_sync,
            )
        output, target_BLZ = self.forward(step, index, micro_batch.batch, micro_batch.logit_index_N)
        routing = routing_totals(output.records) if output.records else None
        if self.config.losses.balance_scope == "global" and step_routing is None and routing:
            step_routing = self.sum_routing([routing])
        values = self.loss_fn.values(
            StepInputs(
                batch=self.model.own_part(micro_batch.batch),
                logits=output.logits,
                velocity=output.velocity,
                target_velocity=target_BLZ,
                records=output.records,
                routing=routing and routing.map(self.ranks.sum_over_parts),
                num_micro_batches=self.num_micro_batches * self.ranks.size,
                step_routing=step_routing,
                group_tokens=tokens_of_groups(totals.modality, self.groups),
                group_batches=batches_of_groups(totals.sets, self.groups),
                cross_entropy=self.loss_fn.cross_entropy,
                logit_index=micro_batch.logit_index_N,
            )
        )
        self.loss_fn.loss(values, totals).backward()
        return MicroBatchResult({name: v.detach() for name, v in values.items()}, routing)
