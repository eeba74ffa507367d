"""Several processes on one shard cache, and reading after a fork."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from llmtrain.config.schema import SourceConfig
from llmtrain.data.formats import open_source
from llmtrain.data.formats.maps import POOL
from llmtrain.data.streaming import import_streaming

pytestmark = pytest.mark.dist

READER = """
import sys
import numpy as np
from llmtrain.config.schema import SourceConfig
from llmtrain.data.formats import open_source
address, cache, seed, bound, truth = sys.argv[1:]
tokens = np.load(truth)
cfg = SourceConfig(address, cache_bytes=int(bound))
from pathlib import Path
source = open_source("web", cfg, eos_id=None, cache_dir=Path(cache))
for start in np.random.default_rng(int(seed)).integers(0, len(tokens) - 300, 150).tolist():
    assert np.array_equal(source.read(start, start + 300), tokens[start : start + 300])
"""


@pytest.fixture
def store(tmp_path):
    """A served MDS folder of some thirty shards: address, tokens' file, counts of requests."""
    rows = np.random.default_rng(0).integers(0, 60000, (600, 64)).astype(np.uint16)
    with import_streaming().MDSWriter(
        out=str(tmp_path / "c"),
        columns={"tokens": "ndarray:uint16:64"},
        size_limit=3000,
        hashes=["xxh64"],
    ) as writer:
        for row in rows:
            writer.write({"tokens": row})
    np.save(tmp_path / "truth.npy", rows.reshape(-1).astype(np.int64))
    asked = Counter()

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "c"))

        def do_GET(self):
            asked[os.path.basename(self.path)] += 1
            super().do_GET()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", tmp_path / "truth.npy", asked
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("bound", [1 << 20, 20_000])
def test_processes_share_a_cache(store, tmp_path, bound):
    """With room for everything each shard is fetched once; with little room all still agree."""
    address, truth, asked = store
    command = [sys.executable, "-c", READER, address, str(tmp_path / "cache")]
    readers = [
        subprocess.Popen([*command, str(seed), str(bound), str(truth)], stderr=subprocess.PIPE)
        for seed in range(3)
    ]
    for reader in readers:
        _, errors = reader.communicate(timeout=120)
        assert reader.returncode == 0, errors.decode()
    shards = {name: n for name, n in asked.items() if name.startswith("shard")}
    files = list((tmp_path / "cache").glob("*/shard*"))
    if bound == 1 << 20:
        assert set(shards.values()) == {1}
        assert len(files) == len(shards) > 20
    else:
        assert max(shards.values()) > 1
    assert sum(file.stat().st_size for file in files) <= bound


def test_reading_after_a_fork(tmp_path):
    """Open maps carry over; a child made while other threads open files does not hang."""
    tokens = np.arange(20_000, dtype=np.uint16)
    for i in range(20):
        np.save(tmp_path / f"{i:02d}.npy", tokens[i * 1000 : (i + 1) * 1000])
    source = open_source("s", SourceConfig(str(tmp_path)), eos_id=None)
    source.read(0, 5000)
    stop = threading.Event()

    def keep_opening():
        while not stop.is_set():
            source.read(0, 20_000)
            source.close()

    thread = threading.Thread(target=keep_opening)
    thread.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                good = np.array_equal(source.read(500, 19_500), tokens[500:19_500])
                os._exit(0 if good else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        thread.join()


def test_fork_while_a_lock_is_held(tmp_path):
    """A child made while another thread holds the lock of the maps can still open files."""
    np.save(tmp_path / "a.npy", np.arange(9, dtype=np.uint16))
    source = open_source("s", SourceConfig(str(tmp_path)), eos_id=None)
    with POOL._lock:
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            os._exit(0 if source.read(8, 9)[0] == 8 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
