"""Released data sets at toy size, in their own layout: names, types and nesting of columns, file formats, folders.

Each function writes one data set into a folder. Where a data set is made of rows, row i is about the colour ``colour(i)``, so a test can
write down what must be read. The layouts are facts from the loaders and pages of the data sets, which the docstrings name; all words and
images are made up, and images are squares of one colour. Text-only sets and plain pairs of image and text: ``released_pairs``.
"""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.helpers.tar_files import tar_bytes

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}
NAMES = tuple(COLOURS)
ROWS = 24

# A picture column of the Hugging Face hub, and turns as it stores them.
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TURN = pa.struct([("from", pa.string()), ("value", pa.string())])


def colour(row: int) -> str:
    return NAMES[row % len(NAMES)]


def picture(name: str, form: str = "PNG", side: int = 16) -> bytes:
    """An encoded square of the colour ``name``."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), COLOURS[name]).save(buffer, form)
    return buffer.getvalue()


def image_struct(name: str) -> dict:
    return {"bytes": picture(name, "JPEG"), "path": f"{name}.jpg"}


def write_parquet(path: Path, columns: dict[str, pa.DataType], rows: list[dict], groups: int = 2):
    """``rows`` as a table of exactly these ``columns``, in ``groups`` row groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=pa.schema(list(columns.items())))
    pq.write_table(table, path, row_group_size=-(-len(rows) // groups))


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_lines(path: Path, rows: list[dict]) -> None:
    write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))


