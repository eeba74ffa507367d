"""What an adaptation is measured by besides held-out losses: answers, spectra, memory, speed."""

from __future__ import annotations

import json
import random
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from llmtrain.analysis.spectra import spectra
from llmtrain.analysis.weights import open_matrices
from llmtrain.config import RunConfig
from llmtrain.data.batch import Batch
from llmtrain.data.sources.arithmetic import page
from llmtrain.eval.generation import Sampling, generate
from llmtrain.eval.loading import Trained, load_trained
from llmtrain.model import resolve_model
from llmtrain.parallel import World, build_layout
from llmtrain.parallel.hardware import resolve_precision
from llmtrain.train.engine import build_module

FILE = "adaptation.json"
QUESTIONS, _NEW_TOKENS, _PROMPT_TOKENS = 128, 8, 96
# Pages of a corpus are counted from 0, so these are in none of a few gigabytes.
_FIRST_PAGE = 1_000_000_000
_RESULT = re.compile(r" = (-?\d+)(?![\d/.])")


@dataclass(frozen=True)
class Measures:
    """exact_match: share of arithmetic questions answered right. rank90 and full_rank: means over
    the blocks' matrices of the change from the base. memory_bytes: see ``counted_memory``."""

    exact_match: float
    rank90: float
    full_rank: float
    memory_bytes: int
    tokens_per_second: float


def measures(run: Path, base: Path) -> Measures:
    """Of a finished run that began with ``base``; kept in its folder and read back."""
    file = run / FILE
    if file.exists():
        return Measures(**json.loads(file.read_text(encoding="utf-8")))
    trained = load_trained(run, torch.device("cpu"))
    found = spectra(open_matrices(base), open_matrices(run))
    out = Measures(
        exact_match(trained),
        mean(one.rank90 for one in found),
        mean(min(one.shape) for one in found),
        counted_memory(trained.cfg, trained.model_cfg.vocab_size),
        _speed(run),
    )
    file.write_text(json.dumps(asdict(out), indent=1), encoding="utf-8")
    return out


def questions(count: int = QUESTIONS) -> list[tuple[str, str]]:
    """(text up to an equals sign, the number behind it) of pages that no corpus holds, one a page.

    What stands before gives the layout and the steps so far, so every kind of problem of the
    builtin arithmetic comes up, from one-digit sums to long products.
    """
    draw, found = random.Random("llmtrain questions"), []
    for index in range(_FIRST_PAGE, _FIRST_PAGE + count):
        text = page(index)
        match = draw.choice(list(_RESULT.finditer(text)) or [None])
        if match is not None:
            found.append((text[: match.start() + len(" =")], match[1]))
    return found


def exact_match(trained: Trained, asked: list[tuple[str, str]] | None = None) -> float:
    """Share of ``questions`` whose number a model writes next, greedily."""
    asked = questions() if asked is None else asked
    tokenizer, context = trained.tokenizer, trained.model_cfg.max_seq_len
    assert tokenizer is not None and context is not None
    longest = min(_PROMPT_TOKENS, context - _NEW_TOKENS)
    prompts = [tokenizer.encode(text)[-longest:] for text, _ in asked]
    greedy = Sampling(temperature=0)
    new = generate(
        trained.model, prompts, _NEW_TOKENS, context, greedy, eos_id=tokenizer.eos_id, batch=32
    )
    right = 0
    for (_, answer), text in zip(asked, new, strict=True):
        written = re.match(r"\s*(-?\d+)(?![\d/.])", tokenizer.decode(text.tokens))
        right += written is not None and written[1] == answer
    return right / len(asked)


def counted_memory(cfg: RunConfig, vocab_size: int | None) -> int:
    """Bytes of weights, moments, gradients and of what one forward keeps for backward, counted.

    Of a step on this process alone: of what a small run adds to a process, which the process's own
    peak hides.
    """
    model_cfg = resolve_model(cfg, vocab_size)
    device = torch.device("cpu")
    assert model_cfg.n_kv_heads is not None and model_cfg.vocab_size is not None
    layout = build_layout(cfg.parallel, World(0, 1, 0, device, None), model_cfg.n_kv_heads)
    module = build_module(cfg, model_cfg, resolve_precision(cfg.precision, device), layout)
    size, s = cfg.train.micro_batch_size or cfg.train.global_batch_size, cfg.data.seq_len
    tokens = torch.randint(0, model_cfg.vocab_size, (size, s))
    batch = Batch(
        tokens=tokens,
        targets=tokens.roll(-1, 1),
        weights=torch.ones(size, s),
        doc_ids=torch.zeros(size, s, dtype=torch.int32),
        positions=torch.arange(s).expand(size, s),
        source_ids=torch.zeros(size, dtype=torch.int64),
        sample_ids=torch.arange(size),
    )
    own = {p.untyped_storage().data_ptr() for p in module.params.values()}
    kept: dict[int, int] = {}
    alive = []  # else a place in memory would be counted once for several tensors in turn

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module.loss(batch, 1.0)
    gradients = sum(p.nbytes for p in module.params.values() if p.requires_grad)
    state = sum(tensor.nbytes for tensor in module.tensors().values())
    del output
    return state + gradients + sum(kept.values())


def _speed(run: Path) -> float:
    """Median of the logged tokens per second."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [r for r in map(json.loads, lines) if r["kind"] == "step"]
    return float(median(r["tokens_per_second"] for r in steps))
