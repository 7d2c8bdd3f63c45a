"""What the data chain makes of conversations beside what the processors of transformers make of them, for the released backbones."""

import io
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil
from transformers.models.aria.processing_aria import AriaProcessor
from transformers.models.ernie4_5_vl_moe.processing_ernie4_5_vl_moe import (
    Ernie4_5_VLMoeProcessor,
)
from transformers.models.glm4v.processing_glm4v import Glm4vProcessor
from transformers.models.glm4v_moe.modeling_glm4v_moe import Glm4vMoeModel
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeModel

from symbiotic_titan.config.data import Data, DataSource
from symbiotic_titan.config.generation import Latents
from symbiotic_titan.config.tokenizer import Tokenizer as TokenizerSection
from symbiotic_titan.data.documents import TextSegment
from symbiotic_titan.data.formats.shard import (
    BadSample,
    Sample,
)
from symbiotic_titan.data.latents import TargetImages
from symbiotic_titan.data.packing import SequenceSize
from symbiotic_titan.data.samples import DocumentMaker
from symbiotic_titan.data.sequence_builder import SequenceBuilder
from symbiotic_titan.data.tokenizer import open_tokenizer
from symbiotic_titan.sequence.modality import VIT
from tests.helpers.released_processors import (
    ARIA,
    ERNIE_VL,
    GLM_4V,
    HIGH,
    LOW,
    QWEN2_VL,
    QWEN3_VL,
    noise_image,
    processor_of,
)
from tests.helpers.tokenizer_files import QWEN_TOKENS, SENTENCES, write

GLM_TOKENS = [
    *["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>"],
    *["<|assistant|>", "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|image|>"],
]  # fmt: skip
HUNYUAN_TOKENS = ["<|startoftext|>", "<|eos|>", "<|pad|>", "<|extra_0|>", "<|extra_4|>"]
ARIA_TOKENS = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<fim_prefix>",
    "<|img|>",
    "<fim_suffix>",
]
ERNIE_TOKENS = [
    *["<unk>", "<s>", "</s>", "<|begin_of_sentence|>", "<|end_of_sentence|>"],
    *["<|IMAGE_PLACEHOLDER|>", "<|IMAGE_START|>", "<|IMAGE_END|>"],
    *["<|VIDEO_PLACEHOLDER|>", "<|VIDEO_START|>", "<|VIDEO_END|>"],
]  # fmt: skip

# What the released templates write, for the roles and contents used here.
CONTENT = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}IMAGE{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    + CONTENT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    + "<|im_end|>\n{% endfor %}"
)
ARIA_TEMPLATE = QWEN_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<fim_prefix><|img|><fim_suffix>")  # fmt: skip
GLM_TEMPLATE = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n"
    + CONTENT.replace("IMAGE", "<|begin_of_image|><|image|><|end_of_image|>")
    + "{% endfor %}"
)
HUNYUAN_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}<|eos|>{% else %}"
    "<|startoftext|>{{ m.content }}<|extra_0|>{% endif %}{% endfor %}"
)

TALK = [
    ("system", ["you count, circles!"]),
    ("user", [(131, 197), "how many circles?\n\nsay it", (60, 300)]),
    ("assistant", ["there are three of them\n"]),
    ("user", ["and größer 圆?  4 of 12", (9, 40)]),
    ("assistant", ["none"]),
]


def qwen_bpe(special):
    """A byte-level BPE that splits text as Qwen2's does."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*SENTENCES, "user\n assistant\n system\n"], trainer)
    tokenizer.add_special_tokens(list(special))
    return tokenizer


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Special tokens of a file -> (our tokenizer, that of transformers), both of that file."""

    def open_file(special, **section):
        folder = write(tmp_path_factory.mktemp("vocabulary"), qwen_bpe(special))
        ours = open_tokenizer(TokenizerSection(kind="huggingface", path=folder, **section))
        return ours, PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json")

    return open_file


@pytest.fixture(scope="module")
def tokenizer(opened):
    return opened(QWEN_TOKENS)[0]


def encoded(height, width):
    data = io.BytesIO()
    noise_image(height, width).save(data, "PNG")
    return data.getvalue()


