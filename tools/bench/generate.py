#!/usr/bin/env python3
"""Images per minute and tokens per second of a config's model, with the key-value cache and without.

Example: tools/bench/generate.py --config train_configs/mini.toml --repeats 5

Both read the same prompts in equally many forwards. Cached, a forward reads the new tokens alone: an image's at every step of the
sampler, or one token of text per row. Uncached it reads the whole rows, as in training. Images are guided, so two rows each; texts
do not stop early. Weights are random, which changes what is drawn but hardly the time.

A table, then one JSON line. A ratio is the median over interleaved rounds of the ratio within a round.
"""

import argparse
import json
import sys
from collections.abc import Callable
from statistics import median

import torch
from bench_timing import interleave, machine, ratio, summary

from symbiotic_titan import device
from symbiotic_titan.build import build_tokenizer
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.flow.solver import SolverOptions
from symbiotic_titan.inference.chunks import ChunkMaker
from symbiotic_titan.inference.images import (
    LatentGrid,
    generate_latents,
    noise_of_images,
)
from symbiotic_titan.inference.prompts import PromptMaker
from symbiotic_titan.inference.session import Session
from symbiotic_titan.inference.text import (
    Endings,
    TextSampling,
    TokenSampler,
    continue_prompts,
)
from symbiotic_titan.model.flavors import model_args
from symbiotic_titan.model.symbiotic import SymbioticModel

CAPTION = "A square picture with a black background: a red circle at the top left and a blue square at the bottom right."


def random_model(config: JobConfig) -> SymbioticModel:
    with torch.device("meta"):
        model = SymbioticModel(model_args(config))
    model.to_empty(device=device.device_type())
    model.init_weights()
    return model.eval()


def contenders(config: JobConfig, options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Name -> drawing or writing ``options.batch`` of them."""
    model, tokenizer = random_model(config), build_tokenizer(config)
    geometry, where = model.args.geometry, torch.device(device.device_type())
    maker = PromptMaker(tokenizer, geometry, config.data, config.training.seq_len)
    chunks = ChunkMaker(geometry, model.args.rotary_layout, tokenizer.special, where)
    side = int((config.data.vae_pixels // geometry.vae_token_pixels**2) ** 0.5)
    grid, indices = LatentGrid(side, side), range(options.batch)
    noise_BLZ = noise_of_images(0, indices, grid, geometry).to(where)
    sampling = SolverOptions(options.steps, "euler", 1.0, guidance=3.0)
    captions, questions = ([make(CAPTION)] * options.batch for make in (maker.image, maker.text))
    nothing = torch.empty(0, dtype=torch.int64, device=where)
    never = Endings(sequences=(), is_stopped=lambda ids: False)
    most = [options.tokens] * options.batch

    def image(cached: bool) -> Callable[[], object]:
        return lambda: generate_latents(
            Session(model, cached=cached),
            chunks,
            captions,
            maker.image([]),
            grid,
            noise_BLZ,
            sampling,
        )

    def text(cached: bool) -> Callable[[], object]:
        return lambda: continue_prompts(
            Session(model, cached=cached),
            chunks,
            questions,
            most,
            TokenSampler(TextSampling(options.tokens), 0, indices, nothing),
            never,
        )

    return {
        f"{what}_{how}": make(how == "cached")
        for what, make in (("image", image), ("text", text))
        for how in ("cached", "uncached")
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="train_configs/debug.toml", help="whose model")
    parser.add_argument("--batch", type=int, default=4, help="prompts at a time (default 4)")
    parser.add_argument("--steps", type=int, default=20, help="Euler steps (default 20)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a text (default 64)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count (default 5)")
    options, overrides = parser.parse_known_args(arguments)
    if options.repeats < 2:
        parser.error(f"--repeats must be at least 2 to have a spread, got {options.repeats}")
    if min(options.batch, options.steps, options.tokens) < 1:
        parser.error("--batch, --steps and --tokens must be at least 1")
    try:
        config = load_job_config(["--job.config_file", options.config, *overrides])
        entries = contenders(config, options)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    times = interleave(entries, repeats=options.repeats, warmup=1)
    speeds = {
        "image": ("images_per_minute", 60 * options.batch),
        "text": ("tokens_per_second", options.tokens * options.batch),
    }
    results: dict[str, float] = {}
    for what, (unit, amount) in speeds.items():
        for how in ("cached", "uncached"):
            speed = amount / median(times[f"{what}_{how}"])
            results[f"{unit}_{how}"] = round(speed, 1)
            print(f"  {what:6s} {how:9s} {speed:9.1f} {unit}")
        faster = ratio(times, f"{what}_uncached", f"{what}_cached")
        results[f"{what}_cached_over_uncached"] = round(faster, 2)
        print(f"  {what:6s} cached over uncached {faster:.2f}")
    settings = {key: getattr(options, key) for key in ("config", "batch", "steps", "tokens")}
    print(
        json.dumps(
            {
                **machine(),
                **settings,
                **results,
                "times": {name: summary(seconds) for name, seconds in times.items()},
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
