"""Every format against the tokens it was written from.

MDS is written by mosaicml-streaming's own MDSWriter, the other formats by the small writers
below, made from the published descriptions of the formats.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from llmtrain.config.schema import SourceConfig
from llmtrain.data.formats import detect_format, open_source
from llmtrain.data.streaming import import_streaming

EOS = 3


@dataclass
class Truth:
    """What a folder was written from: tokens, which of them begin a document, how to open it."""

    tokens: np.ndarray
    starts: np.ndarray
    cfg: SourceConfig
    kind: str


def documents(rng, count, vocab=50000, longest=700, eos=True):
    """Documents of 1 to ``longest`` tokens; with ``eos`` each ends with EOS and holds no other."""
    made = []
    for _ in range(count):
        words = rng.integers(EOS + 1, vocab, int(rng.integers(1, longest)))
        made.append(np.append(words, EOS) if eos else words)
    return made


def flat(docs):
    """The stream of some documents and its starts."""
    tokens = np.concatenate(docs).astype(np.int64)
    starts = np.zeros(len(tokens), bool)
    places = np.cumsum([0] + [len(d) for d in docs[:-1]])
    starts[places[places < len(tokens)]] = True
    return tokens, starts


def write_mds(folder, columns, samples, size_limit=20_000, **options):
    """MDSWriter with small shards, so that windows cross them."""
    streaming = import_streaming()
    with streaming.MDSWriter(
        out=str(folder), columns=columns, size_limit=size_limit, progress_bar=False, **options
    ) as writer:
        for sample in samples:
            writer.write(sample)


def chunks(tokens, length, dtype):
    padded = np.concatenate([tokens, np.full(-len(tokens) % length, EOS)]).astype(dtype)
    return padded.reshape(-1, length)


def mds_fixed(folder, rng, dtype="uint16", vocab=50000, **options):
    tokens, starts = flat(documents(rng, 150, vocab))
    rows = chunks(tokens, 128, dtype)
    write_mds(folder, {"tokens": f"ndarray:{dtype}:128"}, ({"tokens": r} for r in rows), **options)
    stream = {"num_tokens": len(tokens), "dtype": dtype, "eos_id": EOS, "chunk_tokens": 128}
    (folder / "stream.json").write_text(json.dumps(stream))
    return Truth(tokens, starts, SourceConfig(path=str(folder)), "mds")


def mds_wide(folder, rng):
    return mds_fixed(folder, rng, "uint32", 200_000)


def mds_hashed(folder, rng):
    return mds_fixed(folder, rng, hashes=["sha1", "xxh64"])


def mds_documents(folder, rng, dtype="uint16", vocab=50000):
    """One document per sample, without eos; lengths need 1, 2 and 4 bytes in the array header."""
    docs = [*documents(rng, 120, vocab, eos=False), rng.integers(EOS + 1, vocab, 70_001)]
    docs = [docs[i] for i in rng.permutation(len(docs))]
    samples = ({"tokens": d.astype(dtype)} for d in docs)
    write_mds(folder, {"tokens": f"ndarray:{dtype}"}, samples)
    return Truth(*flat(docs), SourceConfig(path=str(folder)), "mds")


def mds_documents_int64(folder, rng):
    return mds_documents(folder, rng, "int64", 1 << 31)


def mds_two_dimensional(folder, rng):
    docs = [rng.integers(EOS + 1, 50000, (int(rng.integers(1, 5)), 37)) for _ in range(60)]
    return several_dimensions(folder, docs)


def mds_three_dimensional(folder, rng):
    """The sizes are also those of flat arrays one token longer."""
    docs = [rng.integers(EOS + 1, 50000, (1, int(rng.integers(1, 5)), 37)) for _ in range(60)]
    return several_dimensions(folder, docs)


def several_dimensions(folder, docs):
    write_mds(folder, {"tokens": "ndarray:uint16"}, ({"tokens": d.astype("u2")} for d in docs))
    return Truth(*flat([d.reshape(-1) for d in docs]), SourceConfig(path=str(folder)), "mds")


def mds_mixed(folder, rng):
    """Varying columns on both sides of the tokens in the order of their names."""
    docs = documents(rng, 120, eos=False)
    columns = {"a": "str", "n": "int", "tokens": "ndarray:int32", "z": "str"}
    write_mds(
        folder,
        columns,
        (
            {"a": "x" * int(rng.integers(9)), "n": i, "tokens": d.astype(np.int32), "z": "é" * i}
            for i, d in enumerate(docs)
        ),
    )
    return Truth(*flat(docs), SourceConfig(path=str(folder)), "mds")


def mds_between_fixed(folder, rng):
    """All columns fixed, tokens in the middle: samples at one distance, with gaps."""
    tokens, starts = flat(documents(rng, 60))
    rows = chunks(tokens, 96, "uint16")
    tokens = rows.reshape(-1).astype(np.int64)
    starts = np.append(True, tokens[:-1] == EOS)
    columns = {"a": "int", "input_ids": "ndarray:uint16:96", "z": "float64"}
    write_mds(folder, columns, ({"a": 1, "input_ids": r, "z": 0.5} for r in rows))
    return Truth(tokens, starts, SourceConfig(path=str(folder)), "mds")


def mds_beside_text(folder, rng):
    """Tokens of a fixed shape beside a column that varies."""
    tokens, _ = flat(documents(rng, 60))
    rows = chunks(tokens, 96, "uint16")
    tokens = rows.reshape(-1).astype(np.int64)
    starts = np.append(True, tokens[:-1] == EOS)
    columns = {"text": "str", "tokens": "ndarray:uint16:96"}
    write_mds(folder, columns, ({"text": "y" * (i % 7), "tokens": r} for i, r in enumerate(rows)))
    return Truth(tokens, starts, SourceConfig(path=str(folder)), "mds")


def packed(algorithm, writer=mds_fixed) -> Callable:
    def write(folder, rng):
        return writer(folder, rng, compression=algorithm, hashes=["xxh64"])

    write.__name__ = f"{writer.__name__}_{algorithm.replace(':', '_')}"
    return write


def foundry(folder, rng, encoding="bytes", dtype="int64", wanted=None, **options):
    """Concatenated samples of one length; the last documents are cut off, as its tool does."""
    tokens, _ = flat(documents(rng, 100))
    tokens = tokens[: len(tokens) // 64 * 64]
    rows = tokens.reshape(-1, 64).astype(dtype)
    samples = ({"tokens": r.tobytes() if encoding == "bytes" else r} for r in rows)
    write_mds(folder, {"tokens": encoding}, samples, **options)
    starts = np.append(True, tokens[:-1] == EOS)
    kind = "foundry" if encoding == "bytes" else "mds"
    return Truth(tokens, starts, SourceConfig(path=str(folder), dtype=wanted), kind)


def foundry_uint16(folder, rng):
    return foundry(folder, rng, dtype="uint16", wanted="uint16")


def foundry_ndarray(folder, rng):
    return foundry(folder, rng, "ndarray:int32", "int32")


def foundry_ndarray_zstd(folder, rng):
    return foundry(folder, rng, "ndarray:int32", "int32", compression="zstd:7")


def foundry_varying(folder, rng):
    """Pieces of different lengths: joined when the format is given, not taken for documents."""
    tokens, starts = flat(documents(rng, 100))
    pieces = np.split(tokens.astype(np.uint16), np.sort(rng.integers(1, len(tokens), 150)))
    samples = ({"tokens": piece} for piece in pieces if len(piece))
    write_mds(folder, {"tokens": "ndarray:uint16"}, samples)
    return Truth(tokens, starts, SourceConfig(path=str(folder), format="foundry"), "mds")


def npy(folder, rng, dtype="uint16"):
    """Three files; the last token of a file need not be an eos for the next to be a start."""
    docs = documents(rng, 90)
    tokens, starts = flat(docs)
    cut = [0, 5, len(tokens) // 2 + 1, len(tokens)]
    folder.mkdir()
    for i, (low, high) in enumerate(pairwise(cut)):
        np.save(folder / f"part-{i}.npy", tokens[low:high].astype(dtype))
        starts[low] = True
    return Truth(tokens, starts, SourceConfig(path=str(folder)), "npy")


def npy_two_dimensional(folder, rng):
    tokens = rng.integers(4, 50000, (33, 17))
    folder.mkdir()
    np.save(folder / "a.npy", tokens.astype(np.int32))
    starts = np.arange(tokens.size) == 0
    return Truth(tokens.reshape(-1), starts, SourceConfig(path=str(folder / "a.npy")), "npy")


def raw(folder, rng, dtype=None, vocab=50000):
    """OLMo's files: called .npy, without a header."""
    docs = documents(rng, 90, vocab)
    tokens, starts = flat(docs)
    folder.mkdir()
    half = len(np.concatenate(docs[:45]))
    for i, piece in enumerate((tokens[:half], tokens[half:])):
        (folder / f"{i}.npy").write_bytes(piece.astype(dtype or "uint16").tobytes())
    return Truth(tokens, starts, SourceConfig(path=str(folder / "*.npy"), dtype=dtype), "npy")


