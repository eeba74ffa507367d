"""What a source of raw text is: parts, records, and the count of bad records."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llmtrain.config.schema import TextSourceConfig
from llmtrain.errors import DataError

EXAMPLES_SHOWN = 5
RECORDS_BEFORE_STOP = 10_000


class Document(NamedTuple):
    """One good record. ``line`` counts from 1 (the row in parquet and datasets).

    split_key: documents with the same key fall on the same side of the held-out split; None: the
    text itself is the key. messages: the turns, if the record is a conversation. spans: once it
    is written as text, (end, code) of the stretches of characters of one loss weight, in order.
    """

    text: str
    path: str
    line: int
    split_key: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    spans: tuple[tuple[int, int], ...] | None = None


class Bad(NamedTuple):
    """One record that cannot be used. ``kind`` is a short stable phrase such as ``not UTF-8``."""

    kind: str
    path: str
    line: int
    detail: str = ""


class Dropped(NamedTuple):
    """One record that a filter keeps out; nothing is wrong with it. ``why``: the filter's field."""

    why: str


class TextSource(ABC):
    """A named source of documents, read part by part in a fixed order.

    bytes_read: bytes of input consumed by ``records`` so far, for progress. total_bytes: bytes of
    all the input, None where that cannot be known beforehand.
    """

    def __init__(self, name: str, cfg: TextSourceConfig) -> None:
        self.name = name
        self.cfg = cfg
        self.bytes_read = 0
        self.total_bytes: int | None = None

    @abstractmethod
    def parts(self) -> Sequence[str]:
        """Names of the pieces (files) in reading order."""

    @abstractmethod
    def records(self, part: str) -> Iterator[Document | Bad | Dropped]:
        """The records of one part; raises DataError where the part as a whole is unreadable."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the content depends on besides the configuration, as JSON."""


@dataclass
class BadTally:
    """Counts records and bad records of one source and stops past the allowed share.

    dropped: records that filters kept out, by filter. ``limit`` is ``prepare.max_bad_fraction``;
    ``report`` prints the first examples.
    """

    source: str
    limit: float
    report: Callable[[str], None]
    records: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def bad(self) -> int:
        """Number of bad records."""
        return sum(self.kinds.values())

    def add(self, bad: Bad) -> None:
        """Count one bad record; print it while few; DataError once too many of many are bad."""
        self.kinds[bad.kind] = self.kinds.get(bad.kind, 0) + 1
        if self.bad <= EXAMPLES_SHOWN:
            detail = f": {bad.detail}" if bad.detail else ""
            self.report(f"{self.source}: {bad.path}:{bad.line}: {bad.kind}{detail}")
        elif self.bad == EXAMPLES_SHOWN + 1:
            self.report(f"{self.source}: further bad records are counted, not printed")
        if self.records >= RECORDS_BEFORE_STOP:
            self.check(bad)

    def drop(self, record: Dropped) -> None:
        """Count one record that a filter keeps out."""
        self.dropped[record.why] = self.dropped.get(record.why, 0) + 1

    def check(self, last: Bad | None = None) -> None:
        """Raise DataError if more than the allowed share of the records seen so far is bad."""
        if self.bad <= self.limit * self.records:
            return
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(self.kinds.items()))
        where = f", the last at {last.path}:{last.line}" if last else ""
        raise DataError(
            f"source {self.source!r}: {self.bad} of {self.records} records are bad "
            f"({kinds}){where}; repair them or raise prepare.max_bad_fraction (now {self.limit:g})"
        )

    def counts(self) -> dict[str, int]:
        """For the manifest: records read and the bad ones by kind."""
        return {"records": self.records, **dict(sorted(self.kinds.items()))}


def documents(
    source: TextSource, tally: BadTally, write: Callable[[Document], Document | Bad] | None = None
) -> Iterator[Document]:
    """The good documents of ``source`` up to its ``max_documents`` and ``max_bytes``, in order.

    write: what becomes of each good one, such as the text of a conversation.
    """
    cfg = source.cfg
    seen = size = 0
    last: Bad | None = None
    for part in source.parts():
        for record in source.records(part):
            tally.records += 1
            good = check_text(record)
            if write is not None and isinstance(good, Document):
                good = write(good)
            if isinstance(good, Bad):
                last = good
                tally.add(good)
                continue
            if isinstance(good, Dropped):
                tally.drop(good)
                continue
            yield good
            seen += 1
            if cfg.max_bytes is not None:
                size += len(good.text.encode())
            if seen == cfg.max_documents or (cfg.max_bytes is not None and size >= cfg.max_bytes):
                tally.check(last)
                return
    tally.check(last)


def check_text(record: Document | Bad | Dropped) -> Document | Bad | Dropped:
    """Bad instead of a document that is blank or holds characters no encoding can write."""
    if isinstance(record, Bad | Dropped):
        return record
    text = record.text
    if not text or text.isspace():
        return Bad("empty", record.path, record.line)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return Bad("not UTF-8", record.path, record.line, f"surrogate at {error.start}")
    return record


def decode(raw: bytes, path: str, line: int) -> str | Bad:
    """Strict UTF-8 without a byte order mark; ``line`` is where ``raw`` begins."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        found = line + raw.count(b"\n", 0, error.start)
        return Bad("not UTF-8", path, found, f"byte 0x{raw[error.start]:02x} at {error.start}")
    return text.removeprefix("\ufeff")
