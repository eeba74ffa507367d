"""Runs in FP8: the switch to the compute dtype, resuming, evaluation, what the user is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import records, tiny_config

from llmtrain.cli.main import main
from llmtrain.config import load_config
from llmtrain.config.schema import ModelConfig
from llmtrain.errors import ConfigError, EnvironmentFault
from llmtrain.eval.checkpoint import evaluate_checkpoint
from llmtrain.eval.loading import load_trained
from llmtrain.linear import FP32, Linear, Placement, fake_vectors
from llmtrain.model import Decoder, attention, complete, hidden_layers
from llmtrain.model.formats import Assignment, check_fp8_device, check_fp8_shape
from llmtrain.parallel.hardware import Precision
from llmtrain.train import dryrun

RULES = [{"layers": ["*.mlp.down"], "format": "fp8_current"}]


def _train(folder: Path, corpus: Path, *words: str, **changes: Any) -> Path:
    """The folder of a finished run of 8 steps."""
    folder.mkdir(exist_ok=True)
    short = {"train__duration": "8step", "eval__every": "4step", "checkpoint__every": "3step"}
    config = tiny_config(folder, corpus, **short, **changes)
    assert main(["train", str(config), *words]) == 0
    return folder / "runs" / "tiny"


def _losses(run: Path) -> list[float]:
    return [r["loss"] for r in records(run)]


def test_the_switch_happens_once_at_its_step_and_a_resumed_run_makes_the_same(
    tmp_path: Path, corpus: Path
) -> None:
    formats = {"quantization__format": "mus_fp8", "quantization__rules": RULES}
    until = {**formats, "quantization__until": "0.6dur"}
    whole = _losses(_train(tmp_path / "whole", corpus, **formats))
    plain = _losses(_train(tmp_path / "plain", corpus))
    run = _train(tmp_path / "switched", corpus, **until)
    switched = _losses(run)
    # 0.6 of 8 updates, rounded up: five in FP8, and the loss of the sixth is in float32.
    assert switched[:5] == whole[:5] and switched[5] != whole[5]
    assert plain[0] != whole[0] and abs(plain[7] - switched[7]) < 0.05
    told = [r for r in records(run, "event") if "compute dtype" in r["text"]]
    assert [r["step"] for r in told] == [5]
    # Stopped before the switch and right after it, then resumed.
    for stop in (3, 6):
        parts = tmp_path / f"parts{stop}"
        _train(parts, corpus, f"train.stop_after={stop}step", **until)
        assert _losses(_train(parts, corpus, **until)) == switched


@pytest.mark.parametrize("until", [None, "0.6dur"])
def test_a_checkpoint_is_evaluated_in_the_formats_of_its_step(
    tmp_path: Path, corpus: Path, until: str | None
) -> None:
    changes = {"quantization__format": "mus_fp8", "quantization__until": until}
    run = _train(tmp_path / "run", corpus, **changes)
    trained = load_trained(run, torch.device("cpu"))
    names = {layer.matmul.name for _, layer in hidden_layers(trained.model)}
    assert names == ({"mus_fp8"} if until is None else {trained.model.head.matmul.name})
    (last,) = (r for r in records(run, "eval") if r["step"] == 8)
    found = evaluate_checkpoint(run, [], "cpu").domains
    other = evaluate_checkpoint(run, ["quantization=null"], "cpu").domains
    for domain in ("letters", "digits"):
        assert found[domain]["loss"] == last["domains"][domain]["loss"]
        assert (found[domain]["loss"] == other[domain]["loss"]) is (until is not None)


def test_dry_run_says_what_every_layer_computes_in_and_why(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = [{"layers": ["blocks.0.*"], "format": "none"}, *RULES]
    config = tiny_config(
        tmp_path,
        corpus,
        quantization__rules=rules,
        quantization__min_features=48,
        quantization__until="0.85dur",
        model__n_layers=4,
        model__d_ff=96,
        model__d_model=48,
    )
    assert main(["train", str(config), "--dry-run"]) == 0
    text = capsys.readouterr().out
    for line in (
        "number formats of products, until step 17; then all in the compute dtype:",
        "  block 0 attention.qkv [96, 48]: the compute dtype (quantization.rules.0)",
        "  blocks 1-3 attention.qkv [96, 48]: mus_fp8",
        "  blocks 0-3 mlp.down [48, 96]: fp8_current (quantization.rules.1)",
        "  embedding and head: the compute dtype",
    ):
        assert line in text.splitlines()
    assert main(["train", str(config), "--dry-run", "quantization.min_features=64"]) == 0
    reason = "the compute dtype (48 is below quantization.min_features 64)"
    assert f"  blocks 1-3 attention.qkv [96, 48]: {reason}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["quantization.format=fp8"], "did you mean"),
        (["quantization.format=fake"], "fake changes nothing"),
        (["quantization.format=fake", "quantization.weights=int2"], "'int2' is no number format"),
        (["quantization.format=fake", "quantization.inputs=e8m7"], "'e8m7' is no number format"),
        (["quantization.kv=int99"], "'int99' is no number format"),
        (["quantization.weights=int8"], "is read with format: fake only"),
        (["quantization.format=none"], "changes nothing"),
        (["quantization.gradient_scale=1000"], "1000 is no power of two"),
        ([f"quantization.gradient_scale={2.0**101!r}"], "2.5353e+30 is beyond 2^-100 to 2^100"),
        ([f"quantization.gradient_scale={2.0**-996!r}"], "is beyond 2^-100 to 2^100"),
        (["quantization.until=30step"], "after the end of the run"),
        (["quantization.rules=[{layers: [head], format: none}]"], "matches no hidden linear layer"),
        (["quantization.rules=[{layers: [], format: none}]"], "is empty"),
        (["quantization.format=mus_fp8", "parallel.engine=deepspeed"], "deepspeed"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path,
    corpus: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    told: str,
) -> None:
    config = tiny_config(tmp_path, corpus)
    assert main(["train", str(config), "--dry-run", *words]) == 2
    error = capsys.readouterr().err
    assert told in error and "quantization" in error and "Traceback" not in error


def test_a_dry_run_refuses_what_the_run_would_for_its_device(
    tmp_path: Path,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny_config(tmp_path, corpus, model__d_ff=56, device="auto")
    asked = ["train", str(config), "quantization.format=te", "--dry-run"]
    if not torch.cuda.is_available():
        assert main(asked) == 2
        assert "te computes in bfloat16 on an NVIDIA GPU" in capsys.readouterr().err
    # Of a machine elsewhere this one says nothing.
    assert main([*asked, "--world", "2"]) == 0
    capsys.readouterr()
    monkeypatch.setattr(dryrun, "pick_device", lambda name, rank: torch.device("cuda", rank))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ConfigError, match=r"blocks\.0\.mlp\.down is 32 x 56"):
        formats = load_config(config, ["quantization.format=mus_fp8"])
        model = complete(formats.model, 257, 48)
        dryrun._model_lines(formats, model, Precision(torch.bfloat16, torch.float32), False)


def test_an_old_gpu_and_odd_widths_are_refused_by_name() -> None:
    for capability in ((8, 9), (9, 0), (10, 0)):
        check_fp8_device("mus_fp8", capability)
    with pytest.raises(EnvironmentFault, match=r"mus_fp8 needs .* 8\.9 .* this one has 8\.0"):
        check_fp8_device("mus_fp8", (8, 0))
    layer = Linear(64, 72, matmul=FP32, placement=Placement.COLUMN)
    found = Assignment("blocks.3.mlp.up", (72, 64), "mus_fp8")
    with pytest.raises(ConfigError, match=r"blocks\.3\.mlp\.up is 72 x 64 .* multiples of 16"):
        check_fp8_shape(found, layer)
    check_fp8_shape(Assignment("blocks.3.mlp.up", (80, 64), "mus_fp8"), layer)


def test_keys_and_values_are_rounded_until_the_switch(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside any format of the products, and only what attention reads."""
    run = _train(tmp_path / "run", corpus, quantization__format="none", quantization__kv="int4")
    seen: list[torch.Tensor] = []
    real = attention.attend

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **more: Any) -> Any:
        seen.extend((k, v))
        return real(q, k, v, *rest, **more)

    monkeypatch.setattr(attention, "attend", spy)
    tokens = torch.arange(40).view(2, 20)
    for changes in ([], ["quantization=null"]):
        model = load_trained(run, torch.device("cpu"), changes).model
        with torch.no_grad():
            model(tokens)
    for rounded, plain in zip(seen[:2], seen[4:6], strict=True):  # block 0: k, v
        assert torch.equal(rounded, fake_vectors(plain, "int4"))
        assert not torch.equal(rounded, plain)
    assert main(["train", str(tmp_path / "run" / "tiny.yaml"), "--dry-run"]) == 0
    model = load_trained(run, torch.device("cpu"), ["quantization.until=8step"]).model
    assert {block.attention.kv_format for block in model.blocks} == {"none"}


def test_hidden_layers_are_those_of_the_blocks() -> None:
    cfg = complete(ModelConfig(vocab_size=101, n_layers=2, d_model=32), 101, 16)
    with torch.device("meta"):
        names = [name for name, _ in hidden_layers(Decoder(cfg))]
    kinds = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    assert names == [f"blocks.{i}.{kind}" for i in range(2) for kind in kinds]
