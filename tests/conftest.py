"""What holds in every test process."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from helpers.tiny import make_corpus

# The tests kill processes and pull no plugs: what a process has written is there without waiting
# for the disk, which is a tenth of a short run. Processes of the command (helpers/warm.py) do wait.
os.fsync = lambda descriptor: None


def _keep() -> None:
    """Take what is alive out of the garbage collector's sight.

    A process that has loaded torch, transformers and all tests holds more than a million objects.
    Each run that a test makes collects garbage, half a second of looking at all of them, and
    each forked rank would copy their pages to do so.
    """
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    """The imports and the tests themselves."""
    _keep()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """What a file has imported; its fixtures are gone by now."""
    if nextitem is not None and nextitem.path != item.path:
        _keep()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of 40 documents each, for all tests: copy it to change it."""
    return make_corpus(tmp_path_factory.mktemp("corpus"), documents=40)
