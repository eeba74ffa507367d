"""Hugging Face datasets, by name or local path, streamed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from llmtrain.config.schema import TextSourceConfig
from llmtrain.data.sources.base import Bad, Document, Dropped, TextSource
from llmtrain.data.sources.conversation import chat_fields
from llmtrain.data.sources.files import find_files, listing
from llmtrain.data.sources.filters import columns as filter_columns
from llmtrain.data.sources.filters import judge
from llmtrain.data.sources.records import document_of
from llmtrain.errors import DataError, EnvironmentFault

_SAVED = ("state.json", "dataset_dict.json")  # what Dataset.save_to_disk leaves in a folder

_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


class HuggingFaceSource(TextSource):
    """A dataset of the hub, or of a local folder or file, one document per row.

    Nothing is downloaded beforehand: rows are streamed in the dataset's own order. A folder made
    by ``save_to_disk`` is recognised.
    """

    def __init__(self, name: str, cfg: TextSourceConfig) -> None:
        super().__init__(name, cfg)
        if not cfg.hf_name:
            raise DataError(f"source {name!r} of kind hf needs hf_name: a dataset or a local path")
        self._path = os.path.expanduser(cfg.hf_name)
        if cfg.hf_name.startswith(("/", ".", "~")) and not os.path.exists(self._path):
            raise DataError(f"source {name!r}: hf_name {cfg.hf_name!r} does not exist; correct it")

    def parts(self) -> Sequence[str]:
        return [self._path]

    def identity(self) -> dict[str, Any]:
        if os.path.exists(self._path):
            return dict(listing(find_files(self.name, [self._path], ())))
        return {}

    def records(self, part: str) -> Iterator[Document | Bad | Dropped]:
        rows = self._open()
        columns = getattr(rows, "column_names", None)
        chat = self.cfg.chat
        fields = [self.cfg.field] if chat is None else chat_fields(chat)
        if columns:
            self._check_fields(fields, list(columns), part)
            read = filter_columns(self.cfg.keep, list(columns))
            rows = rows.select_columns(list(dict.fromkeys([*fields, *read])))
        number = 0
        iterator = iter(rows)
        while True:
            try:
                row = next(iterator)
            except StopIteration:
                return
            except Exception as error:
                raise self._fault(error, f"after row {number}") from error
            number += 1
            verdict = judge(row, self.cfg.keep, part, number)
            yield verdict or document_of(row, self.cfg, part, number)

    def _check_fields(self, fields: list[str], have: list[str], part: str) -> None:
        """DataError where the dataset has no column of a wanted name."""
        remedy = "set its field" if self.cfg.chat is None else "set the fields of its chat"
        for field in fields:
            if field not in have:
                raise DataError(
                    f"source {self.name!r}: {part} has no column {field!r} but {', '.join(have)};"
                    f" {remedy}"
                )

    def _open(self) -> Any:
        """The rows of the wanted split, or a DataError that says what is in the way."""
        try:
            import datasets
        except ImportError as error:
            raise EnvironmentFault(
                f"source {self.name!r} of kind hf needs the package datasets:"
                " pip install 'llmtrain[hf]'"
            ) from error
        cfg = self.cfg
        try:
            if any(os.path.exists(os.path.join(self._path, mark)) for mark in _SAVED):
                saved = datasets.load_from_disk(self._path)
                return saved[cfg.hf_split] if isinstance(saved, dict) else saved
            reader = _READERS.get(os.path.splitext(self._path)[1])
            if reader and os.path.isfile(self._path):
                files = {cfg.hf_split: self._path}
                return datasets.load_dataset(
                    reader, data_files=files, split=cfg.hf_split, streaming=True
                )
            return datasets.load_dataset(
                self._path, cfg.hf_config, split=cfg.hf_split, streaming=True
            )
        except Exception as error:  # the library raises its own, requests' and plain ValueErrors
            raise self._fault(error, "while opening it") from error

    def _fault(self, error: Exception, when: str) -> DataError:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) < 300 else reason[:300] + "..."
        if _is_network(error):
            remedy = "the hub cannot be reached; check the network or give a local path in hf_name"
        else:
            remedy = "check its hf_name, hf_config and hf_split"
        return DataError(
            f"source {self.name!r}: dataset {self._path} failed {when}"
            f" ({type(error).__name__}: {reason}): {remedy}"
        )


def _is_network(error: BaseException | None) -> bool:
    """Whether a connection is at the bottom of ``error`` (by name: several libraries raise)."""
    words = ("Connection", "Timeout", "Connect", "Offline", "LocalEntryNotFound", "SSL")
    seen = 0
    while error is not None and seen < 10:
        if any(word in type(error).__name__ for word in words):
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False
