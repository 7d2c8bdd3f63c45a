"""Whatever is done to the files of the newest checkpoint, two ranks find it, agree, and go on from the one before, bit for bit."""

import copy
import logging
import os
import shutil

import pytest
import torch
import torch.distributed as dist

from symbiotic_titan.checkpoint.start import find_start, share_start
from symbiotic_titan.training.train_spec import register
from symbiotic_titan.weights.damage import read_metadata
from tests.helpers.debug_model import config_of
from tests.helpers.gloo import run_on_ranks
from tests.helpers.saved_run import parts_of_run, whole

SUMS = "SHA256SUMS"
STEPS = (2, 4, 6)  # the last one is saved asynchronously


# ---- damage: each of these is done to the folder of a checkpoint -----------------------------------------------------------


def flip(path, place=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 16
    path.write_bytes(data)


def overwrite(path, byte):
    path.write_bytes(byte * path.stat().st_size)


def flip_state(folder):
    """In the pickle of a state that is no tensor, as the data loader's is."""
    metadata, _ = read_metadata(folder)
    (place,) = (p for i, p in metadata.storage_data.items() if i.fqn == "train_state.step")
    path = folder / place.relative_path
    data = bytearray(path.read_bytes())
    data[place.offset + place.length // 2] ^= 1
    path.write_bytes(data)


def edit_sums(folder, edit):
    path = folder / SUMS
    path.write_text("\n".join(edit(path.read_text().splitlines())) + "\n")


def another_digest(lines):
    return [
        lines[0],
        f"{lines[1][:10]}{'1' if lines[1][10] != '1' else '2'}{lines[1][11:]}",
        *lines[2:],
    ]


def newest(damage):
    return lambda checkpoints: damage(checkpoints / "step-6")


def longer(folder):
    with (folder / "__1_0.distcp").open("ab") as file:
        file.write(b"\0")


def cut(folder):
    os.truncate(folder / "__0_0.distcp", 999)


def both(checkpoints):
    flip(checkpoints / "step-6" / "__0_0.distcp")
    flip(checkpoints / "step-4" / "__1_0.distcp")


OTHER_BYTES = "damaged (another SHA-256 than in SHA256SUMS)"
ITS_METADATA = f"the bytes of its file .metadata are {OTHER_BYTES}"
# Case -> (damage of the newest checkpoint, what is logged of it). The one before is then used.
PASSED_OVER = {
    "bit_of_the_first_rank": (
        lambda f: flip(f / "__0_0.distcp"),
        f"__0_0.distcp are {OTHER_BYTES}",
    ),
    "bit_of_the_second": (
        lambda f: flip(f / "__1_0.distcp", 0.9),
        f"__1_0.distcp are {OTHER_BYTES}",
    ),
    "first_byte": (lambda f: flip(f / "__0_0.distcp", 0.0), OTHER_BYTES),
    "bit_of_a_state": (flip_state, OTHER_BYTES),
    "zeros": (lambda f: overwrite(f / "__1_0.distcp", b"\0"), OTHER_BYTES),
    "garbage": (lambda f: overwrite(f / "__0_0.distcp", b"?"), OTHER_BYTES),
    "longer": (longer, OTHER_BYTES),
    "cut": (cut, "its file __0_0.distcp has 999 bytes instead of"),
    "missing": (lambda f: (f / "__1_0.distcp").unlink(), "its file __1_0.distcp is missing"),
    "metadata_bit": (lambda f: flip(f / ".metadata"), ITS_METADATA),
    "metadata_zeros": (lambda f: overwrite(f / ".metadata", b"\0"), ITS_METADATA),
    "metadata_missing": (lambda f: (f / ".metadata").unlink(), "it has no .metadata"),
    "sums_garbage": (lambda f: overwrite(f / SUMS, b"\xff"), "its SHA256SUMS is damaged"),
    "sums_empty": (lambda f: (f / SUMS).write_bytes(b""), "its SHA256SUMS is damaged"),
    "sums_cut": (lambda f: edit_sums(f, lambda lines: lines[:1]), "no digest of __0_0.distcp"),
    "sums_digest": (lambda f: edit_sums(f, another_digest), f"__0_0.distcp are {OTHER_BYTES}"),
}
# Case -> (damage of the folder of checkpoints, what [checkpoint] has, or the steps of the run, what the run starts from, what is logged).
OTHERS = {
    "after_its_last_step": (
        newest(lambda f: flip(f / "__0_0.distcp")),
        {"steps": 6},
        4,
        "damaged-6",
    ),
    "both": (both, {}, 2, "step-4 is skipped and renamed to damaged-4"),
    "whole": (lambda f: None, {}, 6, "Verified 0.0"),
    "without_digests": (newest(lambda f: (f / SUMS).unlink()), {}, 6, "bytes were not verified"),
    "unverified": (newest(lambda f: flip(f / "__1_0.distcp")), {"verify": False}, 6, ""),
    "named": (
        newest(lambda f: flip(f / "__1_0.distcp")),
        {"load_step": 6},
        f"checkpoint.load_step: checkpoint FOLDER/step-6 is damaged: the bytes of its file __1_0.distcp are {OTHER_BYTES}; name another "
        "step, or leave the key out",
        "",
    ),
    "initial": (
        newest(lambda f: flip(f / "__1_0.distcp")),
        {"folder": "new", "initial_load_path": "FOLDER/step-6"},
        f"checkpoint.initial_load_path: checkpoint FOLDER/step-6 is damaged: the bytes of its file __1_0.distcp are {OTHER_BYTES}; use "
        "another copy of it",
        "",
    ),
}
CASES = {
    name: (newest(damage), {}, 4, f"step-6 is skipped and renamed to damaged-6: WHY{text}")
    for name, (damage, text) in PASSED_OVER.items()
} | OTHERS


# ---- on the ranks ---------------------------------------------------------------------------------------------------------


def save_run(config):
    """Save ``STEPS``. Returns the tensors of step 4."""
    model, manager, optimizers, step = parts_of_run(config)
    for tensor in model.parameters():
        tensor.grad = torch.ones_like(tensor)
    for number in STEPS:
        optimizers.step()
        step.step = number
        if number == 4:
            kept = {n: t.clone() for n, t in whole(model.state_dict()).items()}
        manager.save(number, last_step=number < STEPS[-1])
    manager.close()
    return kept


def roll_back(run):
    """What a run finds that rolls back, at multiples of 2 with the newest one damaged, and whether it then has the tensors of step 4 and
    its own step and rate."""
    folder = run.with_name("way_back") / "checkpoint"
    if dist.get_rank() == 0:
        shutil.copytree(run / "checkpoint", folder)
        shutil.copytree(folder / "step-6", folder / "step-7")  # saved when the run was stopped
        flip(folder / "step-6" / "__1_0.distcp")
    dist.barrier()
    config = config_of(f"--checkpoint.enable --checkpoint.interval 2 --job.dump_folder {run}")
    config.job.dump_folder = str(folder.parent)
    config.stability.on_bad_step = "roll_back"
    model, manager, _, step = parts_of_run(config)
    step.step = 8
    manager.prepare_to_roll_back(config, None)
    start = manager.find_way_back()
    manager.roll_back(start)
    manager.close()
    return (
        start.step,
        sorted(p.name for p in folder.iterdir()),
        step.step,
        whole(model.state_dict()),
    )


def load(start, config):
    """The tensors and the step that a run has which begins with ``start``."""
    model, manager, _, step = parts_of_run(config, start.entries)
    manager.begin(start, config.checkpoint, None)
    assert manager.load(step=config.checkpoint.load_step)
    return whole(model.state_dict()), step.step


class Lines(logging.Handler):
    """Keeps what is logged within a block."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.text, self.logger = "", logging.getLogger()

    def emit(self, record):
        self.text += f"{record.getMessage()}\n"

    def __enter__(self):
        self.logger.setLevel(logging.INFO)
        self.logger.addHandler(self)
        return self

    def __exit__(self, *error):
        self.logger.removeHandler(self)


def begun(config):
    """What a run starts from, and its step or the error's text, and what is logged."""
    with Lines() as log:
        try:
            start = share_start(find_start(config), config)
            return start, start.step, log.text
        except ValueError as error:
            return None, str(error), log.text


def outcomes(rank, run):
    """Case -> (what the run starts from, what was logged); whether the state that is gone back to is that of step 4; what a run that
    rolls back goes back to."""
    register()
    saving = "--checkpoint.enable --checkpoint.interval 6 --checkpoint.async_mode async"
    base, found, equal = config_of(f"{saving} --job.dump_folder {run}"), {}, None
    expected = save_run(base)
    for name, (damage, options, *_) in CASES.items():
        config, folder = copy.deepcopy(base), run.with_name(name) / "checkpoint"
        if rank == 0:
            shutil.copytree(run / "checkpoint", folder)
            damage(folder)
        dist.barrier()
        config.job.dump_folder = str(folder.parent)
        for key, value in options.items():
            section = config.training if key == "steps" else config.checkpoint
            is_path = key == "initial_load_path"
            setattr(section, key, value.replace("FOLDER", str(folder)) if is_path else value)
        start, *found[name] = begun(config)
        if name == "bit_of_a_state":
            tensors, step = load(start, config)
            equal = step == 4 and all(torch.equal(tensors[n], expected[n]) for n in expected)
    *way_back, tensors = roll_back(run)
    way_back.append(all(torch.equal(tensors[n], expected[n]) for n in expected))
    return found, equal, way_back


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    run = tmp_path_factory.mktemp("damage") / "run"
    return run.parent, run_on_ranks(2, outcomes, run)


@pytest.mark.parametrize("name", CASES)
def test_every_damage_is_named_and_the_run_starts_from_what_is_whole(ranks, name):
    folder, ((first, *_), (second, *_)) = ranks
    _, _, expected, logged = CASES[name]
    if isinstance(expected, str):
        expected = expected.replace("FOLDER", str(folder / name / "checkpoint"))
    start, log = first[name]
    assert start == second[name][0] == expected
    before, _, after = logged.partition("WHY")
    assert any(before in line and after in line for line in [*log.splitlines(), ""])


def test_the_state_gone_back_to_is_the_one_that_was_saved(ranks):
    assert [equal for _, equal, _ in ranks[1]] == [True, True]


def test_a_run_rolls_back_to_the_newest_whole_checkpoint_of_the_interval(ranks):
    left = ["damaged-6", "step-2", "step-4", "step-7"]
    assert [way_back for *_, way_back in ranks[1]] == [[4, left, 8, True]] * 2
