"""Saving, finding, verifying and exporting the state of a run.

``Checkpointer`` is what the training loop uses::

    checkpoints = Checkpointer(run / "checkpoints", cfg.checkpoint, world.cpu_group)
    resume = checkpoints.resolve(cfg.checkpoint.resume)       # verified; .skipped: print these
    if resume.path:
        checkpoints.load(resume.path, tensors, verify=False)  # in place, any layout
        files = read_files(resume.path)                       # data.json, extra.json, meta.json
    ...
    checkpoints.save(step, tensors, files, meta=..., permanent=False)
    if saved := checkpoints.poll():                           # every step; raises on failure
        print(saved.path, saved.bytes, saved.stall_seconds)
    checkpoints.close()                                       # waits for the last one

``load_checkpoint`` reads one without being the run that writes it; ``export_model`` writes the
model alone. On disk: ``layout`` describes the files, ``store`` publishes and prunes, ``verify``
checks, ``storage`` is the torch.distributed.checkpoint side. Only what needs torch imports it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmtrain.checkpoint.layout import (
    HOOK_PREFIX,
    MODEL_PREFIX,
    OPTIM_PREFIX,
    Checkpoint,
    checkpoints_folder,
    scan,
)
from llmtrain.checkpoint.store import Store, latest
from llmtrain.checkpoint.verify import read_files, verify

if TYPE_CHECKING:
    from llmtrain.checkpoint.checkpointer import Checkpointer, Resume
    from llmtrain.checkpoint.export import export_model
    from llmtrain.checkpoint.loading import load_checkpoint
    from llmtrain.checkpoint.saving import Saved
    from llmtrain.checkpoint.storage import SafetensorsReader, SafetensorsWriter

__all__ = [
    "HOOK_PREFIX",
    "MODEL_PREFIX",
    "OPTIM_PREFIX",
    "Checkpoint",
    "Checkpointer",
    "Resume",
    "SafetensorsReader",
    "SafetensorsWriter",
    "Saved",
    "Store",
    "checkpoints_folder",
    "export_model",
    "latest",
    "load_checkpoint",
    "read_files",
    "scan",
    "verify",
]

_NEEDS_TORCH = {
    "Checkpointer": "checkpointer",
    "Resume": "checkpointer",
    "SafetensorsReader": "storage",
    "SafetensorsWriter": "storage",
    "Saved": "saving",
    "export_model": "export",
    "load_checkpoint": "loading",
}


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_NEEDS_TORCH[name]}"), name)
