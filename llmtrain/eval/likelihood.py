"""Log-likelihoods of texts under a model, and continuations: what task suites ask for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llmtrain.errors import CheckpointError
from llmtrain.eval.generation import Sampling, generate
from llmtrain.eval.loading import Trained
from llmtrain.model import Head, reads_whole_input

# What a suite's request leaves open, as lm-evaluation-harness does.
MAX_NEW_TOKENS = 256


class TextModel:
    """A loaded model that takes and gives text. batch: texts that are computed together.

    Raises CheckpointError where the checkpoint has no tokenizer.
    """

    def __init__(self, trained: Trained, batch: int = 16) -> None:
        if trained.tokenizer is None:
            raise CheckpointError(
                f"{trained.path} has no tokenizer.json, so text cannot be encoded; train with "
                "data.corpus or data.tokenizer set"
            )
        self.trained, self.tokenizer = trained, trained.tokenizer
        # A format that takes its scale from all of a layer's input would mix texts.
        self.batch = 1 if reads_whole_input(trained.model) else batch
        assert trained.model_cfg.max_seq_len is not None
        self.context: int = trained.model_cfg.max_seq_len
        self.device = next(trained.model.parameters()).device

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of a context and of what follows. Spaces at the context's end go along with what
        follows, as a tokenizer would see them; an empty context is the end-of-text token."""
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        if not stripped:
            return [self._prefix], self.tokenizer.encode(continuation)
        before = self.tokenizer.encode(stripped)
        return before, self.tokenizer.encode(stripped + continuation)[len(before) :]

    @property
    def _prefix(self) -> int:
        eos: int = self.tokenizer.eos_id
        return eos

    def loglikelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of each continuation after its context: log-probability in nats, and whether it is what
        greedy decoding writes. Texts longer than the model's lose their beginning."""
        return self.score([self.encode_pair(*pair) for pair in pairs])

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """Log-probability in nats of whole texts after the end-of-text token: each token once, in
        windows of the model's length (see ``windows``)."""
        pieces = [
            (number, window)
            for number, text in enumerate(texts)
            for window in windows(self.tokenizer.encode(text), self._prefix, self.context)
        ]
        sums = [0.0] * len(texts)
        scored = self.score([window for _, window in pieces])
        for (number, _), (value, _) in zip(pieces, scored, strict=True):
            sums[number] += value
        return sums

    @torch.no_grad()
    def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """``loglikelihoods`` of tokens (context, continuation); longest first, to bound memory."""
        out: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        cut = [
            ((context + new)[-self.context - 1 :], min(len(new), self.context))
            for context, new in pairs
        ]
        order = sorted(
            (i for i in range(len(pairs)) if cut[i][1]), key=lambda i: (-len(cut[i][0]), i)
        )
        for first in range(0, len(order), self.batch):
            chosen = order[first : first + self.batch]
            for i, result in zip(chosen, self._score([cut[i] for i in chosen]), strict=True):
                out[i] = result
        return out

    def _score(self, rows: Sequence[tuple[list[int], int]]) -> Iterator[tuple[float, bool]]:
        """rows: (tokens, how many of the last of them count). Rows are padded behind, where
        nothing before looks."""
        width = max(len(tokens) for tokens, _ in rows) - 1
        inputs = torch.tensor([t[:-1] + [0] * (width + 1 - len(t)) for t, _ in rows])
        places = [(i, len(t) - 1 - n + k) for i, (t, n) in enumerate(rows) for k in range(n)]
        index = torch.tensor(places, device=self.device)
        targets = torch.tensor([token for t, n in rows for token in t[-n:]], device=self.device)

        def head_fn(hidden: Tensor, head: Head) -> Tensor:
            logits: Tensor = head(hidden[index[:, 0], index[:, 1]])
            return logits

        logits = self.trained.model(inputs.to(self.device), head_fn=head_fn).float()
        chances = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].double().cpu()
        best = (logits.argmax(-1) == targets).cpu()
        counts = [n for _, n in rows]
        for own, hit in zip(chances.split(counts), best.split(counts), strict=True):
            yield float(own.sum()), bool(hit.all())

    def continue_texts(
        self, asked: Sequence[tuple[str, dict[str, Any]]], numbers: Sequence[int] | None = None
    ) -> list[str]:
        """Continuations of contexts. Each comes with settings as task suites write them: until
        (text or list), max_gen_toks, do_sample, temperature, top_k, top_p. They end before the
        first text of ``until``; drawn ones by their number as seed (numbers: of each, when these
        are a part of what is asked). Contexts lose their beginning where the model has no room."""
        seeds = range(len(asked)) if numbers is None else numbers
        done = [""] * len(asked)
        groups: dict[int, list[int]] = {}
        for i, (_, settings) in enumerate(asked):
            groups.setdefault(self._room(settings), []).append(i)
        for new, members in groups.items():
            prompts, until, rules = [], [], []
            for i in members:
                context, settings = asked[i]
                tokens = self.tokenizer.encode(context) or [self._prefix]
                prompts.append(tokens[new - self.context :])
                until.append(_ends(settings.get("until")))
                rules.append(_sampling(settings, seed=seeds[i]))

            def stop(number: int, tokens: list[int], until: list[list[str]] = until) -> bool:
                text = self.tokenizer.decode(tokens) if until[number] else ""
                return any(end in text for end in until[number])

            found = generate(
                self.trained.model,
                prompts,
                new,
                self.context,
                rules,
                eos_id=self.tokenizer.eos_id,
                stop=stop,
                batch=self.batch,
            )
            for i, ends, text in zip(members, until, found, strict=True):
                done[i] = _before(self.tokenizer.decode(text.tokens), ends)
        return done

    def _room(self, settings: dict[str, Any]) -> int:
        """New tokens at most; half of the model's length stays for the context."""
        wanted = int(settings.get("max_gen_toks", MAX_NEW_TOKENS))
        return max(min(wanted, self.context // 2), 1)


def windows(tokens: list[int], prefix: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """(context, tokens to score) that score each of ``tokens`` once, with at most ``length`` tokens
    read at a time: whole windows, the last one reaching back as far as it can."""
    for start in range(0, len(tokens), length):
        end = min(start + length, len(tokens))
        whole = [prefix, *tokens][max(end - length, 0) : end]
        yield whole[: len(whole) - (end - start) + 1], tokens[start:end]


def _ends(until: Any) -> list[str]:
    """Texts that end a continuation."""
    listed = [until] if isinstance(until, str) else list(until or ())
    return [text for text in listed if text]


def _before(text: str, ends: list[str]) -> str:
    for end in ends:
        text = text.partition(end)[0]
    return text


def _sampling(settings: dict[str, Any], seed: int) -> Sampling:
    temperature = float(settings.get("temperature", 0.0) or 0.0)
    if not settings.get("do_sample", temperature > 0):
        return Sampling(temperature=0)
    top_k, top_p = int(settings.get("top_k", 0) or 0), float(settings.get("top_p", 1.0) or 1.0)
    return Sampling(temperature or 1.0, top_k, top_p, seed)
