"""Continuing a text, token by token."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt: list[int],
    new_tokens: int,
    context: int,
    *,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
    eos_id: int | None = None,
) -> list[int]:
    """Sample up to ``new_tokens`` tokens after ``prompt``.

    model: called as model(tokens [1, s]) -> logits [1, s, vocab]. context: most tokens the model
    sees; older ones fall out. temperature 0 picks the most likely token; otherwise one of the
    ``top_k`` most likely is drawn (0: of all), reproducibly for a ``seed``. Stops at ``eos_id``.
    The whole window is computed for every token; under FSDP2 all ranks must call it alike.
    """
    device = next(model.parameters()).device
    random = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(new_tokens):
        window = torch.tensor([tokens[-context:]], device=device)
        logits = model(window)[0, -1].float().cpu()
        choice = _pick(logits, temperature, top_k, random)
        if choice == eos_id:
            break
        tokens.append(choice)
    return tokens[len(prompt) :]


def _pick(logits: Tensor, temperature: float, top_k: int, random: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        kept, ids = logits.topk(min(top_k, logits.numel()))
    else:
        kept, ids = logits, torch.arange(logits.numel())
    probabilities = torch.softmax(kept / temperature, dim=0)
    return int(ids[torch.multinomial(probabilities, 1, generator=random)])
