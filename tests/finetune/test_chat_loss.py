"""The loss over answers is that of transformers with labels of -100, however it is packed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.hf_models import renamed
from helpers.layout_runs import add_whole
from helpers.ranks import run_ranks
from torch import Tensor

from llmtrain.config import RunConfig, from_dict
from llmtrain.config.chat import ChatConfig
from llmtrain.config.schema import ModelConfig, PrepareConfig, TextSourceConfig, TokenizerConfig
from llmtrain.data.formats.marks import MarkedSource
from llmtrain.data.loader import Loader, heldout_sets
from llmtrain.data.plan import build_plan
from llmtrain.data.prepare import prepare
from llmtrain.errors import DataError
from llmtrain.eval.heldout import evaluate_domains
from llmtrain.model import complete
from llmtrain.parallel import World, build_layout, local_boxes
from llmtrain.parallel.hardware import Precision
from llmtrain.train.engine import build_module
from llmtrain.train.module import TrainModule

WINDOW, WEIGHTS = 96, {"assistant": 1.0, "user": 0.25}
Talk = list[tuple[str, str]]


def talks(count: int) -> list[Talk]:
    draw = random.Random(1)
    words = ["red", "blue", "4", "é", "x+y"]

    def text() -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, 4)))

    return [
        [(role, text()) for _ in range(draw.randint(1, 2)) for role in ("user", "assistant")]
        for _ in range(count)
    ]


def by_hand(talk: Talk, weights: dict[str, float]) -> tuple[list[int], list[float]]:
    """Bytes of the plain template and the weight of each, with 256 after an answer."""
    tokens: list[int] = []
    out: list[float] = []
    for i, (role, text) in enumerate(talk):
        answer = role == "assistant"
        head = (("\n\n" if i else "") + f"### {role.capitalize()}\n").encode()
        body = [*text.encode(), *[256] * answer]
        tokens += [*head, *body]
        out += [0.0 if answer else weights.get(role, 0.0)] * len(head)
        out += [weights.get(role, 0.0)] * len(body)
    return tokens, [0.0, *out[1:]]


def make_corpus(folder: Path, window: int | None, pack: bool, weighted: bool) -> list[Talk]:
    """A corpus ``folder/corpus``; the conversations that are in it."""
    made = talks(16)
    rows = [{"m": [{"role": r, "content": t} for r, t in talk]} for talk in made]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    roles: dict[str, Any] = {"train_on": "roles", "role_weights": WEIGHTS} if weighted else {}
    chat = ChatConfig(messages="m", window=window, pack=pack, **roles)
    source = TextSourceConfig(kind="jsonl", paths=[str(folder / "rows.jsonl")], chat=chat)
    cfg = PrepareConfig(
        out=str(folder / "corpus"),
        sources={"talks": source},
        tokenizer=TokenizerConfig(kind="byte"),
        heldout_fraction=0.0,
        workers=1,
    )
    prepare(cfg, say=lambda _: None)
    return [t for t in made if window is None or len(by_hand(t, {})[0]) <= window]


def run_config(folder: Path, seq_len: int, samples: int, **parallel: Any) -> RunConfig:
    return from_dict(
        {
            "device": "cpu",
            "model": {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48}
            | {"vocab_multiple": 1, "norm_eps": 1e-6},
            "data": {"corpus": str(folder / "corpus"), "seq_len": seq_len, "weights": {"talks": 1}}
            | {"document_mask": True, "reset_positions": True}
            | {"heldout": {"talks": {"path": str(folder / "corpus/talks/train")}}},
            "precision": {"compute": "fp32"},
            "parallel": parallel,
            "train": {"duration": "1step", "global_batch_size": samples, "micro_batch_size": 2},
        }
    )


def their_model() -> Any:
    import transformers as hf

    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    cfg = hf.LlamaConfig(
        vocab_size=257, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6,
        attn_implementation="eager", max_position_embeddings=512, **sizes,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(cfg)
    for param in model.parameters():
        if param.dim() > 1:
            param.data.normal_(0.0, 0.15)
    return model


def their_loss(model: Any, made: list[Talk], weights: dict[str, float]) -> tuple[float, float]:
    """Loss and gradient norm, each conversation alone; with -100 where all weights are 0 or 1."""
    total: Tensor | float = 0.0
    weight = 0.0
    for talk in made:
        ids, each = by_hand(talk, weights)
        tokens, w = torch.tensor([ids]), torch.tensor([each])
        if set(each) <= {0.0, 1.0}:
            labels = torch.where(w > 0, tokens, -100)
            total = total + model(input_ids=tokens, labels=labels).loss * w.sum()
        else:
            logits = model(input_ids=tokens).logits[0, :-1]
            total = total + F.cross_entropy(logits, tokens[0, 1:], reduction="none") @ w[0, 1:]
        weight += float(w.sum())
    loss = total / weight
    assert isinstance(loss, Tensor)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    return loss.item(), norm.item()


def build(cfg: RunConfig, rank: int, world: int, theirs: Any) -> TrainModule:
    group = dist.group.WORLD if world > 1 else None
    place = World(rank, world, rank, torch.device("cpu"), group)
    model: ModelConfig = complete(cfg.model, 257, cfg.data.seq_len)
    assert model.n_kv_heads is not None
    layout = build_layout(cfg.parallel, place, model.n_kv_heads)
    module = build_module(cfg, model, Precision(torch.float32, torch.float32), layout)
    weights = renamed(dict(theirs.named_parameters()), model)

    @torch.no_grad()
    def fill(tensors: dict[str, Tensor]) -> None:
        for name, value in weights.items():
            for values, _ in local_boxes(tensors[f"model.{name}"]):
                values.zero_()
            add_whole(tensors[f"model.{name}"], value)

    module.restore(fill)
    return module


def our_loss(rank: int, world: int, cfg: RunConfig, theirs: Any) -> tuple[float, float, float]:
    """Loss and gradient norm of the first global batch; the loss over the same text held out."""
    module = build(cfg, rank, world, theirs)
    plan = build_plan(cfg, cfg.train.global_batch_size)
    batch = module.receive(Loader.from_config(plan, cfg, rank, world).batch(0))
    (weight,) = module.layout.world.sum([module.token_weight(batch)])
    sums = module.forward_backward(batch, weight, 1)
    norm = float(module.gradient_norm())
    (loss,) = module.layout.world.sum([float(sums.loss)])
    held = evaluate_domains(module, heldout_sets(cfg), 4, module.layout)
    assert "bits_per_byte" not in held["talks"]
    return loss, norm, held["talks"]["loss"]


def samples_of(cfg: RunConfig) -> int:
    return build_plan(cfg, 8).sizes[0]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pack", [True, False])
def test_loss_is_that_of_transformers(tmp_path: Path, pack: bool, weighted: bool) -> None:
    made = make_corpus(tmp_path, WINDOW, pack, weighted)
    assert len(made) > 10
    number = samples_of(run_config(tmp_path, WINDOW, 8))
    assert number < len(made) if pack else number == len(made)
    theirs = their_model()
    loss, norm = their_loss(theirs, made, WEIGHTS if weighted else {"assistant": 1.0})
    for world, parallel in ((1, {}), (2, {"shard": 2}), (2, {"replicate": 2})):
        cfg = run_config(tmp_path, WINDOW, 4 * number, **parallel)  # four epochs
        for found in run_ranks(world, our_loss, world, cfg, theirs, init=world > 1):
            assert found == pytest.approx((loss, norm, loss), rel=3e-6)


@pytest.mark.parametrize("shift", [-1, 1])
def test_weights_that_are_one_token_off_are_seen(
    tmp_path: Path, shift: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above would fail: this fault changes the loss a thousand times as much."""
    made = make_corpus(tmp_path, WINDOW, True, False)
    theirs = their_model()
    loss, _ = their_loss(theirs, made, {"assistant": 1.0})
    right = MarkedSource.loss_weights

    def wrong(self: MarkedSource, start: int, stop: int) -> Any:
        whole = right(self, 0, self.num_tokens)
        return np.roll(whole, shift)[start:stop]

    monkeypatch.setattr(MarkedSource, "loss_weights", wrong)
    cfg = run_config(tmp_path, WINDOW, 4 * samples_of(run_config(tmp_path, WINDOW, 8)))
    assert abs(our_loss(0, 1, cfg, theirs)[0] - loss) > 3e-3 * loss


def test_without_windows_no_answer_is_lost(tmp_path: Path) -> None:
    """Conversations are cut where a sample ends; the weights of an epoch are all there."""
    made = make_corpus(tmp_path, None, True, True)
    cfg = run_config(tmp_path, 31, 8)
    number = samples_of(cfg)
    plan = build_plan(cfg, number)
    loader = Loader(plan, number, 0, 1)
    found = float(loader.batch_at(0).weights.sum())
    assert found == pytest.approx(sum(sum(by_hand(talk, WEIGHTS)[1]) for talk in made))


def test_samples_that_would_cut_windows_are_refused(tmp_path: Path) -> None:
    make_corpus(tmp_path, WINDOW, True, False)
    assert samples_of(run_config(tmp_path, 2 * WINDOW, 8))
    with pytest.raises(DataError, match="windows of 96 tokens, which samples of 64 would cut"):
        build_plan(run_config(tmp_path, 64, 8), 8)
