"""Released data sets at toy size, continued from ``released_data``: editing pairs, captions, and text without images."""

import json
from pathlib import Path

import pyarrow as pa

from tests.helpers.released_data import (
    IMAGE,
    ROWS,
    TURN,
    colour,
    image_struct,
    picture,
    write_image,
    write_lines,
    write_parquet,
    write_text,
)
from tests.helpers.tar_files import tar_bytes

MESSAGE = pa.struct([("content", pa.string()), ("role", pa.string())])


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members))


# ---- editing pairs --------------------------------------------------------------------------------------------------------


def instructpix2pix(folder: Path) -> None:
    """``timbrooks/instructpix2pix-clip-filtered``."""
    columns = {
        "original_prompt": pa.string(),
        "original_image": IMAGE,
        "edit_prompt": pa.string(),
        "edited_prompt": pa.string(),
        "edited_image": IMAGE,
    }
    rows = [
        {
            "original_prompt": f"a {colour(row)} square",
            "original_image": image_struct(colour(row)),
            "edit_prompt": f"make it {colour(row + 1)}",
            "edited_prompt": f"a {colour(row + 1)} square",
            "edited_image": image_struct(colour(row + 1)),
        }
        for row in range(ROWS)
    ]
    write_parquet(folder / "data" / "train-00000-of-00262.parquet", columns, rows)


def magicbrush(folder: Path) -> None:
    """``osunlp/MagicBrush``: with a mask, which is no input."""
    columns = {
        "img_id": pa.string(),
        "turn_index": pa.int32(),
        "source_img": IMAGE,
        "mask_img": IMAGE,
        "instruction": pa.string(),
        "target_img": IMAGE,
    }
    rows = [
        {
            "img_id": f"{row}",
            "turn_index": 1,
            "source_img": image_struct(colour(row)),
            "mask_img": image_struct("white"),
            "instruction": f"make it {colour(row + 1)}",
            "target_img": image_struct(colour(row + 1)),
        }
        for row in range(ROWS)
    ]
    write_parquet(folder / "data" / "train-00000-of-00051.parquet", columns, rows)


def ultraedit(folder: Path) -> None:
    """``BleachNick/UltraEdit_500k``: with scores and captions of both images."""
    scores = ("clip_sim_source", "clip_sim_target", "clip_sim_dir", "clip_sim_image")
    columns = dict.fromkeys((*scores, "dinov2_sim", "ssim"), pa.float64())
    columns |= {"source_caption": pa.string(), "target_caption": pa.string(), "idx": pa.int64()}
    columns |= {"edit_prompt": pa.string(), "source_image": IMAGE, "edited_image": IMAGE}
    rows = [
        {
            **dict.fromkeys((*scores, "dinov2_sim", "ssim"), 0.5),
            "source_caption": f"a {colour(row)} square",
            "target_caption": f"a {colour(row + 1)} square",
            "idx": row,
            "edit_prompt": f"make it {colour(row + 1)}",
            "source_image": image_struct(colour(row)),
            "edited_image": image_struct(colour(row + 1)),
        }
        for row in range(ROWS)
    ]
    write_parquet(folder / "data" / "FreeForm_0-00000-of-00001.parquet", columns, rows)


def seed_data_edit(folder: Path) -> None:
    """``AILab-CVC/SEED-Data-Edit``: JSON Lines beside a folder of images; parts 1 and 2 hold pairs, part 3 chains of edits in
    numbered columns, ``instruction_1`` with ``edit_image_1`` and so on."""
    pairs, chains = [], []
    for row in range(ROWS):
        images = [f"{row:04d}_{turn}.png" for turn in range(3)]
        for turn, name in enumerate(images):
            write_image(folder / "real_editing" / "images" / name, colour(row + turn))
            write_image(folder / "multi_turn_editing" / "images" / name, colour(row + turn))
        edits = [f"make it {colour(row + turn)}" for turn in (1, 2)]
        pair = {"source_image": images[0], "target_image": images[1], "instruction": edits[0]}
        pairs.append(pair)
        chain = {"source_image": images[0]}
        for turn in (1, 2):
            chain |= {f"instruction_{turn}": edits[turn - 1], f"edit_image_{turn}": images[turn]}
        chains.append(chain)
    write_lines(folder / "real_editing" / "annotations" / "split_0001.jsonl", pairs)
    write_lines(folder / "multi_turn_editing" / "annotations" / "split_0001.jsonl", chains)


