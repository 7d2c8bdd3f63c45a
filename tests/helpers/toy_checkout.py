"""Runs the commands of the documents as they are written, at toy size: in a folder with configs, toy data and tiny released models.

A command keeps its words; only sizes change (``TOY``): steps, rows, batches, and ``model.flavor``, which becomes the same network
with narrow layers and as many experts. What one command reads, another one has made: ``missing`` says what does not exist. A checkpoint
that is named by its step is the newest of the toy run. ``run_train.sh`` and ``torchrun`` become forked processes, at most two
(tests/integration/test_entry_points.py and .ci/run start the programs themselves).
"""

import base64
import copy
import itertools
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.demo.vocabulary import VOCABULARY, vocabulary_of
from symbiotic_titan.demo.write import WorldSize, write_world
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.flavors import FLAVORS
from symbiotic_titan.model.model_config import write_model_config
from tests.helpers import forked, released_data
from tests.helpers.documented import Command
from tests.helpers.launch import environments
from tests.helpers.released_models import (
    ARIA,
    ERNIE,
    HUNYUAN,
    QWEN,
    args_of,
    write_flux,
    write_release,
)
from tests.helpers.tiny_scorers import write_clip, write_features, write_hps
from tests.helpers.tokenizer_files import write_vocabulary

ROOT = forked.ROOT
Options = dict[str, str | None]  # option -> value; None for a flag

# Of every command that reads a config.
CONFIG: Options = {
    "--training.local_batch_size": "1",
    "--training.dataloader.num_workers": "0",
    "--model.attention_backend": "sdpa",
}
TRAIN: Options = CONFIG | {
    "--training.global_batch_size": "2",
    "--checkpoint.async_mode": "disabled",
    "--compile.no_enable": None,
    "--sampling.steps": "1",
    "--validation.steps": "1",
}
# (program and subcommands) -> options with toy values.
TOY: dict[str, Options] = {
    "symbiotic cache-latents": {},
    "symbiotic check-data": {"--share": "0.1", "--workers": "1"},
    "symbiotic show-batch": {"--batches": "8"},
    "symbiotic profile-experts": {"--batches": "1"},
    "symbiotic convert check": {"--batches": "1"},
    "symbiotic generate image": {"--steps": "1"},
    "symbiotic generate text": {"--max-tokens": "4"},
    "symbiotic show-parallel": {"--ranks": "8"},
    "suite clip_score": {"--clip_score.steps": "1"},
    "suite fid": {"--fid.steps": "1"},
    "suite hpsv2": {"--hpsv2.steps": "1"},
    "suite lm_eval": {"--lm_eval.num_fewshot": "1", "--lm_eval.limit": "1"},
    "suite ocrbench": {"--ocrbench.max_tokens": "4"},
    "suite geneval_images": {"--geneval_images.steps": "1", "--geneval_images.samples": "1"},
    "suite t2i_compbench_images": {
        "--t2i_compbench_images.steps": "1",
        "--t2i_compbench_images.samples": "1",
    },
    "suite demo_world": {
        "--demo_world.pictures": "2",
        "--demo_world.questions": "2",
        "--demo_world.knowledge": "2",
        "--demo_world.loss_rows": "1",
        "--demo_world.steps": "1",
    },
}
READS_CONFIG = tuple(
    f"symbiotic {name}"
    for name in ("show-batch", "cache-latents", "profile-experts", "convert p", "convert check")
)
SEED = "reproduce/seed-0"  # of the study, below outputs
_RUNS = ("debug", "mini", *(f"{SEED}/{name}" for name in ("vlm", "symbiotic", "standard_moe")))
_STEP = re.compile(r"(.*/checkpoint)/step-\d+")
OUTPUTS = ("--out", "--json", "--job.dump_folder", "--scratch")


@dataclass(frozen=True)
class Result:
    """What became of a command: its toy words, and the files and folders that it was to write."""

    status: int
    text: str
    arguments: list[str]
    written: tuple[Path, ...] = ()

    @property
    def is_training(self) -> bool:
        asks = {"--help", "--help-all"} & set(self.arguments)
        return self.arguments[1:2] == ["train"] and not asks


