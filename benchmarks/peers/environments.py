"""The peers of ``cpu_peers.py`` and their virtual environments."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Peer:
    """A contender other than llmtrain: its script, its packages, its extra environment."""

    script: str
    venv: str
    packages: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()


PEERS = {
    "litgpt": Peer("litgpt_pretrain.py", "litgpt", ("litgpt==0.5.13",)),
    "litgpt eager": Peer(
        "litgpt_pretrain.py", "litgpt", ("litgpt==0.5.13",), (("TORCHDYNAMO_DISABLE", "1"),)
    ),
    "huggingface": Peer("hf_trainer.py", "hf", ("transformers==5.23.0", "accelerate==1.15.0")),
    "plain": Peer("plain_loop.py", "plain", ()),
}


def make_environment(work: Path, peer: Peer, pip_args: list[str]) -> Path:
    """Python of the peer's virtual environment, made when it is not there."""
    folder = work / "venvs" / peer.venv
    python, done = folder / "bin" / "python", folder / "installed.txt"
    wanted = "\n".join((TORCH, *peer.packages))
    if done.exists() and done.read_text() == wanted:
        return python
    print(f"making the environment of {peer.venv}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pip_args]
    # torch first and pinned in both calls, so that no other request replaces the CPU build.
    subprocess.run([*pip, TORCH, "numpy"], check=True)
    if peer.packages:
        subprocess.run([*pip, TORCH, *peer.packages], check=True)
    done.write_text(wanted)
    return python


def installed(python: Path) -> list[str]:
    """pip freeze of an environment."""
    out = subprocess.run(
        [str(python), "-m", "pip", "freeze"], capture_output=True, text=True, check=True
    )
    return [
        line for line in out.stdout.splitlines() if "@" not in line and not line.startswith("-e")
    ]
