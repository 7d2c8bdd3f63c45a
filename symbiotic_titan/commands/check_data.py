"""Reads, decodes and tokenises every sample of a config's sources, as training would, and lists what is bad.

Examples: symbiotic check-data train_configs/debug.toml
          symbiotic check-data train_configs/debug.toml --share 0.01 --workers 8 --out outputs/check
          symbiotic check-data --suggest mine/shards

All [[data.sources]] and [[validation.sources]] of a positive weight are checked, without caches of latents and without dropping
captions. It prints samples, tokens and bad samples by reason, and writes into --out:

    bad_samples.jsonl   every bad sample; with skip_list = "FOLDER/bad_samples.jsonl" a source is trained without them
    report.json         the tables, and the first bad samples of each reason
    progress.jsonl      what was checked: an interrupted check goes on, a later one checks what has changed

--suggest prints a row of [[data.sources]] for a file, folder or pattern: format, task and keys by what is in it, tried on its first
samples, one of them laid out.

Options --section.key value are applied as in training. Files that samples name by path (images of a JSONL file) are not looked at
for changes: remove the folder to check them again. Exit status: 0: nothing is bad; 1: something is; 2: a mistake in the config.
"""

import argparse
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

from symbiotic_titan.build import build_tokenizer
from symbiotic_titan.config.data import Data
from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.data.check import (
    CheckedSource,
    Share,
    check_spans,
    missing_spans,
    open_source,
)
from symbiotic_titan.data.check_journal import Journal
from symbiotic_titan.data.check_report import (
    BAD_SAMPLES,
    REPORT,
    SourceReport,
    lines_of,
    report_on,
    write_bad_samples,
    write_report,
)
from symbiotic_titan.data.latents import TargetImages
from symbiotic_titan.data.pipeline import checked_rows
from symbiotic_titan.data.samples import DocumentMaker
from symbiotic_titan.data.suggest import suggest
from symbiotic_titan.inference.held_out import TABLES, held_out_data
from symbiotic_titan.model.flavors import model_args
from symbiotic_titan.process import ProgressLine, exit_status

BAD = 1


class Progress:
    """Samples done, per second and bad, and the time left."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.bad = total, 0, 0
        self._start, self._line = time.monotonic(), ProgressLine()

    def __call__(self, count: int, bad: int) -> None:
        self.done += count
        self.bad += bad
        passed = max(time.monotonic() - self._start, 1e-9)
        line = (
            f"{self.done:,}/{self.total:,} samples, {self.done / passed:,.0f}/s, {self.bad:,} bad, "
            f"{self._line.left(self.done, self.total)}"
        )
        self._line.show(line, is_last=self.done >= self.total)


def checked_sources(config: JobConfig, share: Share) -> list[CheckedSource]:
    """All sources that training and validation read, indexed.

    Raises:
        ValueError: a setting with which no run could start.
    """
    tokenizer, args = build_tokenizer(config), model_args(config)
    geometry, seq_len = args.geometry, config.training.seq_len
    latents = replace(config.latents, cache="")
    tables: dict[str, Data] = {TABLES["train"]: config.data}
    if config.validation.sources:
        tables[TABLES["validation"]] = held_out_data(config)
    found = []
    for table, data in tables.items():
        data = replace(data, condition_dropout=0.0)
        rows = checked_rows(data, latents, geometry, tokenizer, seq_len, table)
        images = TargetImages(data, latents, geometry, [source for _, source in rows])
        maker = DocumentMaker(data, geometry, images, tokenizer, seq_len)
        settings = f"{tokenizer.fingerprint} {geometry} {seq_len} {share}"
        found += [open_source(table, n, source, data, maker, settings) for n, source in rows]
    return found


def check(config: JobConfig, out: Path, share: Share, num_workers: int) -> list[SourceReport]:
    """Check what ``out`` has no result of yet, and write the report.

    Raises:
        ValueError: a user's mistake.
        OSError: ``out`` cannot be written.
    """
    checked = checked_sources(config, share)
    journal = Journal(out / "progress.jsonl")
    try:
        spans = list(missing_spans(checked, journal, share))
        total = sum(share.total(source) for source in checked)
        known = sum(report_on(source, journal).checked for source in checked)
        if known:
            print(f"{out}: {known:,} of {total:,} samples have been checked before")
        if spans:
            progress = Progress(total - known)
            check_spans(checked, spans, journal, share, num_workers, progress)
        reports = [report_on(source, journal) for source in checked]
        write_report(out, reports, share.share)
        count = write_bad_samples(out, checked, journal)
    finally:
        journal.close()
    print("\n".join(lines_of(reports)))
    print(f"{out / REPORT}: {len(reports)} sources")
    if count:
        print(
            f'{out / BAD_SAMPLES}: {count} samples; skip_list = "{out / BAD_SAMPLES}" in a source trains without them'
        )
    return reports


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", nargs="?", help="TOML file of a training config")
    parser.add_argument(
        "--suggest", metavar="FILE", help="propose a row of [[data.sources]] for it"
    )
    parser.add_argument(
        "--out", type=Path, help="folder to write (default: check, in job.dump_folder)"
    )
    parser.add_argument(
        "--share",
        type=float,
        default=1.0,
        help="part of the samples, chosen by data.seed (default 1)",
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument(
        "--workers", type=int, default=cores, help="processes (default: one for each core)"
    )
    options, overrides = parser.parse_known_args(arguments)
    reports: list[SourceReport] = []

    def run() -> None:
        if (options.config is None) == (options.suggest is None):
            raise ValueError("name either a CONFIG to check or --suggest FILE")
        if options.suggest is not None:
            print(suggest(options.suggest).toml(), end="")
            return
        if not 0.0 < options.share <= 1.0:
            raise ValueError(f"--share must lie above 0 and be at most 1, got {options.share}")
        if options.workers < 1:
            raise ValueError(f"--workers must be at least 1, got {options.workers}")
        config = load_job_config(["--job.config_file", options.config, *overrides])
        out = options.out or Path(config.job.dump_folder) / "check"
        share = Share(options.share, config.data.seed)
        reports.extend(check(config, out, share, options.workers))

    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        status = exit_status(
            run, interrupted="interrupted; what was checked is kept, and the same command goes on"
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    return status or (0 if all(report.is_good for report in reports) else BAD)