def narrow(args: ModelArgs) -> ModelArgs:
    """The same network with narrow layers, few of them, and as many experts."""
    vit = replace(args.vit, dim=24, num_layers=2, num_heads=2, hidden_dim=32)
    narrower = {"dim": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "mrope_sections": (4, 2, 2)}  # fmt: skip
    widths = ("dense_hidden_dim", "expert_hidden_dim", "shared_hidden_dim", "timestep_width")
    narrower |= {name: min(getattr(args, name), 16) for name in widths}
    layers = args.num_dense_layers + 1
    return replace(args, vocab_size=320, num_layers=layers, vit=vit, **narrower)


def releases() -> dict[str, dict[str, Any]]:
    """Folder of a release -> its config.json with narrow layers: as many experts, patches of the same size."""
    qwen, aria, ernie, hunyuan = map(copy.deepcopy, (QWEN, ARIA, ERNIE, HUNYUAN))
    qwen["text_config"] |= {"vocab_size": 320, "num_experts": 128}
    qwen["vision_config"]["patch_size"] = 16
    aria["text_config"] |= {"vocab_size": 320, "moe_num_experts": 64}
    aria["vision_config"] |= {"patch_size": 14, "image_size": 980}
    aria["projector_patch_to_query_dict"] = {"1225": 128, "4900": 256}
    ernie["text_config"] |= {"vocab_size": 320, "moe_num_experts": 64}
    ernie["text_config"]["moe_intermediate_size"] = [24, 512]  # the width that the config names
    ernie["vision_config"]["patch_size"] = 14
    hunyuan["vocab_size"] = 448  # of the vocabulary file beside it
    return {
        "Qwen3-VL-30B-A3B-Instruct": qwen,
        "Aria": aria,
        "ERNIE-4.5-VL-28B-A3B-PT": ernie,
        "Hunyuan-A13B-Instruct": hunyuan,
    }


