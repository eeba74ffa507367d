"""litgpt's own ``pretrain.setup`` on CPU: Fabric, bf16-mixed or 32-true, its loop and logging.

Differences from what a user gets without asking: the optimizer is fused AdamW (litgpt fuses on
CUDA only; the others here are fused too), the logger only notes the time, no checkpoints.
litgpt compiles the model; TORCHDYNAMO_DISABLE=1 makes the same code run eagerly.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.loggers.logger import Logger
from litgpt import pretrain
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from shape import (
    BATCH,
    BETAS,
    CLIP,
    D_FF,
    D_MODEL,
    LR,
    N_HEADS,
    N_LAYERS,
    NORM_EPS,
    SEQ_LEN,
    TOKENS_PER_STEP,
    VOCAB,
    WEIGHT_DECAY,
    Job,
)
from torch.utils.data import DataLoader, Dataset

JOB = Job()


class FusedAdamW(torch.optim.AdamW):
    """AdamW whose ``fused`` litgpt does not switch off on CPU."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, fused=True, **options)


class Tokens(Dataset[torch.Tensor]):
    """Consecutive pieces of the token file, one token longer than the context."""

    def __init__(self) -> None:
        self.data = np.memmap(JOB.tokens, dtype=np.uint16, mode="r")

    def __len__(self) -> int:
        return JOB.steps * BATCH

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.from_numpy(self.data[i * SEQ_LEN : (i + 1) * SEQ_LEN + 1].astype(np.int64))


class TokenFile(DataModule):
    """litgpt's interface to the token file."""

    def connect(self, *_: Any, **__: Any) -> None:
        """Nothing to connect."""

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        """Batches in order."""
        return DataLoader(Tokens(), batch_size=BATCH)

    val_dataloader = train_dataloader


class StampLogger(Logger):
    """Notes when litgpt logs an iteration, which is the end of an optimizer step here."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    name = "stamp"
    version = 0

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Not kept."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """One iteration has ended."""
        if "iter_time" in metrics:
            JOB.stamp()
            self.losses.append(float(metrics["loss"]))


def main() -> None:
    """Train and write the stamps."""
    logger = StampLogger()
    parameters: list[int] = []
    count = pretrain.num_parameters

    def remember(model: torch.nn.Module, *options: Any) -> int:
        parameters.append(count(model, *options))
        return parameters[-1]

    pretrain.choose_logger = lambda *_, **__: logger
    pretrain.num_parameters = remember
    pretrain.save_checkpoint = lambda *_, **__: None
    config = Config(
        name="llama-17m",
        block_size=SEQ_LEN,
        vocab_size=VOCAB,
        padded_vocab_size=VOCAB,
        n_layer=N_LAYERS,
        n_head=N_HEADS,
        n_embd=D_MODEL,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=NORM_EPS,
        mlp_class_name="LLaMAMLP",
        intermediate_size=D_FF,
    )
    precision = "bf16-mixed" if JOB.bf16 else "32-true"
    options = {"lr": LR, "betas": BETAS, "weight_decay": WEIGHT_DECAY}
    with tempfile.TemporaryDirectory() as folder:
        pretrain.setup(
            "llama-17m",
            model_config=config,
            out_dir=Path(folder),
            precision=precision,
            data=TokenFile(),
            train=TrainArgs(
                save_interval=None,
                log_interval=1,
                global_batch_size=BATCH,
                micro_batch_size=BATCH,
                max_tokens=JOB.steps * TOKENS_PER_STEP,
                max_norm=CLIP,
                lr_warmup_steps=1,
                tie_embeddings=False,
            ),
            eval=EvalArgs(interval=10**9, max_iters=1, final_validation=False),
            optimizer={"class_path": f"{__name__}.FusedAdamW", "init_args": options},
            devices=1,
        )
    eager = os.environ.get("TORCHDYNAMO_DISABLE") == "1"
    note = f"pretrain.setup, {precision}, {'eager' if eager else 'torch.compile'}"
    JOB.finish(parameters[0], [logger.losses[0], logger.losses[-1]], note)


if __name__ == "__main__":
    main()