def messages_of(talk):
    """(role, texts and sizes of images) of each turn, as samples and chat templates have it."""
    return [
        {
            "role": role,
            "content": [
                {"type": "text", "text": p} if isinstance(p, str) else {"type": "image"}
                for p in content
            ],
        }
        for role, content in talk
    ]


def document(tokenizer, talk, geometry=QWEN3_VL, pixels=HIGH):
    """``talk`` as our data chain lays it out."""
    row = {"name": "mmu", "task": "mmu", "format": "parquet", "path": "-"}
    config = Data(sources=[row], vit_pixels=pixels, vit_min_pixels=LOW)
    images = TargetImages(config, Latents(), geometry, config.sources)
    maker = DocumentMaker(config, geometry, images, tokenizer, seq_len=2048)
    parts = [p for _, content in talk for p in content]
    values = {
        "messages": messages_of(talk),
        "image": [encoded(*p) for p in parts if not isinstance(p, str)],
    }
    (made,) = maker.make(DataSource(**row), Sample("shard", "key", values), 0)
    return made


def row_of(tokenizer, documents, geometry=QWEN3_VL):
    size = SequenceSize(2048, 1024, 0)
    return SequenceBuilder(size, geometry, "grid", tokenizer.special).build(documents)


def their_inputs(processor, tokenizer, template, talk, geometry):
    """(ids, positions (T, 3) or None) as chat template and processor of transformers make them."""
    text = tokenizer.apply_chat_template(messages_of(talk), chat_template=template, tokenize=False)
    images = [noise_image(*p) for _, content in talk for p in content if not isinstance(p, str)]
    grids = processor_of(geometry)(images, return_tensors="pt")
    token = {Qwen3VLProcessor: "<|image_pad|>", Glm4vProcessor: "<|image|>"}[processor]
    # A processor cannot be made without torchvision; this is the part of it that concerns images.
    parts = SimpleNamespace(image_processor=processor_of(geometry), image_token=token)
    first, *others = text.split(token)
    assert len(others) == len(images)
    for i, other in enumerate(others):
        first += processor.replace_image_token(parts, grids, i) + other
    ids = torch.tensor([tokenizer(first, add_special_tokens=False)["input_ids"]])
    return ids[0].tolist(), ids == tokenizer.convert_tokens_to_ids(token), grids["image_grid_thw"]


def their_positions(model, lead, is_image_1T, grids):
    """(lead + T, 3) by get_rope_index of ``model``, with ``lead`` more tokens of text in front."""
    is_image_1T = torch.nn.functional.pad(is_image_1T.long(), (lead, 0))
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))
    parts = SimpleNamespace(config=config)
    parts.get_vision_position_ids = model.get_vision_position_ids.__get__(parts)
    positions_31T, _ = model.get_rope_index(parts, is_image_1T, is_image_1T, grids)
    return positions_31T[:, 0].T


CASES = {
    "qwen": (QWEN_TOKENS, QWEN_TEMPLATE, Qwen3VLProcessor, Qwen3VLMoeModel, QWEN3_VL),
    "glm": (GLM_TOKENS, GLM_TEMPLATE, Glm4vProcessor, Glm4vMoeModel, GLM_4V),
}


@pytest.mark.parametrize("family", CASES)
def test_a_conversation_becomes_the_tokens_and_positions_of_the_backbone(opened, family):
    """But for what a document of ours begins and ends with: Qwen's begins with <|endoftext|>, as its pre-training text does, and
    has no line break behind the last turn; GLM's ends with the <|user|> that would begin the next turn."""
    special, template, processor, model, geometry = CASES[family]
    ours, theirs = opened(special)
    made = document(ours, TALK, geometry)
    row = row_of(ours, [made, made], geometry)
    tokens = row.tokens[0, : made.num_tokens].tolist()
    ids, is_image, grids = their_inputs(processor, theirs, template, TALK, geometry)
    if family == "qwen":
        end = theirs("\n", add_special_tokens=False)["input_ids"]
        assert [*tokens, *end] == [theirs.convert_tokens_to_ids("<|endoftext|>"), *ids]
    else:
        assert tokens == [*ids, theirs.convert_tokens_to_ids("<|user|>")]
    lead = int(family == "qwen")
    expected_T3 = their_positions(model, lead, is_image, grids)
    length = min(len(expected_T3), len(tokens))
    for start in (0, made.num_tokens):  # positions begin anew with every document of a row
        got_T3 = row.positions[0, start : start + length]
        assert torch.equal(got_T3, expected_T3[:length])
    assert torch.equal(
        row.modality[0, :length] == VIT,
        torch.tensor([*[False] * lead, *is_image[0].tolist()])[:length],
    )


