#!/usr/bin/env python3
"""How full rows get and what choosing their documents costs: this project's two packings against simpler ones.

Example: tools/bench/packing.py --config train_configs/debug.toml --samples 4000

Contenders, all over the same look-ahead buffer; its oldest document always goes first:
  longest_first, fullest   data.packing of this project
  first_fit                by age, each document that still fits
  next_fit                 by age, up to the first document that does not fit
  none                     one document a row

Cases:
  demo        the mixture of --config, decoded and tokenised beforehand
  lognormal   rows of 2048: half texts of log-normal length (median 300, sigma 1; split at a row's length), half captions of
              log-normal length (median 40, sigma 0.7) with an image of 144 to 256 tokens; seeded

Fill is the share of positions that are text, ViT or VAE tokens, over all rows until the stream ends. Times are of choosing
alone, medians over interleaved rounds; build_ms is the time that writing the tensors of a row of ``fullest`` takes. The last line
is JSON; ``fill`` there is that of ``fullest``, to be at least 0.97.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from random import Random
from statistics import median
from typing import Any

import torch
from bench_timing import interleave, machine, summary

from symbiotic_titan.build import (
    build_dataloader,
    build_tokenizer,
)
from symbiotic_titan.config.data import PACKINGS
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.data.documents import (
    Document,
    TextSegment,
    VaeSegment,
)
from symbiotic_titan.data.mixture import Mixture
from symbiotic_titan.data.packing import (
    Packing,
    SequenceSize,
)
from symbiotic_titan.data.sequence_builder import SequenceBuilder
from symbiotic_titan.data.stream_state import PipelineSpec
from symbiotic_titan.data.streams import OpenSource, open_mixture
from symbiotic_titan.data.tokenizer import ByteTokenizer
from symbiotic_titan.sequence.geometry import ImageGeometry
from symbiotic_titan.sequence.tasks import task_number

BAR = 0.97
LONG_ROW = 2048
GEOMETRY = ImageGeometry(
    vit_patch=4, vit_merge=2, vit_channels=3, latent_channels=3, latent_stride=1, latent_patch=4
)
LM, T2I = task_number("lm"), task_number("t2i")


@dataclass(frozen=True)
class Case:
    """A stream of samples, each as its documents, and the rows they go into."""

    samples: list[list[Document]]
    size: SequenceSize
    lookahead: int
    builder: SequenceBuilder


def by_age(waiting: list[Document], size: SequenceSize, stop: bool) -> list[int]:
    """The oldest, then each one that fits; with ``stop`` none after the first that does not."""
    chosen, left = [0], size.minus(waiting[0])
    for i in range(1, len(waiting)):
        if left.fits(waiting[i]):
            chosen.append(i)
            left = left.minus(waiting[i])
        elif stop:
            break
    return chosen


CONTENDERS: dict[str, Packing] = {
    **{name: PACKINGS[name] for name in PACKINGS},
    "first_fit": partial(by_age, stop=False),
    "next_fit": partial(by_age, stop=True),
    "none": lambda waiting, size: [0],
}


def pack(choose: Packing, case: Case) -> list[list[Document]]:
    """Documents of each row, as a stream packs them, until the stream ends; what waits then is left out."""
    rows: list[list[Document]] = []
    waiting: list[Document] = []
    for documents in case.samples:
        while len(waiting) >= case.lookahead:
            chosen = choose(waiting, case.size)
            rows.append([waiting[i] for i in chosen])
            taken = set(chosen)
            waiting = [document for i, document in enumerate(waiting) if i not in taken]
        waiting += documents
    return rows


def fill(rows: list[list[Document]], size: SequenceSize) -> float:
    used = sum(document.num_tokens for row in rows for document in row)
    return used / (len(rows) * size.num_tokens)


def spec_of(config_file: str, overrides: list[str]) -> PipelineSpec:
    """What decides the rows of a training config on one rank."""
    config = load_job_config(["--job.config_file", config_file, *overrides])
    tokenizer = build_tokenizer(config)
    loader = build_dataloader(dp_world_size=1, dp_rank=0, tokenizer=tokenizer, job_config=config)
    return loader.spec


def mixed_indices(spec: PipelineSpec) -> Iterator[tuple[int, int]]:
    """(source, index in its endless sequence) of the samples of a mixture, by samples, with a single stream."""
    mixture = Mixture([source.weight for source in spec.sources], 1)
    counts = [0] * len(spec.sources)
    while True:
        source = mixture.next(0, counts)
        yield source, counts[source]
        counts[source] += 1


def demo_case(spec: PipelineSpec, num_samples: int) -> Case:
    """The first samples of stream 0, if there were no other streams."""
    sources = [OpenSource(spec, number) for number in range(len(spec.sources))]
    mixture, samples = open_mixture(spec).at(0, 0), []
    counts, tokens = [0] * len(sources), [0] * len(sources)
    given = tokens if spec.config.mixture_by == "tokens" else counts
    for _ in range(num_samples):
        source = mixture.next(0, given)
        samples.append(sources[source].documents(counts[source]))
        counts[source] += 1
        tokens[source] += sum(document.num_tokens for document in samples[-1])
    return Case(samples, spec.size, spec.config.lookahead, spec.builder)


def lognormal_case(num_samples: int, lookahead: int, seed: int) -> Case:
    """Documents of the lengths that the docstring of this file tells; token ids and latents are zeros."""
    random, width = Random(seed), GEOMETRY.vae_token_values

    def text() -> list[Document]:
        length = max(2, round(random.lognormvariate(math.log(300), 1.0)))
        starts = range(0, length, LONG_ROW)
        sizes = [min(LONG_ROW, length - start) for start in starts]
        return [Document(LM, (TextSegment([0] * size, trained=True),)) for size in sizes]

    def image() -> list[Document]:
        caption = max(2, min(LONG_ROW // 2, round(random.lognormvariate(math.log(40), 0.7))))
        rows, columns = random.randint(12, 16), random.randint(12, 16)
        latents = VaeSegment(torch.zeros(rows * columns, width), rows, columns)
        return [Document(T2I, (TextSegment([0] * caption), latents))]

    samples = [text() if random.random() < 0.5 else image() for _ in range(num_samples)]
    size = SequenceSize(LONG_ROW, 0, LONG_ROW)
    builder = SequenceBuilder(size, GEOMETRY, "shared", ByteTokenizer().special)
    return Case(samples, size, lookahead, builder)


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Fill and speed of every contender."""
    packed = {name: pack(choose, case) for name, choose in CONTENDERS.items()}
    runs = {name: partial(pack, choose, case) for name, choose in CONTENDERS.items()}
    times = interleave(runs, repeats=repeats)
    results: dict[str, Any] = {}
    for name, rows in packed.items():
        documents = sum(map(len, rows))
        results[name] = {
            "fill": round(fill(rows, case.size), 4),
            "rows": len(rows),
            "documents": documents,
            "documents_per_second": round(documents / median(times[name])),
            **summary(times[name]),
        }
    results["build_ms"] = round(build_milliseconds(case, packed["fullest"][:50]), 3)
    return results


