"""The debug model made parallel in the processes of a test, and a batch that differs from rank to rank."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.flavors import FLAVORS
from symbiotic_titan.model.symbiotic import ModelOutput, SymbioticModel
from symbiotic_titan.parallel.parallelize import parallelize
from symbiotic_titan.parallel.ranks import parallel_dims_of
from symbiotic_titan.sequence.batch import stack_rows
from tests.helpers.tiny_models import MIXED, OTHER, Document, pack_row

DEBUG = Path(__file__).parents[2] / "train_configs" / "debug.toml"


def config_of(overrides: str) -> JobConfig:
    return load_job_config(["--job.config_file", str(DEBUG), *overrides.split()])


def build(config: JobConfig, **vit: object) -> tuple[SymbioticModel, ModelArgs]:
    """The initialised model on this rank of the process group, with switches of its ViT."""
    args = FLAVORS["debug"]
    args.vit = replace(args.vit, **vit)
    args.update_from_config(config)
    dims = parallel_dims_of(config, dist.get_world_size())
    with torch.device("meta"):
        model = SymbioticModel(args)
    parallelize(model, dims, config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_weights()
    return model, args


def forward(
    model: SymbioticModel,
    args: ModelArgs,
    rank: int,
    shield_scale: float = 1.0,
    documents: tuple[list[Document], list[Document]] = (MIXED, OTHER),
) -> ModelOutput:
    """On two rows, the second of which is the rank's own."""
    first, second = documents
    batch = stack_rows([pack_row(first, args), pack_row(second, args, seed=10 + rank)])
    shape = batch.vae_image.shape
    timesteps_BL = torch.linspace(0.1, 0.9, shape[1]).expand(shape)
    output = model(batch, batch.latents, timesteps_BL, torch.tensor(shield_scale))
    used_BT1 = (batch.document >= 0).unsqueeze(-1)  # logits of padding have no meaning
    return replace(output, logits=output.logits.where(used_BT1, 0.0))


def backward(output: ModelOutput) -> None:
    """Of a loss that depends on everything the model returns, the routing records as well."""
    balance = sum(p.square().sum() for record in output.records for p in record.prob_sum)
    loss = output.logits.float().square().mean() + output.velocity.square().mean() + balance
    loss.backward()
