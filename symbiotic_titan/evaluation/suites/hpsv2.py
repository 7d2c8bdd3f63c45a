"""The suite ``hpsv2``: how much people would like the pictures, by HPS v2 (arXiv 2306.09341), a CLIP ViT-H/14 trained on choices of people.

    hpsv2/FILE   100 x cosine between a picture and its prompt, mean over the prompts of a file; chance: with the next prompt of the file
    hpsv2/all    the same over all files

HPSv2's benchmark is four files of prompts, each a style. In its folder: images/*.png, one for each prompt, in the order of the files.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from pickle import PickleError
from statistics import fmean
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from symbiotic_titan.evaluation.files import check_file, check_limit, read_prompts
from symbiotic_titan.evaluation.suite import Advance, Progress, Scores, Suite, measure_mean
from symbiotic_titan.evaluation.suites.clip import (
    Processor,
    check_clip,
    load_processor,
    untrained_model,
)
from symbiotic_titan.evaluation.suites.generation import ImageSettings, generate_captioned
from symbiotic_titan.inference.generator import Generator


@dataclass(frozen=True)
class Hpsv2Options(ImageSettings):
    """Options of the suite ``hpsv2``."""

    prompts: tuple[str, ...] = ()
    """Files of prompts, comma separated, each with a score of its own: HPDv2's anime.json, or a text file with a caption per line"""

    limit: int | None = None
    """Prompts of each file to use, counted from the first; all by default"""

    weights: str = ""
    """The published weights, HPS_v2.1_compressed.pt"""

    model: str = ""
    """Folder of a CLIP ViT-H/14 in the transformers layout: config.json, tokenizer and preprocessor; weights in it are not read"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_limit(self.limit)
        if not self.prompts:
            raise ValueError("prompts: must be files of prompts, such as HPDv2's anime.json")
        for path in self.prompts:
            check_file("prompts", path, "a file of prompts")
        if len(names := self.styles()) < len(self.prompts):
            raise ValueError(
                f"prompts: two files have the same name, got {', '.join(self.prompts)}"
            )
        for name, prompts in names.items():
            if len(prompts) < 2:
                raise ValueError(f"prompts: at least 2 are needed of each file, {name} has 1")
        check_file("weights", self.weights, "the weights of HPS v2, HPS_v2.1_compressed.pt")
        check_clip("model", self.model)

    def styles(self) -> dict[str, list[str]]:
        """Name of a file without its ending -> its prompts."""
        return {Path(path).stem: read_prompts(path, self.limit) for path in self.prompts}


def run_hpsv2(
    generator: Generator, options: Hpsv2Options, folder: Path, progress: Progress
) -> Scores:
    """Raises ValueError for weights or a folder that cannot be read, or do not belong together."""
    model, processor = load_hps(options.model, options.weights), load_processor(options.model)
    styles = options.styles()
    prompts = [prompt for listed in styles.values() for prompt in listed]
    images = generate_captioned(generator, prompts, options, folder, progress)
    advance = progress("preferences", len(images))
    pairs = embeddings(
        model.to(generator.device), processor, images, prompts, options.batch_size, advance
    )
    return hps_scores(*pairs, {name: len(listed) for name, listed in styles.items()})


@torch.no_grad()
def embeddings(
    model: Any,
    processor: Processor,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    batch_size: int,
    advance: Advance,
) -> tuple[Tensor, Tensor]:
    """float32 (N, D) of the images and of the prompts, each of length 1, on the CPU."""
    found: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(images), batch_size):
        batch = list(images[start : start + batch_size])
        texts = list(prompts[start : start + batch_size])
        inputs = processor(text=texts, images=batch, return_tensors="pt", padding=True)
        out = model(**inputs.to(model.device))
        found.append((out.image_embeds.cpu(), out.text_embeds.cpu()))  # device sync
        advance(len(batch))
    images_ND, texts_ND = (torch.cat(parts) for parts in zip(*found, strict=True))
    return images_ND, texts_ND


def hps_scores(images_ND: Tensor, texts_ND: Tensor, counts: Mapping[str, int]) -> Scores:
    """Scores of files with so many prompts each, whose embeddings follow one another."""
    own: dict[str, list[float]] = {}
    shifted: dict[str, list[float]] = {}
    start = 0
    for name, count in counts.items():
        pictures_ND, captions_ND = (x_ND[start : start + count] for x_ND in (images_ND, texts_ND))
        own[name] = (100 * (pictures_ND * captions_ND).sum(-1)).tolist()
        shifted[name] = (100 * (pictures_ND * captions_ND.roll(-1, 0)).sum(-1)).tolist()
        start += count
    own["all"], shifted["all"] = (list(chain(*values.values())) for values in (own, shifted))
    return {f"hpsv2/{name}": measure_mean(own[name], chance=fmean(shifted[name])) for name in own}


def load_hps(folder: str, weights: str) -> Any:
    """The CLIP model of the config in ``folder`` with the tensors of the file ``weights``, in float32.

    Raises:
        ValueError: one of them cannot be read, or they do not belong together.
    """
    model = untrained_model(folder)
    try:
        # Of a pickle only tensors and plain data are read; nothing in it is run.
        stored = torch.load(weights, map_location="cpu", weights_only=True)["state_dict"]
        state = dict(renamed(stored))
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    except _UNREADABLE as error:
        raise ValueError(
            f"{weights}: holds no weights that can be read ({type(error).__name__}); it should be HPS_v2.1_compressed.pt"
        ) from error
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if wrong := [name for name in wanted | found if found.get(name) != wanted.get(name)]:
        raise ValueError(
            f"{weights}: {len(wrong)} tensors are not those of the CLIP in {folder}, the first is {wrong[0]}: "
            f"{found.get(wrong[0], 'absent')} in place of {wanted.get(wrong[0], 'absent')}; HPS v2 is a CLIP ViT-H/14"
        )
    model.load_state_dict(state)
    return model


# Raised for a file that is no pickle of a dictionary of tensors.
_UNREADABLE = (AttributeError, EOFError, KeyError, RuntimeError, TypeError, ValueError, PickleError)

# open_clip's name of a tensor, or the beginning or a part of it -> transformers'.
_TENSORS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.proj": "visual_projection.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "text_projection": "text_projection.weight",
}
_MODULES = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "ln_final.": "text_model.final_layer_norm.",
}
_PARTS = {
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}
# open_clip multiplies by these from the right.
_TRANSPOSED = ("visual.proj", "text_projection")


def renamed(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a CLIP of open_clip under transformers' names; those of an attention's three inputs are one tensor in open_clip."""
    for name, tensor in state.items():
        if name in _TENSORS:
            yield _TENSORS[name], tensor.T if name in _TRANSPOSED else tensor
            continue
        start = next((start for start in _MODULES if name.startswith(start)), "")
        new = _MODULES.get(start, "") + name.removeprefix(start)
        for part, other in _PARTS.items():
            new = new.replace(part, other)
        before, joined, kind = new.partition(".attn.in_proj_")
        if joined:
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                yield f"{before}.self_attn.{letter}_proj.{kind}", third
        else:
            yield new, tensor


HPSV2 = Suite(
    name="hpsv2",
    description="how much people would like the pictures, by local weights of HPS v2",
    options=Hpsv2Options,
    run=run_hpsv2,
    modules=("transformers",),
    install="pip install transformers",
)
