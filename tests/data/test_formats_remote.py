"""Remote sources: fetched on demand, cached within a bound, tried again, refused with words."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
import time
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from llmtrain.config.schema import SourceConfig
from llmtrain.data.formats import cache as cache_module
from llmtrain.data.formats import open_source, remote
from llmtrain.data.formats.cache import ShardCache
from llmtrain.data.streaming import import_streaming
from llmtrain.errors import DataError, EnvironmentFault

ROWS, LENGTH = 300, 64


def write(place, **options):
    """An MDS folder of about eight shards; returns its tokens."""
    options.setdefault("hashes", ["xxh64"])
    rows = (
        np.random.default_rng(options.pop("seed", 0))
        .integers(4, 60000, (ROWS, LENGTH))
        .astype(np.uint16)
    )
    columns = {"tokens": f"ndarray:uint16:{LENGTH}"}
    with import_streaming().MDSWriter(
        out=str(place), columns=columns, size_limit=6000, **options
    ) as writer:
        for row in rows:
            writer.write({"tokens": row})
    return rows.reshape(-1).astype(np.int64)


class Server(ThreadingHTTPServer):
    """Serves a folder; ``fail(path)`` may answer otherwise. Counts what is asked for."""

    def __init__(self, folder):
        self.asked = Counter()
        self.fail = lambda handler: False

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(handler):
                self.asked[os.path.basename(handler.path)] += 1
                if not self.fail(handler):
                    super().do_GET()

            def log_message(handler, *args):
                pass

            def __init__(handler, *args):
                super().__init__(*args, directory=str(folder))

        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    (tmp_path / "store").mkdir()
    running = Server(tmp_path / "store")
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def opened(path, tmp_path, **keys):
    keys.setdefault("cache_bytes", 1 << 20)
    return open_source(
        "web", SourceConfig(path=str(path), **keys), eos_id=3, cache_dir=tmp_path / "cache"
    )


def shard_files(tmp_path):
    return sorted((tmp_path / "cache").glob("*/shard*"))


@pytest.mark.parametrize("marker", ["http", "file://", "remote:"])
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_reads_what_was_written(server, tmp_path, marker, compression):
    truth = write(tmp_path / "store" / "c", compression=compression)
    address = f"{server.address}/c/" if marker == "http" else f"{marker}{tmp_path}/store/c"
    source = opened(address, tmp_path)
    assert not shard_files(tmp_path)  # the hashes of the index suffice until something is read
    assert source.num_tokens == len(truth)
    rng = np.random.default_rng(1)
    for start in rng.integers(0, len(truth), 100).tolist():
        stop = min(len(truth), start + int(rng.integers(1, 3000)))
        np.testing.assert_array_equal(source.read(start, stop), truth[start:stop])
    local = opened(tmp_path / "store" / "c", tmp_path)
    assert local.fingerprint == source.fingerprint
    if marker == "http":
        assert set(server.asked.values()) == {1}
    assert {path.name for path in shard_files(tmp_path)} >= {"shard.00000.mds"}


def test_same_fingerprint_without_hashes(server, tmp_path):
    write(tmp_path / "store", hashes=[])
    far = opened(server.address, tmp_path)
    assert far.fingerprint == opened(tmp_path / "store", tmp_path).fingerprint


def test_only_needed_shards_are_fetched(server, tmp_path):
    truth = write(tmp_path / "store")
    source = opened(server.address, tmp_path)
    np.testing.assert_array_equal(source.read(0, 10), truth[:10])
    assert server.asked == Counter({"index.json": 1, "stream.json": 1, "shard.00000.mds": 1})


def test_stream_json_comes_along(server, tmp_path):
    truth = write(tmp_path / "store")
    stream = {"num_tokens": len(truth) - 5, "eos_id": 3, "bytes": 77}
    (tmp_path / "store" / "stream.json").write_text(json.dumps(stream))
    source = opened(server.address, tmp_path)
    assert (source.num_tokens, source.text_bytes) == (len(truth) - 5, 77)


def test_lengths_of_documents_are_kept_for_the_next_open(server, tmp_path):
    """Samples of varying length: all shards are read once, by the first open only."""
    docs = [np.arange(1, n % 50 + 2, dtype=np.uint16) for n in range(400)]
    place = tmp_path / "store"
    with import_streaming().MDSWriter(
        out=str(place), columns={"tokens": "ndarray:uint16"}, size_limit=6000, hashes=["xxh64"]
    ) as writer:
        for doc in docs:
            writer.write({"tokens": doc})
    truth = np.concatenate(docs)
    for _ in range(2):
        source = opened(server.address, tmp_path, cache_bytes=1 << 20)
        assert source.num_tokens == len(truth)
        np.testing.assert_array_equal(source.read(0, len(truth)), truth)
    shards = [name for name in server.asked if name.startswith("shard")]
    assert len(shards) > 3
    assert all(server.asked[name] == 1 for name in shards)
    for path in shard_files(tmp_path):
        path.unlink()
    server.asked.clear()
    (memo,) = (tmp_path / "cache").glob("*.counts.json")
    assert opened(server.address, tmp_path).num_tokens == len(truth)
    assert [name for name in server.asked if name.startswith("shard")] == ["shard.00000.mds"]
    counts = json.loads(memo.read_text())
    memo.write_text(json.dumps([counts[0] + 1, *counts[1:]]))
    with pytest.raises(DataError, match=f"part 0 holds {counts[0]} tokens"):
        opened(server.address, tmp_path).read(0, 1)


def test_cache_stays_within_its_bound(server, tmp_path):
    truth = write(tmp_path / "store")
    shard = (tmp_path / "store" / "shard.00000.mds").stat().st_size
    folder = tmp_path / "cache"
    source = open_source(
        "web", SourceConfig(server.address, cache_bytes=3 * shard), eos_id=3, cache_dir=folder
    )
    for start in np.random.default_rng(1).integers(0, len(truth) - 50, 200).tolist():
        np.testing.assert_array_equal(source.read(start, start + 50), truth[start : start + 50])
        files = shard_files(tmp_path)
        assert sum(path.stat().st_size for path in files) <= 3 * shard
        # a map of a shard that left the cache would still hold its space on the disk
        assert len(source._mapped) <= len(files) + 1
    assert max(server.asked.values()) > 1
    assert not list(folder.rglob("*.part*"))


def test_cache_too_small_for_a_shard(server, tmp_path):
    write(tmp_path / "store")
    source = opened(server.address, tmp_path, cache_bytes=100)
    with pytest.raises(DataError, match=r"source 'web': shard shard\.0.*raise cache_bytes"):
        source.read(0, 10)


def test_small_cache_is_warned_about(server, tmp_path, caplog):
    write(tmp_path / "store")
    with caplog.at_level(logging.WARNING):
        opened(server.address, tmp_path, cache_bytes=20_000)
    assert "cache_bytes allows" in caplog.text


def test_oldest_use_leaves_first(tmp_path):
    cache = ShardCache(tmp_path, 30)
    make = {name: lambda path: path.write_bytes(bytes(10)) for name in "abcd"}
    for name in "abc":
        cache.get(name, 10, make[name])
        time.sleep(0.01)
    cache.get("a", 10, make["a"])  # used again: b is the oldest now
    time.sleep(0.01)
    cache.get("d", 10, make["d"])
    assert sorted(p.name for p in tmp_path.glob("[a-z]*")) == ["a", "c", "d"]


def test_room_is_made_before_and_kept_after(tmp_path):
    """Another process publishes a file of its own while this one makes a shard."""
    cache, other = ShardCache(tmp_path, 30), ShardCache(tmp_path, 30)
    for name in "abc":
        cache.get(name, 10, lambda path: path.write_bytes(bytes(10)))
        time.sleep(0.01)

    def make(path):
        assert not (tmp_path / "a").exists()  # room was made for ten bytes
        assert (tmp_path / "b").exists()
        (tmp_path / "e").write_bytes(bytes(10))
        path.write_bytes(bytes(10))

    assert other.get("d", 10, make).exists()
    assert sum(path.stat().st_size for path in tmp_path.glob("[a-z]*")) == 30


def test_a_file_wanted_by_several_is_made_once(tmp_path):
    made = []

    def make(path):
        made.append(path)
        time.sleep(0.2)
        path.write_bytes(b"full")

    caches = [ShardCache(tmp_path, 30) for _ in range(4)]
    threads = [threading.Thread(target=cache.get, args=("a", 4, make)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_remains_of_a_killed_process_are_no_shard(tmp_path):
    cache = ShardCache(tmp_path, 30)
    part, old = tmp_path / ".a.part", tmp_path / ".b.part"
    part.write_bytes(b"half")
    old.write_bytes(b"half")
    os.utime(old, (0, 0))
    assert cache.get("a", 4, lambda path: path.write_bytes(b"full")).read_bytes() == b"full"
    assert not part.exists()
    assert not old.exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_disk_full(tmp_path, code):
    def make(path):
        raise OSError(code, os.strerror(code))

    with pytest.raises(DataError, match=r"make room, lower cache_bytes or set LLMTRAIN_CACHE"):
        ShardCache(tmp_path, 30).get("a", 4, make)


def test_cache_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="LLMTRAIN_CACHE"):
        ShardCache(tmp_path / "file" / "cache", 30)


def test_default_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("LLMTRAIN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_module.default_cache_dir() == tmp_path / "llmtrain" / "shards"
    monkeypatch.setenv("LLMTRAIN_CACHE", str(tmp_path / "mine"))
    assert cache_module.default_cache_dir() == tmp_path / "mine"


def times(number, answer):
    """A fault that happens ``number`` times to each shard."""
    left = Counter()

    def fail(handler):
        name = os.path.basename(handler.path)
        if not name.startswith("shard") or left[name] == number:
            return False
        left[name] += 1
        answer(handler)
        return True

    return fail


def refuse(handler):
    handler.send_error(503)


def cut_short(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "5000")
    handler.end_headers()
    handler.wfile.write(bytes(100))


def other_bytes(handler):
    body = Path(handler.directory, os.path.basename(handler.path)).read_bytes()
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(body[:-1] + bytes([body[-1] ^ 1]))


@pytest.mark.parametrize(
    ("answer", "bearable", "words"),
    [
        (refuse, remote.TRIES - 1, r"cannot fetch http.*503.*check the address"),
        (cut_short, remote.TRIES - 1, r"cannot fetch http.*closed after 100 of 5000 bytes"),
        (other_bytes, 1, r"shard http.*is damaged, its xxh64"),
    ],
)
def test_faults_of_the_network(server, tmp_path, answer, bearable, words):
    truth = write(tmp_path / "store")
    server.fail = times(bearable, answer)
    np.testing.assert_array_equal(opened(server.address, tmp_path).read(0, 99), truth[:99])
    server.fail = times(99, answer)
    with pytest.raises(DataError, match=words):
        opened(server.address, tmp_path).read(len(truth) - 9, len(truth))


def test_missing_remote_shard(server, tmp_path):
    write(tmp_path / "store")
    (tmp_path / "store" / "shard.00001.mds").unlink()
    source = opened(server.address, tmp_path)
    with pytest.raises(DataError, match=r"source 'web': shard http.*00001.mds does not exist"):
        source.read(0, source.num_tokens)
    assert server.asked["shard.00001.mds"] == 1  # absence is no fault of the network


def test_missing_index(server, tmp_path):
    with pytest.raises(DataError, match=r"source 'web': http.*index\.json does not exist"):
        opened(server.address, tmp_path)


def test_unknown_store(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"knows no store 'gopher'"):
        opened("gopher://host/corpus", tmp_path)


def test_store_whose_package_is_missing(tmp_path, monkeypatch):
    def absent(scheme, address):
        raise ModuleNotFoundError("No module named 'google'", name="google")

    monkeypatch.setattr(remote, "_downloader", absent)
    with pytest.raises(EnvironmentFault, match="pip install google"):
        opened("gs://bucket/corpus", tmp_path)


def test_changed_corpus_does_not_meet_the_old_shards(server, tmp_path):
    write(tmp_path / "store")
    opened(server.address, tmp_path).read(0, 10)
    for path in (tmp_path / "store").iterdir():
        path.unlink()
    other = write(tmp_path / "store", seed=1)
    np.testing.assert_array_equal(opened(server.address, tmp_path).read(0, 10), other[:10])


def test_s3_through_the_storage_layer(server, tmp_path, monkeypatch):
    """boto3 against a server that answers HEAD and GET as an object store does."""
    pytest.importorskip("boto3")
    truth = write(tmp_path / "store" / "bucket" / "corpus")
    for key, value in {
        "S3_ENDPOINT_URL": server.address,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(key, value)
    source = opened("s3://bucket/corpus", tmp_path)
    np.testing.assert_array_equal(source.read(50, 5000), truth[50:5000])
    with pytest.raises(DataError, match="does not exist"):
        opened("s3://bucket/elsewhere", tmp_path)
