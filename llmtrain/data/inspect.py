"""``llmtrain data inspect``: what is in a prepared corpus or in any tokenized source."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.schema import SourceConfig
from llmtrain.data.compare import Comparison, compare
from llmtrain.data.corpus import SPLITS, read_manifest
from llmtrain.data.formats import FlatSource, open_source
from llmtrain.data.stream_writer import entropy
from llmtrain.data.tokenizer import FILE, Tokenizer, load_tokenizer
from llmtrain.data.words import Stream
from llmtrain.errors import DataError

SCAN_TOKENS = 1 << 24  # read for the statistics of a source without a manifest
SCAN_WINDOW = 1 << 19
SHOWN_TOKENS = 64


@dataclass(frozen=True)
class Inspection:
    """What to look at. source: path, format and dtype as in ``data.sources``.

    tokenizer: file or folder to decode with; None: the corpus's. samples: excerpts per stream.
    verify: read everything and compare with the recorded hashes. compare: documents with each other
    and with benchmarks.
    """

    source: SourceConfig
    tokenizer: str | None = None
    eos_id: int | None = None
    samples: int = 3
    verify: bool = False
    compare: Comparison | None = None


def inspect(what: Inspection) -> Iterator[str]:
    """Lines of the report. Raises DataError for what is missing or damaged."""
    manifest = read_manifest(what.source.path)
    if manifest is None:
        source = open_source("source", what.source, eos_id=what.eos_id)
        yield from _stream(what, source)
        if what.compare is not None:
            found = _tokenizer_near(what)
            stream = Stream("source", source, load_tokenizer(found) if found else None)
            yield from compare(what.compare, [stream], [False])
        return
    tokenizer = manifest["tokenizer"]
    yield (
        f"corpus {what.source.path}: tokenizer {tokenizer['kind']} ({tokenizer['sha256'][:12]}),"
        f" vocabulary {tokenizer['vocab_size']:,}, eos {tokenizer['eos_id']}"
    )
    for name, entry in manifest["sources"].items():
        for split in SPLITS:
            yield ""
            yield from _counted(f"{name}/{split}", entry[split], what, tokenizer)
        bad = {kind: count for kind, count in entry["bad"].items() if kind != "records"}
        if bad:
            yield f"  bad records: {', '.join(f'{n} {kind}' for kind, n in bad.items())}"
        if entry.get("long"):
            yield f"  dropped: {entry['long']:,} longer than a window"
        if dropped := entry.get("dropped"):
            yield f"  dropped by filters: {', '.join(f'{n} by {w}' for w, n in dropped.items())}"
    if what.compare is not None:
        yield from compare(what.compare, *_corpus_streams(what, manifest))


def _corpus_streams(what: Inspection, manifest: dict[str, Any]) -> tuple[list[Stream], list[bool]]:
    """Every split of a corpus, those to train on first; and which are held out."""
    tokenizer = load_tokenizer(what.tokenizer or what.source.path)
    streams, heldout = [], []
    for split in SPLITS:
        for name, entry in manifest["sources"].items():
            if entry[split]["tokens"]:
                cfg = SourceConfig(path=str(Path(what.source.path) / name / split))
                source = open_source(name, cfg, eos_id=manifest["tokenizer"]["eos_id"])
                streams.append(Stream(f"{name}/{split}", source, tokenizer))
                heldout.append(split == "heldout")
    return streams, heldout


def _counted(
    name: str, entry: dict[str, Any], what: Inspection, tokenizer: dict[str, Any]
) -> Iterator[str]:
    """A split of a corpus: its numbers are in the manifest."""
    tokens, size = entry["tokens"], entry["bytes"]
    yield f"{name}: {entry['documents']:,} documents, {tokens:,} tokens, {size:,} bytes of text"
    if not tokens:
        return
    parts = [f"unigram entropy {entry['unigram_entropy_nats']:.3f} nats/token"]
    if "unigram_loss_nats" in entry:
        parts.append(f"loss under the train unigram {entry['unigram_loss_nats']:.3f} nats/token")
    parts.append(f"{size / tokens:.2f} bytes/token")
    if "weights" in entry:
        yield from _weighted(entry)
    yield f"  {', '.join(parts)}, fingerprint {entry['fingerprint']}"
    cfg = SourceConfig(path=str(Path(what.source.path) / name))
    source = open_source(name, cfg, eos_id=tokenizer["eos_id"])
    yield from _checked(what, source)
    yield from _excerpts(what, source, load_tokenizer(what.tokenizer or what.source.path))


def _stream(what: Inspection, source: FlatSource) -> Iterator[str]:
    """Any other source: its numbers are measured, on a part of it if it is long."""
    found = _tokenizer_near(what)
    tokenizer = load_tokenizer(found) if found else None
    histogram, starts, seen = _scan(source)
    documents = int(starts * source.num_tokens / seen)
    about = "" if seen == source.num_tokens else "about "
    yield (
        f"{what.source.path}: {source.num_tokens:,} tokens, {about}{documents:,} documents,"
        f" fingerprint {source.fingerprint}"
    )
    part = "" if seen == source.num_tokens else f" over {seen:,} of the tokens"
    yield (
        f"  unigram entropy {entropy(histogram):.3f} nats/token{part},"
        f" {np.count_nonzero(histogram):,} different tokens, largest id {len(histogram) - 1:,}"
    )
    yield from _checked(what, source)
    if tokenizer is None:
        yield "  (give --tokenizer to see text)"
    yield from _excerpts(what, source, tokenizer)


def _tokenizer_near(what: Inspection) -> str | None:
    """The tokenizer asked for, or one in the source's folder or up to two above it."""
    if what.tokenizer:
        return what.tokenizer
    path = Path(what.source.path)
    return next((str(p) for p in (path, *path.parents[:2]) if (p / FILE).is_file()), None)


