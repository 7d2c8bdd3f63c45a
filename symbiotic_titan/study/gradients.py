"""Gradients of the shared expert by modality: how large the part from each modality's tokens is, and whether the parts agree.

The gradient of a shared expert's weights is a sum over tokens. With the shield on the weights at scale 0 for all other modalities, a
backward leaves the part of one modality, and nothing else of the pass changes. The parts are measured without the shield that a run
trained with; ``shield/scale`` says which factor its modalities had.

    gradients = shared_gradients(Path("outputs/reproduce/seed-0/symbiotic"), step=450)
    gradients["norm/vae"], gradients["cosine"], gradients["norm/vae/layer_03"]
"""

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from symbiotic_titan.codecs.batch import build_batch_encoder
from symbiotic_titan.config.files import write_json
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.config.saved import saved_config
from symbiotic_titan.device import device_type
from symbiotic_titan.inference.held_out import held_out_data, held_out_inputs, packed_batches
from symbiotic_titan.inference.loaded_model import LoadedModel
from symbiotic_titan.losses.step import LossFunction
from symbiotic_titan.moe.experts import SharedExpert
from symbiotic_titan.moe.partition import batches_of_groups, tokens_of_groups
from symbiotic_titan.parallel.ranks import DataRanks
from symbiotic_titan.process import exit_status
from symbiotic_titan.sequence.batch import PackedBatch
from symbiotic_titan.sequence.modality import MODALITY_NAMES, PADDING, VAE
from symbiotic_titan.weights.damage import find_checkpoint

# The two parts whose directions are compared: the tokens of target images, and all others.
GENERATION, UNDERSTANDING = "generation", "understanding"


def shared_gradients(
    run: Path, step: int | None = None, *, num_batches: int = 4
) -> dict[str, float]:
    """``gradient_numbers`` of a checkpoint of the folder ``run``, by default the newest complete one. The gradient is the mean over
    ``num_batches`` batches of held-out data, each with as many rows as a training step: the same rows and noise at every step, and in every
    run with the same data. More of them leave less to chance, above all in the cosine.

    Raises:
        ValueError: no such checkpoint, no held-out data, or no shared expert.
    """
    config = load_job_config(["--job.config_file", str(saved_config(run))])
    if not config.validation.sources:
        raise ValueError(
            f"{run}: its config has no [[validation.sources]], whose data are read here; add them to its config.toml"
        )
    folder = find_checkpoint(run, config.checkpoint.folder)
    if step is not None:
        folder = run / config.checkpoint.folder / f"step-{step}"
        if not folder.is_dir():
            raise ValueError(
                f"{run}: has no checkpoint of step {step}; leave the step out for its newest one"
            )
    alone = DataRanks(torch.device(device_type()), 0, 1, None)
    loaded = LoadedModel(config, folder, alone)
    if not shared_experts(loaded.model):
        raise ValueError(f"{run}: its model has no shared expert whose gradients could be measured")
    of_a_step = copy.deepcopy(config)
    of_a_step.training.local_batch_size = config.training.global_batch_size
    data = held_out_data(of_a_step)
    batches = packed_batches(of_a_step, data, num_batches, alone, "validation")
    encode = build_batch_encoder(config.latents, loaded.args.geometry, alone.device)
    found = [gradients_by_modality(loaded, config, batch) for batch in map(encode, batches)]
    return gradient_numbers(mean_parts(found))


def mean_parts(
    batches: Sequence[Mapping[str, Mapping[int, Tensor]]],
) -> dict[str, dict[int, Tensor]]:
    """The mean over ``batches`` of what ``gradients_by_modality`` gives; a modality that one of them lacks has no gradient there."""
    names = dict.fromkeys(name for parts in batches for name in parts)
    layers = next(iter(batches[0].values()))
    return {
        name: {
            n: torch.stack([parts[name][n] for parts in batches if name in parts]).sum(0)
            / len(batches)
            for n in layers
        }
        for name in names
    }


def gradients_by_modality(
    loaded: LoadedModel, config: JobConfig, batch: PackedBatch
) -> dict[str, dict[int, Tensor]]:
    """Modality -> number of the layer -> (N,) float32 gradient of all weights of its shared expert, from the tokens of that modality
    alone, of the loss that ``config`` trains with. ``batch``: on the model's device, with latents. Modalities without tokens are left out.
    """
    present = [m for m, number in enumerate(batch.num_tokens().tolist()) if number]
    return {
        MODALITY_NAMES[m]: part_of(
            loaded.model, m, lambda scale: training_loss(loaded, config, batch, scale)
        )
        for m in present
    }