def write_image(path: Path, name: str) -> None:
    """Whatever the ending of ``path`` says, as Pillow takes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    form = {".jpg": "JPEG", ".png": "PNG"}[path.suffix]
    path.write_bytes(picture(name, form))


def question_and_answer(row: int, place: str = "<image>\n") -> list[dict]:
    """Two LLaVA turns about the image of ``row``."""
    return [
        {"from": "human", "value": f"{place}What colour is square {row}?"},
        {"from": "gpt", "value": f"It is {colour(row)}."},
    ]


# ---- BAGEL, Rosetta and LLaVA ---------------------------------------------------------------------------------------------


def bagel_t2i(folder: Path) -> None:
    """``bagel_example/t2i`` of BAGEL, which Rosetta downloads too: encoded images, and captions as JSON text of a table."""
    for part in range(2):
        rows = [
            {
                "image": picture(colour(row), "JPEG"),
                "captions": json.dumps(
                    {"0": f"a {colour(row)} square", "1": f"square {row}, all {colour(row)}"}
                ),
            }
            for row in range(part * ROWS // 2, (part + 1) * ROWS // 2)
        ]
        path = folder / "t2i" / f"{part:05d}.parquet"
        write_parquet(path, {"image": pa.binary(), "captions": pa.string()}, rows)


def bagel_vlm(folder: Path) -> None:
    """``bagel_example/vlm`` of BAGEL (Rosetta renames it ``mmu``): conversations in JSON Lines, images in a folder beside them.
    A row has one image, a list of them, or none."""
    rows = []
    for row in range(ROWS):
        write_image(folder / "vlm" / "images" / f"single/{row:04d}.jpg", colour(row))
        turns = question_and_answer(row)
        rows.append({"id": f"{row}", "image": f"single/{row:04d}.jpg", "conversations": turns})
    two = [
        {"from": "human", "value": "<image>\n<image>\nWhich is red?"},
        {"from": "gpt", "value": "The first."},
    ]
    rows[4] |= {"image": ["single/0000.jpg", "single/0001.jpg"], "conversations": two}
    del rows[5]["image"]
    rows[5]["conversations"] = question_and_answer(5, place="")
    write_lines(folder / "vlm" / "llava_ov_si.jsonl", rows)


def bagel_editing(folder: Path) -> None:
    """``bagel_example/editing`` of BAGEL, from SEED-Data-Edit part 3: chains of edits, with one list of wordings for each edit,
    and a JSON file about the row groups, which is no data."""
    columns = {
        "image_list": pa.list_(pa.binary()),
        "instruction_list": pa.list_(pa.list_(pa.string())),
    }
    path = folder / "editing" / "seedxedit_multi" / "00000.parquet"
    rows = []
    for row in range(ROWS):
        names = [colour(row + i) for i in range(3)]
        edits = [[f"make it {name}", f"paint it {name}"] for name in names[1:]]
        rows.append(
            {"image_list": [picture(name) for name in names], "instruction_list": edits}
            if row % 2
            else {
                "image_list": [picture(name) for name in names[:2]],
                "instruction_list": edits[:1],
            }
        )
    write_parquet(path, columns, rows)
    info = {f"hdfs://somewhere/{path.name}": {"num_row_groups": 2, "num_rows": ROWS}}
    write_text(folder / "editing" / "parquet_info" / "seedxedit_multi_nas.json", json.dumps(info))


def llava_665k(folder: Path) -> None:
    """``llava_v1_5_mix665k.json`` of LLaVA 1.5: one array, with image paths below a folder elsewhere, several rounds, the place of
    the image first or last, and rows of text only."""
    rows = []
    for row in range(ROWS):
        path = f"coco/train2017/{row:012d}.jpg"
        write_image(folder / "data" / path, colour(row))
        turns = question_and_answer(row)
        rows.append({"id": f"{row:012d}", "image": path, "conversations": turns})
    rows[1]["conversations"][0]["value"] = "What colour is this?\n<image>"
    rows[2]["conversations"] += [
        {"from": "human", "value": "How many?"},
        {"from": "gpt", "value": "One."},
    ]
    rows[3] = {"id": "wgByO4Y_0", "model": "", "conversations": question_and_answer(3, place="")}
    write_text(folder / "llava_v1_5_mix665k.json", json.dumps(rows))


def sharegpt4v(folder: Path) -> None:
    """``sharegpt4v_instruct_gpt4-vision_cap100k.json``: as LLaVA, pretty-printed."""
    rows = []
    for row in range(ROWS):
        path = f"sam/images/sa_{row}.jpg"
        write_image(folder / "data" / path, colour(row))
        turns = [
            {"from": "human", "value": "Describe it.\n<image>"},
            {"from": "gpt", "value": f"A {colour(row)} square."},
        ]
        rows.append({"id": f"sa_{row}", "image": path, "conversations": turns})
    write_text(folder / "sharegpt4v.json", json.dumps(rows, indent=2))


def llava_onevision(folder: Path) -> None:
    """``lmms-lab/LLaVA-OneVision-Data``: Parquet with one image or none and a list of turns."""
    columns = {
        "id": pa.string(),
        "image": IMAGE,
        "conversations": pa.list_(TURN),
        "data_source": pa.string(),
    }
    rows = [
        {
            "id": f"{row}",
            "image": image_struct(colour(row)) if row != 1 else None,
            "conversations": question_and_answer(row, place="<image>\n" if row != 1 else ""),
            "data_source": "toy",
        }
        for row in range(ROWS)
    ]
    write_parquet(folder / "toy" / "train-00000-of-00001.parquet", columns, rows)


# ---- questions about images -----------------------------------------------------------------------------------------------


def cauldron(folder: Path, ratings: tuple[str, ...] = ()) -> None:
    """``HuggingFaceM4/the_cauldron``: images of a row, and its rounds of a question with its answer."""
    texts = pa.struct([(name, pa.string()) for name in ("user", "assistant", "source")])
    columns = {"images": pa.list_(IMAGE), "texts": pa.list_(texts)}
    for name in ratings:
        columns |= {f"{name}_ratings": pa.list_(pa.int64()), f"{name}_min": pa.int64()}
    rows = []
    for row in range(ROWS):
        rounds = [(f"What colour is square {row}?", f"It is {colour(row)}.")]
        if row % 2:
            rounds.append(("How many?", "One."))
        rows.append(
            {
                "images": [image_struct(colour(row))],
                "texts": [{"user": q, "assistant": a, "source": "toy"} for q, a in rounds],
                **{f"{name}_ratings": [5] * len(rounds) for name in ratings},
                **{f"{name}_min": 5 for name in ratings},
            }
        )
    rows[2]["images"].append(image_struct("black"))
    write_parquet(folder / "toy" / "train-00000-of-00001.parquet", columns, rows)


def finevision(folder: Path) -> None:
    """``HuggingFaceM4/FineVision``: The Cauldron's columns and ratings of each turn."""
    rated = ("formatting", "relevance", "visual_dependency", "image_correspondence")
    cauldron(folder, rated)


def vqav2(folder: Path) -> None:
    """``HuggingFaceM4/VQAv2``: the answer that most people gave, and what each of them said."""
    answer = pa.struct(
        [("answer", pa.string()), ("answer_confidence", pa.string()), ("answer_id", pa.int64())]
    )
    columns = {
        "question_type": pa.string(),
        "multiple_choice_answer": pa.string(),
        "answers": pa.list_(answer),
        "image_id": pa.int64(),
        "answer_type": pa.string(),
        "question_id": pa.int64(),
        "question": pa.string(),
        "image": IMAGE,
    }
    rows = [
        {
            "question_type": "what color is",
            "multiple_choice_answer": colour(row),
            "answers": [
                {"answer": name, "answer_confidence": "yes", "answer_id": number}
                for number, name in enumerate((colour(row), "grey"), start=1)
            ],
            "image_id": row,
            "answer_type": "other",
            "question_id": row,
            "question": f"What colour is square {row}?",
            "image": image_struct(colour(row)),
        }
        for row in range(ROWS)
    ]
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", columns, rows)


