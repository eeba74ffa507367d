"""Raw text: where documents come from before they are tokens.

``open_text_source`` makes the source that a config section describes; ``documents`` iterates its
good documents and counts the bad records.
"""

from __future__ import annotations

from collections.abc import Callable

from llmtrain.config.schema import TextSourceConfig
from llmtrain.data.sources.base import Bad, BadTally, Document, Dropped, TextSource, documents

__all__ = ["Bad", "BadTally", "Document", "Dropped", "TextSource", "documents", "open_text_source"]


def open_text_source(name: str, cfg: TextSourceConfig) -> TextSource:
    """The source ``cfg`` describes. Raises DataError where its files cannot be found."""
    if cfg.kind == "builtin":
        from llmtrain.data.sources.builtin import BuiltinSource

        return BuiltinSource(name, cfg)
    if cfg.kind == "hf":
        from llmtrain.data.sources.hub import HuggingFaceSource

        return HuggingFaceSource(name, cfg)
    from llmtrain.data.sources.records import JsonLines, ParquetFiles, TextFiles

    kinds: dict[str, Callable[[str, TextSourceConfig], TextSource]]
    kinds = {"text": TextFiles, "jsonl": JsonLines, "parquet": ParquetFiles}
    return kinds[cfg.kind](name, cfg)
