"""Hugging Face Trainer with LlamaForCausalLM, as its documentation has it, on CPU."""

from __future__ import annotations

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
from trainer import Tokens, train
from transformers import LlamaConfig, LlamaForCausalLM


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
    train(
        job,
        model,
        Tokens(job.tokens, SEQ_LEN, job.steps * BATCH),
        bf16=job.bf16,
        learning_rate=LR,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=CLIP,
        per_device_train_batch_size=BATCH,
        max_steps=job.steps,
        logging_steps=10,
        logging_first_step=True,
    )
    attention = model.config._attn_implementation
    note = f"bf16={job.bf16}, adamw_torch_fused, attention {attention}"
    job.finish(model.num_parameters(), [job.losses[0], job.losses[-1]], note)


if __name__ == "__main__":
    main()