def raw_uint32(folder, rng):
    return raw(folder, rng, "uint32", 150_000)


def megatron_files(prefix, docs, code, dtype, modes=False):
    """A document is a list of sequences; lengths may be zero."""
    sequences = [s for doc in docs for s in doc]
    lengths = np.array([len(s) for s in sequences], np.int32)
    itemsize = np.dtype(dtype).itemsize
    pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * itemsize
    first = np.cumsum([0] + [len(doc) for doc in docs]).astype(np.int64)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{prefix}.idx", "wb") as out:
        out.write(b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, code))
        out.write(struct.pack("<QQ", len(sequences), len(first)))
        out.write(lengths.tobytes() + pointers.tobytes() + first.tobytes())
        if modes:
            out.write(bytes(len(sequences)))
    body = np.concatenate(sequences).astype(dtype).tobytes()
    Path(f"{prefix}.bin").write_bytes(body)


def megatron(folder, rng, code=8, dtype="uint16", vocab=50000):
    docs = documents(rng, 200, vocab)
    megatron_files(folder / "x_text_document", [[d] for d in docs], code, dtype)
    return Truth(*flat(docs), SourceConfig(path=str(folder / "x_text_document")), "megatron")


def megatron_int32(folder, rng):
    return megatron(folder, rng, 4, "int32", 200_000)