def build_milliseconds(case: Case, rows: list[list[Document]]) -> float:
    """Median over ``rows`` of the time it takes to write the tensors of one."""
    times = []
    for documents in rows:
        start = time.perf_counter()
        case.builder.build(documents)
        times.append(time.perf_counter() - start)
    return 1e3 * median(times)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="train_configs/debug.toml", help="whose mixture")
    parser.add_argument("--samples", type=int, default=4000, help="samples of each case")
    parser.add_argument("--seed", type=int, default=0, help="of the log-normal lengths")
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count (default 7)")
    options, overrides = parser.parse_known_args(arguments)
    if options.repeats < 2:
        parser.error(f"--repeats must be at least 2 to have a spread, got {options.repeats}")
    try:
        spec = spec_of(options.config, overrides)
        cases = {
            "demo": demo_case(spec, options.samples),
            "lognormal": lognormal_case(options.samples, spec.config.lookahead, options.seed),
        }
        results = {name: measure(case, options.repeats) for name, case in cases.items()}
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, result in results.items():
        size = cases[name].size
        print(f"{name}: rows of {size.num_tokens}, {cases[name].lookahead} samples held")
        for contender in CONTENDERS:
            row = result[contender]
            print(
                f"  {contender:14s} fill {row['fill']:.4f}  {row['documents_per_second']:9,d} documents/s  "
                f"({row['quartile_1_ms']:.1f} to {row['quartile_3_ms']:.1f} ms for all)"
            )
        print(f"  writing a row takes {result['build_ms']} ms")
    fills = {name: result["fullest"]["fill"] for name, result in results.items()}
    met = min(fills.values()) >= BAR
    print(json.dumps({**machine(), "fill": fills, "bar": BAR, "met": met, "cases": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
