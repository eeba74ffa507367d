"""peft and Hugging Face's Trainer, as their documentation has it, on CPU; or the Trainer alone."""

from __future__ import annotations

import json
from typing import Any

import torch
from finetune_job import BATCH, BETAS, CLIP, LR, RANK, SEQ_LEN, TALKS, FinetuneJob
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from trainer import Tokens, train
from transformers import AutoModelForCausalLM

IGNORED = -100


class Talks(Dataset[dict[str, Any]]):
    """Conversations of their own lengths; labels on the answers."""

    def __init__(self, job: FinetuneJob) -> None:
        self.talks = json.loads(job.tokens.read_text())

    def __len__(self) -> int:
        return len(self.talks)

    def __getitem__(self, i: int) -> dict[str, Any]:
        ids, begin = self.talks[i]
        return {
            "input_ids": ids,
            "labels": [IGNORED] * begin + ids[begin:],
            "length": len(ids),
        }


def collator(job: FinetuneJob) -> Any:
    """Padding to the longest of the batch, as ``DataCollatorForSeq2Seq`` does by default."""

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        def padded(key: str, value: int) -> torch.Tensor:
            rows = [torch.tensor(sample[key]) for sample in batch]
            return pad_sequence(rows, batch_first=True, padding_value=value)

        ids, labels = padded("input_ids", 0), padded("labels", IGNORED)
        lengths = torch.tensor([len(sample["input_ids"]) for sample in batch])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        job.useful.append(int((labels != IGNORED).sum()))
        return {"input_ids": ids, "labels": labels, "attention_mask": mask.long()}

    return collate


def main() -> None:
    """Train and write the stamps."""
    job = FinetuneJob()
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    model.config.use_cache = False
    if job.method == "lora":
        import peft

        settings = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        model = peft.get_peft_model(model, settings)
    arguments: dict[str, Any] = {
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "weight_decay": 0.0,
        "max_grad_norm": CLIP,
        "logging_steps": 1,
    }
    if job.talks:
        if job.groups:
            arguments["train_sampling_strategy"] = "group_by_length"
        train(
            job,
            model,
            Talks(job),
            collator(job),
            per_device_train_batch_size=TALKS,
            num_train_epochs=1,
            dataloader_drop_last=True,
            remove_unused_columns=False,
            **arguments,
        )
    else:
        rows = Tokens(job.tokens, SEQ_LEN, job.steps * BATCH)
        job.useful = [BATCH * SEQ_LEN] * job.steps
        train(
            job,
            model,
            rows,
            per_device_train_batch_size=BATCH,
            max_steps=job.steps,
            **arguments,
        )
    job.finish(sum(p.numel() for p in model.parameters() if p.requires_grad))


if __name__ == "__main__":
    main()
