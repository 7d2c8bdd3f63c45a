"""Started by tools/cuda_compile.py, one process for each config: compile forward and backward of its model on the fake device.

Three batches of the config's data run through a model with its first layers: shapes, routing sizes and dtypes are real, numbers are
not. Prints one line of JSON.
"""

import argparse
import collections
import contextlib
import json
import traceback
import warnings
from dataclasses import replace
from typing import Any, NamedTuple

import fake_device
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.model_converter import build_model_converters

from symbiotic_titan.build import build_dataloader, build_loss, build_tokenizer
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.losses.step import LossFunction
from symbiotic_titan.losses.terms import StepInputs
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.flavors import model_args
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.moe.partition import batches_of_groups, tokens_of_groups
from symbiotic_titan.moe.router import Router
from symbiotic_titan.parallel.parallelize import parallelize
from symbiotic_titan.sequence.batch import PackedBatch
from symbiotic_titan.training.train_spec import register

# No workers, one rank: only shapes matter.
ONE_PROCESS = (
    "--training.dataloader.num_workers=0",
    "--training.dataloader.no_pin_memory",
    "--parallelism.expert_parallel_degree=1",
    "--training.global_batch_size=-1",
)
PASSES = 3
MOE_LAYERS = 2


def short(args: ModelArgs) -> ModelArgs:
    """``args`` with the dense layers, two layers with experts and two of the ViT: others have the same graphs."""
    args.num_layers = min(args.num_layers, args.num_dense_layers + MOE_LAYERS)
    layers = min(2, args.vit.num_layers)
    deepstack = tuple(i for i in args.vit.deepstack if i < layers)
    args.vit = replace(args.vit, num_layers=layers, deepstack=deepstack)
    return args


def fake(value: Any) -> Any:
    """``value`` on the device, if it is a tensor. Under a FakeTensorMode."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda:0")


class MicroBatch(NamedTuple):
    """On the host: a batch, the tokens whose logits are needed, its share of the step's totals, its tokens of each modality."""

    batch: PackedBatch
    labelled: torch.Tensor | None
    counts: torch.Tensor
    modalities: collections.Counter[int]


