"""A run beside packed frozen weights, from its config to what reads its checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.hf_folders import run_convert
from helpers.tiny import make_corpus, records, tiny_config

from llmtrain.checkpoint.layout import read_own_layout
from llmtrain.cli.main import main
from llmtrain.config import load_config
from llmtrain.eval.loading import load_trained
from llmtrain.linear.fp8 import Fp8Matmul
from llmtrain.model import packed_layers
from llmtrain.train.run import train

ADAPTED = ["model.adapters.rank=3", "optim.lr=0.02", "train.duration=4step"]
NF4 = [*ADAPTED, "model.adapters.base=nf4", "checkpoint.every=2step"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a run that has been made, with a packed run beside it."""
    folder = tmp_path_factory.mktemp("packed")
    shape = {"model__d_model": 64, "model__d_ff": 64}
    path = tiny_config(folder, make_corpus(folder, documents=40), train__duration="2step", **shape)
    assert main(["train", str(path)]) == 0
    assert main(["train", str(path), *NF4, f"init.path={folder}/runs/tiny", "name=nf4"]) == 0
    return path


def test_resume_is_exact_and_nothing_packed_is_stored(config: Path) -> None:
    runs = config.parent / "runs"
    words = [*NF4, f"init.path={runs}/tiny", "name=again"]
    assert main(["train", str(config), *words, "train.stop_after=2step"]) == 0
    assert main(["train", str(config), *words]) == 0
    assert [r["loss"] for r in records(runs / "nf4")] == [
        r["loss"] for r in records(runs / "again")
    ]
    layout = read_own_layout(runs / "again/checkpoints/step-00000004")
    assert layout and all(".adapter." in key for key in layout)


def test_merged_is_what_the_run_computed(config: Path, tmp_path: Path) -> None:
    import transformers as hf

    run = config.parent / "runs/nf4"
    ours = load_trained(run, torch.device("cpu"), ["precision.compute=fp32"])
    assert len(list(packed_layers(ours.model))) == 8
    assert run_convert("to-hf", run, tmp_path / "merged") == 0
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokens = torch.arange(40)[None] % ours.model_cfg.vocab_size  # type: ignore[operator]
    with torch.no_grad():
        expected = ours.model(tokens)
        torch.testing.assert_close(theirs(tokens).logits, expected, atol=1e-5, rtol=0)
        plain = load_trained(run, torch.device("cpu"), ["model.adapters.base=null"])
        assert (plain.model(tokens) - expected).abs().max() > 1e-3


def test_generate_merges_a_packed_base_where_asked(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", str(config.parent / "runs/nf4"), "--prompt", "a", "--tokens", "5"]
    words += ["--temperature", "0"]
    assert main([*words, "--merge"]) == 2
    assert "llmtrain generate: --dequantise" in " ".join(capsys.readouterr().err.split())
    assert main([*words, "--dequantise"]) == 2
    assert "give both or neither" in " ".join(capsys.readouterr().err.split())
    said = []
    for more in ([], ["--merge", "--dequantise"]):
        assert main([*words, *more]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and len(said[0]) > 1


def test_memory_is_told_before(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = config.parent / "runs"
    assert main(["train", str(config), *NF4, f"init.path={runs}/tiny", "--dry-run"]) == 0
    said = capsys.readouterr().out
    model = load_trained(runs / "nf4", torch.device("cpu")).model
    held = sum(
        p.numel() * p.element_size()
        for _, layer in packed_layers(model)
        for p in layer.packed_parts()
        if p is not None
    )
    assert held == sum(2 * n * k * 4.5 / 8 for n, k in ((128, 64), (64, 64), (128, 64), (64, 64)))
    line = next(line for line in said.splitlines() if "frozen weights (nf4)" in line)
    assert line.split()[-2:] == [f"{held / 2**10:.2f}", "KiB"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model.d_ff=72", "init=null"], "model.adapters.base: nf4 packs the weights of another"),
        (["checkpoint.save=all"], "checkpoint.save: all: nf4 weights are never saved"),
        (["quantization.format=fp8_current"], "nf4 says how frozen weights are kept, and quantiz"),
        (["average.method=ema", "average.every=1step"], "nf4 weights cannot be averaged"),
        (["parallel.engine=deepspeed"], "nf4 does not work with parallel.engine deepspeed"),
    ],
)
def test_what_does_not_go_together(
    config: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = config.parent / "runs"
    command = ["train", str(config), *NF4, f"init.path={runs}/tiny", "name=bad", *words]
    assert main(command) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not (runs / "bad").exists()


def test_columns_that_are_no_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_config(tmp_path, make_corpus(tmp_path, documents=20), train__duration="1step")
    assert main(["train", str(path)]) == 0
    words = [f"init.path={tmp_path}/runs/tiny", "name=bad", "model.adapters.base=nf4"]
    assert main(["train", str(path), *words]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "nf4 packs blocks of 64 in a row, and blocks.0.attention.qkv has 32 columns" in said


def test_frozen_weights_are_cast_to_fp8_once(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once a step: the products in FP8 of a frozen weight keep its cast."""
    casts: list[int] = []
    plain = Fp8Matmul.operand

    def counted(self: Fp8Matmul, weight: torch.Tensor, *more: object) -> object:
        casts.append(weight.numel())
        return plain(self, weight, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(Fp8Matmul, "operand", counted)
    runs = config.parent / "runs"
    words = [*ADAPTED, f"init.path={runs}/tiny", "name=fp8", "quantization.format=fp8_current"]
    assert train(load_config(config, [*words, "quantization.min_features=1"])) == 0
    assert len(casts) == 8
