"""These tests start a SLURM: only where they are asked for (``-m cluster``, no ``-m`` at all)."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    expression = config.getoption("-m")
    if expression and "cluster" not in expression:
        here = Path(__file__).parent
        gone = [item for item in items if here in item.path.parents]
        config.hook.pytest_deselected(items=gone)
        items[:] = [item for item in items if item not in gone]
