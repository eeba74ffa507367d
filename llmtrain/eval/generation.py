"""Continuing texts, token by token, several at a time, with cached keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmtrain.errors import LlmtrainError
from llmtrain.model import KeyValueCache, reads_whole_input

# (number of the prompt, its new tokens so far) -> whether its text is done.
Stop = Callable[[int, list[int]], bool]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0: the most likely one; else one is drawn from the
    ``top_k`` most likely (0: all), and of these from the fewest that have ``top_p`` of the
    probability (Holtzman et al. 2019, 1904.09751), reproducibly for a ``seed``."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 1.0
    seed: int = 0

    def pick(self, logits: Tensor, random: torch.Generator) -> int:
        """A token by ``logits`` [vocab_size], float32 on the CPU."""
        if self.temperature == 0:
            return int(logits.argmax())
        count = min(self.top_k or logits.numel(), logits.numel())
        kept, ids = logits.topk(count)
        probabilities = torch.softmax(kept / self.temperature, dim=0)
        if self.top_p < 1:
            # The most likely come first; the one that completes the share is still drawn from.
            before = probabilities.cumsum(0) - probabilities
            probabilities = torch.where(before < self.top_p, probabilities, 0.0)
        return int(ids[torch.multinomial(probabilities, 1, generator=random)])


@dataclass(frozen=True)
class Continuation:
    """tokens: the new ones, without the end-of-text token. ended: by "eos", by "stop" (the
    caller's rule), at the "length" that was asked for, or at the model's "context"."""

    tokens: list[int]
    ended: str


@dataclass
class _Row:
    """A text that grows. number: of its prompt."""

    number: int
    prompt: list[int]
    sampling: Sampling
    random: torch.Generator
    new: list[int]


class _Rules:
    """When a text is done."""

    def __init__(self, new_tokens: int, context: int, eos_id: int | None, stop: Stop | None):
        self.new_tokens, self.context, self.eos_id, self.stop = new_tokens, context, eos_id, stop

    def most(self, prompt: Sequence[int]) -> int:
        """Most new tokens after a prompt."""
        return min(self.new_tokens, self.context - len(prompt))

    def add(self, row: _Row, token: int) -> str | None:
        """Take the next token; returns how the text ended, None when it goes on."""
        if token == self.eos_id:
            return "eos"
        row.new.append(token)
        if self.stop is not None and self.stop(row.number, row.new):
            return "stop"
        if len(row.new) < self.most(row.prompt):
            return None
        return "length" if len(row.new) == self.new_tokens else "context"


def check_prompts(prompts: Sequence[Sequence[int]], context: int) -> None:
    """Raise LlmtrainError for a prompt that is empty or leaves no room for a token of ``context``,
    by its number."""
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise LlmtrainError(f"prompt {i + 1} is empty; give some text to continue")
        if len(prompt) >= context:
            raise LlmtrainError(
                f"prompt {i + 1} has {len(prompt)} tokens, and a text of this model has at most "
                f"{context} (model.max_seq_len), prompt and continuation together; shorten it"
            )


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    context: int,
    sampling: Sampling | Sequence[Sampling] | None = None,
    *,
    eos_id: int | None = None,
    stop: Stop | None = None,
    batch: int = 16,
) -> list[Continuation]:
    """Continue each of ``prompts`` by up to ``new_tokens`` tokens.

    model: a decoder, or what a train module calls (under FSDP2, tensor or pipeline parallelism
    all ranks call this alike). context: most tokens of a text, prompt included: the model's
    ``max_seq_len``. sampling: for all, or one for each. stop: besides ``eos_id``, ends a text after
    a token. batch: texts that are computed together; each is drawn with a generator of its own,
    and its tokens do not depend on what else is computed, beyond the round-off of products of
    other sizes. Layers whose number format takes a scale from all of its input (dynamic FP8) see
    one text at a time.

    Raises LlmtrainError for a prompt that is empty or leaves no room for a token.
    """
    check_prompts(prompts, context)
    rules = _Rules(new_tokens, context, eos_id, stop)
    drawn = sampling if isinstance(sampling, Sequence) else [sampling or Sampling()] * len(prompts)
    size = 1 if reads_whole_input(model) else batch
    done: dict[int, Continuation] = {}
    for first in range(0, len(prompts), size):
        rows = []
        for number in range(first, min(first + size, len(prompts))):
            random = torch.Generator().manual_seed(drawn[number].seed)
            rows.append(_Row(number, list(prompts[number]), drawn[number], random, []))
        done |= _grow(model, rows, rules)
    return [done[number] for number in range(len(prompts))]


def _grow(model: nn.Module, rows: list[_Row], rules: _Rules) -> dict[int, Continuation]:
    """The finished texts of one batch, by number."""
    device = next(model.parameters()).device
    capacity = max(len(row.prompt) + rules.most(row.prompt) for row in rows)
    cache = KeyValueCache(len(rows), capacity, device)
    width = max(len(row.prompt) for row in rows)
    # What stands behind the shorter prompts is any token: nothing before it sees it.
    fresh = [row.prompt + [row.prompt[0]] * (width - len(row.prompt)) for row in rows]
    counts = [len(row.prompt) for row in rows]
    done: dict[int, Continuation] = {}
    while True:
        cache.begin(counts)
        logits = model(torch.tensor(fresh, device=device), cache=cache)[:, -1].float().cpu()
        going = []
        for i, row in enumerate(rows):
            ended = rules.add(row, row.sampling.pick(logits[i], row.random))
            if ended is None:
                going.append(i)
            else:
                done[row.number] = Continuation(row.new, ended)
        if not going:
            return done
        if len(going) < len(rows):
            cache.keep(going)
            rows = [rows[i] for i in going]
        fresh, counts = [[row.new[-1]] for row in rows], [1] * len(rows)
