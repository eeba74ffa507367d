"""peft and Hugging Face's Trainer, as their documentation has it, on CPU; or the Trainer alone."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
from finetune_job import BATCH, BETAS, CLIP, LR, RANK, SEQ_LEN, FinetuneJob
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)


class Tokens(Dataset[dict[str, torch.Tensor]]):
    """Consecutive pieces of the token file."""

    def __init__(self, job: FinetuneJob) -> None:
        self.data = np.memmap(job.tokens, dtype=np.uint16, mode="r")
        self.samples = job.steps * BATCH

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.data[i * SEQ_LEN : (i + 1) * SEQ_LEN].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


class Stamp(TrainerCallback):  # type: ignore[misc]
    """Notes when each optimizer step ends, and the losses that are logged."""

    def __init__(self, job: FinetuneJob) -> None:
        self.job = job

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.job.stamp()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.job.losses.append(float(logs["loss"]))


def main() -> None:
    """Train and write the stamps."""
    job = FinetuneJob()
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    model.config.use_cache = False
    if job.method == "lora":
        import peft

        settings = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        model = peft.get_peft_model(model, settings)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            optim="adamw_torch_fused",
            learning_rate=LR,
            lr_scheduler_type="constant",
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            weight_decay=0.0,
            max_grad_norm=CLIP,
            per_device_train_batch_size=BATCH,
            max_steps=job.steps,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=Tokens(job),
            data_collator=default_data_collator,
            callbacks=[Stamp(job)],
        )
        trainer.train()
    job.finish(sum(p.numel() for p in model.parameters() if p.requires_grad))


if __name__ == "__main__":
    main()
