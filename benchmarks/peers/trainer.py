"""Hugging Face's Trainer under the stopwatch: what its scripts here share."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stopwatch import Stopwatch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator


class Tokens(Dataset[dict[str, torch.Tensor]]):
    """Consecutive pieces of a file of raw uint16 tokens."""

    def __init__(self, path: Path, length: int, samples: int) -> None:
        self.data = np.memmap(path, dtype=np.uint16, mode="r")
        self.length, self.samples = length, samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        piece = self.data[i * self.length : (i + 1) * self.length]
        ids = torch.from_numpy(piece.astype(np.int64))
        return {"input_ids": ids, "labels": ids}


class Stamp(TrainerCallback):  # type: ignore[misc]
    """Notes when each optimizer step ends, and the losses that are logged."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.watch.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.watch.stamp()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.watch.losses.append(float(logs["loss"]))


def train(
    watch: Stopwatch,
    model: Any,
    samples: Dataset[Any],
    collate: Callable[[list[Any]], dict[str, Any]] = default_data_collator,
    **arguments: Any,
) -> None:
    """Train as the Trainer's documentation has it, on the CPU with fused AdamW."""
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            optim="adamw_torch_fused",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **arguments,
        )
        trainer = Trainer(
            model=model,
            args=settings,
            train_dataset=samples,
            data_collator=collate,
            callbacks=[Stamp(watch)],
        )
        trainer.train()
