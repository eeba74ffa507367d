"""An editable install, as `make install` makes one, works whatever folder one stands in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import llmtrain

ROOT = Path(llmtrain.__file__).parents[1]
BUILD = "import sys; from setuptools.build_meta import build_editable; build_editable(sys.argv[1])"


def test_the_module_runs_in_the_folder_that_holds_the_clone(tmp_path: Path) -> None:
    """There Python meets the clone's own folder, called llmtrain, before the package in it."""
    clone = tmp_path / "llmtrain"
    shutil.copytree(
        ROOT / "llmtrain", clone / "llmtrain", ignore=shutil.ignore_patterns("__pycache__", "*.so")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone / name)
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    built = subprocess.run(
        [sys.executable, "-c", BUILD, str(tmp_path)],
        cwd=clone, env=clean, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    (wheel,) = tmp_path.glob("llmtrain-*.whl")
    zipfile.ZipFile(wheel).extractall(site)

    for folder in (tmp_path, clone, site):
        done = subprocess.run(
            [python, "-m", "llmtrain", "--version"],
            cwd=folder, env=clean, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, f"llmtrain {llmtrain.__version__}\n"), (
            folder,
            done.stderr,
        )
