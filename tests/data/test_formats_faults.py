"""Damaged, missing and contradictory data: one sentence that names the file and the remedy."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from llmtrain.config.schema import SourceConfig
from llmtrain.data.formats import detect_format, open_source
from llmtrain.data.streaming import import_streaming
from llmtrain.errors import DataError

ROWS = 200


@pytest.fixture
def folder(tmp_path):
    """A small MDS folder with hashes and stream.json, in three shards or so."""
    return write(tmp_path / "corpus")


def write(place, encoding="ndarray:uint16:64", hashes=("xxh64",), **options):
    rng = np.random.default_rng(0)
    with import_streaming().MDSWriter(
        out=str(place), columns={"tokens": encoding}, size_limit=10_000, hashes=list(hashes),
        **options,
    ) as writer:  # fmt: skip
        for _ in range(ROWS):
            row = rng.integers(4, 60000, 64).astype(np.uint16)
            writer.write({"tokens": row.tobytes() if encoding == "bytes" else row})
    stream = {"num_tokens": ROWS * 64 - 5, "dtype": "uint16", "eos_id": 3}
    (place / "stream.json").write_text(json.dumps(stream))
    return place


def opened(path, eos_id=3, **keys):
    return open_source("web", SourceConfig(path=str(path), **keys), eos_id=eos_id)


def fails(path, *words, eos_id=3, **keys):
    """Opening, or else reading everything, raises one DataError with these words."""
    with pytest.raises(DataError) as caught:
        source = opened(path, eos_id, **keys)
        source.read(0, source.num_tokens)
    message = str(caught.value)
    assert "\n" not in message
    for word in ("source 'web'", *words):
        assert word in message, message
    return message


def edit(path: Path, change):
    """Rewrites a JSON file."""
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_truncated_shard(folder):
    shard = folder / "shard.00001.mds"
    shard.write_bytes(shard.read_bytes()[:-100])
    fails(folder, str(shard), "truncated", "copy it again")


def test_missing_shard(folder):
    (folder / "shard.00001.mds").unlink()
    fails(folder, str(folder / "shard.00001.mds"), "missing")


def test_shard_that_vanishes_later(folder):
    source = opened(folder)
    (folder / "shard.00001.mds").unlink()
    with pytest.raises(DataError, match="missing"):
        source.read(0, source.num_tokens)


def test_shard_with_a_damaged_head(folder):
    shard = folder / "shard.00001.mds"
    body = bytearray(shard.read_bytes())
    body[0] ^= 1
    shard.write_bytes(body)
    fails(folder, str(shard), "samples where the index says")


def test_sample_that_reaches_over_its_end(tmp_path):
    columns = {"text": "str", "tokens": "ndarray:uint16"}
    with import_streaming().MDSWriter(out=str(tmp_path), columns=columns) as writer:
        for n in range(5):
            writer.write({"text": "x" * n, "tokens": np.arange(3 + n, dtype=np.uint16)})
    shard = tmp_path / "shard.00000.mds"
    body = bytearray(shard.read_bytes())
    (first,) = struct.unpack_from("<I", body, 4)
    struct.pack_into("<I", body, first, 1000)  # the size of the first text
    shard.write_bytes(body)
    fails(tmp_path, str(shard), "reach over their end")


def test_flipped_byte_is_found_by_verify(folder):
    assert opened(folder).verify() == len(list(folder.glob("shard.*")))
    shard = folder / "shard.00002.mds"
    body = bytearray(shard.read_bytes())
    body[len(body) // 2] ^= 1
    shard.write_bytes(body)
    with pytest.raises(DataError, match=r"shard\.00002\.mds is damaged, its xxh64 is"):
        opened(folder).verify()


@pytest.mark.parametrize("place", [40, 2000, -1])
def test_flipped_byte_in_a_compressed_shard(tmp_path, place):
    folder = write(tmp_path / "c", compression="zstd")
    shard = folder / "shard.00001.mds.zstd"
    body = bytearray(shard.read_bytes())
    body[place] ^= 8
    shard.write_bytes(body)
    source = open_source("web", SourceConfig(str(folder)), eos_id=3, cache_dir=tmp_path / "k")
    with pytest.raises(DataError, match=r"shard\.00001\.mds\.zstd is damaged"):
        source.read(0, source.num_tokens)


def test_compressed_garbage_without_hashes(tmp_path):
    folder = write(tmp_path / "c", hashes=(), compression="zstd")
    shard = folder / "shard.00000.mds.zstd"
    shard.write_bytes(bytes(len(shard.read_bytes())))
    with pytest.raises(DataError, match=r"shard\.00000\.mds\.zstd is damaged"):
        open_source("web", SourceConfig(str(folder)), eos_id=3, cache_dir=tmp_path / "k")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "not an MDS index of version 2"),
        ('{"version": 2, "shards": [{}]}', "shard 0 is described wrongly"),
        ('{"version": 2, "shards": []}', "holds no tokens"),
    ],
)
def test_bad_index(folder, content, words):
    (folder / "index.json").write_text(content)
    (folder / "stream.json").unlink()
    fails(folder, words)


@pytest.mark.parametrize("name", ["../shard.00001.mds", "/etc/hostname"])
def test_index_that_leads_out_of_the_folder(folder, name):
    edit(folder / "index.json", lambda d: d["shards"][1]["raw_data"].update(basename=name))
    fails(folder, "leads out of the folder")


def test_index_with_other_samples(folder):
    edit(folder / "index.json", lambda d: d["shards"][0].update(samples=3))
    fails(folder, "stream.json")  # the sum no longer fits
    (folder / "stream.json").unlink()
    fails(folder, "samples where the index says 3")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_tokens": 64 * ROWS + 1}, "do not belong together"),
        ({"num_tokens": 64 * (ROWS - 1)}, "do not belong together"),
        ({"num_tokens": "many"}, "num_tokens"),
        ({"dtype": "uint32"}, "uint32"),
        ({"eos_id": 7}, "eos id 7"),
    ],
)
def test_stream_json_that_contradicts(folder, change, words):
    edit(folder / "stream.json", lambda d: d.update(change))
    fails(folder, words)


def test_eos_id_of_the_stream_is_used(folder):
    assert opened(folder, eos_id=None).eos_id == 3


def test_no_token_column(tmp_path):
    with import_streaming().MDSWriter(out=str(tmp_path), columns={"text": "str"}) as writer:
        writer.write({"text": "hello"})
    fails(tmp_path, "columns text", "llmtrain data prepare")


@pytest.mark.parametrize("encoding", ["ndarray:float32", "ndarray", "str"])
def test_column_that_holds_no_tokens(tmp_path, encoding):
    value = "x" if encoding == "str" else np.ones(4, np.float32)
    with import_streaming().MDSWriter(out=str(tmp_path), columns={"tokens": encoding}) as writer:
        writer.write({"tokens": value})
    fails(tmp_path, encoding, "convert")


def test_dtype_against_the_encoding(folder):
    fails(folder, "uint16", "int32", "remove dtype", dtype="int32")


def test_bytes_column_read_with_a_wrong_dtype(tmp_path):
    folder = write(tmp_path, "bytes")
    (folder / "stream.json").unlink()
    assert opened(folder, dtype="uint16").num_tokens == ROWS * 64
    assert opened(folder).num_tokens == ROWS * 16  # int64 unless told otherwise


@pytest.mark.parametrize("path", ["", "nowhere", "nowhere/*.npy"])
def test_nothing_there(path):
    assert "path" in fails(path)


def test_folder_without_data_names_what_is_near(folder):
    message = fails(folder.parent)
    assert str(folder) in message


def test_format_forced_on_a_folder_of_another(folder):
    fails(folder, "no files ending in .npy or .bin", format="npy")
    fails(folder, "no files ending in .idx", format="megatron")
    fails(folder.parent, "index.json", format="mds")


def test_remote_needs_mds():
    fails("s3://bucket/tokens", "MDS", format="npy")


def megatron(place, lengths=(5, 0, 7), version=1, code=8, shift=0):
    sizes = np.array(lengths, np.int32)
    pointers = (np.cumsum(sizes) - sizes).astype(np.int64) * 2
    pointers[1:] += shift
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", version, code, len(sizes), len(sizes) + 1)
    documents = np.arange(len(sizes) + 1, dtype=np.int64)
    place.with_suffix(".idx").write_bytes(
        head + sizes.tobytes() + pointers.tobytes() + documents.tobytes()
    )
    place.with_suffix(".bin").write_bytes(bytes(2 * int(sizes.sum())))
    return place


def test_megatron_faults(tmp_path):
    place = megatron(tmp_path / "a")
    assert opened(place).num_tokens == 12
    assert detect_format(str(tmp_path / "*.bin")) == "megatron"  # never raw tokens
    fails(place, "uint16", "int32", dtype="int32")
    fails(megatron(tmp_path / "a", version=2), "version 2")
    fails(megatron(tmp_path / "a", code=7), "dtype code 7")
    fails(megatron(tmp_path / "a", shift=2), "not in order")
    megatron(tmp_path / "a")
    (tmp_path / "a.bin").write_bytes(bytes(22))
    fails(place, "a.bin is truncated", "24")
    (tmp_path / "a.bin").unlink()
    fails(place, "a.bin is missing")
    index = tmp_path / "a.idx"
    index.write_bytes(index.read_bytes()[:-9])
    fails(place, "a.idx is truncated")
    index.write_bytes(b"something else that is longer than the head of an index")
    fails(place, "no Megatron index")


def test_npy_faults(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.arange(100, dtype=np.uint16))
    fails(path, "uint16", "uint32", "remove dtype", dtype="uint32")
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    fails(path, "truncated")
    path.write_bytes(whole[:9])
    fails(path, "damaged .npy header")
    np.save(path, np.ones(3))
    fails(path, "float64")
    np.save(path, np.array([{}], object), allow_pickle=True)
    fails(path, "object")
    np.save(path, np.asfortranarray(np.arange(12).reshape(3, 4)))
    fails(path, "Fortran")
    path.write_bytes(b"abc")
    fails(path, "no whole number of uint16", "dtype")
    path.write_bytes(b"")
    fails(path, "holds no tokens")
    path.write_bytes(np.arange(1, 2000, dtype="<u2").tobytes() + b"\xff\xff")
    assert opened(path).num_tokens == 2000
    fails(path, "dtype of its source is wrong", dtype="uint32")
    path.write_bytes(np.full(500, -5, "<i4").tobytes())
    fails(path, "ids from -5 to -5", dtype="int32")


def test_file_that_changes_while_in_use(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.arange(100, dtype=np.uint16))
    source = opened(path)
    np.save(path, np.arange(50, dtype=np.uint16))
    with pytest.raises(DataError, match="changed while it was in use"):
        source.read(0, 100)
    path.unlink()
    with pytest.raises(DataError, match="missing"):
        source.read(0, 100)


def test_datatrove_faults(tmp_path):
    path = tmp_path / "a.ds"
    path.write_bytes(bytes(24))
    index = tmp_path / "a.ds.index"
    index.write_bytes(np.array([5, 12], "<u8").tobytes())
    assert opened(path).num_tokens == 12
    assert opened(tmp_path).document_starts(4, 7, np.zeros(3, np.int64)).tolist() == [0, 1, 0]
    index.write_bytes(np.array([5, 11], "<u8").tobytes())
    fails(path, "its index ends at 11")
    index.write_bytes(b"12345")
    fails(path, "a.ds.index is truncated")
    index.write_bytes(np.array([12], "<u8").tobytes())
    (tmp_path / "b.ds").write_bytes(bytes(4))
    fails(tmp_path, "b.ds.index is missing")


def flip_last(path):
    body = bytearray(path.read_bytes())
    body[-1] ^= 1
    path.write_bytes(body)


def test_other_content_has_another_fingerprint(tmp_path):
    """Of the same sizes: a flipped bit at the end of a file, another hash in an index."""
    megatron(tmp_path / "m")
    np.save(tmp_path / "n.npy", np.arange(100, dtype=np.uint16))
    (tmp_path / "d.ds").write_bytes(bytes(24))
    for path, change in (("m", "m.bin"), ("n.npy", "n.npy"), ("d.ds", "d.ds")):
        before = opened(tmp_path / path).fingerprint
        flip_last(tmp_path / change)
        assert opened(tmp_path / path).fingerprint != before
    hashed, plain = write(tmp_path / "h"), write(tmp_path / "p", hashes=())
    before = [opened(folder).fingerprint for folder in (hashed, plain)]
    entry = {"hashes": {"xxh64": "0" * 16}}
    edit(hashed / "index.json", lambda d: d["shards"][1]["raw_data"].update(entry))
    flip_last(plain / "shard.00000.mds")
    after = [opened(folder).fingerprint for folder in (hashed, plain)]
    assert before[0] != after[0]
    assert before[1] != after[1]
    edit(hashed / "stream.json", lambda d: d.update(fingerprint="given"))
    assert opened(hashed).fingerprint == "given"
