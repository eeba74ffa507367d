"""The papers a repository comes with: changelog, licence, CI script, links."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import llmtrain

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def headings(page: Path) -> set[str]:
    """Anchors of a page, as the documentation site makes them."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    found = re.findall(r"^#+\s+(.*)$", text, flags=re.MULTILINE)
    plain = (re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in found)
    return {re.sub(r"[^\w\s-]", "", title.lower()).strip().replace(" ", "-") for title in plain}


def test_changelog_has_unreleased_changes_and_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    sections = re.findall(r"^## \[([^\]]+)\]", text, flags=re.MULTILINE)
    assert sections[0] == "Unreleased"
    unreleased = text.split("## [Unreleased]")[1].split("\n## ")[0]
    assert re.search(r"^### (Added|Changed|Fixed|Removed)$", unreleased, flags=re.MULTILINE)
    assert re.search(r"^- \w", unreleased, flags=re.MULTILINE)
    assert re.fullmatch(r"\d+\.\d+\.\d+", llmtrain.__version__)


def test_licence_is_the_one_the_package_declares() -> None:
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text("utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    for target in LINK.findall(text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor and file.suffix == ".md":
            assert anchor in headings(file), f"{page.name}: {target}"


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert str(page.relative_to(ROOT / "docs")) in text, page


@pytest.mark.parametrize("script", [".ci/run", "launch/local.sh"])
def test_scripts_parse_and_are_strict(script: str) -> None:
    path = ROOT / script
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert "set -euo pipefail" in path.read_text("utf-8")
    assert path.stat().st_mode & 0o111


def test_local_launcher_explains_itself() -> None:
    done = subprocess.run(
        [str(ROOT / "launch" / "local.sh")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "usage:" in done.stderr


def test_make_help_lists_the_targets() -> None:
    done = subprocess.run(
        ["make", "--no-print-directory", "help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    for target in ("quickstart", "test", "test-gpu", "check", "docs", "clean"):
        assert re.search(rf"^{target}\s+\w", done.stdout, flags=re.MULTILINE)


def test_make_says_when_python_is_too_old(tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "install", "PYTHON=false", f"VENV={tmp_path / 'venv'}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr
    assert not (tmp_path / "venv").exists()
