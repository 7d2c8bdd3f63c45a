"""A source that stops the run: after one epoch, on all ranks at the same step, with a checkpoint."""

import json
import re

from symbiotic_titan.weights.damage import newest_complete_step
from tests.helpers import launch as runs
from tests.helpers.launch import arguments_of, read_scalars

# Rows have 384 positions. The streams, two on each of two ranks, run out after different numbers of rows.
LENGTHS = [20 + 37 * i % 330 for i in range(43)]


def train(folder, demo, source, world_size, **settings):
    """Console text of a run of debug.toml on ``source`` alone."""
    arguments = arguments_of(folder, demo, settings | {"training.steps": 20, "data.lookahead": 4})
    config = folder / "job.toml"
    head, *_, last = config.read_text().split("[[data.sources]]")
    tail = last[last.index("[checkpoint]") :]
    config.write_text(f"{head}[[data.sources]]\n{source}\n{tail}")
    run = runs.train(folder, arguments, world_size=world_size)
    assert run.status == 0, run.text[-3000:]
    return run.text


def test_one_epoch_trains_every_sample_once_and_ends_on_all_ranks_at_once(tmp_path, demo):
    texts = [json.dumps({"text": "x" * length}) for length in LENGTHS]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts) + "\n")
    source = f"name = 'texts'\ntask = 'lm'\nformat = 'jsonl'\npath = '{tmp_path}/texts.jsonl'"
    folder = tmp_path / "run"
    text = train(
        folder,
        demo,
        source + "\nat_end = 'stop'",
        world_size=2,
        **{"parallelism.expert_parallel_degree": 2, "losses.balance_scope": "global"},
    )
    message = r"data ended, all samples of texts were read: saving a checkpoint at step (\d+)"
    last = int(re.search(message, text)[1])
    assert newest_complete_step(folder / "checkpoint")[:2] == (last, {})
    assert max(read_scalars(folder, "loss/text")) == last < 20
    # Each text gets a token before and one behind it.
    assert read_scalars(folder, "tokens/text")[last] == sum(LENGTHS) + 2 * len(LENGTHS)
    assert read_scalars(folder, "data/fill")[last] < 0.6  # some rows are empty

    text = train(folder, demo, source, world_size=1)
    assert f"Training starts at step {last + 1}" in text
    fill = read_scalars(folder, "data/fill")
    assert min(fill[step] for step in range(last + 1, 21)) > 0.6
