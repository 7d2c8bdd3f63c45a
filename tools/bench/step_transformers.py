"""The whole model's training step against that of transformers' Qwen3-VL-MoE: ``step.py --against transformers``.

Both have the same weights, one pool of experts in every layer, and the same text: rows that are one document each, so that attention is
causal over the whole row; every token but the first of a row is a label. A step is forward, mean cross entropy over the labels, backward,
clipping of the gradient norm at 1 and AdamW (fused), on a new random batch in every round. No load-balancing loss is computed, no
activation checkpointing is used. The image encoders are as small as they can be and see no image.

transformers runs with ``experts_implementation = "grouped_mm"`` and SDPA, its fastest on a CPU, without a cache.

In bfloat16 ours is what the trainer runs on one process: float32 weights under autocast. transformers runs twice: ``autocast``, the
same, where its experts stay in float32 because torch's grouped matmul has no autocast; and ``weights``, with weights and optimizer
in bfloat16, which is all in bfloat16 and moves half the memory. The figure of a shape is that against the faster of the two.

Nothing is timed unless loss and gradient norm of the first step agree within ``TOLERANCE``.
"""

import argparse
import contextlib
import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, get_type_hints

import torch
from bench_timing import interleave, ratio, summary
from torch import Tensor, nn

from symbiotic_titan.data.documents import Document, TextSegment
from symbiotic_titan.data.packing import SequenceSize
from symbiotic_titan.data.sequence_builder import SequenceBuilder
from symbiotic_titan.data.tokenizer import NUM_BYTES, ByteTokenizer
from symbiotic_titan.device import device_type
from symbiotic_titan.hf.architectures.qwen3_vl_moe import QWEN3_VL_MOE
from symbiotic_titan.losses.terms import StepInputs, label_index, text_sums
from symbiotic_titan.model.args import ModelArgs
from symbiotic_titan.model.symbiotic import SymbioticModel
from symbiotic_titan.sequence.batch import PackedBatch, stack_rows
from symbiotic_titan.sequence.tasks import task_number

# Read when oneDNN is loaded: with its default cache it forgets the kernels of one contender while it runs the next.
ENVIRONMENT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16384"}

# Relative difference of loss and gradient norm at the first step. In bfloat16 rounding makes some tokens choose other experts.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
MULTIPLE = 8  # of dim and hidden: torch's grouped matmul takes rows of whole 16 bytes


