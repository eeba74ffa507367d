"""Checkpoints of a run: what goes in beside the tensors, and where a run resumes."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llmtrain
from llmtrain.checkpoint import Checkpointer
from llmtrain.config import to_yaml
from llmtrain.config.schema import RunConfig
from llmtrain.data.plan import DataPlan
from llmtrain.errors import CheckpointError
from llmtrain.parallel import World


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to go on from: its folder, updates made, samples seen, and extra state."""

    path: Path
    step: int
    samples: int
    extra: dict[str, Any]


class Saver:
    """Saves and finds the checkpoints of one run."""

    def __init__(self, cfg: RunConfig, plan: DataPlan, world: World, checkpointer: Checkpointer):
        self.cfg, self.plan, self.world, self.checkpointer = cfg, plan, world, checkpointer
        self._last: int | None = None

    def save(
        self, step: int, tensors: Mapping[str, Tensor], extra: dict[str, Any], permanent: bool
    ) -> None:
        """Checkpoint after update ``step``; all ranks call it. Raises CheckpointError."""
        samples = step * self.cfg.train.global_batch_size
        meta = {
            "step": step,
            "samples": samples,
            "tokens": samples * self.cfg.data.seq_len,
            "world_size": self.world.size,
            "versions": {
                "llmtrain": llmtrain.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        files: dict[str, str | bytes] = {
            "meta.json": json.dumps(meta, indent=1),
            "config.yaml": to_yaml(self.cfg),
            "data.json": json.dumps(self.plan.state(), indent=1),
            "extra.json": json.dumps(extra),
        }
        if self.plan.tokenizer_path is not None:
            files["tokenizer.json"] = self.plan.tokenizer_path.read_bytes()
        self.checkpointer.save(step, tensors, files, permanent=permanent)
        self._last = step

    def has(self, step: int) -> bool:
        """Whether update ``step`` was saved by this process."""
        return self._last == step

    def wait(self) -> None:
        """Until everything is on disk. Raises CheckpointError when that failed."""
        self.checkpointer.wait()

    def find(self) -> ResumePoint | None:
        """Where ``checkpoint.resume`` says to go on, or None for a fresh start."""
        wanted = self.cfg.checkpoint.resume
        if wanted == "never":
            return None
        path = self.checkpointer.latest_good() if wanted == "auto" else Path(wanted)
        if path is None:
            return None
        files = self.checkpointer.read_files(path)
        meta = json.loads(files["meta.json"])
        batch = self.cfg.train.global_batch_size
        if meta["samples"] != meta["step"] * batch:
            old = meta["samples"] // max(meta["step"], 1)
            raise CheckpointError(
                f"train.global_batch_size: the checkpoint {path} was made with {old} and the "
                f"config says {batch}; resume with train.global_batch_size={old} (ranks and "
                "train.micro_batch_size may change)"
            )
        self.plan.check_resume(json.loads(files["data.json"]), meta["samples"])
        self._last = meta["step"]
        return ResumePoint(path, meta["step"], meta["samples"], json.loads(files["extra.json"]))