def megatron_parts(folder, rng):
    """Two files; documents of several sequences, some of them empty, no eos at all."""
    truth = []
    for i in range(2):
        docs = []
        for _ in range(60):
            docs.append([rng.integers(4, 60000, int(rng.integers(0, 90))) for _ in range(3)])
        megatron_files(folder / f"part{i}", docs, 8, "uint16", modes=i == 1)
        truth += [np.concatenate(d) for d in docs]
    tokens, starts = flat(truth)
    return Truth(tokens, starts, SourceConfig(path=str(folder)), "megatron")


def datatrove(folder, rng, token_size=2, index=True, metadata=True, vocab=50000):
    """Three files, the last of which is a single document."""
    docs = documents(rng, 91, vocab)
    folder.mkdir()
    for i, piece in enumerate((docs[:30], docs[30:90], docs[90:])):
        path = folder / f"00{i}_tok.ds"
        tokens = np.concatenate(piece)
        path.write_bytes(tokens.astype(f"<u{token_size}").tobytes())
        if index:
            ends = np.cumsum([len(d) for d in piece]).astype("<u8")
            Path(f"{path}.index").write_bytes(ends.tobytes())
        if metadata:
            text = f"some/tokenizer|{token_size}\n{len(tokens)}\n{len(tokens)} T"
            Path(f"{path}.metadata").write_text(text)
    return Truth(*flat(docs), SourceConfig(path=str(folder)), "datatrove")


