"""Readers of tokenized data, one file per format, all behind ``open_source``.

Every format becomes a ``FlatSource``: memory maps of the files' parts, one after the other as
one stream of tokens. MDS (``mds*.py``, local, compressed or remote through ``mds_store.py``,
``cache.py`` and ``remote.py``), LLM Foundry's MDS, Megatron's .bin/.idx, flat .npy and raw
files, datatrove's .ds.
"""

from llmtrain.data.formats.detect import detect_format, open_source
from llmtrain.data.formats.flat import FlatSource

__all__ = ["FlatSource", "detect_format", "open_source"]