# ---- captions -------------------------------------------------------------------------------------------------------------


def img2dataset(folder: Path) -> None:
    """What img2dataset writes: shards of image, caption and record, each beside a Parquet file and a JSON file about the shard,
    which are no data. Row 1 could not be downloaded, so the tar file does not have it."""
    members, records = [], []
    for row in range(ROWS):
        record = {
            "url": f"https://example.org/{row}.jpg",
            "caption": f"a {colour(row)} square",
            "key": f"{row:09d}",
            "status": "success",
            "error_message": None,
            "width": 16,
            "height": 16,
            "similarity": float("nan"),
            "exif": "{}",
            "sha256": f"{row:064x}",
        }
        if row == 1:
            record |= {"status": "failed_to_download", "error_message": "404", "width": None}
        else:
            members += [
                (f"{row:09d}.jpg", picture(colour(row), "JPEG")),
                (f"{row:09d}.json", json.dumps(record, indent=4).encode()),
                (f"{row:09d}.txt", record["caption"].encode()),
            ]
        records.append(record)
    write_tar(folder / "00000.tar", members)
    types = dict.fromkeys(records[0], pa.string()) | {
        "width": pa.int64(),
        "height": pa.int64(),
        "similarity": pa.float64(),
    }
    write_parquet(folder / "00000.parquet", types, records)
    write_text(folder / "00000_stats.json", json.dumps({"count": ROWS, "successes": ROWS - 1}))


def img2dataset_parquet(folder: Path) -> None:
    """The same with ``output_format="parquet"``: the image is the column ``jpg``, null where the download failed."""
    columns = {
        "url": pa.string(),
        "caption": pa.string(),
        "key": pa.string(),
        "status": pa.string(),
        "error_message": pa.string(),
        "jpg": pa.binary(),
    }
    rows = [
        {
            "url": f"https://example.org/{row}.jpg",
            "caption": f"a {colour(row)} square",
            "key": f"{row:09d}",
            "status": "failed_to_download" if row == 1 else "success",
            "error_message": "404" if row == 1 else None,
            "jpg": None if row == 1 else picture(colour(row), "JPEG"),
        }
        for row in range(ROWS)
    ]
    write_parquet(folder / "00000.parquet", columns, rows)
    write_text(folder / "00000_stats.json", json.dumps({"count": ROWS, "successes": ROWS - 1}))


def recap_datacomp(folder: Path) -> None:
    """``UCSC-VLAA/Recap-DataComp-1B`` downloaded by img2dataset with its two captions kept: columns beside the image ``jpg``."""
    texts = ("url", "re_caption", "org_caption", "sha256", "key")
    columns = dict.fromkeys(texts, pa.string())
    columns |= {"re_clip_score": pa.float64(), "org_clip_score": pa.float64(), "jpg": pa.binary()}
    rows = [
        {
            "url": f"https://example.org/{row}.jpg",
            "re_caption": f"square {row}, all {colour(row)}",
            "org_caption": f"a {colour(row)} square" if row != 1 else None,
            "sha256": f"{row:064x}",
            "key": f"{row:012d}",
            "re_clip_score": 0.3,
            "org_clip_score": 0.2,
            "jpg": picture(colour(row), "JPEG"),
        }
        for row in range(ROWS)
    ]
    write_parquet(folder / "00000.parquet", columns, rows)


def coco_karpathy(folder: Path) -> None:
    """``coco_karpathy_val.json`` of BLIP and ALBEF: an array of images with five captions each, image paths below a folder
    elsewhere."""
    rows = []
    for row in range(ROWS):
        path = f"val2014/COCO_val2014_{row:012d}.jpg"
        write_image(folder / "coco" / path, colour(row))
        captions = [f"{number} {colour(row)}" for number in ("one", "two", "three", "four", "five")]
        rows.append({"image": path, "caption": captions, "image_id": f"coco_{row}"})
    write_text(folder / "coco_karpathy_val.json", json.dumps(rows))


def coco_annotations(folder: Path) -> None:
    """``captions_train2017.json`` as COCO has it: one object, whose arrays of images and annotations refer to each other by id."""
    images = [{"id": row, "file_name": f"{row:012d}.jpg"} for row in range(ROWS)]
    texts = [
        {"image_id": row, "id": row, "caption": f"a {colour(row)} square"} for row in range(ROWS)
    ]
    whole = {"info": {}, "licenses": [], "images": images, "annotations": texts}
    write_text(folder / "captions_train2017.json", json.dumps(whole))