class ToyCheckout:
    """A folder in which documented commands are run. What a user brings is there: data, releases, a small demo world."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("train_configs", "docs/examples"):
            shutil.copytree(ROOT / name, folder / name)
        demo = folder / "demo_data"
        write_world(demo, 0, WorldSize(80, 30, 160, 40))
        study = folder / f"outputs/{SEED}/data"
        (study / "pretrain/reading").mkdir(parents=True)
        for name in ("train", "heldout"):
            (study / name).symlink_to(demo / name)
        for name in ("mmu", "lm"):
            (study / "pretrain" / name).symlink_to(demo / "train" / name)
        for shard in demo.glob("train/mmu/*.tar"):
            name = shard.name.replace("mmu", "reading")
            (study / "pretrain/reading" / name).symlink_to(shard)
        texts = [path.read_text() for path in sorted(demo.glob("train/lm/*.jsonl"))]
        (study / VOCABULARY).write_text(vocabulary_of(texts, 300))
        released_data.bagel_t2i(folder / "bagel_example")
        released_data.bagel_editing(folder / "bagel_example")
        released_data.llava_665k(folder / "llava")
        self._bring()
        self._jobs: dict[str, JobConfig] = {}
        self._numbers = itertools.count()
        self._worker = self._start(environments(1)[0])

    def _bring(self) -> None:
        for name, config in releases().items():
            write_release(self.folder / name, config)
        shutil.copytree(self.folder / "demo_data/train/t2i", self.folder / "mine/shards")
        (self.folder / "mine.toml").write_text('extends = "train_configs/debug.toml"\n')
        Image.new("RGB", (32, 32), "red").save(self.folder / "seven.png")
        write_flux(self.folder / "ae.safetensors")
        write_vocabulary(self.folder / "Hunyuan-A13B-Instruct/hy.tiktoken")
        self._bring_suites()

    def _bring_suites(self) -> None:
        """The files of the suites of docs/evaluation.md."""
        shutil.copytree(ROOT / "docs/examples/lm_eval", self.folder / "tasks")
        self._bring_mmlu()
        for number, year in enumerate(("val2014", "val2017") * 2):
            (self.folder / "coco" / year).mkdir(parents=True, exist_ok=True)
            shutil.copy(self.folder / "seven.png", self.folder / f"coco/{year}/{number}.png")
        captions = ("captions.txt", "coco_30k.txt", "color_val.txt", "shape_val.txt", "texture_val.txt")  # fmt: skip
        for name in captions:
            (self.folder / name).write_text("a red circle\na blue square\n")
        for style in ("anime", "concept-art", "paintings", "photo"):
            (self.folder / f"{style}.json").write_text('["a red circle", "a blue square"]')
        for name in ("clip-vit-large-patch14", "CLIP-ViT-H-14"):
            write_clip(self.folder / name)
        write_hps(self.folder / "HPS_v2.1_compressed.pt")
        write_features(self.folder / "inception.pt")
        prompts = self.folder / "geneval/prompts/evaluation_metadata.jsonl"
        prompts.parent.mkdir(parents=True)
        prompts.write_text(json.dumps({"tag": "colors", "include": [], "prompt": "a red dog"}))
        image = base64.b64encode((self.folder / "seven.png").read_bytes()).decode()
        columns = ("index", "image", "question", "answer", "category")
        row = ("1", image, "Which digit?", "['7']", "Digit String Recognition")
        (self.folder / "OCRBench.tsv").write_text("\t".join(columns) + "\n" + "\t".join(row))

    def _bring_mmlu(self) -> None:
        """A question and an example for each subject of docs/examples/lm_eval/mmlu.yaml."""
        text = (ROOT / "docs/examples/lm_eval/mmlu.yaml").read_text()
        for path in re.findall(r"data/(?:dev|test)/\w+\.csv", text):
            file = self.folder / "tasks" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("What is one?,1,2,3,4,A\n")

    def job(self, config: str) -> JobConfig:
        """``config``, read once."""
        if config not in self._jobs:
            path = str(self.folder / config)
            self._jobs[config] = load_job_config(["--job.config_file", path])
        return self._jobs[config]

    # ---- words of a toy run --------------------------------------------------------------------------------------------

    def flavor(self, config: str) -> Options:
        """The option that makes the model of ``config`` narrow; none for the debug model, which is."""
        job = self.job(config)
        name = job.model.flavor
        if name == "debug":
            return {}
        path = self.folder / "flavors" / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            released = [c for folder, c in releases().items() if folder.startswith(name)]
            write_model_config(path, args_of(released[0]) if released else narrow(FLAVORS[name]))
        return {"--model.flavor": str(path)}

    def degrees(self, config: str, ranks: int) -> Options:
        """Expert parallelism over the toy run's ranks, where ``config`` has any."""
        degree = self.job(config).parallelism.expert_parallel_degree
        return {"--parallelism.expert_parallel_degree": str(ranks)} if degree > 1 else {}

    def existing(self, word: str) -> str:
        """``word``, but a checkpoint named by its step is the newest of that run."""
        found = _STEP.fullmatch(word)
        steps = self.steps(found[1]) if found else []
        return f"{found[1]}/step-{steps[-1]}" if found and steps else word

    def steps(self, checkpoints: str) -> list[int]:
        return sorted(int(p.name[5:]) for p in (self.folder / checkpoints).glob("step-*"))

    def output(self, command: Command) -> str:
        """The folder or file that the command writes; empty if it only prints."""
        option = "--job.dump_folder" if is_training(command) else "--out"
        if option in command.words:
            return command.words[command.words.index(option) + 1]
        config = config_of(command)
        return self.job(str(config)).job.dump_folder if is_training(command) else ""

    def missing(self, command: Command) -> list[str]:
        """What the command reads and no command has made yet."""
        words = list(command.words)
        reads = [w for before, w in zip(words, words[1:], strict=False) if before not in OUTPUTS]
        if is_training(command):
            config = str(config_of(command))
            reads += [self.job(config).checkpoint.initial_load_path or "", config]
        parts = [part for word in reads for part in word.split(",")]
        paths = [part for part in parts if "/" in part or part.endswith((".json", ".png"))]
        return [p for p in paths if not self._is_made(self.existing(p))]

    def _is_made(self, path: str) -> bool:
        """Whether it exists; a folder of a run, such as outputs/mini, may hold other runs before its own."""
        is_run = path.removeprefix("outputs/") in _RUNS
        return (self.folder / path / "config.toml" if is_run else self.folder / path).exists()

    def arguments(self, command: Command, ranks: int) -> list[str]:
        """The command's words with its toy options."""
        words = [self.existing(word) for word in command.words]
        config = config_of(command)
        if is_training(command):
            options = self._of_training(command, str(config), ranks)
            rest = words[1:] if words[0] == "run_train.sh" else words[3:]
            return ["symbiotic", "train", str(config), *with_options(rest, options)]
        if words[0] == "torchrun":
            words = ["symbiotic", *words[words.index("symbiotic_titan.cli") + 1 :]]
        options = {}
        text = " ".join(words)
        for start, toy in TOY.items():
            if text.startswith(start) or f"--{start} " in f"{text} ":
                options |= toy
        if config is not None and text.startswith(READS_CONFIG):
            options |= self.flavor(config) | CONFIG
            options |= self.degrees(config, ranks) if ranks > 1 else {}
        return with_options(words, options)

    def _of_training(self, command: Command, config: str, ranks: int) -> Options:
        options = TRAIN | self.flavor(config)
        job = self.job(config)
        words = command.words
        last = [0, *self.steps(f"{self.output(command)}/checkpoint")][-1]
        options["--training.steps"] = str(last + 1)  # one more than the run has
        options |= self.degrees(config, ranks)
        if start := job.checkpoint.initial_load_path:
            options["--checkpoint.initial_load_path"] = self.existing(start)
        if "--shielding.ramp" in words:
            options["--shielding.steps"] = "1"
        if Path(config).name == "mini.toml":
            options["--ema.enable"] = None  # two commands compare its weights with their average
        return options

    # ---- running -------------------------------------------------------------------------------------------------------

    def run(self, command: Command) -> Result:
        """One command, at toy size."""
        ranks = min(2, int(dict(command.environment).get("NGPU", "1")))
        ranks = 2 if command.words[0] == "torchrun" else ranks
        arguments = self.arguments(command, ranks)
        self._remove_output(arguments)
        environment = environments(ranks)
        # What a module registers stays until its process ends.
        is_shared = ranks == 1 and "--experimental.custom_import" not in arguments
        workers = [self._worker] if is_shared else [self._start(e) for e in environment]
        logs = [self.folder / f"{next(self._numbers)}.log" for _ in workers]
        for worker, log in zip(workers, logs, strict=True):
            worker.begin(arguments[1:], log)
        statuses = [worker.status(300) for worker in workers]
        if not is_shared:
            for worker in workers:
                worker.close()
        text = "".join(log.read_text() for log in logs)
        pairs = zip(arguments, arguments[1:], strict=False)
        written = tuple(self.folder / path for option, path in pairs if option in OUTPUTS)
        return Result(next(filter(None, statuses), 0), text, arguments, written)

    def never_run(self, command: Command) -> Result:
        """Of a command that nothing has made the input of."""
        return Result(1, f"no document says what makes {self.missing(command)}", [*command.words])

    def _start(self, environment: Mapping[str, str]) -> forked.Commands:
        return forked.Commands(environment, self.folder)

    def close(self) -> None:
        self._worker.close()

    def _remove_output(self, arguments: list[str]) -> None:
        """What another command of the same name has written: a user would choose another name."""
        if arguments[1] in ("convert", "cache-latents") and "--out" in arguments:
            path = self.folder / arguments[arguments.index("--out") + 1]
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def with_options(words: list[str], options: Options) -> list[str]:
    """``words`` with these options: in place of the values that they have, or at the end."""
    words = list(words)
    for name, value in options.items():
        given = [] if value is None else [value]
        if name not in words:
            words += [name, *given]
        elif given:
            start = words.index(name) + 1
            end = next((i for i in range(start, len(words)) if words[i].startswith("--")), len(words))  # fmt: skip
            words[start:end] = given
    return words


def is_training(command: Command) -> bool:
    return command.words[0] == "run_train.sh" or command.words[:2] == ("symbiotic", "train")


def config_of(command: Command) -> str | None:
    """The training config that a command reads."""
    if command.words[0] == "run_train.sh":
        return dict(command.environment).get("CONFIG_FILE", "train_configs/debug.toml")
    return next((word for word in command.words if word.endswith(".toml")), None)
