"""Forms of released data, recognised by the names of their fields; the right documents are written out by hand."""

import json

import pytest

from symbiotic_titan.config.data import Data
from symbiotic_titan.data.formats.shard import BadSample, Sample
from symbiotic_titan.data.schemas import recognised
from symbiotic_titan.sequence.tasks import TASKS
from tests.helpers.read_documents import document_of
from tests.helpers.released_data import picture

RED, GREEN, BLUE = (picture(name) for name in ("red", "green", "blue"))
QA = [("q1", "a1"), ("q2", "a2")]
ROUNDS = "q1<assistant>[a1<eos>]<user>q2<assistant>[a2<eos>]"

MMU = {
    "Cauldron": {"images": [RED], "texts": [{"user": q, "assistant": a, "source": "s"} for q, a in QA]},
    "Cauldron as a table of lists": {
        "images": {"bytes": [RED], "path": [None]},
        "texts": {"user": ["q1", "q2"], "assistant": ["a1", "a2"]},
    },
    "Cauldron as JSON text": {
        "images": [RED],
        "texts": json.dumps([{"user": q, "assistant": a} for q, a in QA]),
    },
    "LLaVA as a table of lists": {
        "image": RED,
        "conversations": {
            "from": ["human", "gpt", "human", "gpt"],
            "value": ["<image>\nq1", "a1", "q2", "a2"],
        },
    },
    "messages as a table of lists": {
        "image": RED,
        "messages": {
            "role": ["user", "assistant", "user", "assistant"],
            "content": ["<image>q1", "a1", "q2", "a2"],
        },
    },
    "pairs in messages": {
        "image": [RED],
        "messages": [{"user": q, "assistant": a} for q, a in QA],
    },
    "conversations with role and content": {
        "image": RED,
        "conversations": [
            {"role": role, "content": text}
            for q, a in QA
            for role, text in (("user", q), ("assistant", a))
        ],
    },
    "Alpaca with an image and a history": {
        "images": [RED],
        "instruction": "q2",
        "input": "",
        "output": "a2",
        "history": [["<image>q1", "a1"]],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", MMU)
def test_questions_about_images_are_read_in_every_form(name):
    assert document_of("mmu", MMU[name]) == f"<user><see red>{ROUNDS}"


def test_alpaca_rows_are_turns_also_through_keys():
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3", "system": "Be brief."}
    right = "Be brief.<user>Add.\n1 and 2<assistant>[3<eos>]"
    assert document_of("lm", row) == right
    renamed = {"ask": "Add.", "context": "1 and 2", "say": "3", "prompt": "Be brief."}
    keys = {"instruction": "ask", "input": "context", "output": "say", "system": "prompt"}
    assert document_of("lm", renamed, keys=keys) == right
    assert document_of("lm", {"instruction": "Hi", "input": None, "output": "Ho"}) == (
        "<user>Hi<assistant>[Ho<eos>]"
    )


SLOTS = {"images": [None, RED, None, BLUE], "texts": ["one", None, "two", None]}
MMC4 = {
    "text_list": ["one", "two"],
    "image_info": [
        {"image_name": "b.png", "raw_url": "https://x.org/b", "matched_text_index": 1},
        {"image_name": "r.png", "matched_text_index": 0},
    ],
    "b.png": BLUE,
    "r.png": RED,
}


def test_documents_of_texts_and_images_are_interleaved():
    assert document_of("interleaved", SLOTS) == "[one]<see red>[two]<see blue>[<eos>]"
    as_json = {
        "images": json.dumps(["r.png", None]),
        "texts": json.dumps([None, "x"]),
        "r.png": RED,
    }
    assert document_of("interleaved", as_json) == "<see red>[x<eos>]"
    assert document_of("interleaved", MMC4) == "<see red>[one]<see blue>[two<eos>]"
    only_text = {"text_list": ["one", "two"], "image_info": []}
    assert document_of("interleaved", only_text) == "[one two<eos>]"


PAIR = "<user><see red>make it blue<assistant><make blue>[<eos>]"
PAIR_NAMES = {
    "HQ-Edit": ("input_image", "edit", "output_image"),
    "MagicBrush": ("source_img", "instruction", "target_img"),
    "UltraEdit": ("source_image", "edit_prompt", "edited_image"),
    "InstructPix2Pix": ("original_image", "edit_prompt", "edited_image"),
    "SEED-Data-Edit": ("source_image", "instruction", "target_image"),
    "OmniEdit": ("src_img", "edited_prompt_list", "edited_img"),
}


@pytest.mark.parametrize("name", PAIR_NAMES)
def test_editing_pairs_are_an_input_image_an_instruction_and_a_target_image(name):
    before, text, after = PAIR_NAMES[name]
    said = ["make it blue"] if text.endswith("list") else "make it blue"
    assert document_of("interleaved", {before: RED, text: said, after: BLUE}) == PAIR


def test_editing_pairs_have_names_of_their_own_through_keys():
    values = {"a": {"bytes": RED, "path": None}, "b": "make it <image> blue", "c": [BLUE]}
    keys = {"input_image": "a", "instruction": "b", "output_image": "c"}
    assert document_of("interleaved", values, keys=keys) == PAIR.replace(
        "<see red>make it", "make it <see red>"
    )


CHAIN = "<user><see red>{}<assistant><make green>[<eos>]<user><see green>{}<assistant><make blue>[<eos>]"


def test_a_chain_of_edits_shows_each_result_again_and_chooses_among_instructions():
    values = {
        "image_list": [RED, GREEN, BLUE],
        "instruction_list": [["first", "1st"], ["second", "", "2nd"]],
    }
    found = {document_of("interleaved", values, index=index) for index in range(40)}
    assert found == {CHAIN.format(a, b) for a in ("first", "1st") for b in ("second", "2nd")}
    numbered = {"source_image": RED, "instruction_1": "x", "edit_image_1": GREEN}
    numbered |= {"instruction_2": "y", "edit_image_2": BLUE}
    assert document_of("interleaved", numbered) == CHAIN.format("x", "y")


BAD = [
    ("interleaved", SLOTS | {"texts": ["one"]}, "it has 1 texts and 4 places for images"),
    ("interleaved", SLOTS | {"texts": ["a", "b", "c", None]}, "place 1 of its texts has a text and"),
    ("interleaved", SLOTS | {"images": [None] * 4}, "place 1 of its texts has neither a text nor an"),
    ("mmu", {"texts": ["a", "b"], "images": [RED, None]}, "that needs the task interleaved"),
    (
        "interleaved",
        MMC4 | {"text_list": ["one"]},
        "image 0 of its image_info has matched_text_index 1, and there are 1 texts",
    ),
    (
        "interleaved",
        {"image_list": [RED], "instruction_list": [["a"]]},
        "it has 1 images and 1 instructions between",
    ),
    (
        "interleaved",
        {"image_list": [RED, BLUE], "instruction_list": [["", None]]},
        "instruction 0 of its instruction_list is empty",
    ),
    (
        "interleaved",
        {"input_image": RED, "instruction": "x", "output_image": [RED, BLUE]},
        "it has 1 input images and 2 output images",
    ),
    ("interleaved", {"input_image": None, "instruction": "x", "output_image": RED}, "0 input images"),
    (
        "interleaved",
        {"source_image": RED, "instruction_1": "x", "edit_image_1": GREEN, "instruction_2": "y"},
        "an image of its edit 2 is missing",
    ),
    ("lm", {"instruction": "x", "output": ""}, "'output' is empty"),
    ("lm", {"instruction": "x", "output": "y", "history": ["z"]}, "its history must have pairs"),
    ("mmu", {"images": [RED], "texts": {"user": ["q"], "assistant": []}}, "must be a list, got"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "values", "message"), BAD, ids=[m for _, _, m in BAD])
def test_a_sample_that_is_not_quite_of_its_form_is_bad(task, values, message):
    with pytest.raises(BadSample) as error:
        document_of(task, values)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("task", "values", "text"),
    [
        (
            "interleaved",
            SLOTS,
            "OBELICS, MINT-1T (texts and images of one length): TEXT, image 1, TEXT",
        ),
        (
            "mmu",
            MMU["Cauldron"],
            "questions with answers): user: image 1, TEXT; assistant: TEXT; us",
        ),
        ("t2i", {"png": RED, "captions": '["a", "b"]'}, "one of 2 texts of caption at random"),
        (
            "interleaved",
            {"input_image": "far.png", "instruction": "x", "output_image": "away.png"},
            "editing pair (image, instruction, image): user: image 1, TEXT; assistant: target 2",
        ),
    ],
)
def test_what_was_recognised_is_said_with_the_layout_of_one_sample(task, values, text):
    assert text in recognised(TASKS[task], Sample("s", "0", values), {})


def test_a_plain_sample_is_recognised_without_a_word():
    plain = {"png": RED, "question": "q", "answer": "a"}
    assert recognised(TASKS["mmu"], Sample("s", "0", plain), {}) == ""
    assert recognised(TASKS["t2i"], Sample("s", "0", {"png": RED, "txt": b"c"}), {}) == ""


def test_the_start_of_a_run_logs_what_a_source_is(make_loader, caplog, tmp_path):
    rows = [{"instruction": "x", "input": "", "output": "y"}] * 4
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    row = {"name": "mine", "task": "lm", "format": "jsonl", "path": f"{tmp_path}/a.jsonl"}
    with caplog.at_level("INFO"):
        make_loader({"sources": Data(sources=[row]).sources})
    [line] = [r.getMessage() for r in caplog.records if "source 'mine'" in r.getMessage()]
    assert line == (
        "source 'mine': Alpaca (instruction, input, output): user: TEXT; assistant: TEXT"
    )
