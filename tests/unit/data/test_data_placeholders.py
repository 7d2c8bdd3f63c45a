"""Nothing is trained as something else than it is: places of images, weights of turns, system prompts, video, preference pairs."""

import pytest

from symbiotic_titan.data.formats.shard import BadSample
from tests.helpers.read_documents import document_of
from tests.helpers.released_data import picture

RED, BLUE = picture("red"), picture("blue")
PAIR = {"images": [RED, BLUE]}
KEYS = {"question": "query", "answer": "response"}


def chat(*turns, **extra):
    return {"messages": [{"role": role, "content": text} for role, text in turns], **extra}


def item(kind="image", **extra):
    return {"type": kind, **extra}


# ---- places of images -----------------------------------------------------------------------------------------------------


def test_a_placeholder_is_the_place_of_an_image_in_a_question():
    row = {"query": "<image>\nWhat is it?", "response": "red", "images": [RED]}
    right = "<user><see red>What is it?<assistant>[red<eos>]"
    assert document_of("mmu", row, keys=KEYS) == right
    assert document_of("mmu", row | {"query": "What is it?"}, keys=KEYS) == right
    last = row | {"query": "What is it?\n<image>"}
    assert document_of("mmu", last, keys=KEYS) == (
        "<user>What is it?<see red><assistant>[red<eos>]"
    )


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("<image>a<image>b", "<see red>a<see blue>b"),
        ("<image 2>a<image 1>b", "<see blue>a<see red>b"),
        ("<image_1>a<image_2>b", "<see red>a<see blue>b"),
        ("<|image_2|>a<|image_1|>b<|image_2|>", "<see blue>a<see red>b<see blue>"),
        ("<|image|>a<|image|>", "<see red>a<see blue>"),
        ("<image_placeholder>a<ImageHere>", "<see red>a<see blue>"),
        ("<image_2>a<image>", "<see blue>a<see red>"),
    ],
)
def test_every_spelling_of_a_placeholder_is_read(text, right):
    row = {"question": text, "answer": "r", **PAIR}
    assert document_of("mmu", row) == f"<user>{right}<assistant>[r<eos>]"
    turns = chat(("user", text), ("assistant", "r"), **PAIR)
    assert document_of("mmu", turns) == f"<user>{right}<assistant>[r<eos>]"
    segments = {"segments": ["x", text], **PAIR}
    # All text of segments is trained, so only the order is compared.
    found = document_of("interleaved", segments).replace("[", "").replace("]", "")
    assert found == f"x{right}<eos>"


@pytest.mark.parametrize(
    ("items", "right"),
    [
        ([item(index=1), item(index=0)], "<see blue><see red>"),
        ([item(index=1.0, text=None), item(index=0, text=None)], "<see blue><see red>"),
        ([item(index=1), item(index=1), item()], "<see blue><see blue><see red>"),
    ],
)
def test_an_index_names_an_image(items, right):
    turns = chat(("user", [*items, item("text", text="q")]), ("assistant", "r"), **PAIR)
    assert document_of("mmu", turns) == f"<user>{right}q<assistant>[r<eos>]"


def test_a_placeholder_is_text_where_neither_task_nor_sample_has_an_image():
    assert document_of("lm", {"text": "an <image> tag"}) == "[an <image> tag<eos>]"
    turns = chat(("user", "<image> <video>?"), ("assistant", "a tag"))
    assert document_of("lm", turns) == "<user><image> <video>?<assistant>[a tag<eos>]"


TO_GENERATE = "its caption has <image>, a place for an image, which this task does not read; use the task interleaved"
BAD = [
    ("t2i", {"png": RED, "caption": "like <image>"}, TO_GENERATE),
    ("lm", {"png": RED, "text": "see <image 1>"}, "its text has <image 1>, a place for an image, whi"),
    ("lm", {"png": RED, "text": "see <image>"}, "use the task mmu or interleaved"),
    ("lm", chat(("user", "<image>?"), ("assistant", "x"), image="a.png"), "of its messages has <imag"),
    (
        "mmu",
        {"png": RED, "question": "q", "answer": "<image>"},
        "the assistant gives an image; that needs the task interleaved",
    ),
    ("mmu", {"png": RED, "question": "<image><image>", "answer": "a"}, "an image that is not there"),
    ("mmu", {**PAIR, "question": "<image>", "answer": "a"}, "have places for 1 images too few"),
    ("mmu", {**PAIR, "question": "<image 3>", "answer": "a"}, "image 2, counted from 0, of 2 that"),
    ("mmu", {**PAIR, "question": "<image_0>", "answer": "a"}, "<image_0>; images are counted from 1"),
    ("mmu", chat(("user", [item(index=2)]), ("assistant", "a"), **PAIR), "a place for image 2"),
    ("mmu", chat(("user", [item(index=-1)]), ("assistant", "a"), **PAIR), "a place for image -1"),
    ("mmu", chat(("user", [item(index=True)]), ("assistant", "a"), **PAIR), "index must be a whole"),
    ("mmu", chat(("user", [item(index="0")]), ("assistant", "a"), **PAIR), "index must be a whole"),
    ("mmu", {"images": [RED, None], "question": "q", "answer": "a"}, "1 of its 2 images are null"),
]  # fmt: skip


# ---- turns ----------------------------------------------------------------------------------------------------------------


def weighted(key, *weights, name="messages"):
    role, content = ("role", "content") if name == "messages" else ("from", "value")
    turns = []
    for number, weight in enumerate(weights):
        turns.append({role: "user", content: f"q{number}", key: None})
        turns.append({role: "assistant", content: f"a{number}", key: weight})
    return {name: turns}