def journeydb(folder: Path) -> None:
    """``train_anno_realease_repath.jsonl`` of JourneyDB: the prompt, and a caption in a nested table; images in ``imgs``."""
    rows = []
    for row in range(ROWS):
        path = f"000/{row}.jpg"
        write_image(folder / "imgs" / path, colour(row))
        rows.append(
            {
                "img_path": f"./{path}",
                "prompt": f"{colour(row)} square --v 5",
                "Task1": {"Model version": {}},
                "Task2": {"Caption": f"a {colour(row)} square"},
            }
        )
    write_lines(folder / "train_anno_realease_repath.jsonl", rows)


def blip3o(folder: Path) -> None:
    """``BLIP3o/BLIP3o-Pretrain-Long-Caption``: tar shards of image and caption."""
    members = []
    for row in range(ROWS):
        members.append((f"sa_{row}.jpg", picture(colour(row), "JPEG")))
        members.append((f"sa_{row}.txt", f"a {colour(row)} square".encode()))
    write_tar(folder / "sa_000000.tar", members)


def text_to_image_2m(folder: Path) -> None:
    """``jackyhate/text-to-image-2M``: tar shards of image and a JSON object with the prompt."""
    members = []
    for row in range(ROWS):
        members.append((f"{row:06d}.jpg", picture(colour(row), "JPEG")))
        prompt = {"prompt": f"a {colour(row)} square"}
        members.append((f"{row:06d}.json", json.dumps(prompt).encode()))
    write_tar(folder / "data_512_2M" / "data_000000.tar", members)


# ---- text -----------------------------------------------------------------------------------------------------------------


def llava_text(folder: Path) -> None:
    """``conversation_58k.json``, with which Rosetta trains text: LLaVA's array, whose turns keep their placeholder and whose images
    are not there."""
    rows = [
        {
            "id": f"{row:012d}",
            "image": f"{row:012d}.jpg",
            "conversations": [
                {"from": "human", "value": f"What is {row}?\n<image>"},
                {"from": "gpt", "value": f"It is {colour(row)}."},
            ],
        }
        for row in range(ROWS)
    ]
    write_text(folder / "lm" / "conversation_58k.json", json.dumps(rows))


def alpaca(folder: Path) -> None:
    """``alpaca_data.json``: an array; many rows have an empty input."""
    rows = [
        {
            "instruction": "Name the colour.",
            "input": f"square {row}" if row % 2 else "",
            "output": f"It is {colour(row)}.",
        }
        for row in range(ROWS)
    ]
    write_text(folder / "alpaca_data.json", json.dumps(rows, indent=4))


def infinity_instruct(folder: Path) -> None:
    """``BAAI/Infinity-Instruct``: LLaVA's turns in Parquet, after an id and before labels."""
    label = pa.struct(
        [("ability_en", pa.list_(pa.string())), ("cate_ability_en", pa.list_(pa.string()))]
    )
    columns = {
        "id": pa.int64(),
        "conversations": pa.list_(TURN),
        "label": label,
        "langdetect": pa.string(),
        "source": pa.string(),
    }
    rows = [
        {
            "id": row,
            "conversations": [
                {"from": "system", "value": ""},
                {"from": "human", "value": f"What is {row}?"},
                {"from": "gpt", "value": f"It is {colour(row)}."},
            ][row % 2 :],
            "label": {"ability_en": ["naming"], "cate_ability_en": ["toy"]},
            "langdetect": "en",
            "source": "toy",
        }
        for row in range(ROWS)
    ]
    write_parquet(folder / "7M" / "train-00000-of-00035.parquet", columns, rows)


def tulu(folder: Path) -> None:
    """``allenai/tulu-3-sft-mixture``: messages; ``HuggingFaceTB/smoltalk`` has the same without ``id``."""
    columns = {"id": pa.string(), "messages": pa.list_(MESSAGE), "source": pa.string()}
    rows = [
        {
            "id": f"toy_{row}",
            "messages": [
                {"content": "Be brief.", "role": "system"},
                {"content": f"What is {row}?", "role": "user"},
                {"content": f"It is {colour(row)}.", "role": "assistant"},
            ][row % 2 :],
            "source": "toy",
        }
        for row in range(ROWS)
    ]
    write_parquet(folder / "data" / "train-00000-of-00006.parquet", columns, rows)