def datatrove_wide(folder, rng):
    return datatrove(folder, rng, 4, vocab=200_000)


def datatrove_size_from_index(folder, rng):
    return datatrove(folder, rng, 4, metadata=False, vocab=200_000)


def datatrove_bare(folder, rng):
    return datatrove(folder, rng, index=False, metadata=False)


WRITERS = [
    mds_fixed,
    mds_wide,
    mds_hashed,
    mds_documents,
    mds_documents_int64,
    mds_two_dimensional,
    mds_three_dimensional,
    mds_mixed,
    mds_between_fixed,
    mds_beside_text,
    packed("zstd:3"),
    packed("gz"),
    packed("br"),
    packed("bz2"),
    packed("snappy"),
    foundry,
    foundry_uint16,
    foundry_ndarray,
    foundry_ndarray_zstd,
    foundry_varying,
    packed("zstd", foundry),
    npy,
    npy_two_dimensional,
    raw,
    raw_uint32,
    megatron,
    megatron_int32,
    megatron_parts,
    datatrove,
    datatrove_wide,
    datatrove_size_from_index,
    datatrove_bare,
]


@pytest.fixture(params=WRITERS, ids=lambda w: w.__name__)
def written(request, tmp_path):
    """A source on disk, the truth about it, and a cache folder of the test's own."""
    truth = request.param(tmp_path / "data", np.random.default_rng(1))
    return truth, tmp_path / "cache"


def windows(rng, total, count=60):
    """Random windows of all sizes, and the edges of the stream."""
    yield from ((0, 0), (0, 1), (0, total), (total - 1, total), (total, total))
    for _ in range(count):
        length = int(2 ** rng.uniform(0, 12))
        start = int(rng.integers(0, total))
        yield start, min(total, start + length)


def test_reads_what_was_written(written):
    truth, cache = written
    assert detect_format(truth.cfg.path) == truth.kind
    source = open_source("s", truth.cfg, eos_id=EOS, cache_dir=cache)
    assert source.num_tokens == len(truth.tokens)
    for start, stop in windows(np.random.default_rng(2), source.num_tokens):
        tokens = source.read(start, stop)
        assert tokens.dtype == np.int64
        np.testing.assert_array_equal(tokens, truth.tokens[start:stop])
        out = np.full(stop - start, -1, np.int64)
        source.read_into(start, stop, out)
        np.testing.assert_array_equal(out, tokens)
        marks = source.document_starts(start, stop, tokens)
        assert marks.dtype == np.bool_
        expected = truth.starts[start:stop]
        assert np.array_equal(marks, expected), (start, stop, np.flatnonzero(marks != expected))
    source.close()
    np.testing.assert_array_equal(source.read(0, 9), truth.tokens[:9])  # opens again


def test_windows_outside_the_stream(written):
    truth, cache = written
    source = open_source("s", truth.cfg, eos_id=EOS, cache_dir=cache)
    total = source.num_tokens
    for start, stop in (
        (-1, 3),
        (0, total + 1),
        (total, total + 1),
        (5, 4),
        (total + 1, total + 2),
    ):
        with pytest.raises(IndexError):
            source.read(start, stop)


def test_fingerprint_follows_the_content(written, tmp_path):
    truth, cache = written
    source = open_source("s", truth.cfg, eos_id=EOS, cache_dir=cache)
    shutil.move(tmp_path / "data", tmp_path / "moved")
    path = truth.cfg.path.replace(str(tmp_path / "data"), str(tmp_path / "moved"))
    cfg = replace(truth.cfg, path=path)
    moved = open_source("t", cfg, eos_id=EOS, cache_dir=tmp_path / "other")
    assert moved.fingerprint == source.fingerprint
    assert len(source.fingerprint) == 32