def mmmu(folder: Path) -> None:
    """``MMMU/MMMU``: seven image columns, most of them null; a question names its images ``<image 1>``; options are the text of a
    Python list, and the answer is a letter."""
    texts = ("id", "question", "options", "explanation")
    more = ("img_type", "answer", "topic_difficulty", "question_type", "subfield")
    images = {f"image_{number}": IMAGE for number in range(1, 8)}
    columns = {name: pa.string() for name in texts} | images | {name: pa.string() for name in more}
    rows = [
        {
            "id": f"validation_Toy_{row}",
            "question": f"What colour is square {row}? <image 1>",
            "options": "['red', 'green', 'blue', 'other']",
            "explanation": "",
            "image_1": image_struct(colour(row)),
            "img_type": "['Paintings']",
            "answer": "ABCDDD"[row % 6],
            "topic_difficulty": "Easy",
            "question_type": "multiple-choice",
            "subfield": "Toy",
        }
        for row in range(ROWS)
    ]
    write_parquet(folder / "Toy" / "validation-00000-of-00001.parquet", columns, rows)


# ---- text among images ----------------------------------------------------------------------------------------------------


def obelics(folder: Path) -> None:
    """``HuggingFaceM4/OBELICS`` after the download of its images: ``images`` and ``texts`` are equally long, and at each place one
    of them is null. (As released, ``images`` holds URLs.) ``metadata`` and ``general_metadata`` are JSON text."""
    columns = {
        "images": pa.list_(pa.string()),
        "metadata": pa.string(),
        "general_metadata": pa.string(),
        "texts": pa.list_(pa.string()),
    }
    rows = []
    for row in range(ROWS):
        path = f"images/{row}.png"
        write_image(folder / path, colour(row))
        rows.append(
            {
                "images": [None, path, None],
                "metadata": json.dumps([None, {"src": "https://example.org/a.png"}, None]),
                "general_metadata": json.dumps({"url": "https://example.org"}),
                "texts": [f"Before square {row}.", None, f"After {colour(row)}."],
            }
        )
    write_image(folder / "images" / "last.png", "black")
    rows[1] |= {"images": ["images/1.png", "images/last.png"], "texts": [None, None]}
    rows[2] |= {"images": [None, "images/2.png"], "texts": ["One.\n\nTwo.", None]}
    write_parquet(folder / "train-00000-of-00001.parquet", columns, rows)


def mmc4(folder: Path) -> None:
    """``docs_no_face_shard_0_v2.jsonl`` of Multimodal C4, unpacked, its images in a folder by ``image_name``: sentences, and for each
    image the sentence that it belongs to."""
    rows = []
    for row in range(ROWS):
        name = f"{row:012x}.png"
        write_image(folder / "images" / name, colour(row))
        info = {
            "image_name": name,
            "raw_url": f"https://example.org/{name}",
            "matched_text_index": row % 2,
            "matched_sim": 0.25,
            "face_detections": None,
        }
        rows.append(
            {
                "url": "https://example.org",
                "text_list": [f"One about {row}.", f"Two is {colour(row)}."],
                "image_info": [info],
                "similarity_matrix": [[0.2, 0.3]],
                "could_have_url_duplicate": 0,
            }
        )
    rows[2]["image_info"].insert(0, {**rows[3]["image_info"][0], "matched_text_index": 1})
    write_lines(folder / "docs_no_face_shard_0_v2.jsonl", rows)


def mint_pdf(folder: Path) -> None:
    """``mlfoundations/MINT-1T-PDF-*``: tar shards with the images of a document as frames of one TIFF, in the order of
    ``image_metadata``; ``images`` and ``texts`` as in OBELICS, an image as ``page_<page>_image_<xref>``."""
    members = []
    for row in range(ROWS):
        names = [colour(row), colour(row + 1)]
        frames = [Image.new("RGB", (16, 16), COLOURS[name]) for name in names]
        buffer = io.BytesIO()
        frames[0].save(buffer, "TIFF", save_all=True, append_images=frames[1:])
        document = {
            "pdf_name": f"{row}.pdf",
            "url": "https://example.org",
            "texts": [f"Page {row}.", None, "Then.", None],
            "images": [None, f"page_0_image_{row}", None, f"page_1_image_{row}"],
            "image_metadata": [
                {"page": page, "xref": row, "width": 16, "height": 16, "sha256": f"{row}-{page}"}
                for page in range(2)
            ],
            "language_id_whole_page_fasttext": {"en": 0.9},
        }
        members += [
            (f"{row:08d}.json", json.dumps(document).encode()),
            (f"{row:08d}.tiff", buffer.getvalue()),
        ]
    path = folder / "CC-MAIN-2024-18-shard-0" / "CC-MAIN-00000.tar"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members))
