"""The debug model with random weights, in its config, and a generator of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from symbiotic_titan.build import build_tokenizer
from symbiotic_titan.config.data import DataSource
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.data.formats.shard import Sample
from symbiotic_titan.data.latents import TargetImages
from symbiotic_titan.data.samples import DocumentMaker
from symbiotic_titan.inference.chunks import ChunkMaker
from symbiotic_titan.inference.generator import Generator
from symbiotic_titan.inference.prompts import PromptMaker
from symbiotic_titan.model.flavors import model_args
from symbiotic_titan.model.symbiotic import SymbioticModel
from tests.helpers.query_models import with_queries

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def config():
    return load_job_config(["--job.config_file", str(ROOT / "train_configs" / "debug.toml")])


def lively(args):
    """A model whose zeros and small values are replaced, so that all inputs matter and greedy text is no repetition."""
    with torch.device("meta"):
        model = SymbioticModel(args)
    model.to_empty(device="cpu")
    model.init_weights()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("flow_head."):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
            elif name.startswith("output."):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="session")
def model(config):
    return lively(model_args(config))


@pytest.fixture(scope="session")
def query_model(config):
    """Five learned queries read each image, whose longer side has 8 patches."""
    return lively(with_queries(model_args(config), {4: 3, 8: 5}))


@pytest.fixture(scope="session")
def tokenizer(config):
    return build_tokenizer(config)


@pytest.fixture
def training_document(config, model, tokenizer):
    """The document that the data chain makes of a sample of ``task``; with ``dropout`` without its caption."""

    def make(task, *, tokenizer=tokenizer, dropout=False, **members):
        source = DataSource("s", task, "webdataset", "p")
        geometry = model.args.geometry
        data = replace(config.data, condition_dropout=float(dropout))
        images = TargetImages(data, config.latents, geometry, [source])
        maker = DocumentMaker(data, geometry, images, tokenizer, config.training.seq_len)
        [document] = maker.make(source, Sample("shard", "key", members), 0)
        return document

    return make


@pytest.fixture
def prompts(config, model, tokenizer):
    return PromptMaker(tokenizer, model.args.geometry, config.data, config.training.seq_len)


@pytest.fixture
def chunks(model, tokenizer):
    args = model.args
    return ChunkMaker(args.geometry, args.rotary_layout, tokenizer.special, torch.device("cpu"))


@pytest.fixture
def make_generator(model, config, tokenizer):
    def make(**changes):
        return Generator(model, config, tokenizer, torch.device("cpu"), **changes)

    return make


@pytest.fixture
def generator(make_generator):
    return make_generator()
