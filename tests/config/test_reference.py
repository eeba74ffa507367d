"""The reference page is current, and every shipped YAML file loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.config import load_config, to_yaml
from llmtrain.config.reference import reference_page

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").glob("**/*.yaml"))


def test_the_committed_page_is_current() -> None:
    committed = (ROOT / "docs/reference/config.md").read_text(encoding="utf-8")
    assert committed == reference_page(), (
        "run python -m llmtrain.config.reference docs/reference/config.md"
    )


def test_the_page_has_every_key_with_a_meaning() -> None:
    page = reference_page()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    for row in rows:
        cells = [c.strip() for c in row.replace("\\|", "").strip("|").split("|")]
        assert len(cells) == 4 and cells[1] and cells[3], row


def test_there_are_shipped_files() -> None:
    assert SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_load(name: str, tmp_path: Path) -> None:
    cfg = load_config(ROOT / name)
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(cfg), encoding="utf-8")
    assert load_config(again) == cfg
