"""check-data finds what training would refuse, in any number of processes, and goes on where it was ended."""

import json
import multiprocessing
import os
import signal
import time
from itertools import islice
from pathlib import Path

import pytest
import torch

from symbiotic_titan.commands import check_data, show_batch
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.data.documents import TextSegment
from symbiotic_titan.sequence.tasks import TASKS, Task

ROOT = Path(__file__).parents[3]


def write_texts(path, number, bad=None):
    """JSON Lines of ``number`` texts; ``bad``: sample -> line in place of it."""
    lines = [json.dumps({"text": f"text number {i}"}) for i in range(number)]
    for sample, line in (bad or {}).items():
        lines[sample] = line
    path.write_text("\n".join(lines) + "\n")


def write_config(folder, *rows, extra=""):
    """A config of ``rows`` of [[data.sources]], given as (name, task, format, path, *more lines)."""
    text = f'extends = "{ROOT}/train_configs/debug.toml"\n{extra}\n'
    for name, task, form, path, *more in rows:
        values = {"name": name, "task": task, "format": form, "path": str(path)}
        lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        text += "\n".join(["[[data.sources]]", *lines, *more, ""])
    config = folder / "config.toml"
    config.write_text(text)
    return config


def check(config, out, *options):
    """(exit status, the report's sources by name, the lines of the list)."""
    status = check_data.main([str(config), "--out", str(out), "--workers", "2", *options])
    report = json.loads((out / "report.json").read_text())
    entries = [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
    return status, {source["name"]: source for source in report["sources"]}, entries


def results(out):
    return [(out / name).read_bytes() for name in ("report.json", "bad_samples.jsonl")]


def journal(out):
    return [json.loads(line) for line in (out / "progress.jsonl").read_text().splitlines()]


@pytest.fixture
def texts(tmp_path):
    """A config with one source of two files: 600 texts, of which 14 are bad, and 300."""
    bad = {1: "{", 599: '{"text": " "}', **{i: '{"text": 7}' for i in range(10, 130, 10)}}
    write_texts(tmp_path / "a.jsonl", 600, bad)
    write_texts(tmp_path / "b.jsonl", 300)
    row = ("texts", "lm", "jsonl", f"{tmp_path}/?.jsonl")
    return write_config(tmp_path, row)


def test_the_report_counts_and_names_what_is_bad(texts, tmp_path, capsys):
    status, sources, entries = check(texts, tmp_path / "out")
    found = sources["texts"]
    assert status == 1
    assert (found["files"], found["samples"], found["checked"]) == (2, 900, 900)
    assert (found["good"], found["bad"], found["errors"]) == (886, 14, [])
    assert found["reasons"] == {"json": 1, "wrong_type": 12, "empty": 1}
    assert [e["sample"] for e in entries] == [1, *range(10, 130, 10), 599]
    assert [e["sample"] for e in found["named"]["wrong_type"]] == list(range(10, 110, 10))
    first = entries[1] | {"message": "", "num_bytes": 0}
    assert first == {
        "source": "texts", "file": f"{tmp_path}/a.jsonl", "num_bytes": 0, "sample": 10,
        "key": "line 11", "reason": "wrong_type", "message": "",
    }  # fmt: skip
    assert entries[1]["message"] == "'text' must be a string, got 7"
    assert entries[1]["num_bytes"] == (tmp_path / "a.jsonl").stat().st_size
    # The bytes of each text, and a token before and after it.
    lengths = [len(f"text number {i}") + 2 for i in range(600)]
    good = [n for i, n in enumerate(lengths) if i not in {e["sample"] for e in entries}]
    good += [len(f"text number {i}") + 2 for i in range(300)]
    assert found["mean_tokens"] == pytest.approx(sum(good) / 886) and found["max_tokens"] == 17
    said = capsys.readouterr().out
    assert "texts, wrong_type: the first 10 of them" in said
    assert f"  {tmp_path}/a.jsonl: sample 'line 600': 'text' is empty" in said
    assert f'skip_list = "{tmp_path}/out/bad_samples.jsonl"' in said


def test_good_data_end_with_status_0_and_an_empty_list(tmp_path):
    write_texts(tmp_path / "a.jsonl", 20)
    row = ("texts", "lm", "jsonl", tmp_path / "a.jsonl")
    config = write_config(tmp_path, row, extra="[data]\nmax_row_share = {lm = 1.0}")
    status, sources, entries = check(config, tmp_path / "out")
    assert (status, sources["texts"]["good"], entries) == (0, 20, [])


def test_any_number_of_workers_finds_the_same(texts, tmp_path):
    for workers in ("1", "3"):
        check(texts, tmp_path / workers, "--workers", workers)
    assert results(tmp_path / "1") == results(tmp_path / "3")


def test_a_journal_that_breaks_off_anywhere_gives_the_same_report(texts, tmp_path):
    check(texts, tmp_path / "whole")
    text = (tmp_path / "whole" / "progress.jsonl").read_bytes()
    assert len(journal(tmp_path / "whole")) == 5  # 256 + 256 + 88 and 256 + 44
    for number, length in enumerate((len(text) // 2, len(text) - 1)):
        out = tmp_path / f"out{number}"
        out.mkdir()
        (out / "progress.jsonl").write_bytes(text[:length])
        check(texts, out)
        assert results(out) == results(tmp_path / "whole")


def test_only_files_and_settings_that_changed_are_checked_again(texts, tmp_path):
    out = tmp_path / "out"
    check(texts, out)
    check(texts, out)
    assert len(journal(out)) == 5
    write_texts(tmp_path / "b.jsonl", 300, {7: "{"})
    _, sources, _ = check(texts, out)
    assert sources["texts"]["bad"] == 15
    assert [r["file"][-7:] for r in journal(out)[5:]] == ["b.jsonl"] * 2
    check(texts, out, "--data.lookahead", "3")
    assert len(journal(out)) == 7
    check(texts, out, "--training.seq_len", "512")
    assert len(journal(out)) == 12


def test_a_share_is_chosen_by_the_seed(tmp_path):
    write_texts(tmp_path / "a.jsonl", 4000, {i: '{"text": 7}' for i in range(4000)})
    config = write_config(tmp_path, ("texts", "lm", "jsonl", tmp_path / "a.jsonl"))

    def chosen(out, *options):
        _, sources, entries = check(config, tmp_path / out, "--share", "0.1", *options)
        assert sources["texts"]["checked"] == len(entries) == 400
        return [e["sample"] for e in entries]

    first = chosen("0")
    assert first == chosen("1", "--workers", "1")
    assert first != chosen("0", "--data.seed", "1")
    assert all(
        300 < sum(low <= i < low + 1000 for i in first) * 4 < 500 for low in range(0, 4000, 1000)
    )


def test_long_samples_are_counted_as_the_source_treats_them(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 2000}]
    lines = [json.dumps({"messages": turns})] + [json.dumps({"text": "a"})] * 3
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    rows = [
        (policy, "lm", "jsonl", tmp_path / "a.jsonl", f'too_long = "{policy}"')
        for policy in ("bad", "skip", "truncate")
    ]
    status, sources, entries = check(write_config(tmp_path, *rows), tmp_path / "out")
    assert status == 1 and [(e["source"], e["reason"]) for e in entries] == [("bad", "too_long")]
    keys = ("good", "bad", "passed_over", "truncated", "too_long")
    assert [[sources[name][key] for key in keys] for name in ("bad", "skip", "truncate")] == [
        [3, 1, 0, 0, 0.25],
        [3, 0, 1, 0, 0.25],
        [4, 0, 0, 1, 0.25],
    ]


def test_files_that_cannot_be_read_stop_no_other(tmp_path, capsys):
    """Damage at an index, a file that is empty, a path without files and keys that no sample has."""
    write_texts(tmp_path / "a.jsonl", 10)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    rows = [
        ("texts", "lm", "jsonl", tmp_path / "a.jsonl"),
        ("nothing", "lm", "jsonl", tmp_path / "no*.jsonl"),
        ("broken", "lm", "parquet", tmp_path / "broken.parquet"),
        ("keys", "lm", "jsonl", tmp_path / "a.jsonl", 'keys = {text = "words"}'),
        ("folder", "mmu", "jsonl", tmp_path / "a.jsonl", f'image_folder = "{tmp_path}/none"'),
    ]
    held_out = ["[[validation.sources]]", 'name = "held_out"', 'task = "lm"', 'format = "jsonl"']
    validation = "\n".join(["[validation]", *held_out, f'path = "{tmp_path}/a.jsonl"'])
    status, sources, entries = check(
        write_config(tmp_path, *rows, extra=validation), tmp_path / "out"
    )
    assert status == 1
    assert {name: source["good"] for name, source in sources.items()} == {
        "texts": 10, "nothing": 0, "broken": 0, "keys": 0, "folder": 0, "held_out": 10,
    }  # fmt: skip
    [[_, nothing]], [[_, keys]] = sources["nothing"]["errors"], sources["keys"]["errors"]
    assert "[[data.sources]] #2 (nothing): no file matches path" in nothing
    assert "keys.text is looked for as 'words', which no sample has" in keys
    assert [(e["source"], e["key"], e["reason"]) for e in entries] == [
        ("broken", "(damaged part)", "unreadable")
    ]
    assert "is no folder; name the one" in sources["folder"]["errors"][0][1]
    assert f"error: {nothing}" in capsys.readouterr().out


def test_training_with_the_list_has_the_rows_of_skipping_bit_for_bit(texts, tmp_path):
    check(texts, tmp_path / "out")
    with_list, skipping = tmp_path / "list.toml", tmp_path / "skip.toml"
    with_list.write_text(f'{texts.read_text()}skip_list = "{tmp_path}/out/bad_samples.jsonl"\n')
    skipping.write_text(f'{texts.read_text()}bad_samples = "skip"\n')
    loaders = [
        show_batch.open_data(load_job_config(["--job.config_file", str(config)]))[0]
        for config in (with_list, skipping)
    ]
    for left, right in zip(*(islice(loader, 30) for loader in loaders), strict=True):
        for name, tensor in left.tensors().items():
            assert torch.equal(tensor, getattr(right, name))
    assert loaders[0].num_skipped == 0
    assert loaders[0].skip_reasons["listed"] == loaders[1].num_skipped > 9


def layout_that(does):
    """A task whose samples call ``does(text)`` in the process that makes their documents."""

    def layout(sample):
        text = sample.fields.text("text")
        does(text)
        return [[TextSegment([1, 2], trained=True)]]

    return TASKS.temporarily(harmful=Task("harmful", (("text",),), layout=layout))


def test_a_sample_that_kills_its_process_is_listed_and_all_others_are_checked(tmp_path, caplog):
    def crash(text):
        if text == "text number 300":
            os.kill(os.getpid(), signal.SIGKILL)

    write_texts(tmp_path / "a.jsonl", 600, {400: '{"text": " "}'})
    config = write_config(tmp_path, ("texts", "harmful", "jsonl", tmp_path / "a.jsonl"))
    with layout_that(crash):
        status, sources, entries = check(config, tmp_path / "out")
    assert status == 1
    assert [(e["sample"], e["reason"]) for e in entries] == [(300, "crash"), (400, "empty")]
    assert "ended by SIGKILL; the system does that where memory runs out" in entries[0]["message"]
    assert (sources["texts"]["checked"], sources["texts"]["good"]) == (600, 598)
    assert "texts', " in caplog.text and "samples 256 to 511: its worker process was" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_check_that_is_ended_goes_on_where_it_was(texts, tmp_path, number):
    text = texts.read_text().replace('"lm"', '"harmful"')
    texts.write_text(text)
    out = tmp_path / "out"

    def slow():
        with layout_that(lambda text: time.sleep(0.002)):
            os._exit(check_data.main([str(texts), "--out", str(out), "--workers", "2"]))

    process = multiprocessing.get_context("fork").Process(target=slow)
    process.start()
    deadline = time.monotonic() + 60
    while not (out / "progress.jsonl").exists() or not journal(out):
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == (130 if number == signal.SIGTERM else -number)
    before = len(journal(out))
    assert 0 < before < 5 and not (out / "report.json").exists()
    with layout_that(lambda text: None):
        check(texts, out)
        check(texts, tmp_path / "at_once")
    assert len(journal(out)) == 5
    assert results(out) == results(tmp_path / "at_once")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--share", "0"], "error: --share must lie above 0 and be at most 1, got 0.0"),
        (["--share", "nan"], "error: --share must lie above 0 and be at most 1, got nan"),
        (["--workers", "0"], "error: --workers must be at least 1, got 0"),
        (["--data.lookahead", "0"], "error: data.lookahead: must be at least 1, got 0"),
        (["--data.vae_pixels", "1"], "error: data.vae_pixels: 1 pixels hold no token"),
        (["--shar", "1"], "error: command line: unknown key 'shar'"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, capsys, options, message):
    config = write_config(tmp_path, ("images", "t2i", "webdataset", tmp_path / "a.tar"))
    try:
        status = check_data.main([str(config), "--out", str(tmp_path / "out"), *options])
    except SystemExit as end:
        status = end.code
    assert status == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
