"""What stands in a checkpoint."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

LAST = 20  # of tiny_config


def stored(run: Path, step: int = LAST) -> dict[str, Tensor]:
    """All tensors of a run's checkpoint that was made by one process."""
    out: dict[str, Tensor] = {}
    for file in sorted((run / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")):
        out.update(load_file(file))
    return out


def stored_bits(run: Path, step: int = LAST) -> dict[str, bytes]:
    """The same, to be compared bit for bit; with the state of the optimizer."""
    out = bits(run / "checkpoints" / f"step-{step:08d}")
    assert any(key.startswith("optim.") for key in out)
    return out


def bits(checkpoint: Path) -> dict[str, bytes]:
    """All tensors of a checkpoint, bit for bit."""
    out: dict[str, bytes] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        out.update({key: value.numpy().tobytes() for key, value in load_file(file).items()})
    return out


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are the same, names and bits."""
    return a.keys() == b.keys() and all(a[k].numpy().tobytes() == b[k].numpy().tobytes() for k in a)
