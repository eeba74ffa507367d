"""Hugging Face Trainer with LlamaForCausalLM, as its documentation has it, on CPU."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
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
    ROPE_THETA,
    SEQ_LEN,
    VOCAB,
    WEIGHT_DECAY,
    Job,
)
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)


class Tokens(Dataset[dict[str, torch.Tensor]]):
    """Consecutive pieces of the token file."""

    def __init__(self, job: Job) -> None:
        self.data = np.memmap(job.tokens, dtype=np.uint16, mode="r")
        self.samples = job.steps * BATCH

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.data[i * SEQ_LEN : (i + 1) * SEQ_LEN].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


class Stamp(TrainerCallback):  # type: ignore[misc]
    """Notes when each optimizer step ends, and the losses that are logged."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.losses: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.job.stamp()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


def main() -> None:
    """Train and write the stamps."""
    job = Job()
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        intermediate_size=D_FF,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_HEADS,
        max_position_embeddings=SEQ_LEN,
        rms_norm_eps=NORM_EPS,
        rope_theta=ROPE_THETA,
        tie_word_embeddings=False,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            bf16=job.bf16,
            optim="adamw_torch_fused",
            learning_rate=LR,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=CLIP,
            per_device_train_batch_size=BATCH,
            max_steps=job.steps,
            logging_steps=10,
            logging_first_step=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        stamp = Stamp(job)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=Tokens(job),
            data_collator=default_data_collator,
            callbacks=[stamp],
        )
        trainer.train()
    losses = [stamp.losses[0], stamp.losses[-1]]
    attention = model.config._attn_implementation
    note = f"bf16={job.bf16}, adamw_torch_fused, attention {attention}"
    job.finish(model.num_parameters(), losses, note)


if __name__ == "__main__":
    main()
