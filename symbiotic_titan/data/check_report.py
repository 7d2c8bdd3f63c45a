"""What a check found: tables for people, ``report.json`` for programs, and the list of bad samples that training can skip by."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from symbiotic_titan.config.files import replacing, write_json
from symbiotic_titan.data.check import CRASH, CheckedSource
from symbiotic_titan.data.check_journal import Journal
from symbiotic_titan.data.formats.shard import REASONS
from symbiotic_titan.data.skip_list import BadEntry
from symbiotic_titan.data.statistics import Table

KIND = "report of symbiotic check-data"
REPORT, BAD_SAMPLES = "report.json", "bad_samples.jsonl"

# Bad samples of each reason that a report names; the list has all.
NUM_NAMED = 10


@dataclass(frozen=True)
class SourceReport:
    """What was found in a source.

    samples:     in its files; ``checked`` of them, or a share.
    passed_over: too long, where ``too_long = "skip"``; neither good nor bad.
    too_long:    share of the samples checked that are longer than fits, whatever becomes of them.
    tokens:      mean and maximum of the good samples.
    reasons:     reason -> number of bad samples; ``named``: the first of each.
    errors:      files, or "" for the source as a whole, that cannot be indexed, and why.
    """

    table: str
    name: str
    task: str
    files: int
    samples: int
    checked: int
    good: int
    bad: int
    passed_over: int
    truncated: int
    too_long: float
    mean_tokens: float
    max_tokens: int
    reasons: dict[str, int]
    named: dict[str, list[BadEntry]]
    errors: list[tuple[str, str]]

    @property
    def is_good(self) -> bool:
        return not self.bad and not self.errors


def bad_entries(checked: CheckedSource, journal: Journal) -> Iterator[BadEntry]:
    """The bad samples of a source, by file and number."""
    sizes = {shard.path: shard.num_bytes for shard in checked.shards}
    for path, num_bytes in sizes.items():
        for record in checked.records(journal, path):
            for sample, key, reason, message in record.bad:
                yield BadEntry(checked.source.name, path, num_bytes, sample, key, reason, message)


def report_on(checked: CheckedSource, journal: Journal) -> SourceReport:
    counts, longest = Counter[str](), 0
    for path in checked.versions:
        for record in checked.records(journal, path):
            for name in ("checked", "good", "passed_over", "truncated", "tokens"):
                counts[name] += getattr(record, name)
            longest = max(longest, record.max_tokens)
    reasons = Counter[str]()
    named: dict[str, list[BadEntry]] = defaultdict(list)
    for entry in bad_entries(checked, journal):
        reasons[entry.reason] += 1
        if reasons[entry.reason] <= NUM_NAMED:
            named[entry.reason].append(entry)
    order = [reason for reason in (*REASONS, CRASH) if reason in reasons]
    too_long = reasons["too_long"] + counts["passed_over"] + counts["truncated"]
    return SourceReport(
        table=checked.table,
        name=checked.source.name,
        task=checked.source.task,
        files=len(checked.versions),
        samples=sum(shard.num_samples for shard in checked.shards),
        checked=counts["checked"],
        good=counts["good"],
        bad=reasons.total(),
        passed_over=counts["passed_over"],
        truncated=counts["truncated"],
        too_long=too_long / max(1, counts["checked"]),
        mean_tokens=counts["tokens"] / max(1, counts["good"]),
        max_tokens=longest,
        reasons={reason: reasons[reason] for reason in order},
        named={reason: named[reason] for reason in order},
        errors=checked.errors,
    )


def write_report(folder: Path, reports: list[SourceReport], share: float) -> None:
    """``report.json``. Without times, so that the same data give the same file."""
    rows = [asdict(report) for report in reports]
    write_json(folder / REPORT, KIND, {"share": share, "sources": rows})


def write_bad_samples(folder: Path, checked: list[CheckedSource], journal: Journal) -> int:
    """The list that ``skip_list`` of a source takes; returns the number of its lines."""
    count = 0
    with (
        replacing(folder / BAD_SAMPLES) as unfinished,
        unfinished.open("w", encoding="utf-8", errors="replace") as out,
    ):
        for source in checked:
            for entry in bad_entries(source, journal):
                out.write(entry.line())
                count += 1
    return count


def tables_of(reports: list[SourceReport]) -> list[Table]:
    """One line per source; then the bad samples by reason."""
    heads = ("source", "task", "files", "samples", "checked", "good", "bad", "too long")
    lines = [
        (
            report.name if report.table == "[[data.sources]]" else f"{report.name} (validation)",
            report.task,
            *(f"{n:,d}" for n in (report.files, report.samples, report.checked)),
            *(f"{n:,d}" for n in (report.good, report.bad)),
            f"{report.too_long:.2%}",
            f"{report.mean_tokens:,.1f}",
            f"{report.max_tokens:,d}",
        )
        for report in reports
    ]
    tables = [Table("Sources", (*heads, "mean tokens", "most"), lines)]
    by_reason: list[tuple[str, ...]] = [
        (report.name, reason, f"{count:,d}", f"{count / report.checked:.2%}")
        for report in reports
        for reason, count in report.reasons.items()
    ]
    if by_reason:
        tables.append(Table("Bad samples", ("source", "reason", "samples", "share"), by_reason))
    return tables


def lines_of(reports: list[SourceReport]) -> list[str]:
    """The tables, the first bad samples of each reason and the files that cannot be read, as lines of text."""
    lines = [line for table in tables_of(reports) for line in table.text()]
    for report in reports:
        for reason, entries in report.named.items():
            rest = report.reasons[reason] - len(entries)
            lines.append(
                f"{report.name}, {reason}:" + (f" the first {NUM_NAMED} of them" if rest else "")
            )
            lines += [f"  {e.file}: sample {e.key!r}: {e.message}" for e in entries]
    lines += [f"error: {message}" for report in reports for _, message in report.errors]
    return lines
