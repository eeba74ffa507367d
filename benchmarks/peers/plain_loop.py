"""The plain torch loop: the model as a tutorial writes it, autocast where bf16, fused AdamW."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
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
from torch import Tensor, nn

D_HEAD = D_MODEL // N_HEADS


def linear(n_in: int, n_out: int) -> nn.Linear:
    """A linear layer without bias."""
    return nn.Linear(n_in, n_out, bias=False)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [b, h, s, d]."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Block(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(D_MODEL, eps=NORM_EPS)
        self.norm2 = nn.RMSNorm(D_MODEL, eps=NORM_EPS)
        self.q, self.k, self.v, self.o = (linear(D_MODEL, D_MODEL) for _ in range(4))
        self.gate, self.up = linear(D_MODEL, D_FF), linear(D_MODEL, D_FF)
        self.down = linear(D_FF, D_MODEL)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, s, _ = x.shape
        h = self.norm1(x)
        q, k, v = (
            f(h).view(b, s, N_HEADS, D_HEAD).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, s, D_MODEL))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """The decoder; returns logits."""

    cos: Tensor
    sin: Tensor

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D_MODEL)
        self.blocks = nn.ModuleList(Block() for _ in range(N_LAYERS))
        self.norm = nn.RMSNorm(D_MODEL, eps=NORM_EPS)
        self.head = linear(D_MODEL, VOCAB)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
        freq = ROPE_THETA ** (-torch.arange(0, D_HEAD, 2).float() / D_HEAD)
        angle = torch.outer(torch.arange(SEQ_LEN).float(), freq).repeat(1, 2)
        # In the compute dtype, as the attention inputs are under autocast.
        self.register_buffer("cos", angle.cos().to(dtype))
        self.register_buffer("sin", angle.sin().to(dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(self.norm(x))


def main() -> None:
    """Train and write the stamps."""
    job = Job()
    torch.manual_seed(0)
    model = Llama(torch.bfloat16 if job.bf16 else torch.float32)
    data = np.memmap(job.tokens, dtype=np.uint16, mode="r")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    losses = []
    size = BATCH * SEQ_LEN
    for step in range(job.steps):
        piece = torch.from_numpy(data[step * size : (step + 1) * size + 1].astype(np.int64))
        tokens, targets = piece[:-1].view(BATCH, SEQ_LEN), piece[1:].view(BATCH, SEQ_LEN)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=job.bf16):
            logits = model(tokens)
            loss = F.cross_entropy(logits.view(-1, VOCAB), targets.reshape(-1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
        job.stamp()
    count = sum(p.numel() for p in model.parameters())
    formats = "autocast bf16" if job.bf16 else "fp32"
    job.finish(count, [losses[0], losses[-1]], f"{formats}, SDPA, fused AdamW, eager")


if __name__ == "__main__":
    main()
