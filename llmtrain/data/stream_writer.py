"""One split of a prepared source: its MDS folder, its counts and its unigram statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from llmtrain.data.mds_writer import CHUNK_TOKENS, STREAM, ShardWriter, token_dtype, write_file
from llmtrain.data.tokenizer import Tokenizer


class StreamWriter:
    """Writes a stream of documents and counts what goes in.

    documents: number of them; bytes: of their UTF-8 text; histogram: [vocab] int64 token counts,
    eos included. ``state`` and ``restore`` carry all of it over an interruption.
    """

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, shard_bytes: int, compression: str | None
    ) -> None:
        self.folder = folder
        self.eos_id = tokenizer.eos_id
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.shards = ShardWriter(folder, self.dtype, shard_bytes, compression)
        self.documents = 0
        self.bytes = 0
        self.histogram = np.zeros(tokenizer.vocab_size, np.int64)

    @property
    def tokens(self) -> int:
        """Tokens of the stream so far, without the padding at its end."""
        return int(self.histogram.sum())

    def add(self, documents: int, size: int, tokens: NDArray[Any]) -> None:
        """Append ``tokens`` of so many whole documents with ``size`` bytes of text."""
        self.documents += documents
        self.bytes += size
        self.histogram += np.bincount(tokens, minlength=len(self.histogram))
        self.shards.append(tokens)

    def state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """(JSON, arrays) from which ``restore`` continues."""
        plain = {
            "documents": self.documents,
            "bytes": self.bytes,
            "shards": self.shards.shards,
            "digest": self.shards.digest.hex(),
        }
        return plain, {"open": self.shards.open_tokens, "histogram": self.histogram}

    def restore(self, plain: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        """Continue from what ``state`` returned, in the same folder."""
        self.documents, self.bytes = plain["documents"], plain["bytes"]
        self.histogram = arrays["histogram"].astype(np.int64)
        self.shards.resume(plain["shards"], bytes.fromhex(plain["digest"]), arrays["open"])

    def finish(self) -> dict[str, Any]:
        """Write the end of the stream, its index and ``stream.json``; the manifest's entry."""
        self.shards.finish(self.eos_id)
        tokens = self.tokens
        fingerprint = xxhash.xxh64(self.shards.digest + str(tokens).encode()).hexdigest()
        counts = {"documents": self.documents, "bytes": self.bytes, "fingerprint": fingerprint}
        layout = {"dtype": self.dtype, "eos_id": self.eos_id, "chunk_tokens": CHUNK_TOKENS}
        stream = {"version": 1, "num_tokens": tokens, **layout, **counts}
        write_file(self.folder / STREAM, (json.dumps(stream, indent=1) + "\n").encode())
        return {"tokens": tokens, **counts, "unigram_entropy_nats": entropy(self.histogram)}


def entropy(histogram: NDArray[np.int64]) -> float:
    """Entropy in nats of the distribution given by counts; 0 for no counts."""
    seen = histogram[histogram > 0].astype(np.float64)
    if not len(seen):
        return 0.0
    total = seen.sum()
    return float(np.log(total) - (seen * np.log(seen)).sum() / total)


def unigram_loss(counts: NDArray[np.int64], model: NDArray[np.int64]) -> float:
    """Nats per token of text with ``counts`` under the unigram distribution of ``model``.

    The model's counts are raised by one (Laplace), so tokens it never saw have a finite loss.
    """
    total = int(counts.sum())
    if not total:
        return 0.0
    logs = np.log((model + 1.0) / (model.sum() + len(model)))
    return float(-(counts * logs).sum() / total)
