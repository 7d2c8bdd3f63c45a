"""An error in the data costs no work: all ranks save the last step, and the run goes on as if nothing had happened."""

import json
import os
import re
import subprocess
import sys

from tests.helpers.launch import ROOT, arguments_of, read_scalars, run_in_turn

STEPS = 6
# A third to the whole of a row of 384 positions. With two ranks the 42nd is read in the data of step 5, by rank 1.
TEXTS = [{"text": chr(97 + i % 26) * (130 + 37 * i % 240)} for i in range(60)]
BAD, LAST = 41, 4
EXACT = ("loss/total", "loss/text", "grad_norm/all", "tokens/text", "data/fill")
SMALL = {"training.steps": STEPS, "data.lookahead": 2}


def write(folder, bad=()):
    folder.mkdir()
    rows = [{"text": 7} if i in bad else row for i, row in enumerate(TEXTS)]
    path = folder / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def arguments(folder, demo, data, name, settings, validation=None):
    """Of a run of debug.toml on ``data`` alone, with the config ``name``.toml."""
    found = arguments_of(folder, demo, SMALL | settings)
    head, *_, last = (folder / "job.toml").read_text().split("[[data.sources]]")
    source = "name = 'texts'\ntask = 'lm'\nformat = 'jsonl'\npath = '{}'\n"
    text = f"{head}[[data.sources]]\n{source.format(data)}\n{last[last.index('[checkpoint]') :]}"
    if validation:
        text += "[validation]\nenable = true\nsteps = 12\n"
        text += f"[[validation.sources]]\n{source.format(validation)}"
    (folder / f"{name}.toml").write_text(text)
    return ["--job.config_file", str(folder / f"{name}.toml"), *found[2:]]


def assert_same_curves(folder, reference):
    for tag in EXACT:
        values = read_scalars(folder, tag)
        assert list(values) == list(range(1, STEPS + 1))
        assert values == read_scalars(reference, tag), tag


def test_an_error_on_one_rank_costs_no_step_once_the_sample_is_repaired(tmp_path, demo):
    whole, broken = write(tmp_path / "whole"), write(tmp_path / "broken", [BAD])
    two_ranks = {
        "training.global_batch_size": 8,  # two micro-batches a step, so that a rank has one to put back
        "losses.balance_scope": "global",
        "checkpoint.async_mode": "async",
    }
    workers = two_ranks | {"training.dataloader.num_workers": 2}
    folder, reference = tmp_path / "run", tmp_path / "reference"
    *stops, repaired, undisturbed = run_in_turn(
        tmp_path,
        [
            arguments(folder, demo, broken, "broken", workers),
            arguments(folder, demo, broken, "not_repaired", two_ranks),
            arguments(folder, demo, whole, "validated", two_ranks, validation=broken),
            arguments(folder, demo, whole, "repaired", two_ranks),
            arguments(reference, demo, whole, "whole", two_ranks),
        ],
        world_size=2,
    )
    bad = f"{broken}: sample 'line {BAD + 1}': 'text' must be a string, got 7"
    for stop, ends in zip(
        stops,
        (
            f"The checkpoint of step {LAST} is saved: started again, the run goes on from there",
            "No step was taken since the start, so there was nothing to save",
            'repair it, or set data.bad_samples = "skip"',
        ),
        strict=True,
    ):
        for run in stop:
            assert run.status == 2 and "Traceback" not in run.text, run.text[-3000:]
            line = run.text.strip().splitlines()[-1]
            assert bad in line and line.endswith(ends), line
        assert (
            stop[0].text.strip().splitlines()[-1].partition("ERROR")[2]
            == line.partition("ERROR")[2]
        )
    assert all(f"step {LAST + 1}: rank 1: {bad}" in stop[0].text for stop in stops[:2])
    assert "[[validation.sources]]: rank " in stops[2][0].text
    for run in (*repaired, *undisturbed):
        assert run.status == 0, run.text[-3000:]
    assert "files have other sizes than when the checkpoint was saved" in repaired[0].text
    assert f"Training starts at step {LAST + 1}" in repaired[0].text
    assert_same_curves(folder, reference)


def test_too_many_bad_samples_cost_no_step_once_a_share_is_allowed(tmp_path, demo):
    data, useless = write(tmp_path / "some", range(9, 60, 6)), write(tmp_path / "all", range(60))
    skip = {"data.bad_samples": "skip", "data.num_lanes": 4, "training.local_batch_size": 2}
    few = skip | {"data.max_bad_samples": 4}
    folder, reference = tmp_path / "run", tmp_path / "reference"
    limited, share, undisturbed, unsaved, first = (
        run
        for (run,) in run_in_turn(
            tmp_path,
            [
                arguments(folder, demo, data, "limited", few),
                arguments(folder, demo, data, "share", few | {"data.max_bad_share": 0.5}),
                arguments(reference, demo, data, "reference", skip),
                arguments(tmp_path / "a", demo, data, "job", few | {"checkpoint.enable": False}),
                arguments(tmp_path / "b", demo, useless, "job", skip),
            ],
        )
    )
    last = int(re.search(r"error in the data: saving a checkpoint at step (\d+)", limited.text)[1])
    assert 0 < last < STEPS
    for run, message in (
        (limited, f"step {last + 1}: skipped 5 bad samples (texts: 5) of "),
        (limited, f"The checkpoint of step {last} is saved: started again, the run goes on"),
        (unsaved, f"With checkpoint.enable = false nothing was saved: the {last} steps of this"),
        (first, "skipped 101 samples in a row, more than data.max_bad_in_a_row = 100"),
        (first, "No step was taken since the start, so there was nothing to save"),
    ):
        assert run.status == 2 and "Traceback" not in run.text, run.text[-3000:]
        assert message in run.text.strip().splitlines()[-1]
    assert share.status == undisturbed.status == 0, share.text[-3000:]
    assert f"Training starts at step {last + 1}" in share.text
    assert_same_curves(folder, reference)
    assert read_scalars(folder, "data/skipped")[STEPS] > 4
    assert 0.1 < read_scalars(folder, "data/bad_share")[STEPS] < 0.3


def test_run_train_with_two_processes_ends_with_status_2_and_one_line(tmp_path, demo):
    data = write(tmp_path / "broken", range(60))
    _, config, *rest = arguments(tmp_path / "run", demo, data, "job", {})
    environment = os.environ | {"NGPU": "2", "CONFIG_FILE": config, "OMP_NUM_THREADS": "1"}
    environment |= {"SYMBIOTIC_PYTHON": sys.executable, "LOG_RANK": "1"}
    done = subprocess.run(
        ["./run_train.sh", *rest],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    text = done.stdout + done.stderr
    assert done.returncode == 2 and "Traceback" not in text, text[-3000:]
    assert len([line for line in text.splitlines() if " - ERROR - " in line]) == 1
    assert re.search(r"ERROR - step 1: rank 0: .* \(ranks 0, 1 failed\)\. No step was taken", text)