class HostReads:
    """Numbers that the host reads from the device, waiting for each. A fake device has none: it answers those that a MoE
    layer asks for, copies and rows of every group, and refuses others. Operators whose shape needs such a number are refused by torch."""

    def __init__(self, args: ModelArgs) -> None:
        self.count, self._args = 0, args
        self._answer: list[int] = []
        FakeTensor.tolist = lambda tensor: self.read(tensor)  # type: ignore

    def expect(self, modalities: collections.Counter[int]) -> None:
        """The next batch has so many tokens of each modality."""
        copies, rows = [], []
        for group, top_k in zip(self._args.groups, self._args.moe_args.top_ks, strict=True):
            copies.append(sum(modalities[m] for m in group.modalities) * top_k)
            # Zero rows fill every expert's last block of 16, as float8 needs.
            rows.append((copies[-1] // 16 + group.num_experts) * 16)
        self._answer = [*copies, *rows]

    def read(self, tensor: torch.Tensor) -> list[int]:
        self.count += 1
        if tensor.numel() != len(self._answer):
            raise ValueError(
                f"the host reads {tensor.numel()} numbers of a device that has none; {len(self._answer)} were expected, "
                "copies and rows of every group"
            )
        return self._answer


def build(config: JobConfig, args: ModelArgs, *, as_fsdp: bool) -> SymbioticModel:
    """The model on the device, converted, checkpointed and compiled as a run of one process has it."""
    dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
    with torch.device("cuda:0"):
        model = SymbioticModel(args)
    build_model_converters(config, dims).convert(model)
    if as_fsdp:
        to_bfloat16(model)
    return parallelize(model, dims, config)


def to_bfloat16(model: SymbioticModel) -> None:
    """The weights as FSDP gives them; routers keep theirs in float32. Replaced, since fake tensors cannot change their dtype."""
    for module in model.modules():
        if isinstance(module, Router):
            continue
        for name, weight in list(module.named_parameters(recurse=False)):
            cast = torch.nn.Parameter(weight.detach().bfloat16(), weight.requires_grad)
            setattr(module, name, cast)


class Step:
    """Forward and backward of a micro-batch, as the trainer's."""

    def __init__(
        self, config: JobConfig, args: ModelArgs, loss: LossFunction, *, as_fsdp: bool
    ) -> None:
        self.model = build(config, args, as_fsdp=as_fsdp)
        self.loss, self.groups, self.as_fsdp = loss, args.groups, as_fsdp
        self.residual: set[str] = set()
        for block in self.model.layers.values():
            block.register_forward_hook(
                lambda _, inputs, output: self.residual.add(str(output[0].dtype)[6:])
            )

    def run(self, micro_batch: MicroBatch) -> None:
        """Raises ValueError if a parameter gets no gradient."""
        batch, index_N = micro_batch.batch.map(fake), fake(micro_batch.labelled)
        totals = self.loss.totals(fake(micro_batch.counts))
        timesteps_BL = torch.empty(batch.vae_image.shape, device="cuda:0")
        precision: Any = contextlib.nullcontext()
        if not self.as_fsdp:
            precision = torch.autocast("cuda", dtype=torch.bfloat16)
        with precision:
            output = self.model(
                batch,
                batch.latents,
                timesteps_BL,
                torch.ones((), device="cuda:0"),
                logit_index_N=index_N,
            )
        inputs = StepInputs(
            batch=batch,
            logits=output.logits,
            velocity=output.velocity,
            target_velocity=torch.empty_like(output.velocity),
            records=output.records,
            group_tokens=tokens_of_groups(totals.modality, self.groups),
            group_batches=batches_of_groups(totals.sets, self.groups),
            cross_entropy=self.loss.cross_entropy,
            logit_index=index_N,
        )
        loss = self.loss.loss(self.loss.values(inputs), totals)
        fake_device.ran.clear()
        loss.backward()
        silent = [name for name, p in self.model.named_parameters() if p.grad is None]
        if silent:
            raise ValueError(f"no gradient for {', '.join(silent[:3])}")
        self.model.zero_grad()


def check(config: JobConfig, *, as_fsdp: bool) -> dict[str, Any]:
    """What three passes compiled."""
    args = short(model_args(config))
    rows = iter(
        build_dataloader(
            dp_world_size=1, dp_rank=0, tokenizer=build_tokenizer(config), job_config=config
        )
    )
    batches = [next(rows) for _ in range(PASSES)]
    fake_device.install()
    loss = build_loss(config)
    micro_batches = [
        MicroBatch(
            batch.counted("cuda"),
            loss.logit_index(batch),
            loss.count_step([batch]),
            collections.Counter(batch.modality.flatten().tolist()),
        )
        for batch in batches
    ]
    reads = HostReads(args)
    graphs: list[int] = []
    again: collections.Counter[str] = collections.Counter()
    errors: list[str] = []
    residual: set[str] = set()
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            step = Step(config, args, loss, as_fsdp=as_fsdp)
            residual = step.residual
            for micro_batch in micro_batches:
                reads.expect(micro_batch.modalities)
                step.run(micro_batch)
                graphs.append(counters["stats"]["unique_graphs"])
                again = fake_device.ran.copy()
        except Exception as error:  # noqa: BLE001 - whatever fails to compile is a row of the result
            traceback.print_exc()
            errors.append(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    passes = len(graphs) * min(MOE_LAYERS, args.num_layers - args.num_dense_layers)
    return {
        "graphs": graphs[0] if graphs else 0,
        "kernel_graphs": dict(fake_device.compiled),
        "breaks": sum(counters["graph_break"].values()),
        "recompilations": graphs[-1] - graphs[0] if graphs else 0,
        "host_reads_per_moe_layer": reads.count / passes if passes else None,
        "residual": sorted(residual),
        # Forward graphs, and attention in any graph, that a backward ran.
        "forward_graphs_again": again["forward"],
        "attention_again": again["flex_attention"],
        "errors": errors,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--fsdp-weights", action="store_true")
    options, overrides = parser.parse_known_args()
    warnings.simplefilter("ignore")
    register()
    config = load_job_config(["--job.config_file", options.config, *overrides, *ONE_PROCESS])
    print(json.dumps(check(config, as_fsdp=options.fsdp_weights)))


if __name__ == "__main__":
    main()
