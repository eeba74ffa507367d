"""Sources in files: plain text, JSON lines and parquet."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from llmtrain.config.schema import TextSourceConfig
from llmtrain.data.sources.base import Bad, Document, Dropped, TextSource, decode
from llmtrain.data.sources.conversation import chat_fields, from_conversation
from llmtrain.data.sources.files import PACKED, find_files, listing, open_bytes
from llmtrain.data.sources.filters import columns, judge
from llmtrain.errors import DataError

PARQUET_ROWS = 1024


class FileSource(TextSource):
    """A source that is a list of files."""

    endings: tuple[str, ...] = ()

    def __init__(self, name: str, cfg: TextSourceConfig) -> None:
        super().__init__(name, cfg)
        self._files = find_files(name, cfg.paths, self.endings)
        self._listing = listing(self._files)
        total = self._listing["bytes"]
        self.total_bytes = total if isinstance(total, int) else None

    def parts(self) -> Sequence[str]:
        return self._files

    def identity(self) -> dict[str, Any]:
        return dict(self._listing)

    def _count(self, size: int) -> None:
        self.bytes_read += size


class TextFiles(FileSource):
    """Each file is one document."""

    def records(self, part: str) -> Iterator[Document | Bad]:
        with open_bytes(part, self._count) as file:
            text = decode(file.read(), part, 1)
        yield text if isinstance(text, Bad) else Document(text, part, 1)


class JsonLines(FileSource):
    """Each line is one JSON object whose ``field`` is the text. Blank lines are passed over."""

    endings = (".jsonl", ".json", ".ndjson")

    def records(self, part: str) -> Iterator[Document | Bad | Dropped]:
        with open_bytes(part, self._count) as file:
            for number, raw in enumerate(file, 1):
                if not raw.isspace():
                    yield self._parse(raw, part, number)

    def _parse(self, raw: bytes, path: str, number: int) -> Document | Bad | Dropped:
        line = decode(raw, path, number)
        if isinstance(line, Bad):
            return line
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            return Bad("not JSON", path, number, str(error))
        if not isinstance(record, dict):
            return Bad("not a JSON object", path, number, f"a {type(record).__name__}")
        verdict = judge(record, self.cfg.keep, path, number)
        return verdict or document_of(record, self.cfg, path, number)


def document_of(
    record: dict[str, Any], cfg: TextSourceConfig, path: str, number: int
) -> Document | Bad:
    """The text or the conversation in ``record``, or what is wrong with it."""
    if cfg.chat is not None:
        return from_conversation(record, cfg.chat, path, number)
    return from_field(record, cfg.field, path, number)


def from_field(record: dict[str, Any], field: str, path: str, number: int) -> Document | Bad:
    """The text in ``record[field]`` as a document, or what is wrong with it."""
    text = record.get(field)
    if isinstance(text, str):
        return Document(text, path, number)
    if text is None:
        have = "null" if field in record else "has " + ", ".join(list(record)[:8])
        return Bad("missing field", path, number, f"{field!r}: {have}")
    return Bad("wrong type", path, number, f"{field!r} is a {type(text).__name__}, not text")


class ParquetFiles(FileSource):
    """Each row is one document, the text in the column ``field``; read one row group at a time."""

    endings = (".parquet",)

    def records(self, part: str) -> Iterator[Document | Bad | Dropped]:
        import pyarrow

        with self._seekable(part) as plain:
            try:
                yield from self._rows(plain, part)
            except pyarrow.ArrowException as error:
                reason = " ".join(str(error).split())
                raise DataError(f"{part} is not a readable parquet file: {reason}") from error

    @contextmanager
    def _seekable(self, path: str) -> Iterator[IO[bytes]]:
        """Parquet is read from its end: compressed files are unpacked into a temporary one."""
        if path.endswith(PACKED):
            with open_bytes(path, self._count) as stream, tempfile.TemporaryFile() as plain:
                shutil.copyfileobj(stream, plain)
                plain.seek(0)
                yield plain
            return
        try:
            with open(path, "rb") as plain:
                yield plain
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error

    def _rows(self, plain: IO[bytes], path: str) -> Iterator[Document | Bad | Dropped]:
        import pyarrow
        import pyarrow.parquet

        file = pyarrow.parquet.ParquetFile(plain)
        if self.cfg.chat is not None:
            yield from self._conversations(file, path)
            return
        field, row = self.cfg.field, 0
        if field not in file.schema_arrow.names:
            have = ", ".join(file.schema_arrow.names)
            raise DataError(
                f"source {self.name!r}: {path} has no column {field!r} but {have}; set its field"
            )
        kind = file.schema_arrow.field(field).type
        if not _is_text(kind):
            raise DataError(f"source {self.name!r}: column {field!r} of {path} is {kind}, not text")
        self._check_columns(file.schema_arrow.names, path)
        before, size = self.bytes_read, os.path.getsize(path)
        rows = max(file.metadata.num_rows, 1)
        read = columns(self.cfg.keep, list(file.schema_arrow.names))
        wanted = list(dict.fromkeys([field, *read]))
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=wanted):
            column = batch.column(field)
            if pyarrow.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            others = batch.select(read).to_pylist() if read else [{}] * len(column)
            cells = column.cast(pyarrow.large_binary()).to_pylist()
            for raw, record in zip(cells, others, strict=True):
                row += 1
                verdict = judge(record, self.cfg.keep, path, row)
                yield verdict or _from_cell(raw, path, row, field)
            if not path.endswith(PACKED):
                self.bytes_read = before + size * row // rows

    def _conversations(self, file: Any, path: str) -> Iterator[Document | Bad | Dropped]:
        """Rows whose columns hold prompt and response, or messages."""
        names, chat, row = list(file.schema_arrow.names), self.cfg.chat, 0
        assert chat is not None
        for field in chat_fields(chat):
            if field not in names:
                raise DataError(
                    f"source {self.name!r}: {path} has no column {field!r} but {', '.join(names)}; "
                    "set the fields of its chat"
                )
        self._check_columns(names, path)
        before, size = self.bytes_read, os.path.getsize(path)
        wanted = list(dict.fromkeys([*chat_fields(chat), *columns(self.cfg.keep, names)]))
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=wanted):
            for index in range(batch.num_rows):
                row += 1
                try:
                    (record,) = batch.slice(index, 1).to_pylist()
                except UnicodeDecodeError as error:
                    yield Bad("not UTF-8", path, row, str(error))
                    continue
                verdict = judge(record, self.cfg.keep, path, row)
                yield verdict or document_of(record, self.cfg, path, row)
            if not path.endswith(PACKED):
                self.bytes_read = before + size * row // max(file.metadata.num_rows, 1)

    def _check_columns(self, have: list[str], path: str) -> None:
        """A filter that must have its column and has none would drop everything."""
        for name, rule in self.cfg.keep.items():
            if rule.missing == "drop" and not columns({name: rule}, have):
                raise DataError(
                    f"source {self.name!r}: {path} has no column {name!r} for its filter but "
                    f"{', '.join(have)}; correct its keep"
                )


def _from_cell(raw: bytes | None, path: str, row: int, field: str) -> Document | Bad:
    if raw is None:
        return Bad("missing field", path, row, f"{field!r}: null")
    text = decode(raw, path, 0)
    return text._replace(line=row) if isinstance(text, Bad) else Document(text, path, row)


def _is_text(kind: Any) -> bool:
    import pyarrow

    types = pyarrow.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    binary = types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
    return bool(
        binary
        or types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
        or types.is_null(kind)
    )