@pytest.mark.parametrize("name", ["messages", "conversations"])
@pytest.mark.parametrize("key", ["weight", "train", "training", "loss", "loss_scale"])
@pytest.mark.parametrize("off", [0, False, 0.0])
def test_a_turn_of_weight_zero_is_not_trained(name, key, off):
    assert document_of("lm", weighted(key, off, 1, None, True, name=name)) == (
        "<user>q0<assistant>a0<eos><user>q1<assistant>[a1<eos>]<user>q2<assistant>[a2<eos>]"
        "<user>q3<assistant>[a3<eos>]"
    )


def test_the_image_of_a_turn_of_weight_zero_is_only_seen():
    turns = chat(
        ("user", "draw"), ("assistant", "<image>"), ("user", "x"), ("assistant", "<image>")
    )
    turns["messages"][1]["weight"] = 0
    assert document_of("interleaved", turns | PAIR) == (
        "<user>draw<assistant><see red><eos><user>x<assistant><make blue>[<eos>]"
    )


def test_a_weight_between_is_refused_and_so_is_none_that_is_trained():
    for value in (0.5, 2, "1", [1]):
        with pytest.raises(
            BadSample, match="turn 2 of its messages has weight = .* only 0 .not tr"
        ):
            document_of("lm", weighted("weight", value, 1))
    with pytest.raises(BadSample, match="every turn of the assistant in its messages has weight 0"):
        document_of("lm", weighted("weight", 0, 0))


@pytest.mark.parametrize("empty", ["", None, " \n", []])
def test_an_empty_system_turn_is_left_out(empty):
    turns = chat(("system", empty), ("user", "q"), ("assistant", "a"))
    assert document_of("lm", turns) == "<user>q<assistant>[a<eos>]"
    assert document_of("lm", turns | {"system": "Brief."}) == "Brief.<user>q<assistant>[a<eos>]"


def test_a_system_prompt_in_a_field_of_its_own_is_the_first_turn():
    turns = chat(("user", "q"), ("assistant", "a"))
    right = "Brief.<user>q<assistant>[a<eos>]"
    assert document_of("lm", turns | {"system": "Brief."}) == right
    assert document_of("lm", turns | {"system_prompt": "Brief."}) == right
    assert document_of("lm", turns | {"system": ""}) == "<user>q<assistant>[a<eos>]"
    both = chat(("system", "Brief."), ("user", "q"), ("assistant", "a"), system="Brief.")
    assert document_of("lm", both) == right
    with pytest.raises(BadSample, match="two system prompts: a field, and the first turn"):
        document_of("lm", both | {"system": "Long."})


@pytest.mark.parametrize(
    ("asks", "answers"), [("USER", "Assistant"), ("Human", "GPT"), ("prompter", "bot"), (" user", "Model")]
)  # fmt: skip
def test_roles_are_known_in_any_case(asks, answers):
    turns = chat((asks, "q"), (answers, "a"), (asks, "r"), (asks, "s"))
    assert document_of("lm", turns) == "<user>q<assistant>[a<eos>]<user>r<user>s"


UNREAD = [
    ("mmu", {"png": RED, "question": "q", "answer": "a", "video": "v.mp4"}, "video is not supported"),
    ("t2i", {"png": RED, "caption": "c", "audios": ["a.wav"]}, "audio is not supported, and it has"),
    ("mmu", {"png": RED, "question": "<video>q", "answer": "a"}, "has <video>: video and audio are no"),
    ("mmu", chat(("user", "<|audio_1|>q"), ("assistant", "a")), "<|audio_1|>: video and audio"),
    ("lm", {"text": "<video> x", "videos": ["v.mp4"]}, "its text has <video>: video and audio are"),
    ("mmu", chat(("user", [item("video", video="v")]), ("assistant", "a")), "video is not supported"),
    ("mmu", chat(("user", [item("input_audio")]), ("assistant", "a")), "input_audio is not supported"),
    (
        "lm",
        chat(("user", "q"), ("assistant", "a"), chosen=[{"x": 1}], rejected=[{"x": 2}]),
        'it is a pair of answers, chosen and rejected; name what is trained: keys = {messages = "ch',
    ),
    ("lm", {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"id": 1}]}]}, "tool_calls"),
    ("lm", chat(("user", "q"), ("tool", "a"), ("assistant", "b")), "role 'tool' has no turn"),
    ("mmu", {"png": RED, "question": "q", "answer": 3}, "'answer' must be a string, got 3"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "values", "message"), [*BAD, *UNREAD])
def test_a_place_that_cannot_be_filled_and_what_no_task_reads_are_bad(task, values, message):
    with pytest.raises(BadSample) as error:
        document_of(task, values)
    assert message in str(error.value)


def test_empty_columns_of_video_and_pairs_with_a_name_are_read():
    row = {"png": RED, "question": "q", "answer": "a", "videos": [], "audio": None, "video": [None]}
    assert document_of("mmu", row) == "<user><see red>q<assistant>[a<eos>]"
    assert document_of("lm", {"text": "a", "video": "v.mp4"}) == "[a<eos>]"
    turns = chat(("user", "q"), ("assistant", "a"))["messages"]
    row = {"chosen": turns, "rejected": turns}
    assert document_of("lm", row, keys={"messages": "chosen"}) == "<user>q<assistant>[a<eos>]"
