"""Bounded maps, threads, and the import of mosaicml-streaming."""

from __future__ import annotations

import gc
import sys
import threading

import numpy as np
import pytest

from llmtrain.config.schema import SourceConfig
from llmtrain.data import streaming as streaming_module
from llmtrain.data.formats import open_source
from llmtrain.data.formats.files import FileParts
from llmtrain.data.formats.flat import FlatSource
from llmtrain.data.formats.maps import MapPool
from llmtrain.data.formats.npy import token_file
from llmtrain.data.streaming import import_streaming
from llmtrain.errors import EnvironmentFault

FILES, PER_FILE = 40, 997


@pytest.fixture
def files(tmp_path):
    """Forty small token files and their tokens."""
    tokens = np.random.default_rng(0).integers(0, 60000, FILES * PER_FILE)
    for i in range(FILES):
        piece = tokens[i * PER_FILE : (i + 1) * PER_FILE].astype(np.uint16)
        np.save(tmp_path / f"{i:03d}.npy", piece)
    return tmp_path, tokens


def over(folder, pool, eos_id=None):
    paths = sorted(folder.glob("*.npy"))
    parts = FileParts([token_file(path, None) for path in paths])
    return FlatSource("s", parts, fingerprint="", eos_id=eos_id, pool=pool)


def test_open_maps_are_bounded_over_all_sources(files):
    folder, tokens = files
    pool = MapPool(7)
    sources = [over(folder, pool) for _ in range(3)]
    rng = np.random.default_rng(1)
    for start in rng.integers(0, len(tokens) - 2500, 200).tolist():
        source = sources[start % 3]
        np.testing.assert_array_equal(
            source.read(start, start + 2500), tokens[start : start + 2500]
        )
        assert sum(len(s._mapped) for s in sources) == len(pool) <= 7
    sources[0].close()
    assert len(pool) == sum(len(s._mapped) for s in sources[1:])


def test_pool_outlives_its_sources(files):
    folder, tokens = files
    pool = MapPool(3)
    gone = over(folder, pool)
    gone.read(0, 3 * PER_FILE)
    del gone
    gc.collect()
    source = over(folder, pool)
    np.testing.assert_array_equal(source.read(0, 9 * PER_FILE), tokens[: 9 * PER_FILE])
    assert len(pool) <= 3


def test_threads_read_the_same(files):
    """Eight threads on one source whose maps come and go all the time."""
    folder, tokens = files
    source = over(folder, MapPool(2), eos_id=7)
    starts = np.zeros(len(tokens), bool)
    starts[::PER_FILE] = True
    starts[1:] |= tokens[:-1] == 7
    faults = []

    def work(seed):
        rng = np.random.default_rng(seed)
        try:
            for start in rng.integers(0, len(tokens) - 1500, 150).tolist():
                window = source.read(start, start + 1500)
                np.testing.assert_array_equal(window, tokens[start : start + 1500])
                marks = source.document_starts(start, start + 1500, window)
                np.testing.assert_array_equal(marks, starts[start : start + 1500])
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_nothing_is_written_through_the_map(files):
    folder, tokens = files
    source = open_source("s", SourceConfig(str(folder)), eos_id=None)
    window = source.read(0, 100)
    window[:] = 0  # a copy of the caller's own
    np.testing.assert_array_equal(source.read(0, 100), tokens[:100])


def test_streaming_leaves_no_standin_behind():
    streaming = import_streaming()
    assert import_streaming() is streaming
    module = sys.modules.get("torchvision")
    assert module is None or getattr(module, "__file__", None)
    from transformers import LlamaConfig, LlamaForCausalLM  # broken by a stand-in left behind

    assert LlamaForCausalLM.config_class is LlamaConfig


@pytest.mark.parametrize(
    ("missing", "words"),
    [("streaming", "pip install --no-deps mosaicml-streaming"), ("catalogue", "pip install cat")],
)
def test_streaming_absent(monkeypatch, missing, words):
    for name in [n for n in sys.modules if n.split(".")[0] == "streaming"]:
        monkeypatch.delitem(sys.modules, name)
    real = streaming_module.importlib.import_module

    def without(name, *args):
        if name == "streaming":
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return real(name, *args)

    monkeypatch.setattr(streaming_module.importlib, "import_module", without)
    with pytest.raises(EnvironmentFault, match=words):
        import_streaming()
    assert "torchvision" not in sys.modules or sys.modules["torchvision"].__file__