def part_of(model: nn.Module, modality: int, loss: Callable[[Tensor], Tensor]) -> dict[int, Tensor]:
    """Number of the layer -> (N,) float32 gradient of its shared expert's weights from the tokens of ``modality``. ``loss``: (the
    shield's scale) -> the loss of a forward of ``model``."""
    experts = shared_experts(model)
    weights = {layer: list(expert.parameters()) for layer, expert in experts.items()}
    with shielding_all_but(experts, modality):
        scale = torch.zeros((), device=next(iter(weights.values()))[0].device)
        found = iter(torch.autograd.grad(loss(scale), sum(weights.values(), [])))
    return {
        layer: torch.cat([next(found).flatten().float() for _ in own])
        for layer, own in weights.items()
    }


def shared_experts(model: nn.Module) -> dict[int, SharedExpert]:
    """By the number of the layer, as in the names of its parameters."""
    return {
        int(name.split(".")[1]): module
        for name, module in model.named_modules()
        if isinstance(module, SharedExpert)
    }


@contextmanager
def shielding_all_but(experts: Mapping[int, SharedExpert], modality: int) -> Iterator[None]:
    """In the block the shield acts on the weights' gradients from all tokens but those of ``modality``."""
    before = [(expert, expert.shield_modalities, expert.shield_mode) for expert in experts.values()]
    others = tuple(m for m in range(PADDING + 1) if m != modality)
    for expert in experts.values():
        expert.shield_modalities, expert.shield_mode = others, "weights"
    try:
        yield
    finally:
        for expert, modalities, mode in before:
            expert.shield_modalities, expert.shield_mode = modalities, mode


def training_loss(
    loaded: LoadedModel, config: JobConfig, batch: PackedBatch, shield_scale: Tensor
) -> Tensor:
    """() the loss of ``batch`` as if it were a step, with held-out noise."""
    loss_fn = LossFunction(config.losses)
    own, inputs = held_out_inputs(
        loaded.model, batch, config.flow, 0, loss_fn, loaded.autocast, shield_scale
    )
    counts = loss_fn.count_step([own.to("cpu")])  # device sync
    totals = loss_fn.totals(counts.to(own.tokens.device))
    inputs = replace(
        inputs,
        group_tokens=tokens_of_groups(totals.modality, loaded.args.groups),
        group_batches=batches_of_groups(totals.sets, loaded.args.groups),
    )
    return loss_fn.loss(loss_fn.values(inputs), totals)


def gradient_numbers(parts: Mapping[str, Mapping[int, Tensor]]) -> dict[str, float]:
    """L2 norms ``norm/<part>`` of all layers together and ``norm/<part>/layer_NN`` of each; ``cosine`` and ``cosine/layer_NN`` between the
    generation and the understanding part. A part is a modality, ``generation`` (VAE tokens) or ``understanding`` (all others).

    ``parts``: of ``gradients_by_modality``. What has no tokens is left out; so is the cosine of a part that is 0.
    """
    layers = sorted(next(iter(parts.values()), {}))
    places = {"": layers} | {f"/layer_{layer:02}": [layer] for layer in layers}
    numbers: dict[str, float] = {}
    for place, own in places.items():
        vectors = {name: torch.cat([part[n] for n in own]) for name, part in parts.items()}
        sides = {GENERATION: [MODALITY_NAMES[VAE]]}
        sides[UNDERSTANDING] = [n for n in MODALITY_NAMES if n not in sides[GENERATION]]
        for side, names in sides.items():
            found = [vectors[name] for name in names if name in parts]
            if found:
                vectors[side] = torch.stack(found).sum(0)
        numbers |= {f"norm/{name}{place}": float(v.norm()) for name, v in vectors.items()}
        if all(side in vectors and vectors[side].any() for side in sides):
            cosine = F.cosine_similarity(vectors[GENERATION], vectors[UNDERSTANDING], dim=0)
            numbers[f"cosine{place}"] = float(cosine)
    return numbers


def main(run: str, out: str) -> None:
    """Write the numbers of the newest checkpoint of the folder ``run`` into the file ``out``."""
    write_json(Path(out), "gradients of the shared expert", shared_gradients(Path(run)))


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(*sys.argv[1:])))