def _scan(source: FlatSource) -> tuple[NDArray[np.int64], int, int]:
    """(token counts, document starts, tokens seen) of evenly spaced windows of the stream."""
    total = source.num_tokens
    windows = -(-min(total, SCAN_TOKENS) // SCAN_WINDOW)
    histogram = np.zeros(0, np.int64)
    starts = seen = 0
    for number in range(windows):
        low = total * number // windows
        stop = min(low + SCAN_WINDOW, total * (number + 1) // windows)
        tokens = source.read(low, stop)
        if tokens.min(initial=0) < 0:
            raise DataError(
                f"source {source.name!r} holds negative tokens; set its dtype or format"
            )
        counts = np.bincount(tokens)
        if len(counts) > len(histogram):
            histogram = np.pad(histogram, (0, len(counts) - len(histogram)))
        histogram[: len(counts)] += counts
        starts += int(source.document_starts(low, stop, tokens).sum())
        seen += stop - low
    return histogram, starts, seen


def _checked(what: Inspection, source: FlatSource) -> Iterator[str]:
    if what.verify:
        yield f"  verified: {source.verify()} files agree with their hashes"


def _excerpts(what: Inspection, source: FlatSource, tokenizer: Tokenizer | None) -> Iterator[str]:
    """The beginnings of some documents, evenly spaced."""
    for number in range(what.samples):
        low = source.num_tokens * number // what.samples
        stop = min(low + (1 << 14), source.num_tokens)
        tokens = source.read(low, stop)
        starts = np.flatnonzero(source.document_starts(low, stop, tokens))
        first = int(starts[0]) if len(starts) else 0
        end = int(starts[1]) if len(starts) > 1 else len(tokens)
        weights = source.loss_weights(low, stop)
        if weights is not None:
            yield from _conversation(low, starts, tokens, weights, tokenizer)
            continue
        shown = tokens[first : min(end, first + SHOWN_TOKENS)]
        text = repr(tokenizer.decode(shown)) if tokenizer else " ".join(map(str, shown))
        yield f"  token {low + first:,}: {text}"


def _weighted(entry: dict[str, Any]) -> Iterator[str]:
    """What part of a split of conversations is trained on."""
    weights = ", ".join(f"{weight:g}" for weight in entry["weights"] if weight)
    window = f", windows of {entry['window']:,} tokens" if entry["window"] else ""
    share = entry["trained"] / entry["tokens"]
    yield (
        f"  trained on {entry['trained']:,} of the tokens ({share:.1%}), weights {weights}{window}"
    )


def _conversation(
    low: int,
    starts: NDArray[np.int64],
    tokens: NDArray[np.int64],
    weights: NDArray[np.float32],
    tokenizer: Tokenizer | None,
) -> Iterator[str]:
    """The first conversation, no padding, of a stretch of the stream from token ``low`` on."""
    for begin, end in itertools.pairwise([*starts.tolist(), len(tokens)]):
        if weights[begin:end].any():
            yield f"  token {low + begin:,}:"
            yield from _turns(tokens[begin:end], weights[begin:end], tokenizer)
            return


def _turns(
    tokens: NDArray[np.int64], weights: NDArray[np.float32], tokenizer: Tokenizer | None
) -> Iterator[str]:
    """A conversation in stretches of one weight; of long ones the beginning."""
    edges = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(tokens)]
    for begin, end in itertools.pairwise(edges):
        shown = tokens[begin : min(end, begin + SHOWN_TOKENS)]
        more = " ..." if end - begin > SHOWN_TOKENS else ""
        text = repr(tokenizer.decode(shown)) if tokenizer else " ".join(map(str, shown))
        if tokenizer is not None and tokenizer.eos_id == tokens[end - 1]:
            more += " " + tokenizer.eos_token
        kind = f"weight {weights[begin]:g}" if weights[begin] else "untrained"
        yield f"    {kind}, {end - begin:,} tokens: {text}{more}"
