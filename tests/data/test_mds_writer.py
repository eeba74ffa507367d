"""Our MDS shards against mosaicml-streaming: same bytes as its writer, readable by its dataset."""

from __future__ import annotations

import json

import numpy as np
import pytest

from llmtrain.config.schema import SourceConfig
from llmtrain.data.formats import open_source
from llmtrain.data.mds_writer import CHUNK_TOKENS, ShardWriter, token_dtype, zstd_level
from llmtrain.data.streaming import import_streaming
from llmtrain.errors import ConfigError

PAD = 7


def write(folder, tokens, dtype, shard_bytes, compression=None, seed=0):
    """Written in pieces of odd sizes."""
    writer = ShardWriter(folder, dtype, shard_bytes, compression)
    rng, start = np.random.default_rng(seed), 0
    while start < len(tokens):
        stop = start + int(rng.integers(1, 5000))
        writer.append(tokens[start:stop])
        start = stop
    writer.finish(PAD)
    return writer


def stream(count, dtype):
    rng = np.random.default_rng(count)
    return rng.integers(0, np.iinfo(dtype).max, count, dtype=dtype, endpoint=True)


def chunks(tokens):
    padding = np.full(-len(tokens) % CHUNK_TOKENS, PAD, tokens.dtype)
    return np.concatenate([tokens, padding]).reshape(-1, CHUNK_TOKENS)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("count", [1, 1024, 1025, 30_011, 61_440])
@pytest.mark.parametrize("shard_bytes", [8192, 20_000, 1 << 26])
def test_same_bytes_as_their_writer(tmp_path, dtype, count, shard_bytes):
    tokens = stream(count, dtype)
    write(tmp_path / "ours", tokens, dtype, shard_bytes)
    columns = {"tokens": f"ndarray:{dtype}:{CHUNK_TOKENS}"}
    settings = {"hashes": ["xxh64"], "size_limit": shard_bytes}
    with import_streaming().MDSWriter(
        out=str(tmp_path / "theirs"), columns=columns, **settings
    ) as w:
        for row in chunks(tokens):
            w.write({"tokens": row})
    names = sorted(p.name for p in (tmp_path / "theirs").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "ours").iterdir())
    for name in names:
        ours, theirs = ((tmp_path / side / name).read_bytes() for side in ("ours", "theirs"))
        assert ours == theirs, name


@pytest.mark.parametrize("compression", [None, "zstd", "zstd:7"])
def test_their_dataset_reads_ours(tmp_path, compression):
    tokens = stream(50_001, "uint16")
    write(tmp_path / "ours", tokens, "uint16", 30_000, compression)
    streaming = import_streaming()
    streaming.base.util.clean_stale_shared_memory()
    dataset = streaming.StreamingDataset(
        local=str(tmp_path / "cache"), remote=str(tmp_path / "ours"), batch_size=1,
        validate_hash="xxh64", shuffle=False,
    )  # fmt: skip
    rows = np.stack([dataset[i]["tokens"] for i in range(len(dataset))])
    np.testing.assert_array_equal(rows, chunks(tokens))


@pytest.mark.parametrize("compression", [None, "zstd:1"])
def test_our_reader_reads_ours(tmp_path, compression):
    tokens = stream(9000, "uint32")
    write(tmp_path / "ours", tokens, "uint32", 10_000, compression)
    cfg = SourceConfig(path=str(tmp_path / "ours"))
    source = open_source("s", cfg, eos_id=None, cache_dir=tmp_path / "cache")
    np.testing.assert_array_equal(source.read(0, 9000), tokens)
    assert source.verify() == len(json.loads((tmp_path / "ours/index.json").read_bytes())["shards"])


def test_digest_depends_on_the_stream_alone(tmp_path):
    tokens = stream(20_000, "uint16")
    digests = {
        write(tmp_path / str(n), tokens, "uint16", size, pack, seed).digest
        for n, (size, pack, seed) in enumerate(
            [(4096, None, 0), (9999, "zstd", 1), (1 << 20, None, 2)]
        )
    }
    assert len(digests) == 1
    tokens[11_111] ^= 1
    assert write(tmp_path / "x", tokens, "uint16", 4096).digest not in digests


def test_resume_continues_a_stream(tmp_path):
    tokens = stream(33_333, "uint16")
    whole = write(tmp_path / "whole", tokens, "uint16", 10_000)
    first = ShardWriter(tmp_path / "parts", "uint16", 10_000)
    first.append(tokens[:17_001])
    kept = list(first.shards), first.digest, first.open_tokens.copy()
    first.append(tokens[17_001:30_000])  # lost work, partly on disk
    second = ShardWriter(tmp_path / "parts", "uint16", 10_000)
    second.resume(*kept)
    second.append(tokens[17_001:])
    second.finish(PAD)
    assert second.digest == whole.digest
    for path in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "parts" / path.name).read_bytes() == path.read_bytes()


def test_dtype_and_compression_names():
    assert [token_dtype(n) for n in (257, 65536, 65537)] == ["uint16", "uint16", "uint32"]
    assert [zstd_level(c) for c in (None, "zstd", "zstd:22")] == [None, 3, 22]
    for wrong in ("gz", "zstd:0", "zstd:23", "zstd:x"):
        with pytest.raises(ConfigError, match=r"prepare\.compression"):
            zstd_level(wrong)
