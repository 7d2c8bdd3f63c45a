"""Everything composes: every layout x activation checkpointing x compile x float8 gives the losses of one plain process.

CI runs a covering subset; ``tests/run.sh -m matrix`` runs all combinations (about 40 minutes on 2 cores).
"""

from itertools import product

import pytest

from tests.helpers.launch import launch

NUM_STEPS = 3
LOSSES = ("loss/text", "loss/flow", "loss/balance", "grad_norm/all")
# Relative, float32. Sums are taken in another order; float8 rounds every matmul of the blocks.
TOLERANCE = {False: 1e-3, True: 6e-2}

# Name -> (processes, replicas, expert-parallel degree, context-parallel degree).
LAYOUTS = {
    "fsdp2": (2, 1, 1, 1),
    "hsdp": (4, 2, 1, 1),
    "ep2": (2, 1, 2, 1),
    "ep4": (4, 1, 4, 1),
    "ep2_hsdp": (4, 2, 2, 1),
    "cp2": (2, 1, 1, 2),
    "cp2_hsdp": (4, 2, 1, 2),
    "cp2_ep2_hsdp": (4, 2, 2, 2),
}
# When FSDP frees the weights behind a forward: all ways occur.
RESHARD = {"none": "never", "full": "always", "per_op": "default"}
CHECKPOINTING = {"none": "none", "full": "full", "per_op": "selective"}
ALL = list(product(LAYOUTS, CHECKPOINTING, ("eager", "aot_eager"), (False, True)))
# Every layout that shards or replicates, every activation checkpointing, eager and compiled, with float8 and without. Context parallelism
# alone has tests of its own.
COVERING = {
    ("fsdp2", "full", "aot_eager", False),
    ("fsdp2", "per_op", "eager", True),
    ("hsdp", "none", "aot_eager", True),
    ("ep2", "per_op", "aot_eager", False),
    ("ep2", "none", "eager", True),
    ("ep4", "full", "eager", True),
    ("ep2_hsdp", "per_op", "aot_eager", False),
    ("cp2_ep2_hsdp", "full", "aot_eager", True),
}


def settings_of(checkpointing: str, backend: str, float8: bool) -> dict[str, object]:
    settings: dict[str, object] = {
        "training__steps": NUM_STEPS,
        "losses__balance_scope": "global",
        "checkpoint__enable": False,
        "activation_checkpoint__mode": CHECKPOINTING[checkpointing],
    }
    if checkpointing == "per_op":
        settings["activation_checkpoint__selective_ac_option"] = "op"
    if backend != "eager":
        settings |= {"compile__enable": True, "compile__backend": backend}
    if float8:
        settings |= {"model__converters": "float8", "float8__emulate": True}
    return settings


@pytest.fixture(scope="module")
def plain(tmp_path_factory, demo):
    """One process, float32, nothing on, all rows in one micro-batch."""
    settings = settings_of("none", "eager", False)
    run = launch(tmp_path_factory.mktemp("plain"), demo, training__local_batch_size=4, **settings)
    assert run.status == 0, run.text[-3000:]
    return run


def assert_losses_of_plain(folder, demo, plain, layout, checkpointing, backend, float8):
    world_size, replicas, expert_parallel, context_parallel = LAYOUTS[layout]
    run = launch(
        folder,
        demo,
        world_size=world_size,
        training__local_batch_size=4 * context_parallel // world_size,
        parallelism__data_parallel_replicate_degree=replicas,
        parallelism__expert_parallel_degree=expert_parallel,
        parallelism__context_parallel_degree=context_parallel,
        parallelism__fsdp_reshard_after_forward=RESHARD[checkpointing],
        **settings_of(checkpointing, backend, float8),
    )
    assert run.status == 0, run.text[-3000:]
    shards = world_size // replicas // context_parallel
    applied = f"{replicas} x {shards} ranks, expert parallel {expert_parallel}, context parallel {context_parallel}"
    assert applied in run.text
    for tag in LOSSES:
        ours, theirs = run.scalars(tag), plain.scalars(tag)
        for step in range(1, NUM_STEPS + 1):
            near = pytest.approx(theirs[step], rel=TOLERANCE[float8])
            assert ours[step] == near, (tag, step)


@pytest.mark.parametrize(
    ("layout", "checkpointing", "backend", "float8"),
    [
        pytest.param(
            *row, marks=() if row in COVERING else pytest.mark.matrix, id="-".join(map(str, row))
        )
        for row in ALL
    ],
)
def test_combination_gives_the_losses_of_one_plain_process(
    tmp_path, demo, plain, layout, checkpointing, backend, float8
):
    assert_losses_of_plain(tmp_path, demo, plain, layout, checkpointing, backend, float8)


def test_inductor_gives_the_losses_of_one_plain_process(tmp_path, demo, plain):
    assert_losses_of_plain(tmp_path, demo, plain, "ep2", "full", "inductor", False)
