"""The trainer: batch -> noise -> model -> loss terms -> step.

torchtitan's Trainer with its own ``train_step``, because every loss term has its own normaliser and the model also returns routing
records. Differences from upstream's step: targets are counted over the whole step and each term is divided once; noise is drawn per
row; the balancing loss may need the expert counts of the whole step; losses and gradient norm are checked before the weights change;
a stop signal, and an error in the data of the next step, end the run after the current step, with a checkpoint.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.logging import logger
from torchtitan.train import Trainer

from symbiotic_titan.checkpoint.manager import SymbioticCheckpointManager, in_use
from symbiotic_titan.checkpoint.start import Start, share_start
from symbiotic_titan.codecs.batch import ImagePlace, build_batch_encoder
from symbiotic_titan.config.data import used_sources
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.optimizer import Weights
from symbiotic_titan.config.saved import SavedConfig
from symbiotic_titan.config.stages import rates_by_stage
from symbiotic_titan.data.latents import generates
from symbiotic_titan.data.loader import PackedLoader
from symbiotic_titan.device import copy_from_host
from symbiotic_titan.losses.step import LossFunction, MicroBatchResult, StepTotals
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.flops import NUM_PAIRS, model_cost, visible_pairs
from symbiotic_titan.model.initialize import leaving_out
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.optim.group_norms import group_grad_norms, group_update_ratios
from symbiotic_titan.optim.group_record import GroupRecord
from symbiotic_titan.optim.shield_schedule import shield_scale
from symbiotic_titan.parallel.float8 import refresh_scales
from symbiotic_titan.parallel.ranks import data_ranks, on_host, traces_made_later
from symbiotic_titan.process import is_first_process
from symbiotic_titan.sequence.batch import PackedBatch
from symbiotic_titan.sequence.modality import MODALITY_NAMES
from symbiotic_titan.signals import Stopped, StopRequest
from symbiotic_titan.training.gradients import StepGradients
from symbiotic_titan.training.metrics import StepReport, SymbioticMetrics
from symbiotic_titan.training.step_data import (
    MicroBatch,
    StepBatches,
    StepData,
    read_seconds,
)

if TYPE_CHECKING:  # loaded by the runs that use them
    from symbiotic_titan.optim.ema import EMA
    from symbiotic_titan.training.stability import BadSteps
    from symbiotic_titan.training.validation import SymbioticValidator


class SymbioticTrainer(Trainer):
    """Trains the model of the train spec ``symbiotic`` from a checked JobConfig. ``start``: what ``find_start`` found; None: new
    weights. ``stop``: where signals are handled already; None: from ``train`` on."""

    job_config: JobConfig
    metrics_processor: SymbioticMetrics  # type: ignore[assignment]
    validator: "SymbioticValidator"
    checkpointer: SymbioticCheckpointManager
    loss_fn: LossFunction  # type: ignore[assignment]

    def __init__(
        self, job_config: JobConfig, start: Start | None = None, stop: StopRequest | None = None
    ) -> None:
        self.start, self.given = start, set[str]()
        self.stop, self.saved_config = stop or StopRequest(), SavedConfig(job_config)
        self.first_step = 0  # the step that this process continued from
        self.tokens_seen = torch.zeros(len(MODALITY_NAMES), dtype=torch.int64)
        with warnings.catch_warnings(), leaving_out(self.given), in_use():
            # In float32 on one process upstream creates an autocast that torch disables with a warning.
            warnings.filterwarnings("ignore", message="In CPU autocast")
            super().__init__(job_config)
        if job_config.training.mixed_precision_param == "float32":
            self.maybe_enable_amp = contextlib.nullcontext()
        self.ranks = data_ranks(self.device, self.parallel_dims)
        geometry = cast(ModelArgs, self.model_args).geometry
        data, held_out = job_config.data, job_config.validation.sources
        images = generates([*used_sources(data.sources, data.stages), *used_sources(held_out)])
        self.encode = build_batch_encoder(job_config.latents, geometry, self.device, needed=images)
        self.ema: EMA | None = None
        if job_config.ema.enable:
            from symbiotic_titan.optim.ema import build_ema

            self.ema = self.checkpointer.states["ema"] = build_ema(self.model_parts[0], job_config)
        if job_config.validation.enable:
            self.validator.connect(
                self.to_device,
                self.maybe_enable_amp,
                self.sum_over_ranks,
                self.stop_requested,
                functools.partial(self.using_weights, job_config.validation.weights),
            )
        self.lr_schedulers.set_stages(rates_by_stage(data.stages))  # type: ignore[attr-defined]
        # Called with the step after each step, and with 0 before the first one of a new run.
        self.step_hooks: list[Callable[[int], None]] = []
        self.checkpointer.states["param_groups"] = GroupRecord(self.model_parts[0], self.optimizers)  # type: ignore[arg-type]
        self.checkpointer.on_failed_save = functools.partial(self.stop.request, "a failed save")
        self.bad_steps = self.find_bad_steps(job_config)
        self.shield_scale = torch.ones((), device=self.device)
        self.gradients = StepGradients(
            model=cast(SymbioticModel, self.model_parts[0]),
            config=job_config,
            loss_fn=self.loss_fn,
            ranks=self.ranks,
            groups=cast(ModelArgs, self.model_args).groups,
            num_micro_batches=self.gradient_accumulation_steps,
            on_device=lambda m: replace(m, batch=self.to_device(m.batch, m.image_places)),
            context=self.forward_context,
            shield_scale=self.shield_scale,
        )
        seen = job_config.data.seen_pixels
        self.metrics_processor.cost = model_cost(
            self.model_parts[0],
            cast(ModelArgs, self.model_args),
            job_config.training.seq_len,
            image_patches=geometry.vit_budget(seen)[1] if seen else None,
        )

    def find_bad_steps(self, config: JobConfig) -> "BadSteps | None":
        """What passes over bad steps, as a part of checkpoints; None where [stability] asks for nothing."""
        if config.stability.on_bad_step == "stop" and not config.stability.has_limits:
            return None
        from symbiotic_titan.training.stability import BadSteps

        self.checkpointer.prepare_to_roll_back(config, self.ema)
        found = self.checkpointer.states["stability"] = BadSteps(
            config.stability, self.checkpointer
        )
        return found

    def init_distributed(self) -> ParallelDims:
        with traces_made_later(self.job_config):
            dims = super().init_distributed()
            self.start = share_start(self.start, self.job_config)
        self.given |= self.start.entries.keys() if self.start else set()
        return dims

    # ---- data ---------------------------------------------------------------------------------------------------------

    def batch_generator(self, data_iterable: Iterable[PackedBatch]) -> StepData:  # type: ignore[override]
        """One step's data after another; upstream's loop hands it to ``train_step``."""
        loader = cast(PackedLoader, data_iterable)
        loader.start_at(self.step)
        self.step_data = StepData(
            loader,
            self.gradient_accumulation_steps,
            self.ranks,
            self.metrics_processor.data_loading_times,
            count=self.count,
            move=self.move,
            signals=self.stop,
            read_seconds=read_seconds(self.job_config, self.parallel_dims.world_size),
        )
        return self.step_data

    def count(self, batches: Sequence[PackedBatch]) -> torch.Tensor:
        """(N,) float64 of a step's batches on the host: the targets of the loss terms, then the pairs that attention computes."""
        whole, vit = batches if self.ranks.counts_rows else [], self.model_args.vit_attention  # type: ignore[attr-defined]
        no_pairs = torch.zeros(NUM_PAIRS, dtype=torch.float64)
        pairs = sum((visible_pairs(batch, vit) for batch in whole), no_pairs)
        targets = self.loss_fn.count_step([self.own_part(batch) for batch in batches], whole)
        return torch.cat([targets, pairs])

    def move(self, batch: PackedBatch) -> MicroBatch:
        """``batch`` on its way to the device; what the host must know of it is found out first, so that it never asks the device."""
        own = self.own_part(batch)
        index_N, places = self.loss_fn.logit_index(own), self.encode.places(batch)
        copied = functools.partial(copy_from_host, device=self.device)
        moved = self.counted(batch, own).map(copied)
        return MicroBatch(moved, None if index_N is None else copied(index_N), places)

    def to_device(self, batch: PackedBatch, places: list[ImagePlace] | None = None) -> PackedBatch:
        """``batch`` on the training device, target images, which are at ``places``, encoded as latents."""
        return self.encode(self.counted(batch, self.own_part(batch)).to(self.device), places)

    def counted(self, batch: PackedBatch, own: PackedBatch) -> PackedBatch:
        """``batch`` with the counts of its ``own_part``, which is all that its way to the device would count."""
        return replace(batch, modality_counts=own.counted(self.device).modality_counts)

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """``values`` summed over all ranks; the same on all of them."""
        return self.ranks.sum(values)

    def own_part(self, batch: PackedBatch) -> PackedBatch:
        """Of ``batch`` what the model's output is about, see ``SymbioticModel.own_part``."""
        return cast(SymbioticModel, self.model_parts[0]).own_part(batch)

    # ---- one step -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def forward_context(self) -> Iterator[None]:
        with self.train_context(), self.maybe_enable_amp:
            yield

    def train_step(self, data_iterator: Iterator[StepBatches]) -> None:  # type: ignore[override]
        """One optimizer step over ``gradient_accumulation_steps`` micro-batches. The host waits for the device once."""
        if self.step == 1:  # of a new run, or from initial weights
            self.before_the_first_step()
        self.optimizers.zero_grad()
        scale = shield_scale(self.job_config.shielding, self.step)
        self.shield_scale.fill_(scale)
        data = next(data_iterator)
        # Known before the first backward: every micro-batch can then divide by the step's totals.
        totals = self.loss_fn.totals(data.counts[:-NUM_PAIRS])
        results = self.gradients.of_step(self.step, data.micro_batches, totals)
        should_log = self.metrics_processor.should_log(self.step)
        # Before clipping scales the gradients.
        norms = group_grad_norms(self.optimizers.groups) if should_log else {}  # type: ignore[attr-defined]
        grad_norm = dist_utils.clip_grad_norm_(
            [p for p in self.model_parts[0].parameters() if p.requires_grad],
            self.job_config.training.max_norm,
            foreach=True,
            ep_enabled=self.parallel_dims.ep_enabled,
        )
        sums, norm, *group_norms = self.read_step(results, grad_norm, *norms.values())
        totals = self.loss_fn.totals(data.counts_on_host[:-NUM_PAIRS])
        losses = self.loss_fn.step_losses(sums.float(), totals)
        is_taken = self.takes_step(losses, float(norm), results)
        rates = {group["name"]: group["lr"] for group in self.optimizers.groups}  # type: ignore[attr-defined]
        ratios = self.update_weights(should_log) if is_taken else {}
        self.lr_schedulers.step()
        self.count_tokens(totals, data.counts_on_host[-NUM_PAIRS:])
        if should_log and is_taken:
            self.metrics_processor.log_step(
                StepReport(
                    step=self.step,
                    losses=losses,
                    grad_norms={
                        "all": float(norm),
                        **dict(zip(norms, map(float, group_norms), strict=True)),
                    },
                    rates=rates,
                    weights=self.job_config.data.weights_at(self.step),
                    update_ratios=ratios,
                    ema=self.ema.metrics() if self.ema is not None else {},
                    routing=self.gradients.logged_routing(results),
                    shield_scale=scale,
                    fill=float(totals.modality.sum() / totals.positions),
                    skipped=self.step_data.count_skipped(),
                    tokens_seen=self.tokens_seen,
                    bad_steps=self.bad_steps.counts if self.bad_steps else {},
                )
            )
        for hook in self.step_hooks:
            hook(self.step)
        self.stop.nothing_to_save = False

    def takes_step(
        self, losses: dict[str, float], norm: float, results: list[MicroBatchResult]
    ) -> bool:
        """Whether the weights may change by this step; if not, [stability] has skipped it or rolled back. The same on all ranks.

        Raises:
            FloatingPointError: the step is bad, and the run must stop. The last checkpoint is kept.
        """
        if self.bad_steps is not None:
            bad = self.loss_fn.not_finite(losses, norm)
            if self.bad_steps.pass_over(self.step, losses["total"], norm, bad):
                self.metrics_processor.log_bad_step(self.step, self.bad_steps.counts)
                return False
        self.gradients.check_finite(self.step, losses, norm, results)
        return True

    def update_weights(self, should_log: bool) -> dict[str, float]:
        """The optimizer's step. Returns the update ratios where they are logged."""
        # An asynchronous save may still be copying the weights that the optimizer is about to change.
        self.checkpointer.maybe_wait_for_staging()
        self.optimizers.step()
        ratios = group_update_ratios(self.optimizers) if should_log else {}
        if self.ema is not None:
            self.ema.update(self.step)
        return ratios

    def before_the_first_step(self) -> None:
        """What measures the initial weights. Raises Stopped on a stop signal to any rank."""
        if self.job_config.validation.enable:
            self.validator.validate(self.model_parts, step=0)
        for hook in self.step_hooks:
            hook(0)
        if self.step_hooks or self.job_config.validation.enable:
            self.leave_if(self.stop_requested())

    def read_step(
        self, results: list[MicroBatchResult], *others: torch.Tensor
    ) -> list[torch.Tensor]:
        """The values on the host of ``results``, summed over the ranks, and of ``others``: the one wait for the device of a step.

        The next step's data are read before it, while the device still computes, and what the ranks agree on comes with these values.
        """
        wanted = [self.ranks.sum(self.loss_fn.sum_results(results)), *others]
        if self.step < self.job_config.training.steps:
            *found, agreed = on_host(*wanted, self.step_data.read())
            self.step_data.agree(agreed)
            return found
        return on_host(*wanted)

    @contextlib.contextmanager
    def using_weights(self, which: Weights) -> Iterator[None]:
        """Let the model have these weights for a measurement, then those of the training again, bit for bit."""
        if self.ema is None or which == "trained":
            yield
            return
        # An asynchronous save may still be copying the weights.
        self.checkpointer.maybe_wait_for_staging()
        with self.ema.applied():
            refresh_scales(self.model_parts[0], self.job_config)
            yield
        refresh_scales(self.model_parts[0], self.job_config)

    def count_tokens(self, totals: StepTotals, pairs: torch.Tensor) -> None:
        """Add the step's tokens, and the ``pairs`` that attention computed, to the running totals. Both on the host."""
        tokens = totals.modality.to(torch.int64)
        self.tokens_seen += tokens
        self.ntokens_seen = int(self.tokens_seen.sum())
        num_labels = int(totals.counts["text"].sum())
        self.metrics_processor.count(tokens, num_labels, pairs)

    # ---- stopping, saving, resuming -----------------------------------------------------------------------------------

    def train(self) -> None:
        """Load what the run starts from, train, and save when a signal asks to stop."""
        self.stop.install(self.job_config.checkpoint.stop_signals)
        if self.start is not None:
            self.checkpointer.begin(self.start, self.job_config.checkpoint, self.ema)
            self.start = None  # its metadata are freed once they are loaded
        if is_first_process():
            self.saved_config.write()
        super().train()

    def should_continue_training(self) -> bool:
        """Whether to take another step, whose data have been read.

        On a stop signal on any rank, at the end of the data, and on an error in them, all ranks save the last step and stop. A signal
        that comes after the read of a step, in the last moments of it, stops the run after the next one.

        Raises:
            ValueError: an error in the data of any rank; on all ranks, after saving.
        """
        if not super().should_continue_training():
            return False
        if (
            not self.step_data.is_agreed
        ):  # before the first step; later ones read and agree on the next
            self.step_data.agree(*on_host(self.step_data.read()))
        stop = self.step_data.reason_to_stop()
        if stop is None:
            return True
        self.leave_if(self.step == self.first_step and stop.is_signal)
        outcome = self.save_before_stop(stop.reason)
        if stop.error is not None:
            raise ValueError(f"step {self.step + 1}: {stop.error}. {outcome}")
        return False

    def save_before_stop(self, reason: str) -> str:
        """Save the last step, unless it is saved. Returns what became of the work, as a sentence."""
        config = self.job_config.checkpoint
        if self.step == self.first_step:
            logger.info(f"{reason}: stopping at step {self.step}, before any step was taken")
            return "No step was taken since the start, so there was nothing to save"
        if not config.enable or config.load_only:
            logger.warning(f"{reason}: stopping at step {self.step} without a checkpoint")
            setting = "load_only = true" if config.enable else "enable = false"
            return f"With checkpoint.{setting} nothing was saved: the {self.step - self.first_step} steps of this start are lost"
        logger.info(f"{reason}: saving a checkpoint at step {self.step} and stopping")
        self.checkpointer.save_now(self.step)
        return f"The checkpoint of step {self.step} is saved: started again, the run goes on from there"

    def leave_if(self, stopped: bool) -> None:
        """End a run that has nothing to save, on all ranks together."""
        if stopped and self.stop.nothing_to_save:
            raise Stopped

    def stop_requested(self) -> bool:
        """Whether any rank received a stop signal."""
        flag = torch.tensor(float(self.stop.signal_name is not None), device=self.device)
        return bool(self.sum_over_ranks(flag) > 0)

    def close(self) -> None:
        if hasattr(self, "step_data"):
            self.step_data.close()
        super().close()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "tokens_seen": self.tokens_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = self.first_step = state_dict["step"]
        self.tokens_seen = state_dict["tokens_seen"]
        self.ntokens_seen = int(self.tokens_seen.sum())