@pytest.mark.parametrize("longest", [490, 980])
def test_a_conversation_becomes_the_tokens_of_aria_and_positions_that_count_up(opened, longest):
    """But for a line break behind the last turn. Documents begin with <s>, as in pre-training."""
    ours, theirs = opened(ARIA_TOKENS)
    made = document(ours, TALK, ARIA, longest**2)
    text = theirs.apply_chat_template(
        messages_of(TALK), chat_template=ARIA_TEMPLATE, tokenize=False
    )
    processor = SimpleNamespace(size_conversion={490: 128, 980: 256}, image_token="<|img|>")
    images = [noise_image(*p) for _, content in TALK for p in content if not isinstance(p, str)]
    inputs = AriaImageProcessorPil(max_image_size=longest)(images, return_tensors="pt")
    expanded = AriaProcessor.replace_image_token(processor, inputs, 0)
    ids = theirs(text.replace("<|img|>", expanded), add_special_tokens=False)["input_ids"]
    size = SequenceSize(2048, 1024, 0, num_vit_patches=made.num_vit_patches)
    row = SequenceBuilder(size, ARIA, "sequence", ours.special).build([made])
    tokens = row.tokens[0, : made.num_tokens].tolist()
    end = theirs("\n", add_special_tokens=False)["input_ids"]
    assert [*tokens, *end] == [theirs.convert_tokens_to_ids("<s>"), *ids]
    counted = torch.arange(made.num_tokens)[:, None].expand(-1, 3)
    assert torch.equal(row.positions[0, : made.num_tokens], counted)
    assert (row.modality == VIT).sum() == len(images) * {490: 128, 980: 256}[longest]


