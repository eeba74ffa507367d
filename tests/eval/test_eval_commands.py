"""``llmtrain eval`` and ``llmtrain generate`` on a run that was really trained."""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers.tiny import make_corpus, records, tiny_config

from llmtrain.cli.main import main
from llmtrain.eval.generation import generate


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    corpus = make_corpus(folder, documents=40)
    config = tiny_config(folder, corpus, train__duration="6step", checkpoint__every="3step")
    assert main(["train", str(config)]) == 0
    return folder / "runs" / "tiny"


def test_eval_repeats_the_losses_of_training(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run), "--json"]) == 0
    domains = json.loads(capsys.readouterr().out)["domains"]
    trained = records(run, "eval")[-1]["domains"]
    assert domains.keys() == trained.keys()
    for name, metrics in domains.items():
        assert metrics["loss"] == pytest.approx(trained[name]["loss"], abs=0.02)
        assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
        assert metrics["bits_per_byte"] > 0


def test_eval_takes_overrides_and_prints_a_table(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(run / "checkpoints" / "step-00000003"), "eval.samples=2"]) == 0
    out = capsys.readouterr().out
    assert "step 3" in out
    assert "bits/byte" in out
    assert "digits" in out


def test_generate_continues_and_is_reproducible(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outs = []
    for seed in ("1", "1", "2"):
        assert main(["generate", str(run), "--prompt", "alpha ", "--seed", seed]) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0].startswith("alpha ")
    assert outs[0] == outs[1]
    assert outs[0] != outs[2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["eval", "{run}/nowhere"], "nowhere"),
        (["generate", "{run}", "--prompt", ""], "--prompt is empty"),
        (["generate", "{run}", "--prompt", "a", "--tokens", "0"], "--tokens"),
        (["eval", "{run}", "eval.sampels=2"], "samples"),
    ],
)
def test_bad_input_is_one_sentence(
    run: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([a.format(run=run) for a in arguments]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err


class Fixed(torch.nn.Module):
    """Logits that prefer (last token + 1) mod 7, and record what they were shown."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.longest = 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.longest = max(self.longest, tokens.shape[1])
        return torch.nn.functional.one_hot((tokens + 1) % 7, 7).float() * 50


def test_sampling_rules() -> None:
    model = Fixed()
    assert generate(model, [0], 5, 4, temperature=0) == [1, 2, 3, 4, 5]
    assert generate(model, [0], 9, 4, temperature=0.5, eos_id=3) == [1, 2]
    assert model.longest == 4