@dataclass(frozen=True)
class Shape:
    """A decoder and its batch. ``heads`` and ``kv_heads`` 0: a head for every 32 channels, half as many for keys and values.

    Raises:
        ValueError: a model of this shape cannot be built.
    """

    rows: int = 2
    length: int = 1024
    dim: int = 256
    layers: int = 8
    experts: int = 32
    top_k: int = 4
    hidden: int = 192
    heads: int = 0
    kv_heads: int = 0
    vocab: int = 320
    dtype: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", self.heads or max(1, self.dim // 32))
        object.__setattr__(self, "kv_heads", self.kv_heads or max(1, self.heads // 2))
        for key in ("rows", "length", "layers", "heads", "kv_heads"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        for key, divisor in (("dim", MULTIPLE), ("hidden", MULTIPLE), ("dim", 8 * self.heads)):
            value = getattr(self, key)
            if value < 1 or value % divisor:
                why = (
                    f"{self.heads} heads of a multiple of 8 channels"
                    if divisor != MULTIPLE
                    else "16 bytes"
                )
                raise ValueError(f"{key} must be a multiple of {divisor} ({why}), got {value}")
        if self.vocab < NUM_BYTES + 8:
            raise ValueError(f"vocab must be at least {NUM_BYTES + 8}, got {self.vocab}")
        if self.dtype not in TOLERANCE:
            raise ValueError(f"dtype must be {' or '.join(TOLERANCE)}, got {self.dtype}")
        self.args()

    def config(self) -> dict[str, Any]:
        """config.json of such a Qwen3-VL-MoE."""
        half = self.dim // self.heads // 2
        text = {
            "vocab_size": self.vocab,
            "hidden_size": self.dim,
            "intermediate_size": self.dim,  # of dense layers: there are none
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": 2 * half,
            "moe_intermediate_size": self.hidden,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
                "mrope_interleaved": True,
            },
        }
        vision = {
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_heads": 1,
            "patch_size": 4,
            "num_position_embeddings": 4,
            "out_hidden_size": self.dim,
            "deepstack_visual_indexes": [],
        }
        placeholders = {"image_token_id": self.vocab - 2, "video_token_id": self.vocab - 1}
        return {
            "model_type": "qwen3_vl_moe",
            "text_config": text,
            "vision_config": vision,
            **placeholders,
            "tie_word_embeddings": False,
        }

    def args(self) -> ModelArgs:
        return QWEN3_VL_MOE.model_args(self.config())


SHAPES = {
    "mini_float32": Shape(),
    "mini_bfloat16": Shape(dtype="bfloat16"),
    "wide_bfloat16": Shape(1, 2048, 512, 6, 64, 8, 256, dtype="bfloat16"),
}


def shape_of(text: str) -> tuple[str, Shape]:
    """(name, shape) of an argument of --shapes.

    Raises:
        argparse.ArgumentTypeError: it is neither a name nor a shape that can be built.
    """
    if text in SHAPES:
        return text, SHAPES[text]
    kinds = get_type_hints(Shape)
    values: dict[str, Any] = {}
    for pair in text.split(","):
        key, equals, value = pair.partition("=")
        if key not in kinds or not equals:
            raise argparse.ArgumentTypeError(
                f"{pair!r} is neither one of {', '.join(SHAPES)} nor KEY=VALUE with a key of {', '.join(kinds)}"
            )
        try:
            values[key] = kinds[key](value)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{key} must be a whole number, got {value!r}"
            ) from None
    try:
        return text, Shape(**values)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None


def check_installed() -> None:
    """Raises SystemExit, in one line, without the package transformers."""
    try:
        from transformers import Qwen3VLMoeForConditionalGeneration  # noqa: F401
    except ImportError as error:
        raise SystemExit(
            f"--against transformers needs the package transformers, version 5 ({error}): pip install 'symbiotic_titan[bench]'"
        ) from error


def our_model(shape: Shape) -> SymbioticModel:
    """Ours with its initial values."""
    with torch.device("meta"):
        model = SymbioticModel(shape.args())
    model.to_empty(device=device_type())
    model.init_weights()
    return model.train()


def their_model(shape: Shape, ours: SymbioticModel) -> nn.Module:
    """transformers' with the weights of ``ours``."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    model = Qwen3VLMoeForConditionalGeneration._from_config(
        Qwen3VLMoeConfig(**copy.deepcopy(shape.config())),
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
    )
    names = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    state = ours.state_dict()
    values: dict[str, Tensor] = {}
    for mapping in QWEN3_VL_MOE.weight_map(shape.args(), names):
        tensors = mapping.save([state[name] for name in mapping.ours])
        values |= dict(zip(mapping.theirs, tensors, strict=True))
    model.load_state_dict(values)
    return model.to(device_type()).train()


def make_batch(shape: Shape, seed: int) -> PackedBatch:
    """Rows of one document of random bytes each."""
    tokenizer, args = ByteTokenizer(), QWEN3_VL_MOE.model_args(shape.config())
    builder = SequenceBuilder(
        SequenceSize(shape.length, 0, 0), args.geometry, args.rotary_layout, tokenizer.special
    )
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(NUM_BYTES, (shape.rows, shape.length), generator=generator)
    documents = [
        Document(task_number("lm"), (TextSegment(row, trained=True),)) for row in tokens_BT.tolist()
    ]
    return stack_rows([builder.build([document]) for document in documents]).to(device_type())


def our_loss(model: nn.Module, batch: PackedBatch) -> Tensor:
    """As the trainer computes it: logits where there are labels, and the cross entropy outside of autocast."""
    index_N = label_index(batch.labels)  # device sync
    timesteps_BL = torch.zeros(batch.vae_image.shape, device=batch.tokens.device)
    no_shield = torch.ones((), device=batch.tokens.device)
    out = model(batch, batch.latents, timesteps_BL, no_shield, logit_index_N=index_N)
    with torch.autocast(device_type(), enabled=False):
        inputs = StepInputs(
            batch, out.logits, out.velocity, batch.latents, out.records, logit_index=index_N
        )
        return text_sums(inputs).sum() / batch.num_labels()


def their_loss(model: nn.Module, batch: PackedBatch) -> Tensor:
    return model(input_ids=batch.tokens, labels=batch.tokens, use_cache=False).loss


class Contender:
    """A model with its optimizer. ``results``: loss and gradient norm of every step so far."""

    def __init__(
        self, model: nn.Module, loss: Callable[[nn.Module, PackedBatch], Tensor], *, autocast: bool
    ) -> None:
        self._model, self._loss, self._autocast = model, loss, autocast
        self._parameters = list(model.parameters())
        self._optimizer = torch.optim.AdamW(self._parameters, lr=1e-4, fused=True)
        self.results: list[tuple[float, float]] = []

    def step(self, batch: PackedBatch) -> None:
        self._optimizer.zero_grad()
        context = torch.autocast(device_type(), torch.bfloat16) if self._autocast else None
        with context or contextlib.nullcontext():
            loss = self._loss(self._model, batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._parameters, 1.0, foreach=True)
        self._optimizer.step()
        self.results.append((float(loss.detach()), float(norm)))  # device sync


def contenders(shape: Shape) -> dict[str, Contender]:
    """``ours`` and those of transformers, with equal weights."""
    model = our_model(shape)
    if shape.dtype == "float32":
        theirs = {"transformers": Contender(their_model(shape, model), their_loss, autocast=False)}
    else:
        rounded = their_model(shape, model).to(torch.bfloat16)
        theirs = {
            "transformers_autocast": Contender(
                their_model(shape, model), their_loss, autocast=True
            ),
            "transformers_weights": Contender(rounded, their_loss, autocast=False),
        }
    return {"ours": Contender(model, our_loss, autocast=shape.dtype != "float32"), **theirs}


def check_agree(name: str, shape: Shape, entries: dict[str, Contender]) -> dict[str, float]:
    """The largest relative difference to ours of each contender's loss and gradient norm in the first step.

    Raises:
        SystemExit: one is larger than the tolerance.
    """
    ours = entries["ours"].results[0]
    found = {}
    for other in entries.keys() - {"ours"}:
        pairs = zip(entries[other].results[0], ours, strict=True)
        found[other] = max(abs(a - b) / abs(b) for a, b in pairs)
        if not found[other] <= TOLERANCE[shape.dtype]:
            raise SystemExit(
                f"{name}: loss and gradient norm of {other} are {entries[other].results[0]}, of ours {ours}; models that compute "
                f"different things are not timed (allowed: {TOLERANCE[shape.dtype]:g})"
            )
    return found


def compare_transformers(name: str, shape: Shape, *, steps: int, warmup: int) -> dict[str, Any]:
    """``over_transformers``: seconds of transformers' faster way / ours, median of the rounds' ratios.

    Raises:
        SystemExit: the two do not compute the same.
    """
    entries = contenders(shape)
    batches = [make_batch(shape, seed) for seed in range(1 + warmup + steps)]
    for contender in entries.values():
        contender.step(batches[0])
    differences = check_agree(name, shape, entries)

    def next_step(contender: Contender) -> Callable[[], None]:
        return lambda: contender.step(batches[len(contender.results)])

    runs = {name: next_step(contender) for name, contender in entries.items()}
    times = interleave(runs, repeats=steps, warmup=warmup)
    over = {other: round(ratio(times, other, "ours"), 3) for other in differences}
    return {
        "over_transformers": min(over.values()),
        "over": over,
        "first_step_difference": differences,
        "shape": asdict(shape),
        "times": {name: summary(seconds) for name, seconds in times.items()},
    }


def print_transformers(name: str, result: dict[str, Any]) -> None:
    print(f"{name}: {' '.join(f'{k}={v}' for k, v in result['shape'].items())}")
    for contender, row in result["times"].items():
        quartiles = f"({row['quartile_1_ms']} to {row['quartile_3_ms']})"
        print(f"  {contender:22s} {row['median_ms']:9.1f} ms  {quartiles}")
    print("  " + "  ".join(f"{key}_over_ours {value}" for key, value in result["over"].items()))
