"""What the benchmarks of a GPU share: timing by its events, and a step of a model."""

from __future__ import annotations

from collections.abc import Callable

import common
import torch

from llmtrain.config.schema import LossConfig
from llmtrain.loss import head_loss
from llmtrain.model import Decoder

Work = Callable[[], object]


def milliseconds(
    work: Work, calls: int = 1, *, ahead: bool = False, on_gpu: bool | None = None
) -> float:
    """GPU time of one of ``calls`` calls in a row; the clock's where on_gpu is false.

    ahead: the GPU is kept waiting until all are in its queue, so that it is the kernels' own time
    and not the host's between them. on_gpu: None: where there is one.
    """
    if not (torch.cuda.is_available() if on_gpu is None else on_gpu):
        return 1000 * common.seconds(work)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if ahead:
        torch.cuda._sleep(4_000_000)  # cycles, 2 ms
    begin.record()
    for _ in range(calls):
        work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / calls


def training_step(model: Decoder, batch: int, sequence: int) -> Work:
    """A training step of a model, forward to AdamW, on one batch of random tokens."""
    device = next(model.parameters()).device
    words = model.cfg.vocab_size
    assert words is not None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, words, (batch, sequence), device=device)
    ones = torch.ones(tokens.shape, device=device)

    def step() -> object:
        optimizer.zero_grad()
        output = model(
            tokens,
            head_fn=lambda hidden, head: head_loss(
                hidden, head, tokens, ones, LossConfig(), float(tokens.numel())
            ),
        )
        output.loss.backward()
        return optimizer.step()

    return step
