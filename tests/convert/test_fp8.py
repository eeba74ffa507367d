"""FP8 weights for inference: transformers' own model with these weights, and inputs cast as the
folder's config says, computes what our FP8 model computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import make_corpus, tiny_config
from safetensors.torch import load_file
from torch import Tensor, nn

from llmtrain.cli.main import main
from llmtrain.eval.loading import load_trained

MUS = "model.scaling={parametrization: mus, residual: sum}"
RULES = "quantization.rules=[{layers: ['blocks.1.mlp.*'], format: none}]"
HIDDEN = 2 * 7


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8")
    return tiny_config(folder, make_corpus(folder, documents=40), train__duration="2step")


def _train(config: Path, folder: Path, *changes: str) -> Path:
    assert main(["train", str(config), f"out={folder}", "name=run", *changes]) == 0
    return folder / "run"


def _cast_inputs(model: nn.Module, scales: dict[str, Tensor], dynamic: bool) -> None:
    """Clip and cast what every quantised layer reads, as a runtime of the style does."""
    for name, module in model.named_modules():
        if f"{name}.weight_scale" not in scales:
            continue
        fixed = scales.get(f"{name}.input_scale")
        assert (fixed is None) is dynamic

        def hook(module: nn.Module, args: tuple[Tensor], fixed: Tensor | None = fixed) -> Any:
            scale = args[0].abs().max() / 448 if fixed is None else fixed
            return ((args[0] / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale,)

        module.register_forward_pre_hook(hook)


@pytest.mark.parametrize(
    ("format", "changes"), [("mus_fp8", [MUS, RULES]), ("fp8_current", [])], ids=str
)
def test_their_model_computes_with_trainings_numbers(
    config: Path, tmp_path: Path, format: str, changes: list[str]
) -> None:
    import transformers as hf

    run = _train(config, tmp_path, f"quantization.format={format}", *changes)
    out = tmp_path / "hf"
    assert main(["convert", "to-hf", str(run), str(out), "--fp8"]) == 0
    stored = load_file(out / "model.safetensors")
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    group = section["config_groups"]["group_0"]
    dynamic = group["input_activations"]["dynamic"]
    assert dynamic is (format == "fp8_current") and section["format"] == "float-quantized"
    bytewise = [n for n, x in stored.items() if x.dtype == torch.float8_e4m3fn]
    skipped = [f"model.layers.1.mlp.{x}_proj" for x in ("gate", "up", "down")]
    skipped = skipped if changes else []
    assert section["ignore"] == ["lm_head", *skipped]
    assert len(bytewise) == HIDDEN - len(skipped)

    plain = {n: x.float() for n, x in stored.items() if not n.endswith("_scale")}
    for name in bytewise:
        plain[name] *= stored[name + "_scale"]
    theirs = hf.AutoConfig.from_pretrained(out)
    del theirs.quantization_config
    model = hf.AutoModelForCausalLM.from_config(theirs)
    model.load_state_dict(plain, strict=True)
    _cast_inputs(model, stored, dynamic)
    tokens = torch.arange(60).view(2, 30)
    ours = load_trained(run, torch.device("cpu")).model
    other = load_trained(run, torch.device("cpu"), ["quantization=null"]).model
    with torch.no_grad():
        expected, unquantised = ours(tokens), other(tokens)
        found = model.eval()(tokens).logits
    # A sum in another order may take an input across a border between two FP8 numbers.
    far = (unquantised - expected).norm()
    assert (found - expected).norm() < 0.02 * far and far > 1e-3 * expected.norm()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ([], "no layer computes in FP8 here (the run has no quantization section)"),
        (["quantization.format=mus_fp8", "quantization.until=1step"], "of quantization.until"),
        (["quantization.format=mus_fp8", "model.d_ff=39"], "multiples of 16"),
        (
            ["quantization.rules=[{layers: [blocks.0.*], format: fp8_current}]"],
            "layers compute in fp8_current, mus_fp8",
        ),
    ],
)
def test_what_cannot_be_written_is_refused(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: list[str],
    says: str,
) -> None:
    run = _train(config, tmp_path, *changes)
    capsys.readouterr()
    assert main(["convert", "to-hf", str(run), str(tmp_path / "hf"), "--fp8"]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "hf").exists()
