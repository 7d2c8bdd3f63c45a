"""A run that starts on several ranks: only the first reads the metadata, each reads its part of the weights, and no value is drawn that
a checkpoint gives."""

import sys
from pathlib import Path

import pytest
import torch

from symbiotic_titan.checkpoint.start import find_start, share_start
from symbiotic_titan.optim.build import ParamGroupOptimizers
from symbiotic_titan.training.train_spec import register
from symbiotic_titan.weights.reader import TensorSpec
from symbiotic_titan.weights.safetensors import SafetensorsModel, write_folder
from tests.helpers.debug_model import config_of
from tests.helpers.gloo import run_on_ranks
from tests.helpers.saved_run import parts_of_run, whole


def saved(rank, overrides, export):
    """Tensors of a run, saved at step 3 and, without its training state, as safetensors."""
    config = config_of(overrides)
    model, manager, optimizers, step = parts_of_run(config)
    for tensor in model.parameters():
        tensor.grad = torch.ones_like(tensor)
    optimizers.step()
    step.step = 3
    manager.save(3, last_step=True)
    weights = whole(model.state_dict())
    export.mkdir()
    kinds = {name: TensorSpec.of(tensor) for name, tensor in weights.items()}
    write_folder(export, kinds, weights.__getitem__, shard_bytes=1 << 20)
    return weights | whole(optimizers.state_dict())


def count_openings(name, opened):
    def count(event, details):
        if event == "open" and str(details[0]).endswith(name):
            opened.append(details[0])

    sys.addaudithook(count)


def bytes_read():
    return int(Path("/proc/self/io").read_text().split()[1])


def resumed(rank, overrides, export):
    """(tensors, step, how often this rank opened a .metadata, what was drawn although the checkpoint gives it), and of a model that read
    the export: (tensors, bytes read)."""
    config, opened = config_of(overrides), []
    register()
    count_openings(".metadata", opened)
    start = share_start(find_start(config), config)
    assert start is not None and config.checkpoint.load_step == 3
    model, manager, optimizers, step = parts_of_run(config, start.entries)
    drawn = [name for name, p in model.named_parameters() if not torch.isnan(p).any()]
    manager.begin(start, config.checkpoint, None)
    assert manager.load(step=config.checkpoint.load_step)
    tensors = whole(model.state_dict()) | whole(optimizers.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    reader, before = SafetensorsModel(export), bytes_read()
    reader.read_into(model.state_dict())
    read = bytes_read() - before
    return (tensors, step.step, len(opened), drawn), (whole(model.state_dict()), read)


def with_momentum(model, config):
    """SGD, whose state is not Adam's."""
    parameters = [{"name": "all", "params": list(model.parameters()), "lr": 0.1}]
    return ParamGroupOptimizers(model, torch.optim.SGD(parameters, momentum=0.9))


def refused(rank, options, export):
    """What a run with another optimizer is told when it loads."""
    config = config_of(options)
    register()
    start = share_start(find_start(config), config)
    _, manager, _, _ = parts_of_run(config, start.entries, with_momentum)
    manager.begin(start, config.checkpoint, None)
    with pytest.raises(ValueError, match="optimizer.builder: ") as caught:
        manager.load(step=3)
    return str(caught.value)


def resumed_and_refused(rank, options, export):
    return resumed(rank, options, export), refused(rank, options, export)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    options = f"--checkpoint.enable --job.dump_folder {folder}"
    return options, folder / "export", run_on_ranks(1, saved, options, folder / "export")[0]


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [(2, ""), (4, "--parallelism.expert_parallel_degree 2")],
    ids=["fsdp", "expert_parallel_fsdp"],
)
def test_the_first_rank_reads_the_metadata_once_and_each_its_part_of_the_weights(
    run, num_ranks, layout
):
    options, export, expected = run
    size = sum(path.stat().st_size for path in export.glob("*.safetensors"))
    ranks = run_on_ranks(num_ranks, resumed_and_refused, f"{options} {layout}", export)
    for rank, ((own, initial), told) in enumerate(ranks):
        assert "step-3 has no optimizer.state." in told and "momentum_buffer, which" in told
        assert "\n" not in told
        tensors, step, opened, drawn = own
        assert step == 3 and drawn == [] and opened == (1 if rank == 0 else 0)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
        weights, read = initial
        assert all(torch.equal(weights[name], expected[name]) for name in weights)
        assert read == pytest.approx(size / num_ranks, rel=0.02)
