"""Adapters against ``peft`` on the same weights and data, and in its format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.hf_folders import run_convert, their_model
from helpers.tiny import make_corpus, tiny_config

from llmtrain.cli.main import main
from llmtrain.config.adapters import AdapterConfig
from llmtrain.convert.names import rules_for
from llmtrain.eval.loading import load_trained
from llmtrain.model import Decoder, init_weights

VOCAB, STEPS = 83, 10


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCAB, (2, 24), generator=generator) for _ in range(STEPS)]


def loss_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def copy_in(side: Any, theirs: list[Any]) -> None:
    """PEFT's random A into ours; its B is zero, as ours."""
    a = torch.cat([layer.lora_A["default"].weight for layer in theirs])
    side.a.weight.data.copy_(a)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", [["attention", "mlp"], ["q", "v"]])
def test_ten_steps_are_those_of_peft(rslora: bool, targets: list[str], tmp_path: Path) -> None:
    import peft

    base = their_model("llama")
    base.save_pretrained(tmp_path / "hf")
    assert run_convert("from-hf", tmp_path / "hf", tmp_path / "ours") == 0
    plain = load_trained(tmp_path / "ours", torch.device("cpu"), ["precision.compute=fp32"])
    import dataclasses

    section = AdapterConfig("rslora" if rslora else "lora", 4, 6.0, targets)
    cfg = dataclasses.replace(plain.model_cfg, adapters=section)
    ours = Decoder(cfg)
    init_weights(ours, 0)
    ours.load_state_dict(plain.model.state_dict(), strict=False)
    names = ["q_proj", "v_proj"]
    if targets != ["q", "v"]:
        names += ["k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, target_modules=names)
    theirs = peft.get_peft_model(base, settings)
    layers = dict(base.named_modules())
    sides = {}
    for rule in rules_for("llama", cfg):
        layer, _, leaf = rule.ours.rpartition(".")
        module = dict(ours.named_modules()).get(layer)
        side = getattr(module, "adapter", None)
        if leaf == "weight" and side is not None:
            members = [layers[name.removesuffix(".weight")] for name in rule.theirs]
            adapted = [member for member in members if hasattr(member, "lora_A")]
            copy_in(side, adapted)
            sides[layer] = (side, adapted)
    assert len(sides) == (2 if targets == ["q", "v"] else 8)
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, eps=1e-6)
        for model in (ours, theirs)
    ]
    for tokens in batches():
        losses = [loss_of(ours(tokens), tokens), loss_of(theirs(tokens).logits, tokens)]
        torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=0)
        for loss in losses:
            loss.backward()
        for side, adapted in sides.values():
            grad = torch.cat([layer.lora_A["default"].weight.grad for layer in adapted])
            torch.testing.assert_close(side.a.weight.grad, grad, atol=1e-5, rtol=0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and one that adapts its weights."""
    folder = tmp_path_factory.mktemp("adapters")
    corpus = make_corpus(folder, documents=40)
    config = tiny_config(folder, corpus, train__duration="2step")
    assert main(["train", str(config)]) == 0
    words = [f"init.path={folder}/runs/tiny", "model.adapters.rank=3", "name=adapted"]
    words += ["optim.lr=0.02", "train.duration=4step"]
    assert main(["train", str(config), *words]) == 0
    return folder / "runs"


def test_a_run_of_adapters_keeps_its_base(run: Path) -> None:
    before, after = (load_trained(run / n, torch.device("cpu")) for n in ("tiny", "adapted"))
    new = dict(after.model.named_parameters())
    for name, value in before.model.named_parameters():
        assert torch.equal(value, new[name]), name
    assert all(new[n].abs().max() > 0 for n in new if n.endswith("adapter.b.weight"))


def test_merged_and_apart_in_their_formats(run: Path, tmp_path: Path) -> None:
    import peft
    import transformers as hf

    assert run_convert("to-hf", run / "tiny", tmp_path / "base") == 0
    assert run_convert("to-hf", run / "adapted", tmp_path / "merged") == 0
    assert run_convert("to-peft", run / "adapted", tmp_path / "adapter") == 0
    ours = load_trained(run / "adapted", torch.device("cpu"), ["precision.compute=fp32"])
    tokens = torch.arange(40)[None] % ours.model_cfg.vocab_size  # type: ignore[operator]
    with torch.no_grad():
        expected = ours.model(tokens)
        base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        assert (base(tokens).logits - expected).abs().max() > 1e-3
        apart = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        torch.testing.assert_close(apart(tokens).logits, expected, atol=1e-5, rtol=0)
        merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(tokens).logits, expected, atol=1e-5, rtol=0)


def test_what_has_no_adapters(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_convert("to-peft", run / "tiny", tmp_path / "adapter") == 2
    assert "has no adapters (model.adapters); use convert to-hf" in capsys.readouterr().err
    words = [f"init.path={run}/tiny", "model.adapters.targets=[wq]", "name=bad"]
    config = next(run.parent.glob("*.yaml"))
    assert main(["train", str(config), *words]) == 2
    assert "model.adapters.targets: 'wq' is no matrix" in capsys.readouterr().err
    assert not (run / "bad").exists() and not (tmp_path / "adapter").exists()
