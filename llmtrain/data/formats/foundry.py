"""LLM Foundry's concatenated MDS: samples of one length, documents cut where it falls.

Older converters wrote the column ``tokens`` as plain bytes (int64 unless the source's dtype says
otherwise), those of 2026 as ``ndarray:int32``. Sample boundaries are no document boundaries;
documents come from the eos id.
"""

from __future__ import annotations

from pathlib import Path

from llmtrain.config.schema import SourceConfig
from llmtrain.data.formats.flat import FlatSource
from llmtrain.data.formats.mds import open_mds


def open_foundry(
    name: str, cfg: SourceConfig, *, eos_id: int | None, cache_dir: Path | None = None
) -> FlatSource:
    """The folder as a source; samples are joined even where their lengths differ."""
    return open_mds(name, cfg, eos_id=eos_id, cache_dir=cache_dir, concatenated=True)
