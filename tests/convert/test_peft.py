"""Adapters against ``peft`` on the same weights and data, and in its format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.hf_folders import run_convert, their_model
from helpers.tiny import make_corpus, records, tiny_config

from llmtrain.cli.main import main
from llmtrain.convert.outgoing import open_checkpoint
from llmtrain.convert.peft import adaptable_layers
from llmtrain.eval.loading import load_trained

VOCAB, STEPS = 83, 10


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCAB, (2, 24), generator=generator) for _ in range(STEPS)]


def loss_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


NAMES = {"attention": ["q_proj", "k_proj", "v_proj", "o_proj"]}
NAMES |= {"mlp": ["gate_proj", "up_proj", "down_proj"], "q": ["q_proj"], "v": ["v_proj"]}
OWN = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"up_proj": 9, r"layers\.1\..*q_proj": 3}}


def theirs_adapted(settings: dict[str, Any], folder: Path) -> Any:
    """A tiny model with adapters of PEFT that change it, saved."""
    import peft

    base = their_model("llama")
    base.save_pretrained(folder / "hf")
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, **settings))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.copy_(0.02 * torch.randn(param.shape, generator=generator))
            if "magnitude" in name:
                param.mul_(1 + 0.05 * torch.randn(param.shape, generator=generator))
    model.save_pretrained(folder / "adapter")
    assert run_convert("from-hf", folder / "hf", folder / "base") == 0
    words = ("from-peft", folder / "adapter", folder / "ours", "--base", folder / "base")
    assert run_convert(*words) == 0
    return model


SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": NAMES["attention"] + NAMES["mlp"]},
    "rslora, a regular expression": {
        "use_rslora": True,
        "target_modules": r".*\.(q_proj|v_proj)|.*\.1\..*up_proj",
    },
    "dora": {"use_dora": True, "target_modules": NAMES["attention"] + NAMES["mlp"]},
    "dora, ranks of their own": {
        "use_dora": True, "target_modules": ["q_proj", "v_proj", "up_proj", "o_proj"], **OWN
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", SETTINGS)
def test_ten_steps_are_those_of_peft(kind: str, tmp_path: Path) -> None:
    """Losses and gradients of what PEFT saved, here and there; then back again, to the byte."""
    import peft

    theirs = theirs_adapted(SETTINGS[kind], tmp_path)
    ours = load_trained(tmp_path / "ours", torch.device("cpu"), ["precision.compute=fp32"])
    cfg, opened = ours.model_cfg, open_checkpoint(tmp_path / "ours")
    modules = {n: m for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    pairs = []
    for layer in adaptable_layers(opened, cfg):
        side = ours.model.get_submodule(layer.name).adapter
        at = 0
        for i, name in enumerate(layer.modules):
            if name in modules:
                pairs.append((modules.pop(name), side, (layer.rule, i, at)))
                at += side.rank
    assert pairs and not modules
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, eps=1e-6)
        for model in (ours.model, theirs)
    ]
    for tokens in batches():
        losses = [loss_of(ours.model(tokens), tokens), loss_of(theirs(tokens).logits, tokens)]
        torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=0)
        for loss in losses:
            loss.backward()
        for module, side, (rule, i, at) in pairs:
            a, b = (getattr(module, f"lora_{x}")["default"].weight.grad for x in "AB")
            rows = rule.split(side.b.weight.grad, cfg)[i]
            found = [(side.a.weight.grad[at : at + len(a)], a), (rows[:, : b.shape[1]], b)]
            if side.magnitude is not None:
                length = module.lora_magnitude_vector["default"].weight.grad
                found.append((rule.split(side.magnitude.weight.grad, cfg)[i], length))
            for one, other in found:
                torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert run_convert("to-peft", tmp_path / "ours", tmp_path / "there") == 0
    base = ("--base", tmp_path / "base")
    assert run_convert("from-peft", tmp_path / "there", tmp_path / "back", *base) == 0
    assert run_convert("to-peft", tmp_path / "back", tmp_path / "again") == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    ours = load_trained(tmp_path / "back", torch.device("cpu"), ["precision.compute=fp32"])
    again = peft.PeftModel.from_pretrained(their_model("llama"), tmp_path / "there")
    with torch.no_grad():
        expected = again(batches()[0]).logits
        torch.testing.assert_close(ours.model(batches()[0]), expected, atol=1e-5, rtol=0)


def damaged(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("shape", "changes", "says"),
    [
        ({"hidden_size": 32}, {}, ["lora_A.weight is [2, 48]", "takes [2, 32]"]),
        ({"num_hidden_layers": 1}, {}, ["adapts model.layers.1.", "a llama of 1 layers"]),
        ({}, {"r": 3}, ["lora_A.weight is [2, 48]", "with rank 3 takes [3, 48]"]),
        ({}, {"target_modules": ["q_proj"]}, ["holds model.layers.0.mlp.down_proj"]),
        ({}, {"target_modules": ["q_proj", "down_proj", "o_proj"]}, ["lacks", "o_proj.lora_A"]),
        ({}, {"peft_type": "IA3"}, ["peft_type IA3 is none of LORA"]),
        ({}, {"init_lora_weights": "pissa"}, ["init_lora_weights 'pissa' trains or changes"]),
        ({}, {"r": None}, ["r None is not what peft writes there"]),
        ({}, {"lora_alpha": -3}, ["lora_alpha -3 is not what peft writes there"]),
        ({}, {"target_modules": "(("}, ["target_modules '((' is not what peft writes there"]),
        ({}, {"rank_pattern": {"((": 5}}, ["rank_pattern {'((': 5} is not what peft"]),
    ],
)
def test_adapters_for_another_model(
    shape: dict[str, Any],
    changes: dict[str, Any],
    says: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import peft
    import transformers as hf

    model = their_model("llama")
    adapters = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"])
    peft.get_peft_model(model, adapters).save_pretrained(tmp_path / "adapter")
    damaged(tmp_path / "adapter", **changes)
    config = hf.LlamaConfig(**{**their_model("llama").config.to_dict(), **shape})
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "hf")
    assert run_convert("from-hf", tmp_path / "hf", tmp_path / "base") == 0
    capsys.readouterr()
    words = ("from-peft", tmp_path / "adapter", tmp_path / "ours", "--base", tmp_path / "base")
    assert run_convert(*words) == 2
    said = capsys.readouterr().err
    assert all(text in said for text in [*says, str(tmp_path / "adapter")]), said
    assert not (tmp_path / "ours").exists()


def test_architectures_with_fused_matrices(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPT-NeoX: what is one matrix on both sides goes both ways, q k v does not."""
    import peft

    base = their_model("pythia")
    base.save_pretrained(tmp_path / "hf")
    assert run_convert("from-hf", tmp_path / "hf", tmp_path / "base") == 0
    for name, targets in (("fits", ["dense", "dense_4h_to_h"]), ("fused", ["query_key_value"])):
        settings = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        theirs = peft.get_peft_model(their_model("pythia"), settings)
        theirs.save_pretrained(tmp_path / name)
        words = (
            "from-peft",
            tmp_path / name,
            tmp_path / f"our {name}",
            "--base",
            tmp_path / "base",
        )
        assert run_convert(*words) == (0 if name == "fits" else 2)
        if name == "fused":
            assert "query_key_value, which gpt_neox keeps in one matrix" in capsys.readouterr().err
            continue
        ours = load_trained(tmp_path / "our fits", torch.device("cpu"), ["precision.compute=fp32"])
        with torch.no_grad():
            expected = theirs(batches()[0]).logits
            torch.testing.assert_close(ours.model(batches()[0]), expected, atol=1e-5, rtol=0)
        assert run_convert("to-peft", tmp_path / "our fits", tmp_path / "back") == 0
        again = peft.PeftModel.from_pretrained(their_model("pythia"), tmp_path / "back")
        with torch.no_grad():
            torch.testing.assert_close(again(batches()[0]).logits, expected, atol=1e-5, rtol=0)


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
        words = ("from-peft", tmp_path / "adapter", tmp_path / "back", "--base", run / "tiny")
        assert run_convert(*words) == 0
        back = load_trained(tmp_path / "back", torch.device("cpu"), ["precision.compute=fp32"])
        assert torch.equal(back.model(tokens), expected)
        merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(tokens).logits, expected, atol=1e-5, rtol=0)


def test_a_run_goes_on_with_what_came_from_peft(run: Path, tmp_path: Path) -> None:
    assert run_convert("to-peft", run / "adapted", tmp_path / "adapter") == 0
    words = ("from-peft", tmp_path / "adapter", tmp_path / "back", "--base", run / "tiny")
    assert run_convert(*words) == 0
    config = next(run.parent.glob("*.yaml"))
    same = ["model.adapters.rank=3", "train.duration=1step"]
    for name, path in (("one", run / "adapted"), ("two", tmp_path / "back")):
        assert main(["train", str(config), *same, f"name={name}", f"init.path={path}"]) == 0
    one, two = (records(run / name)[0]["loss"] for name in ("one", "two"))
    assert one == two


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
