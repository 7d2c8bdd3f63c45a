"""A tiny Qwen3-VL on disk with tokenizer, chat template and image processor, and a run that teaches it two answers."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from symbiotic_titan.build import build_tokenizer
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.data.documents import Document, TextSegment
from symbiotic_titan.data.packing import SequenceSize
from symbiotic_titan.data.sequence_builder import SequenceBuilder
from symbiotic_titan.inference.prompts import PromptMaker
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.sequence.batch import PackedBatch
from symbiotic_titan.sequence.modality import NO_TASK
from tests.helpers.forked import ROOT
from tests.helpers.pictures import picture
from tests.helpers.released_models import QWEN, write_release
from tests.helpers.tokenizer_files import QWEN_TOKENS, byte_level_bpe, write

TEMPLATE = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}
{{- '<|im_start|>assistant\\n' }}"""
QUESTIONS = ["how many circles are in the picture?", "a red circle and"]
PICTURES = [[picture(1, 32, 24)], []]
ANSWERS = [" three of them", " a blue square"]
BUDGET = {"shortest_edge": 64, "longest_edge": 4096}


def write_talking_release(folder: Path, **text_config: object) -> None:
    config = copy.deepcopy(QWEN)
    tokenizer = byte_level_bpe(QWEN_TOKENS)
    ids = {name: tokenizer.token_to_id(name) for name in QWEN_TOKENS}
    config["text_config"] |= {"vocab_size": 320, **text_config}
    config |= {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|box_start|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
    write_release(folder, config)
    declared = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}
    write(folder, tokenizer, **declared, pad_token="<|endoftext|>", bos_token=None)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    ends = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    generation = {"eos_token_id": ends, "pad_token_id": ids["<|endoftext|>"]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen3VLProcessor",
        "size": BUDGET,
        "patch_size": 4,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def config_for(release: Path, flavor: Path, dump: Path, *overrides: str) -> JobConfig:
    """The debug config for that release: its tokenizer, five experts for understanding and three for generation."""
    text = (ROOT / "train_configs" / "debug.toml").read_text()
    text = text.replace("num_experts = 12", "num_experts = 5")
    text = text.replace("num_experts = 4\n", "num_experts = 3\n")
    path = dump.parent / "talking.toml"
    path.write_text(text)
    words = ["--model.flavor", str(flavor), "--job.dump_folder", str(dump)]
    words += ["--tokenizer.kind", "huggingface", "--tokenizer.path", str(release)]
    words += ["--data.vit_pixels", "4096"]
    return load_job_config(["--job.config_file", str(path), *words, *overrides])


def rows(model: SymbioticModel, config: JobConfig) -> list[tuple[PackedBatch, torch.Tensor]]:
    """(row with a question and its answer, ids of the answer and what ends it)."""
    tokenizer, args = build_tokenizer(config), model.args
    prompts = PromptMaker(tokenizer, args.geometry, config.data, config.training.seq_len)
    out = []
    for question, images, answer in zip(QUESTIONS, PICTURES, ANSWERS, strict=True):
        ids = [*tokenizer.encode(answer), *tokenizer.turn("assistant").suffix]
        segments = (*prompts.conversation(question, images).segments, TextSegment(ids))
        document = Document(NO_TASK, segments)
        patches = document.num_vit_patches
        size = SequenceSize(
            document.num_tokens, document.num_vit_tokens, 1, num_vit_patches=patches
        )
        builder = SequenceBuilder(size, args.geometry, args.rotary_layout, tokenizer.special)
        out.append((builder.build([document]), torch.tensor(ids)))
    return out


def teach(model: SymbioticModel, config: JobConfig, steps: int = 40) -> float:
    """Train the answers; returns the last loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    lessons = rows(model, config)
    for _ in range(steps):
        losses = []
        for row, ids in lessons:
            out = model(row, row.latents, torch.zeros(row.vae_image.shape), torch.ones(()))
            losses.append(F.cross_entropy(out.logits[0, -len(ids) - 1 : -1], ids))
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    return sum(losses).item()


def answers_of_transformers(folder: Path, model: torch.nn.Module) -> list[str]:
    """Greedy answers of ``model`` with the tokenizer, image processor and generation config of the exported ``folder``."""
    from transformers import AutoImageProcessor, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    return [
        answer_of(model, tokenizer, processor, question, images)
        for question, images in zip(QUESTIONS, PICTURES, strict=True)
    ]


def answer_of(
    model: torch.nn.Module,
    tokenizer: object,
    processor: object,
    question: str,
    images: Sequence[Image.Image],
) -> str:
    seen, content = {}, question
    if images:
        seen = dict(processor(images=list(images), return_tensors="pt"))
        count = int(seen["image_grid_thw"].prod(-1).sum()) // processor.merge_size**2
        content = f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>{question}"
    messages = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer("<|endoftext|>" + text, return_tensors="pt", return_token_type_ids=False)
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    if images:
        ids["mm_token_type_ids"] = (ids["input_ids"] == image).int()
    out = model.generate(**ids, **seen, do_sample=False, max_new_tokens=24)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