def test_a_conversation_becomes_the_text_and_the_routing_of_ernie(opened):
    """The tokens that begin and end an image are routed with it. Words mark the turns, so that only the text is the same, not how it
    is cut into tokens. Left out: the template's ``Picture 1:`` before an image."""
    ours, theirs = opened(ERNIE_TOKENS)
    made = document(ours, TALK, ERNIE_VL)
    row = row_of(ours, [made, made], ERNIE_VL)
    length = made.num_tokens
    ids = row.tokens[0, :length].tolist()
    parts = SimpleNamespace(
        **{
            f"{kind}{part}_token_id": theirs.convert_tokens_to_ids(f"<|{kind.upper()}_{name}|>")
            for kind in ("image", "video")
            for part, name in (("", "PLACEHOLDER"), ("_start", "START"), ("_end", "END"))
        }
    )
    expected = Ernie4_5_VLMoeProcessor.create_moe_mm_token_type_ids(parts, ids)
    for start in (0, length):
        assert (row.modality[0, start : start + length] == VIT).int().tolist() == expected
    images = [noise_image(*p) for _, content in TALK for p in content if not isinstance(p, str)]
    grids = processor_of(ERNIE_VL)(images, return_tensors="pt")["image_grid_thw"]
    counts = (grids.prod(-1) // 4).tolist()
    assert sum(expected) == sum(counts) + 2 * len(images)
    pictures = iter(counts)
    turns = {
        "system": "{}\n",
        "user": "User: {}\n",
        "assistant": "Assistant: {}<|end_of_sentence|>",
    }
    contents = [
        "".join(
            p
            if isinstance(p, str)
            else f"<|IMAGE_START|>{'<|IMAGE_PLACEHOLDER|>' * next(pictures)}<|IMAGE_END|>"
            for p in content
        )
        for _, content in TALK
    ]
    talk = (turns[role].format(text) for (role, _), text in zip(TALK, contents, strict=True))
    assert theirs.decode(ids) == "<|begin_of_sentence|>" + "".join(talk)


def test_the_tokens_around_an_image_are_text_to_other_backbones(opened):
    ours, _ = opened(ERNIE_TOKENS)
    made = document(ours, TALK, ERNIE_VL)
    own, text = (row_of(ours, [made], geometry).modality for geometry in (ERNIE_VL, QWEN2_VL))
    assert (own != text).sum() == 2 * 3 and torch.equal(own[own == text], text[own == text])


def test_an_image_of_a_shape_that_the_backbone_does_not_take_is_a_bad_sample(tokenizer):
    with pytest.raises(BadSample, match="its image has the wrong size") as error:
        document(tokenizer, [("user", [(30, 6030), "?"]), ("assistant", ["no"])])
    assert error.value.reason == "image_size"


def spelled(tokenizer, made):
    """The text segments of ``made``, as the strings of their special tokens and ``.`` for others; trained ones in brackets."""
    names = {i: token for token, i in tokenizer.special_ids.items()}
    parts = []
    for segment in made.segments:
        if isinstance(segment, TextSegment) and segment.ids:
            text = "".join(names.get(i, ".") for i in segment.ids)
            parts.append(f"[{text}]" if segment.trained else text)
    return "".join(parts).replace("][", "")


def test_what_ends_an_answer_is_trained_and_not_repeated_by_the_next_turn(opened):
    ours, _ = opened(GLM_TOKENS)
    talk = [("user", ["a"]), ("assistant", ["b"]), ("user", ["c"]), ("assistant", ["d"])]
    assert spelled(ours, document(ours, talk)) == (
        "[gMASK]<sop><|user|>..<|assistant|>.[.<|user|>]..<|assistant|>.[.<|user|>]"
    )


TEXT_TALK = [(role, [p for p in content if isinstance(p, str)]) for role, content in TALK]


@pytest.mark.parametrize(
    ("special", "template", "family"),
    [(HUNYUAN_TOKENS, HUNYUAN_TEMPLATE, "hunyuan"), (ARIA_TOKENS, ARIA_TEMPLATE, "aria")],
    ids=["hunyuan", "aria"],
)
def test_text_turns_are_those_of_the_template(opened, special, template, family):
    ours, theirs = opened(special)
    assert open_family(ours) == family
    messages = [{"role": role, "content": text} for role, (text,) in TEXT_TALK[1:]]
    text = theirs.apply_chat_template(messages, chat_template=template, tokenize=False)
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    tokens = row_of(ours, [document(ours, TEXT_TALK[1:])]).tokens[0].tolist()
    begin = [] if family == "hunyuan" else [ours.special.bos]
    assert tokens[: len(ids)] == [*begin, *ids][: len(ids)]


def open_family(tokenizer):
    """Whose begin, image and turn tokens ``tokenizer`` has."""
    names = {i: token for token, i in tokenizer.special_ids.items()}
    return {
        ("<|endoftext|>", "<|image_pad|>"): "qwen",
        ("<s>", "<|img|>"): "aria",
        ("<sop>", "<|image|>"): "glm",
        ("<|begin_of_sentence|>", "<|IMAGE_PLACEHOLDER|>"): "ernie",
        ("<|startoftext|>", "<vit>"): "hunyuan",
        ("<bos>", "<vit>"): "plain",
    }[names[tokenizer.special.bos], names[tokenizer.special.vit]]


@pytest.mark.parametrize(
    ("special", "family"),
    [
        (QWEN_TOKENS, "qwen"),
        (ARIA_TOKENS, "aria"),
        (GLM_TOKENS, "glm"),
        (ERNIE_TOKENS, "ernie"),
        (HUNYUAN_TOKENS, "hunyuan"),
        (["<|user|>", "<|startoftext|>"], "plain"),
    ],
    ids=["qwen", "aria", "glm", "ernie", "hunyuan", "plain"],
)
def test_a_family_is_known_by_its_tokens(opened, special, family):
    ours, _ = opened(special)
    assert open_family(ours) == family
    if family != "plain":
        other, _ = opened(special, family=family)
        assert other.special_ids == ours.special_ids
